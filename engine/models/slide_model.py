"""The slide model: a tile encoder and an aggregator, trained as one."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from slidescale.engine.errors import ConfigError
from slidescale.engine.models.dropout import key_dropouts
from slidescale.engine.models.encoder import GivenFeatures
from slidescale.engine.parallel.tile_parallel import TileGroup


class SlideModel(nn.Module):
    """The two halves under one root, so that one optimizer and one checkpoint cover both.

    The engine runs the halves apart, the encoder a chunk of tiles at a time, so there is no `forward`.

    The dropout layers of both halves (PyTorch's `nn.Dropout` and timm's `DropPath`) are replaced by ones that draw by
    tile (see `models/dropout.py`), so that neither ranks nor chunks change what they draw.

    Args:
        encoder: any module that maps n tiles `[n, …]` to features `[n, D]`, each tile by itself.
        aggregator: maps `(features [K_local, D], places [K, 2], group)` to `(logits [C], weights [K_local] or None)`
            over the ranks of a group, as `Aggregator` does; `Gathered` makes one of any module `[K, D] -> [C]`.
        autocast: dtype that matrix products run in; None computes in the parameters' own precision.

    Raises:
        ConfigError: the aggregator takes other arguments.
    """

    def __init__(self, encoder: nn.Module, aggregator: nn.Module, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        _check_arguments(aggregator)
        self.encoder: Any = encoder  # a run's is an `Encoder`, whose attributes its commands look at
        self.aggregator: Any = aggregator
        self.autocast = autocast
        key_dropouts(encoder, "encoder")
        key_dropouts(aggregator, "aggregator")

    def without_encoder(self) -> "SlideModel":
        """The same aggregator on features that are given, for an `Encoder` that does not train."""
        return SlideModel(GivenFeatures(self.encoder.name, self.encoder.dim), self.aggregator, self.autocast)

    def encode(self, tiles: Tensor) -> Tensor:
        """Tiles `[n, …]` to features `[n, D]`, in at least fp32; given features pass as they are.

        Raises:
            ConfigError: the encoder returns something else.
        """
        with self._precision(tiles.device):
            features = self.encoder(tiles)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(tiles):
            found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ConfigError(
                f"the encoder returns {found} for {len(tiles)} tiles: must be one vector per tile, [n, D]"
            )
        return _at_least_fp32(features)

    def aggregate(self, features: Tensor, places: Tensor, group: TileGroup) -> tuple[Tensor, Tensor | None]:
        """A tile group's features `[K_local, D]` to logits `[C]` and tile weights `[K_local]`, if there are such.

        Args:
            places: `[K, 2]`, where each of the bag's tiles lies on the slide, counted in tiles.
        """
        with self._precision(features.device):
            logits, weights = self.aggregator(features, places, group)
        return _at_least_fp32(logits), weights

    def _precision(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None)


def takes_places_and_group(aggregator: nn.Module) -> bool:
    """Whether an aggregator's forward takes (features, places, group), and so knows of ranks."""
    try:
        inspect.signature(aggregator.forward).bind(None, None, None)
    except TypeError:
        return False
    return True


def _check_arguments(aggregator: nn.Module) -> None:
    if not takes_places_and_group(aggregator):
        name = type(aggregator).__name__
        raise ConfigError(
            f"the aggregator {name} does not take (features, places, group): for a module that takes all features of a "
            f"slide, [K, D], pass Gathered({name}(…))"
        )


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
