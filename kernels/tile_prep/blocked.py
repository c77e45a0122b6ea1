"""Tile preparation in PyTorch's operators, a few tiles at a time, so that what is in between stays in the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from slidescale.kernels.tile_prep.reference import turn

# Values whose fp32 copies fit a core's second-level cache; a GPU needs more at once to be busy, and has room.
CPU_VALUES = 2**17
GPU_VALUES = 2**24


def write_prepared(
    out: Tensor, tiles: Tensor, mean: Tensor, std: Tensor, symmetry: Tensor | None, colour: Tensor | None
) -> None:
    """Write to `out`, `[n, H, W, 3]` and contiguous, what the reference gives; arguments as there.

    With a symmetry on a GPU, the host waits for the numbers.
    """
    if out.numel() == 0:
        return
    width = tiles.shape[2]
    arithmetic = torch.promote_types(out.dtype, torch.float32)
    mean, std = mean.to(arithmetic), std.to(arithmetic)
    # Of a row of pixels: operators are slow along a dimension of three.
    scale, shift = (1 / (255 * std)).repeat(width), (-mean / std).repeat(width)  # [W · 3]
    numbers = symmetry.tolist() if symmetry is not None else None
    for rows in _blocks(tiles):
        block = tiles[rows]
        if numbers:
            block = torch.stack([turn(tile, number) for tile, number in zip(block, numbers[rows], strict=True)])
        pixels = block.to(arithmetic) if colour is None else _recolour(block, colour[rows].to(arithmetic))
        lines = pixels.reshape(-1, 3 * width)
        target = out[rows].view(-1, 3 * width)
        if out.dtype == arithmetic:
            torch.addcmul(shift, lines, scale, out=target)
        else:
            target.copy_(torch.addcmul(shift, lines, scale))


def _blocks(tiles: Tensor) -> Iterator[slice]:
    """Consecutive tiles, at least one."""
    values = CPU_VALUES * torch.get_num_threads() if tiles.device.type == "cpu" else GPU_VALUES
    size = max(1, values // max(1, tiles[:1].numel()))
    for begin in range(0, len(tiles), size):
        yield slice(begin, begin + size)


def _recolour(block: Tensor, colour: Tensor) -> Tensor:
    """`reference.recolour` of uint8 pixels, a channel at a time, without a temporary for each pair of channels."""
    channels = block.movedim(-1, 0).contiguous().to(colour.dtype)
    density = channels.clamp_(min=1).div_(255).log_().neg_()  # [3, b, H, W]
    factors = colour[..., None, None]  # [b, 3, 4, 1, 1]
    pixels = torch.empty(block.shape, dtype=colour.dtype, device=block.device)
    for channel in range(3):
        mixed = factors[:, channel, 3]
        for source in range(3):
            mixed = torch.addcmul(mixed, factors[:, channel, source], density[source])  # [b, H, W]
        # A density below 0 would be brighter than white.
        pixels[..., channel] = mixed.clamp_(min=0).neg_().exp_().mul_(255)
    return pixels
