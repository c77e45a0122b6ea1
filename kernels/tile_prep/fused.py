"""Tile preparation in Triton: a pixel is read once, as a byte, and written once, as it goes into the encoder.

Programs write patches of the output. Where tiles are turned, a patch spans rows as well as columns, so that a quarter
turn uses whole sectors of the memory that it reads; where they are not, a tile is one long row.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slidescale.kernels.variant import POINTERS, Variant

ALIGNMENT = 16  # bytes that are read and written at once, where rows begin at multiples of them
STAGES = 1  # no loop that could be pipelined


class Blocks(NamedTuple):
    """A patch: so many rows, of so many values (three a pixel), powers of two."""

    rows: int
    values: int
    warps: int


# By whether tiles are turned, and recoloured (which takes more registers a value).
BLOCKS = {
    (False, False): Blocks(rows=1, values=2048, warps=4),
    (False, True): Blocks(rows=1, values=1024, warps=4),
    (True, False): Blocks(rows=32, values=64, warps=4),
    (True, True): Blocks(rows=32, values=64, warps=4),
}


# What is read value by value may begin anywhere, and a height of 1, as where nothing is turned, is not compiled in.
@triton.jit(do_not_specialize=["height"], do_not_specialize_on_alignment=["mean", "std", "symmetry", "colour"])
def prepare_patch(
    out,
    tiles,
    mean,
    std,
    symmetry,
    colour,
    height: tl.int32,
    row_values: tl.int32,
    HAS_SYMMETRY: tl.constexpr,
    HAS_COLOUR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """A patch of one tile of `out` `[n, H, W, 3]`; the other arguments as in `reference.py`.

    `row_values` is 3 W. Addresses are int64 from tile to tile, and int32 inside of one.
    """
    row_blocks, value_blocks = tl.cdiv(height, BLOCK_ROWS), tl.cdiv(row_values, BLOCK_VALUES)
    program = tl.program_id(0)
    tile = (program // (row_blocks * value_blocks)).to(tl.int64)
    rows = program // value_blocks % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    values = program % value_blocks * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)  # [BLOCK_VALUES], of a row
    inside = (rows < height)[:, None] & (values < row_values)[None, :]  # [BLOCK_ROWS, BLOCK_VALUES]
    columns, channels = values // 3, values % 3
    first = tile * height * row_values
    tiles += first
    out += first

    # Of what is read: where it begins, and the steps to the next row and column of what is written.
    begin, row_step, column_step = 0, row_values, 3
    if HAS_SYMMETRY:
        number = tl.load(symmetry + tile).to(tl.int32)
        is_swapped, is_upside_down, is_mirrored = (number & 4) != 0, (number & 2) != 0, (number & 1) != 0
        row_step = tl.where(is_swapped, 3, row_values)
        column_step = tl.where(is_swapped, row_values, 3)
        begin = tl.where(is_upside_down, (height - 1) * row_step, 0)
        begin += tl.where(is_mirrored, (row_values // 3 - 1) * column_step, 0)
        row_step = tl.where(is_upside_down, -row_step, row_step)
        column_step = tl.where(is_mirrored, -column_step, column_step)

    if HAS_COLOUR:
        at = tiles + begin + (rows * row_step)[:, None] + (columns * column_step)[None, :]
        factors = colour + tile * 12 + channels * 4
        density = tl.load(factors + 3)[None, :]
        for channel in tl.static_range(3):
            pixel = tl.maximum(tl.load(at + channel, inside, 1).to(tl.float32), 1.0)
            density -= tl.load(factors + channel)[None, :] * tl.log(pixel * (1.0 / 255.0))
        light = tl.exp(-tl.maximum(density, 0.0))  # a density below 0 would be brighter than white
    elif HAS_SYMMETRY:
        at = tiles + begin + (rows * row_step)[:, None] + (columns * column_step + channels)[None, :]
        light = tl.load(at, inside, 0).to(tl.float32) * (1.0 / 255.0)
    else:
        # The same addresses, written so that the compiler sees that they follow each other.
        light = tl.load(tiles + (rows * row_step)[:, None] + values[None, :], inside, 0).to(tl.float32) * (1.0 / 255.0)
    normalised = (light - tl.load(mean + channels)[None, :]) / tl.load(std + channels)[None, :]
    to = out + (rows * row_values)[:, None] + values[None, :]
    tl.store(to, normalised.to(out.dtype.element_ty), inside)


def write_prepared(
    out: Tensor, tiles: Tensor, mean: Tensor, std: Tensor, symmetry: Tensor | None, colour: Tensor | None
) -> None:
    """Write to `out`, `[n, H, W, 3]` and contiguous, what the reference gives; arguments as there.

    Raises:
        ValueError: a tile has more than 2^30 values.
    """
    if out.numel() == 0:
        return
    n, height, width, _ = tiles.shape
    if 3 * height * width > 2**30:
        raise ValueError(f"a tile of {height} × {width} pixels has more than 2^30 values: use kernels='torch'")
    tiles = tiles.contiguous()
    if tiles.data_ptr() % ALIGNMENT:
        tiles = tiles.clone()
    if symmetry is None:
        height, width = 1, height * width
    blocks = BLOCKS[symmetry is not None, colour is not None]
    programs = n * triton.cdiv(height, blocks.rows) * triton.cdiv(3 * width, blocks.values)
    with torch.cuda.device_of(tiles):
        prepare_patch[(programs,)](
            out,
            tiles,
            mean.float().contiguous(),
            std.float().contiguous(),
            symmetry if symmetry is None else symmetry.to(torch.uint8).contiguous(),
            colour if colour is None else colour.contiguous(),
            height,
            3 * width,
            HAS_SYMMETRY=symmetry is not None,
            HAS_COLOUR=colour is not None,
            BLOCK_ROWS=blocks.rows,
            BLOCK_VALUES=blocks.values,
            num_warps=blocks.warps,
            num_stages=STAGES,
        )


def variants() -> Iterator[Variant]:
    """All that `write_prepared` can launch, for rows (tiles, where none is turned) of multiples of 16 pixels or not."""
    for dtype, (turned, recoloured), aligned in product(POINTERS, BLOCKS, (True, False)):
        blocks = BLOCKS[turned, recoloured]
        constexprs: dict[str, Any] = {
            "HAS_SYMMETRY": turned,
            "HAS_COLOUR": recoloured,
            "BLOCK_ROWS": blocks.rows,
            "BLOCK_VALUES": blocks.values,
        }
        # As at a launch, an argument that is None is compiled in.
        constexprs |= {} if turned else {"symmetry": None}
        constexprs |= {} if recoloured else {"colour": None}
        signature = {"out": POINTERS[dtype], "tiles": "*u8", "mean": "*fp32", "std": "*fp32", "symmetry": "*u8"}
        signature |= {"colour": "*fp32", "height": "i32", "row_values": "i32"}
        signature |= dict.fromkeys(constexprs, "constexpr")
        multiples = frozenset(["out", "tiles", *["row_values"] * aligned])
        words = ["prepare_patch", str(dtype).removeprefix("torch."), "symmetry" * turned, "colour" * recoloured]
        label = " ".join([*filter(None, words), "aligned" if aligned else "any size"])
        yield Variant(prepare_patch, signature, constexprs, multiples, blocks.warps, STAGES, label)
