"""The slide model: a tile encoder and an aggregator, trained as one."""

import torch
from torch import Tensor, nn

from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.encoder import Encoder, GivenFeatures
from slidescale.engine.parallel.tile_parallel import TileGroup


class SlideModel(nn.Module):
    """The two halves under one root, so that one optimizer and one checkpoint cover both.

    The engine runs the halves apart, the encoder a chunk of tiles at a time, so there is no `forward`.

    Args:
        autocast: dtype that matrix products run in; None computes in the parameters' own precision.
    """

    def __init__(
        self, encoder: Encoder | GivenFeatures, aggregator: Aggregator, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.aggregator = aggregator
        self._autocast = autocast

    def without_encoder(self) -> "SlideModel":
        """The same aggregator on features that are given, for a frozen encoder."""
        return SlideModel(GivenFeatures(self.encoder.name, self.encoder.dim), self.aggregator, self._autocast)

    def encode(self, tiles: Tensor) -> Tensor:
        """uint8 `[n, H, W, 3]` to features `[n, D]`, in at least fp32; given features pass as they are."""
        with self._precision(tiles.device):
            return _at_least_fp32(self.encoder(tiles))

    def aggregate(self, features: Tensor, places: Tensor, group: TileGroup) -> tuple[Tensor, Tensor]:
        """A tile group's features `[K_local, D]` to logits `[classes]` and tile weights `[K_local]`.

        Args:
            places: `[K, 2]`, where each of the bag's tiles lies on the slide, counted in tiles.
        """
        with self._precision(features.device):
            logits, weights = self.aggregator(features, places, group)
        return _at_least_fp32(logits), weights

    def _precision(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self._autocast, enabled=self._autocast is not None)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
