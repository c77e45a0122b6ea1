"""Collectives that autograd can differentiate."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllReduceSum(torch.autograd.Function):
    """y = Σ_r x_r, the same y on every rank.

    Every rank holds its own x_r (one shape everywhere) and receives the whole y. A loss that each rank computes
    from its copy of y is T losses to autograd, one per rank, so ∂(ΣL)/∂x_r = Σ_ranks ∂L_rank/∂y: the backward is
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


class _AllGatherRows(torch.autograd.Function):
    """y = [x_0; x_1; …; x_{T−1}], the ranks' rows one below the other, the same y on every rank.

    Forward: rank r holds x_r `[K_r, …]` and receives the whole y `[Σ K_r, …]`. K_r may differ, and be 0: rows travel
    padded to the largest K_r, since neither gloo nor NCCL gathers unequal parts in one call.

    Backward: every rank has used its own copy of y, and so holds a gradient `[Σ K_r, …]` of all rows, of its own loss
    alone; ∂(ΣL)/∂x_r = Σ_ranks ∂L_rank/∂y[rows of r] `[K_r, …]`: a reduce-scatter. Returning the rank's own slice
    would lose what the other ranks' use of its rows says. The sum is taken in at least fp32, whatever x is in.

    Nothing but the counts is saved: the map is linear.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.counts, ctx.group, ctx.dtype = counts, group, x.dtype
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        gathered = x.new_empty(len(counts) * len(padded), *x.shape[1:])
        dist.all_gather_single(gathered, padded, group=group)
        parts = gathered.split(len(padded))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad, counts, most = grads[0], ctx.counts, max(ctx.counts)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        padded = grad.new_zeros(len(counts) * most, *grad.shape[1:], dtype=dtype)
        for part, rows, count in zip(padded.split(most), grad.split(counts), counts, strict=True):
            part[:count] = rows
        total = padded.new_empty(most, *grad.shape[1:])
        dist.reduce_scatter_single(total, padded, group=ctx.group)
        return total[: counts[dist.get_rank(ctx.group)]].to(ctx.dtype), None, None


def all_gather_rows(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate each rank's rows in rank order, on every rank of `group` (None: all ranks).

    Args:
        x: `[counts[rank], …]`.
        counts: rows of each rank; not all of them 0, and the same list on every rank.

    Returns:
        `[sum(counts), …]`; its backward sums over ranks the gradients of this rank's rows.
    """
    return _AllGatherRows.apply(x, counts, group)
