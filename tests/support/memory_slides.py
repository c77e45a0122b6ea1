"""Slides that exist only in memory: their tiles, a cohort of them, and what reads them."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slidescale.engine.data.cohort import Cohort
from slidescale.engine.data.manifest import Manifest, ManifestRow
from slidescale.engine.data.prefetch import TileRequest
from slidescale.engine.data.tiling import Tiling
from slidescale.engine.errors import SlideError
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.parallel.tile_parallel import TileGroup

# Slides' tile counts. With 3 ranks: uneven shares, ranks without a tile (K = 2), one with all (K = 1). More than
# three steps, because several faults are right at the first step and wrong from the second.
BAG_SIZES = (7, 5, 1, 2, 11)


TILE_PX = 32


EXCLUDED = Path(tempfile.gettempdir()) / f"excluded-{os.getpid()}.csv"


class Reading:
    """Tiles that are there already, or cannot be read."""

    def __init__(self, tiles: Tensor, *, damaged: bool) -> None:
        self.tiles = tiles
        self._damaged = damaged

    def wait(self) -> Tensor:
        if self._damaged:
            raise SlideError("damaged")
        return self.tiles


class MemoryReader:
    """Answers for slides that exist only here; the last rank that shares an unreadable one finds it so."""

    def __init__(self, unreadable: str, group: TileGroup) -> None:
        self._unreadable = unreadable if group.rank == group.size - 1 else ""

    def ahead(self, requests: Iterable[TileRequest], depth: int) -> Iterator[Reading]:
        for request in requests:
            damaged = request.path.name in self._unreadable
            yield Reading(all_tiles(request.path)[request.coords[:, 0] // 10], damaged=damaged)

    def blank(self, n: int) -> Tensor:
        return torch.zeros((n, TILE_PX, TILE_PX, 3), dtype=torch.uint8)


@cache
def all_tiles(path: Path) -> Tensor:
    """uint8 `[K, 32, 32, 3]` of a slide."""
    index = int(path.name)
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, 256, (BAG_SIZES[index], TILE_PX, TILE_PX, 3), dtype=torch.uint8, generator=generator)


def make_cohort(mesh: Mesh) -> Cohort:
    """A slide for each bag size, its tiles scattered over a plane."""
    rows = [
        ManifestRow(f"slide-{index}", f"case-{index}", Path(str(index)), (float(index % 2),), "train")
        for index in range(len(BAG_SIZES))
    ]
    cohort = Cohort(Manifest(tuple(rows), ("a", "b")), mesh.world, max_excluded=1, excluded_csv=EXCLUDED)
    for row, k in zip(rows, BAG_SIZES, strict=True):
        coords = np.stack([10 * np.arange(k), 10 * (np.arange(k) ** 2 % 5)], axis=1)
        cohort.tilings[row.slide_id] = Tiling(coords, side_px=10.0)
    return cohort
