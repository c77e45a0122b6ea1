"""Features of a frozen encoder: computed once per slide, kept on disk, and read as if they were tiles.

A slide's file is a safetensors file with `features` fp32 `[N, D]` of all its tissue tiles, and their `coords` int64
`[N, 2]` in the tiling's order.
"""

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slidescale.engine.data.prefetch import TileReader, TileRequest
from slidescale.engine.data.retry import reading
from slidescale.engine.data.tiling import TileSpec, Tiling, cache_key
from slidescale.engine.errors import SlideError
from slidescale.engine.files import NAME_BYTES, replacing

# Part of a folder's name, to be raised when what is in a file changes.
FORMAT = 1


class FeatureStore:
    """The files of one encoder's features, one per slide.

    Names change with everything that features follow from, so that stale ones are never found: the folder's name with
    the encoder, its weights, the tiles and the precision, a file's name with the slide's file.

    Args:
        root: folder with the features of all encoders.
        encoder: the encoder's name.
        fingerprint: digest of its weights and constants (see `frozen.fingerprint`).
        precision: how its matrix products are computed, "bf16" or "fp32".
        dim: D, the features' number of components.
    """

    def __init__(self, root: Path, spec: TileSpec, *, encoder: str, fingerprint: str, precision: str, dim: int) -> None:
        key = json.dumps([FORMAT, encoder, fingerprint, precision, asdict(spec)])
        digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        self.folder = root / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', encoder)[:NAME_BYTES]}-{digest}"
        self.spec = spec
        self.dim = dim

    def file(self, slide: Path, mpp_um: float | None = None) -> Path:
        """Path where the features of a slide's file are, or would be.

        Args:
            mpp_um: level-0 resolution of the slide in place of what its file states, here and below.

        Raises:
            SlideError: there is no such slide.
        """
        return self.folder / f"{cache_key(slide, self.spec, mpp_um)}.safetensors"

    def has(self, slide: Path, tiling: Tiling, mpp_um: float | None = None) -> bool:
        """Whether the features of a slide's tiles are there; what is damaged is deleted.

        Raises:
            SlideError: there is no such slide.
            OSError: a damaged file cannot be deleted.
        """
        file = self.file(slide, mpp_um)
        if not file.exists():
            return False
        try:
            with safe_open(file, framework="numpy") as kept:
                shape = kept.get_slice("features").get_shape()
                if shape == [len(tiling.coords), self.dim] and np.array_equal(kept.get_tensor("coords"), tiling.coords):
                    return True
        except (SafetensorError, OSError):
            pass
        file.unlink()
        return False

    def save(self, slide: Path, tiling: Tiling, features: Tensor, mpp_um: float | None = None) -> None:
        """Write the features of a slide's tiles, fp32 `[N, D]`, whole or not at all.

        Raises:
            SlideError: there is no such slide.
            OSError: they cannot be written.
        """
        with replacing(self.file(slide, mpp_um)) as unfinished:
            try:
                save_file({"features": features.contiguous(), "coords": torch.from_numpy(tiling.coords)}, unfinished)
            except SafetensorError as error:  # also for a full disk
                raise OSError(str(error)) from None


class FeatureReader(TileReader):
    """A reader of features in place of tiles: a `Reading` holds fp32 `[n, D]` of the n tiles that were asked for."""

    def __init__(self, store: FeatureStore, *, threads: int, pin: bool) -> None:
        super().__init__(store.spec, threads=threads, pin=pin)
        self._store = store

    def _empty(self, n: int) -> Tensor:
        return torch.empty((n, self._store.dim), dtype=torch.float32, pin_memory=self._pin)

    def _read(self, request: TileRequest, out: np.ndarray) -> None:
        path = request.path
        file = self._store.file(path, request.mpp_um)

        def attempt() -> None:
            with safe_open(file, framework="pt") as kept:  # maps the file, and reads what is looked at
                places, features = kept.get_tensor("coords").numpy(), kept.get_tensor("features").numpy()
            out[:] = features[_rows(places, request.coords, path)]

        reading(file, f"{path}: cannot read its features in {file}", attempt, (SafetensorError, OSError))


def _rows(places: np.ndarray, coords: np.ndarray, slide: Path) -> np.ndarray:
    """Indices of tiles `coords` `[n, 2]` among `places` `[N, 2]`, which are in reading order.

    Raises:
        SlideError: a tile is not among them.
    """
    known, wanted = _order(places), _order(coords)
    rows = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    if not np.array_equal(known[rows], wanted):
        raise SlideError(f"{slide}: its features are of other tiles")
    return rows


def _order(coords: np.ndarray) -> np.ndarray:
    """A number for each (x, y), ascending in reading order; sides of slides are below 2³¹ pixels."""
    return (coords[:, 1].astype(np.int64) << 31) + coords[:, 0]
