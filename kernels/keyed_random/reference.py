"""A counter-based random number generator in plain PyTorch (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"): no state, so any rank may draw any tile's numbers, in any order, and gets the same.
"""

import torch
from torch import Tensor

MASK_64 = (1 << 64) - 1
# The two multipliers and shifts of splitmix64's finaliser (Steele et al. 2014), which turns a counter into bits that
# pass statistical tests, and its increment, the odd number nearest to 2^64 divided by the golden ratio.
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
GOLDEN = 0x9E3779B97F4A7C15


def keyed_uniform(seed: int, tiles: Tensor, size: int) -> Tensor:
    """Uniform numbers in [0, 1) for each of some tiles.

    Args:
        seed: of the bag and the layer, 63 bits.
        tiles: int64 `[n]`, index of each tile in its bag.
        size: numbers wanted for each tile.

    Returns:
        fp32 `[n, size]`; row i depends on `seed`, `tiles[i]` and nothing else, and starts alike for any `size`.
    """
    key = _mix((tiles + 1) * _signed(GOLDEN) + _signed(seed))
    counter = torch.arange(size, device=tiles.device, dtype=torch.int64) * _signed(GOLDEN)
    bits = _mix(key[:, None] + counter)
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, whose products wrap as unsigned ones do."""
    x = (x ^ _shift_right(x, SHIFTS[0])) * _signed(MULTIPLIERS[0])
    x = (x ^ _shift_right(x, SHIFTS[1])) * _signed(MULTIPLIERS[1])
    return x ^ _shift_right(x, SHIFTS[2])


def _shift_right(x: Tensor, by: int) -> Tensor:
    """Shift in zeros, where int64's own shift repeats the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    value &= MASK_64
    return value - (1 << 64) if value >> 63 else value
