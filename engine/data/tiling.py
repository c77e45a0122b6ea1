"""Tilings: where the tissue of a slide is, as a grid of tiles; computed once a slide and kept."""

import hashlib
import json
import zipfile
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from einops import reduce
from skimage.color import rgb2hsv
from skimage.filters import threshold_otsu

from slidescale.engine.data.retry import fault
from slidescale.engine.data.slide import Slide
from slidescale.engine.errors import SlideError
from slidescale.engine.files import file_name, replacing

# Tissue is judged on an image with this many pixels along a tile's side: enough to measure a share of its area.
MASK_PX_A_TILE = 8
# Saturation that separates tissue from glass. Otsu's threshold adapts it to the stain, within bounds that keep an
# empty slide from turning its noise into tissue, and a slide full of tissue from losing its paler half.
LOWEST_THRESHOLD, HIGHEST_THRESHOLD = 0.05, 0.12

# What NumPy and the ZIP format have for a file that cannot be read or was changed.
DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, kw_only=True)
class TileSpec:
    """What a tile is: `tile_px` pixels square at `mpp_um`, of which a share of `min_tissue` is tissue."""

    tile_px: int
    mpp_um: float
    min_tissue: float
    default_mpp_um: float | None


@dataclass(frozen=True, eq=False)
class Tiling:
    """The tissue tiles of one slide, on a grid without overlap, in reading order.

    Attributes:
        coords: int64 `[N, 2]`, (x, y) of each tile's top left corner in level-0 pixels.
        side_px: a tile's side in level-0 pixels (not an integer in general).
    """

    coords: np.ndarray
    side_px: float

    @property
    def cells(self) -> np.ndarray:
        """int64 `[N, 2]`, (column, row) of each tile in the slide's grid."""
        return np.rint(self.coords / self.side_px).astype(np.int64)


def tile_slide(slide: Slide, spec: TileSpec) -> Tiling:
    """Find the tissue of a slide and lay the grid.

    Raises:
        SlideError: no tissue, too coarse, smaller than a tile, or unreadable.
    """
    slide.check_resolution(spec.mpp_um)
    side_px = spec.tile_px * spec.mpp_um / slide.mpp_um
    columns, rows = int(slide.width / side_px), int(slide.height / side_px)
    if columns == 0 or rows == 0:
        raise SlideError(f"{slide.path}: {slide.width} × {slide.height} px is smaller than one tile ({side_px:.0f} px)")
    saturation = _saturation(slide, side_px, columns, rows)
    threshold = np.clip(_otsu(saturation), LOWEST_THRESHOLD, HIGHEST_THRESHOLD)
    tissue = (saturation > threshold).astype(np.float32)
    share = reduce(tissue, "(r a) (c b) -> r c", "mean", a=MASK_PX_A_TILE, b=MASK_PX_A_TILE)
    row, column = np.nonzero(share >= spec.min_tissue)
    if len(row) == 0:
        raise SlideError(f"{slide.path}: no tissue: no tile is covered by {spec.min_tissue:.0%} or more")
    coords = np.stack([np.rint(column * side_px), np.rint(row * side_px)], axis=1).astype(np.int64)
    return Tiling(coords, side_px)


def cached_tiling(path: Path, spec: TileSpec, cache: Path) -> Tiling:
    """The tiling of a slide file, from `cache` when this file was tiled with these settings before.

    Raises:
        SlideError: see `Slide` and `tile_slide`.
        OSError: the tiling cannot be kept.
    """
    kept = cache / f"{cache_key(path, spec)}.npz"
    try:
        with np.load(kept) as stored:
            return Tiling(stored["coords"], float(stored["side_px"]))
    except FileNotFoundError:
        pass
    except DAMAGED:  # cut short by a full disk, say: it is made again
        with suppress(OSError):
            kept.unlink()
    with Slide(path, default_mpp_um=spec.default_mpp_um) as slide:
        tiling = tile_slide(slide, spec)
    with replacing(kept) as unfinished:
        np.savez(unfinished, coords=tiling.coords, side_px=tiling.side_px)
    return tiling


def _saturation(slide: Slide, side_px: float, columns: int, rows: int) -> np.ndarray:
    """HSV saturation, float `[rows · 8, columns · 8]`, aligned with the grid."""
    mask_mpp_um = max(slide.mpp_um, slide.mpp_um * side_px / MASK_PX_A_TILE)
    bands = slide.read_bands((columns * MASK_PX_A_TILE, rows * MASK_PX_A_TILE), mask_mpp_um)
    return np.concatenate([rgb2hsv(band)[..., 1] for band in bands])


def _otsu(values: np.ndarray) -> float:
    """Otsu's threshold; 0 for an image of one value, which has none."""
    return float(threshold_otsu(values)) if np.ptp(values) > 0 else 0.0


def cache_key(path: Path, spec: TileSpec) -> str:
    """A name for what is kept of a slide's tiles; changes with the file and the settings, so that none is stale.

    Raises:
        SlideUnavailableError: the file cannot be looked at now.
        SlideError: there is no such file.
    """
    try:
        status, resolved = path.stat(), path.resolve()
    except OSError as error:
        raise fault(f"cannot open {path}", error) from None
    key = [str(resolved), status.st_size, status.st_mtime_ns, asdict(spec)]
    key += [MASK_PX_A_TILE, LOWEST_THRESHOLD, HIGHEST_THRESHOLD]
    return f"{file_name(path.stem)}-{hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()}"
