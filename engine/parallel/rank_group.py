"""Groups of ranks that compute and talk together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from slidescale.engine.errors import UserError
from slidescale.engine.parallel.collectives import all_reduce_sum

Item = TypeVar("Item")


@dataclass(frozen=True)
class RankGroup:
    """Some ranks, in order; `RankGroup()` is one process alone.

    Attributes:
        rank: of this process within the group.
        size: number of ranks.
        process_group: None stands for all ranks when `size` > 1.
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

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

    def ask_main(self, question: Callable[[], Item]) -> Item:
        """The answer of rank 0, on every rank; the others do not look for themselves.

        Raises:
            UserError: rank 0 did.
        """
        answer: Item | UserError | None = None
        if self.rank == 0:
            try:
                answer = question()
            except UserError as error:
                answer = error
        first = self.gather_objects(answer)[0]
        if isinstance(first, UserError):
            raise first
        return cast(Item, first)

    def barrier(self) -> None:
        """Wait for the other ranks of the group."""
        if self.size > 1:
            dist.barrier(group=self.process_group)
