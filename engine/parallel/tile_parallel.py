"""Tile parallelism: T ranks share the tiles of one slide.

The scaling rule of the whole engine: the merge's backward is an all-reduce, so with every rank back-propagating
the *plain* loss, each holds T times its own tiles' share of the gradient, and the reducer (DeepSpeed, FSDP2, DDP)
takes the *mean* over ranks: Σ_r T·g_r / T = Σ_r g_r, the gradient over all tiles. Pass 2 injects ∂L/∂h unscaled.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from slidescale.engine.parallel.collectives import all_reduce_sum
from slidescale.kernels.gated_attention import Partial

Item = TypeVar("Item")


@dataclass(frozen=True)
class TileGroup:
    """The ranks that share one slide's tiles; `TileGroup()` is one process that has them all.

    Attributes:
        rank: of this process within the group.
        size: T, the number of ranks.
        process_group: None stands for all ranks when `size` > 1.
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

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

    def merge(self, partial: Partial) -> Tensor:
        """The softmax-pooled features `[D]` of the whole slide, from each rank's partial.

        One detached max and one differentiable all-reduce of D + 1 numbers, whatever K is.
        """
        if self.size == 1:
            return partial.acc / partial.l
        largest = self.max(partial.m)
        rescale = torch.exp(partial.m - largest)
        total = self.sum(torch.cat([partial.acc * rescale, (partial.l * rescale).reshape(1)]))
        return total[:-1] / total[-1]

    def sum(self, x: Tensor) -> Tensor:
        """Differentiable sum over the group."""
        return x if self.size == 1 else all_reduce_sum(x, self.process_group)

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the group, detached."""
        x = x.detach()
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.process_group)
        return x

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate each rank's `[K_r, ...]` in rank order on every rank; detached, K_r may differ."""
        return torch.cat(self.gather_objects(rows.detach().cpu()))

    def gather_objects(self, item: Item) -> list[Item]:
        """Every rank's `item`, in rank order, on every rank."""
        if self.size == 1:
            return [item]
        items = [item] * self.size
        dist.all_gather_object(items, item, group=self.process_group)
        return items

    def barrier(self) -> None:
        """Wait for the other ranks of the group."""
        if self.size > 1:
            dist.barrier(group=self.process_group)
