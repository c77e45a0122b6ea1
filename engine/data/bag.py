"""Bags: the tiles of one slide that take part in one step."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from slidescale.engine.data.manifest import ManifestRow
from slidescale.engine.data.tiling import Tiling
from slidescale.engine.seeding import derive_seed


@dataclass(frozen=True, eq=False)
class Bag:
    """K tiles of one slide, the same on every rank.

    Attributes:
        coords: int64 `[K, 2]`, level-0 (x, y) of the tiles, in reading order.
        side_px: a tile's side in level-0 pixels.
        seed: for everything random that happens to the bag.
    """

    row: ManifestRow
    coords: np.ndarray
    side_px: float
    seed: int

    @property
    def k(self) -> int:
        """Number of tiles, over all ranks."""
        return len(self.coords)

    @property
    def places(self) -> Tensor:
        """fp32 `[K, 2]`, where each tile lies on the slide, counted in tiles."""
        return places(self.coords, self.side_px)


def places(coords: np.ndarray, side_px: float) -> Tensor:
    """Level-0 (x, y) of tiles, int64 `[K, 2]`, counted in tiles: fp32 `[K, 2]`."""
    return torch.from_numpy(coords / side_px).to(torch.float32)


def bag_size(tiling: Tiling, k: int | Literal["all"]) -> int:
    """Number of tiles that a slide's bag will have."""
    return len(tiling.coords) if k == "all" else min(k, len(tiling.coords))


def draw_bag(row: ManifestRow, tiling: Tiling, k: int | Literal["all"], *, seed: int, epoch: int) -> Bag:
    """Sample K of a slide's tiles without repeats; a slide with no more than K gives all.

    The draw depends on (seed, epoch, slide) only. Tiles stay in reading order, so that neighbours, which share
    compressed blocks of the file, are read together.
    """
    bag_seed = derive_seed(seed, "bag", epoch, row.slide_id)
    coords = tiling.coords
    if (size := bag_size(tiling, k)) < len(coords):
        chosen = np.random.default_rng(bag_seed).choice(len(coords), size=size, replace=False)
        coords = coords[np.sort(chosen)]
    return Bag(row, coords, tiling.side_px, bag_seed)


def epoch_size(slides: int, share: float) -> int:
    """Number of slides that an epoch takes: their share, rounded, and at least one."""
    return min(slides, max(1, round(share * slides)))


def epoch_order(rows: list[ManifestRow], *, seed: int, epoch: int, share: float = 1.0) -> list[ManifestRow]:
    """The slides of an epoch, shuffled; which and in what order depends on (seed, epoch) only.

    Args:
        share: part of the rows that is drawn, anew each epoch and without regard to class.
    """
    order = np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(len(rows))
    return [rows[index] for index in order[: epoch_size(len(rows), share)]]
