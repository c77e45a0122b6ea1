"""Collectives that autograd can differentiate."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllReduceSum(torch.autograd.Function):
    """y = Σ_r x_r, the same y on every rank.

    Every rank holds its own x_r (one shape everywhere) and receives the whole y. A loss that each rank computes
    from its copy of y is T losses to autograd, one a rank, so ∂(ΣL)/∂x_r = Σ_ranks ∂L_rank/∂y: the backward is
    the same all-reduce. Nothing is saved: the map is linear.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum `x` over the ranks of `group` (None: all ranks); its backward sums the gradients likewise."""
    return _AllReduceSum.apply(x, group)
