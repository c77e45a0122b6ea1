"""Tile preparation in plain PyTorch: the one place where a tile's pixels become floats."""

from torch import Tensor


def prepare_tiles(tiles: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise pixels to what an encoder was trained on: (pixel / 255 − mean) / std.

    Args:
        tiles: uint8 `[n, H, W, 3]`, RGB.
        mean: `[3]`, of channels scaled to 0..1; its dtype is the result's.
        std: `[3]`, likewise.

    Returns:
        `[n, 3, H, W]` in `mean.dtype`, channels-last in memory (the layout convolutions run fastest in, and
        the one the pixels already have, so nothing is transposed).
    """
    scale = 1.0 / (255.0 * std)
    return (tiles.to(mean.dtype) * scale - mean / std).permute(0, 3, 1, 2)
