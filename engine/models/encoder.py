"""Tile encoders: any timm model, from uint8 tiles to one feature vector per tile."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slidescale.engine.errors import ConfigError
from slidescale.engine.models.backbone import create_backbone, no_drop_path
from slidescale.engine.models.custom import is_custom
from slidescale.engine.models.dropout import KeyedDropout, key_dropouts
from slidescale.engine.models.foundation import class_and_patch_tokens, find_foundation_model
from slidescale.engine.models.lora import add_adapters
from slidescale.engine.models.tile_prep import TilePrep
from slidescale.engine.models.trial import try_network, turn_off_dropout
from slidescale.kernels.dispatch import KernelName


class Encoder(nn.Module):
    """A timm model that maps tiles uint8 `[n, H, W, 3]` to features `[n, D]`.

    Its BatchNorm layers stay in evaluation mode whatever mode the model is in: batch statistics would depend on
    how a slide is cut into chunks and would be updated twice by the two passes. Their scale and shift train.

    timm's own dropout is off, whatever its default: the only thing that is left out at random is a tile's residual
    block (`drop_path`). Where a network cuts tiles into windows, its layers see a tile's windows in a row, and all of
    them are left out or none.

    A few tiles without content go through the network as it is made (see `models/trial.py`).

    Args:
        name: a timm model name, e.g. "resnet50_gn" or "hf-hub:owner/model", one of the `FOUNDATION_MODELS`, or
            "efficientnet_lite0_packaged" (see `packaged.py`).
        tile_px: side of a tile in pixels; a model of fixed input size is built for it, if timm can.
        pretrained: load the published weights (from the hub or the local hub cache, or the package).
        weights: a local state dict (.pth, .bin, .safetensors) to load instead.
        drop_path: largest probability of leaving out a residual block for a tile (stochastic depth: Huang et al.
            2016); timm gives the deepest block this and the earlier ones less.
        lora_rank: rank of the adapters that are trained in place of the weights (see `models/lora.py`); 0: none.
        augment_symmetry: turn each training tile by a random symmetry of the square (see `TilePrep`).
        stain_jitter: strength of random changes of a training tile's stains, 0 to 1 (see `TilePrep`); 0: none.
        kernels: implementation that prepares the tiles.

    Raises:
        ConfigError: unknown name (with near matches); weights that are not there, are named twice, cannot be read or
            do not fit; a network that cannot take such tiles or does not give one vector for each, or has no residual
            blocks to leave out or no layers to adapt.
    """

    def __init__(
        self,
        name: str,
        *,
        tile_px: int,
        pretrained: bool = False,
        weights: Path | None = None,
        drop_path: float = 0.0,
        lora_rank: int = 0,
        augment_symmetry: bool = False,
        stain_jitter: float = 0.0,
        kernels: KernelName = "torch",
    ) -> None:
        super().__init__()
        known = find_foundation_model(name)
        self.name = known[0] if known else name
        backbone = create_backbone(name, tile_px, pretrained=pretrained, weights=weights, drop_path=drop_path)
        self.backbone: nn.Module = backbone
        if not is_custom(name):
            turn_off_dropout(backbone, keep_paths=drop_path > 0)
        self.prefix_tokens: int | None = backbone.num_prefix_tokens if known and known[1].concatenates else None
        self.dim: int = try_network(backbone, name, tile_px, self._pool)
        data_config = timm.data.resolve_model_data_config(self.backbone)
        self.prepare = TilePrep(
            data_config["mean"],
            data_config["std"],
            augment_symmetry=augment_symmetry,
            stain_jitter=stain_jitter,
            kernels=kernels,
        )
        if lora_rank:
            add_adapters(backbone, lora_rank, example=torch.zeros(1, 3, tile_px, tile_px))
        key_dropouts(backbone, "encoder")
        if drop_path and not any(isinstance(module, KeyedDropout) and module.whole for module in self.modules()):
            raise ConfigError(no_drop_path(name, drop_path))
        self.train()

    def forward(self, tiles: Tensor) -> Tensor:
        """uint8 `[n, H, W, 3]` to features `[n, D]`."""
        return self._pool(self.backbone(self.prepare(tiles)))

    def train(self, mode: bool = True) -> "Encoder":
        """Set training or evaluation mode; BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def set_checkpointing(self, on: bool) -> None:
        """Let each block forget its inner activations in the forward and compute them again in the backward, or not.

        Raises:
            ConfigError: timm cannot do that for this network.
        """
        backbone: Any = self.backbone
        try:
            if on or hasattr(backbone, "set_grad_checkpointing"):
                backbone.set_grad_checkpointing(on)
        except (AttributeError, AssertionError) as error:  # no such method, or one that asserts that it is not asked
            raise ConfigError(
                f"--memory.checkpoint-blocks: timm has no activation checkpointing for {self.name} ({error}); "
                "leave it off and take a smaller --memory.chunk, or take another --model.encoder"
            ) from None

    def _pool(self, output: Tensor) -> Tensor:
        """Turn what the backbone returns into features `[n, D]`."""
        if self.prefix_tokens is not None:
            return class_and_patch_tokens(output, self.prefix_tokens)
        return output

    def has_batch_norm(self) -> bool:
        """Whether the encoder has BatchNorm layers, whose statistics stay as they are."""
        return any(isinstance(module, _BatchNorm) for module in self.modules())


class GivenFeatures(nn.Module):
    """Stands in for a frozen encoder: hands on the features `[n, D]` that it is given, as the encoder computed them.

    Args:
        name: the encoder's.
        dim: D, the features' number of components.
    """

    def __init__(self, name: str, dim: int) -> None:
        super().__init__()
        self.name = name
        self.dim = dim
        self.backbone = nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Features `[n, D]`, as they are."""
        return self.backbone(features)

    def set_checkpointing(self, on: bool) -> None:
        """Do nothing: what is not computed cannot be forgotten."""

    def has_batch_norm(self) -> bool:
        """False: nothing is computed."""
        return False
