"""The generator of `reference.py` as a function that Triton kernels call; it draws the same numbers, bit by bit."""

import triton
import triton.language as tl

from slidescale.kernels.keyed_random.reference import GOLDEN, MULTIPLIERS, SHIFTS

# Unsigned: products wrap, and shifts bring in zeros.
_GOLDEN = tl.constexpr(GOLDEN)
_FIRST = tl.constexpr(MULTIPLIERS[0])
_SECOND = tl.constexpr(MULTIPLIERS[1])
_SHIFTS = tl.constexpr(SHIFTS)


@triton.jit
def draw_uniform(seed, tiles, counters):
    """fp32 `[n, m]` in [0, 1), for int64 tiles `[n]` and int64 counters `[m]` (see `keyed_uniform`)."""
    golden = tl.full([1], _GOLDEN, tl.uint64)
    key = _mix((tiles + 1).to(tl.uint64) * golden + seed.to(tl.uint64))  # [n]
    bits = _mix(key[:, None] + (counters.to(tl.uint64) * golden)[None, :])  # [n, m]
    return (bits >> 40).to(tl.float32) * (1.0 / (1 << 24))


@triton.jit
def _mix(x):
    """splitmix64's finaliser."""
    x = (x ^ (x >> _SHIFTS[0])) * tl.full([1], _FIRST, tl.uint64)
    x = (x ^ (x >> _SHIFTS[1])) * tl.full([1], _SECOND, tl.uint64)
    return x ^ (x >> _SHIFTS[2])
