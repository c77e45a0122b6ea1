"""Sizes of the blocks that the Triton kernels work in, and the padding that lets them read whole vectors.

The sizes are not tuned on a device. They are chosen so that, on every architecture that `benchmarks/kernels.py --aot`
compiles for, no register spills, and the blocks fit in shared memory (docs/kernels.md).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Triton reads a row 16 bytes at a time where it knows that rows begin at multiples of 16 values, and else one by one,
# with many more registers.
ALIGNMENT = 16
ALIGNMENT_BYTES = 16
# Arguments that may begin anywhere, and are read value by value.
UNALIGNED = ["mask", "w_bias", "scores", "m", "grad_scores", "grad_l"]

# Branches that are pooled for at once: one, or up to so many.
MANY_BRANCHES = 16


class BlockSizes(NamedTuple):
    """What one program takes at a time.

    Attributes:
        tiles: rows of the features.
        gate: columns of the gate, of L (of both halves, 2 L, in the products of the backward).
        dim: columns of the features.
        warps: groups of 32 threads (AMD: 64) that work on it.
        stages: blocks on their way from memory at once.
    """

    tiles: int
    gate: int
    dim: int
    warps: int
    stages: int


def pool_blocks(dtype: torch.dtype, *, dropout: bool) -> BlockSizes:
    """For the forward, with the gate's products in `dtype`; drawing numbers of 64 bits takes registers."""
    if dtype == torch.float32:
        return BlockSizes(64, 16, 32, warps=4, stages=2) if dropout else BlockSizes(64, 32, 32, warps=8, stages=2)
    return BlockSizes(128, 64, 32, warps=8, stages=3)


def gate_blocks(features: torch.dtype, dtype: torch.dtype, *, dropout: bool) -> BlockSizes:
    """For the gate's gradient, which holds more at once; features that are rounded on the way take shared memory."""
    if dtype == torch.float32:
        return BlockSizes(64, 32, 32, warps=8, stages=2)
    if dropout:
        return BlockSizes(64, 32, 64, warps=4, stages=2)
    return BlockSizes(128, 32, 64, warps=8, stages=3 if features == dtype else 2)


def product_blocks(dtype: torch.dtype) -> BlockSizes:
    """For the two matrix products of the backward."""
    if dtype == torch.float32:
        return BlockSizes(64, 64, 32, warps=8, stages=2)
    return BlockSizes(64, 64, 64, warps=8, stages=3)


def score_blocks() -> BlockSizes:
    """For the gradient of the scores, which computes no gate."""
    return BlockSizes(64, 1, 64, warps=4, stages=2)


def next_multiple(n: int, of: int) -> int:
    """The smallest multiple of `of` that is at least n."""
    return -(-n // of) * of


def pad(x: Tensor, dims: int = 1) -> Tensor:
    """`x` with zeros behind its last `dims` dimensions, up to aligned sizes; a copy only where it is not aligned."""
    sizes = x.shape[-dims:]
    x = x.contiguous()
    if all(size % ALIGNMENT == 0 for size in sizes):
        return x if x.data_ptr() % ALIGNMENT_BYTES == 0 else x.clone()
    return torch.nn.functional.pad(
        x, [n for size in reversed(sizes) for n in (0, next_multiple(size, ALIGNMENT) - size)]
    )


def pad_halves(both: Tensor, dims: int) -> Tensor:
    """V above U, `[2 L, D]` or (biases) `[2 L]`, to `[2, L', D']` or `[2, L']`, with zeros behind each half."""
    return pad(both.unflatten(0, (2, -1)), dims)


def branch_groups(branches: int) -> Iterator[slice]:
    """The branches that are pooled for at once."""
    for begin in range(0, branches, MANY_BRANCHES):
        yield slice(begin, min(begin + MANY_BRANCHES, branches))
