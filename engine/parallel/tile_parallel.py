"""Tile parallelism: T ranks share the tiles of one slide.

The scaling rule of the whole engine: the merge's backward is an all-reduce, so with every rank back-propagating
the *plain* loss, each holds T times its own tiles' share of the gradient, and the reducer (DeepSpeed, FSDP2, DDP)
takes the *mean* over ranks: Σ_r T·g_r / T = Σ_r g_r, the gradient over all tiles. Pass 2 injects ∂L/∂h unscaled.

With S tile groups, each on slides of its own, the mean over S × T ranks is that over slides: a step on n slides, whose
tile groups took A = n / S each, one after another, has each loss times S / n (see `Feed`).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slidescale.engine.parallel.collectives import all_gather_rows
from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.kernels.gated_attention import Partial


@dataclass(frozen=True)
class TileGroup(RankGroup):
    """The ranks that share one slide's tiles; `TileGroup()` is one process that has them all."""

    def share(self, k: int) -> slice:
        """The contiguous part of a bag's K tiles that this rank works on; parts differ by at most one tile."""
        return slice(self.rank * k // self.size, (self.rank + 1) * k // self.size)

    def chunk_count(self, k: int, chunk: int) -> int:
        """How many chunks every rank encodes for a bag of K tiles: what the fullest rank needs.

        It follows from K alone, so ranks agree without talking. Ranks with fewer tiles pad with empty chunks,
        because each encoder call gathers parameters under ZeRO-3 and must find its partners.
        """
        most = -(-k // self.size)
        return -(-most // chunk)

    def all_rows(self, rows: Tensor, k: int) -> Tensor:
        """This rank's rows `[K_local, …]` of K to all K, on every rank; the backward sums over ranks."""
        if self.size == 1:
            return rows
        shares = [replace(self, rank=rank).share(k) for rank in range(self.size)]
        return all_gather_rows(rows, [share.stop - share.start for share in shares], self.process_group)

    def merge(self, partial: Partial) -> Tensor:
        """The softmax-pooled features `[B, D]` of the whole slide, from each rank's partial.

        One detached max and one differentiable all-reduce of B (D + 1) numbers, whatever K is.
        """
        if self.size == 1:
            return partial.acc / partial.l[:, None]
        largest = self.max(partial.m)
        rescale = torch.exp(partial.m - largest)
        total = self.sum(torch.cat([partial.acc, partial.l[:, None]], dim=1) * rescale[:, None])
        return total[:, :-1] / total[:, -1:]
