"""A Triton kernel that writes what `draw_uniform` draws; its module is imported where Triton is."""

import triton
import triton.language as tl

from slidescale.kernels.keyed_random.device import draw_uniform


@triton.jit
def draw(out, seed: tl.int64, first: tl.int64, TILES: tl.constexpr, SIZE: tl.constexpr):  # noqa: N803
    """`out` `[TILES, SIZE]`, for tiles from `first` on."""
    tiles, counters = first + tl.arange(0, TILES), tl.arange(0, SIZE).to(tl.int64)
    tl.store(out + tl.arange(0, TILES)[:, None] * SIZE + counters[None, :], draw_uniform(seed, tiles, counters))
