"""Tile preparation as one operator of PyTorch, which picks the implementation by name."""

import torch
from torch import Tensor

from slidescale.kernels.dispatch import KernelName, check_name, check_triton
from slidescale.kernels.tile_prep import blocked


def prepare_tiles(
    tiles: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    dtype: torch.dtype,
    symmetry: Tensor | None = None,
    colour: Tensor | None = None,
    kernels: KernelName = "torch",
) -> Tensor:
    """Turn, recolour and normalise pixels to what an encoder was trained on: (pixel / 255 − mean) / std.

    `reference.py` is the definition. Arithmetic is in fp32 (fp64 for fp64), rounded once to `dtype`; memory is the
    result's and that of a few tiles. No gradient flows through.

    Args:
        tiles: uint8 `[n, H, W, 3]`, RGB.
        mean: `[3]`, of channels scaled to 0..1.
        std: `[3]`, likewise.
        dtype: of the result; bf16, fp16, fp32, or fp64 (torch only).
        symmetry: uint8 or int64 `[n]`, which of the eight symmetries of a square each tile is turned by: its bits say
            to swap rows and columns (4), then to mirror top and bottom (2), then left and right (1).
        colour: fp32 `[n, 3, 4]`, an affine transform of each tile's optical density −ln(max(pixel, 1) / 255), such as
            stain jitter; what comes out brighter than white is white.
        kernels: "triton", for GPUs, or "torch".

    Returns:
        `[n, 3, H, W]` in `dtype`, channels-last in memory.

    Raises:
        ValueError: a shape or dtype is another, tiles to be turned are not square, or triton was asked for where it
            cannot run, or for fp64.
    """
    if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[3] != 3:
        raise ValueError(f"tiles are {tiles.dtype} {list(tiles.shape)}: they must be uint8 [n, H, W, 3]")
    if mean.shape != (3,) or std.shape != (3,):
        raise ValueError(f"mean and std have shapes {list(mean.shape)} and {list(std.shape)}: they must be [3]")
    n = len(tiles)
    if symmetry is not None:
        if symmetry.shape != (n,) or symmetry.dtype not in (torch.uint8, torch.int64):
            raise ValueError(f"symmetry is {symmetry.dtype} {list(symmetry.shape)}: it must be uint8 or int64 [{n}]")
        if tiles.shape[1] != tiles.shape[2]:
            raise ValueError(f"tiles are {tiles.shape[1]} × {tiles.shape[2]} pixels: only square ones can be turned")
    if colour is not None and (colour.shape != (n, 3, 4) or colour.dtype != torch.float32):
        raise ValueError(f"colour is {colour.dtype} {list(colour.shape)}: it must be float32 [{n}, 3, 4]")
    check_name(kernels)
    allowed = (torch.bfloat16, torch.float16, torch.float32, *[torch.float64] * (kernels == "torch"))
    if dtype not in allowed:
        raise ValueError(f"dtype is {dtype}: with {kernels} kernels it must be one of {', '.join(map(str, allowed))}")
    return _operator(tiles, mean, std, dtype, symmetry, colour, kernels)


@torch.library.custom_op("slidescale::prepare_tiles", mutates_args=())
def _operator(
    tiles: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    symmetry: Tensor | None,
    colour: Tensor | None,
    kernels: str,
) -> Tensor:
    out = allocate_pixels(tiles, dtype)
    if kernels == "triton":
        check_triton(tiles.device)
        from slidescale.kernels.tile_prep import fused  # triton need not be installed

        fused.write_prepared(out, tiles, mean, std, symmetry, colour)
    else:
        blocked.write_prepared(out, tiles, mean, std, symmetry, colour)
    return out.permute(0, 3, 1, 2)


@_operator.register_fake
def _(
    tiles: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    symmetry: Tensor | None,
    colour: Tensor | None,
    kernels: str,
) -> Tensor:
    return allocate_pixels(tiles, dtype).permute(0, 3, 1, 2)


def allocate_pixels(tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the result, `[n, H, W, 3]`."""
    return torch.empty(tiles.shape, dtype=dtype, device=tiles.device)
