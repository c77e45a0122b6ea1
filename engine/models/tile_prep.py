"""The first layer of an encoder: uint8 tiles to the floats that its network takes, augmented in training."""

from collections.abc import Sequence

import torch
from skimage.color import rgb_from_hed
from torch import Tensor, nn

from slidescale.engine.models.dropout import current_draw
from slidescale.kernels.dispatch import KernelName
from slidescale.kernels.tile_prep import prepare_tiles


class TilePrep(nn.Module):
    """Normalises pixels, and in training turns tiles and jitters their stains.

    Both are drawn for each tile as dropout is (see `models/dropout.py`): they depend on the bag and the tile's index in
    it, so that both passes, any chunks and any ranks see the same pixels.

    Args:
        mean: of the three channels scaled to 0..1.
        std: likewise.
        augment_symmetry: turn each training tile by one of the eight symmetries of a square, all equally likely.
        stain_jitter: s, from 0, below 1, of the random change of each training tile's stains (Tellez et al. 2018):
            the amounts of haematoxylin, eosin and DAB are multiplied by factors from U(1 − s, 1 + s), and terms from
            U(−s, s), in natural optical density, are added. White background has no stain to multiply and gets the
            terms: a tint, in which each channel keeps at least exp(−2.26 s) of its brightness, 89% at s = 0.05 and 64%
            at 0.2; where it would become brighter, it stays white.
        kernels: "triton" or "torch".
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        augment_symmetry: bool = False,
        stain_jitter: float = 0.0,
        kernels: KernelName = "torch",
    ) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.stain_changes: Tensor
        self.augment_symmetry = augment_symmetry
        self.stain_jitter = stain_jitter
        self.kernels = kernels
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        self.register_buffer("stain_changes", _stain_changes(), persistent=False)

    def forward(self, tiles: Tensor) -> Tensor:
        """uint8 `[n, H, W, 3]` to floats `[n, 3, H, W]`, channels-last.

        Under autocast these are of its dtype. Networks begin with a convolution or linear layer, whose input autocast
        would round to it anyway, so no feature changes, and the batch is never in memory in fp32. (timm's CrossViT
        resizes its input first, and then resizes what is rounded.) In fp64, which autocast leaves alone, and without
        autocast they are of the dtype of `mean`, which follows the model's.
        """
        dtype, device = self.mean.dtype, tiles.device
        if dtype == torch.float32 and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        symmetry = self._draw_symmetry(tiles) if self.training and self.augment_symmetry else None
        colour = self._draw_colour(tiles) if self.training and self.stain_jitter else None
        return prepare_tiles(
            tiles, self.mean, self.std, dtype=dtype, symmetry=symmetry, colour=colour, kernels=self.kernels
        )

    def extra_repr(self) -> str:
        """As `print(model)` shows it."""
        return f"augment_symmetry={self.augment_symmetry}, stain_jitter={self.stain_jitter}, kernels={self.kernels!r}"

    def _draw_symmetry(self, tiles: Tensor) -> Tensor:
        """uint8 `[n]`, 0 to 7."""
        return (8 * _draw_for(tiles, "encoder.prepare.symmetry", 1)[:, 0]).to(torch.uint8)

    def _draw_colour(self, tiles: Tensor) -> Tensor:
        """Transforms of optical density, fp32 `[n, 3, 4]`: the identity, and a random share of each stain's changes."""
        shares = self.stain_jitter * (2 * _draw_for(tiles, "encoder.prepare.stain", 6) - 1)
        colour = torch.eye(3, 4, device=tiles.device).expand(len(tiles), 3, 4)
        # One by one: a matrix product would be rounded under autocast, and may add up in another order for other n.
        for index, change in enumerate(self.stain_changes.float()):
            colour = colour + shares[:, index, None, None] * change
        return colour


def _draw_for(tiles: Tensor, layer: str, size: int) -> Tensor:
    draw = current_draw()
    assert len(tiles) == draw.count, f"{len(tiles)} tiles, and numbers are drawn for {draw.count}"
    return draw.uniform(layer, size, tiles.device)


def _stain_changes() -> Tensor:
    """What a stain's amount does to optical density od: fp32 `[6, 3, 4]`, to be added to the identity `[I | 0]`.

    With R `[stain, channel]`, the density of a unit of haematoxylin, eosin and DAB (Ruifrok & Johnston 2001), a pixel
    has amounts a = od R⁻¹, and od = a R. A share α_k more of stain k adds α_k a_k R_k, the first three; β_k units more
    add β_k R_k, the last three.
    """
    densities = torch.tensor(rgb_from_hed, dtype=torch.float64)
    amounts = torch.linalg.inv(densities)  # [channel, stain]
    changes = torch.zeros(6, 3, 4)
    for stain in range(3):
        changes[stain, :, :3] = torch.outer(densities[stain], amounts[:, stain])
        changes[3 + stain, :, 3] = densities[stain]
    return changes
