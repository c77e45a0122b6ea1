"""Tile preparation in plain PyTorch, the definition of what `blocked.py` and `fused.py` compute.

Colour changes in optical density, od = −ln(pixel / 255): there, by the law of Beer and Lambert, stains add up, each in
proportion to its amount (Ruifrok & Johnston 2001, "Quantification of histochemical staining by color deconvolution").
They take the logarithm to base 10; here it is the natural one, as where the transform is from (Tellez et al. 2018,
"Whole-slide mitosis detection in H&E breast histology", sec. III-D, and scikit-image at the time). A linear part means
the same in both; a shift in density is 2.3 times smaller here. Pixels of 0, of infinite density, count as 1.
"""

import torch
from torch import Tensor


def prepare_tiles(
    tiles: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    symmetry: Tensor | None = None,
    colour: Tensor | None = None,
) -> Tensor:
    """Turn, recolour and normalise pixels: (pixel / 255 − mean) / std, in fp32 (fp64 for fp64), and round once.

    Args:
        tiles: uint8 `[n, H, W, 3]`, RGB.
        mean: `[3]`, of channels scaled to 0..1.
        std: `[3]`, likewise.
        dtype: of the result.
        symmetry: uint8 or int64 `[n]`, how each tile is turned (see `turn`); then H = W.
        colour: fp32 `[n, 3, 4]`, each tile's transform of optical density (see `recolour`).

    Returns:
        `[n, 3, H, W]` in `dtype`, channels-last in memory (the layout convolutions run fastest in, and the one the
        pixels already have, so nothing is transposed).
    """
    arithmetic = torch.promote_types(dtype, torch.float32)
    if symmetry is not None and len(tiles):
        tiles = torch.stack([turn(tile, number) for tile, number in zip(tiles, symmetry.tolist(), strict=True)])
    pixels = tiles.to(arithmetic)
    if colour is not None:
        pixels = recolour(pixels, colour.to(arithmetic))
    normalised = (pixels / 255 - mean.to(arithmetic)) / std.to(arithmetic)
    return normalised.to(dtype).permute(0, 3, 1, 2)


def turn(tile: Tensor, number: int) -> Tensor:
    """One of the eight symmetries of a square `[H, W, 3]`, by the bits of a number.

    4 swaps rows and columns; then 2 mirrors top and bottom; then 1 mirrors left and right. So 3 is half a turn, 6 a
    quarter turn to the left and 5 one to the right. Higher bits do not count.
    """
    if number & 4:
        tile = tile.transpose(0, 1)
    mirrored = [axis for axis, bit in ((0, 2), (1, 1)) if number & bit]
    return tile.flip(mirrored) if mirrored else tile


def recolour(pixels: Tensor, colour: Tensor) -> Tensor:
    """Pixels `[n, H, W, 3]` whose optical density od, a column of three, becomes colour[:, :3] @ od + colour[:, 3].

    What would then be brighter than 255 is 255; nothing is rounded. White has density 0 and becomes exp(−colour[:, 3]).
    """
    density = -torch.log(pixels.clamp(min=1) / 255)
    # Not a matrix product, which autocast and TF32 would round.
    mixed = (colour[:, None, None, :, :3] * density[..., None, :]).sum(-1) + colour[:, None, None, :, 3]
    return (255 * torch.exp(-mixed)).clamp(0, 255)
