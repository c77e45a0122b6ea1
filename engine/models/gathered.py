"""Any aggregator, over several ranks: each has all features of the slide, and computes the same."""

from typing import Any

from torch import Tensor, nn

from slidescale.engine.errors import ConfigError
from slidescale.engine.models.dropout import redrawing
from slidescale.engine.parallel.tile_parallel import TileGroup


class Gathered(nn.Module):
    """An aggregator for `SlideModel`, made of a module that wants the features of all tiles.

    Ranks gather their features, K rows of D numbers, and each runs the module on all of them. Its activations
    therefore grow with K on every rank, which those of `Aggregator` do not. The gather's backward sums over ranks, so
    the scaling rule of `parallel/tile_parallel.py` holds.

    Dropout layers of the module draw by slide, alike on every rank. A layer that is called twice for a slide draws the
    same mask twice, as far as the shapes are equal.

    Args:
        module: maps features `[K, D]` to logits `[C]` (or `[1, C]`), or to a tuple of these and of weights `[K]`, the
            share of each tile in the result, which sum to 1. K differs from slide to slide.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, features: Tensor, places: Tensor, group: TileGroup) -> tuple[Tensor, Tensor | None]:
        """Aggregate the features of a tile group.

        Args:
            features: `[K_local, D]`, the rows `group.share(K)` of the bag's.
            places: `[K, 2]`; only their number is looked at.

        Returns:
            logits `[C]`, equal on every rank, and the weights of this rank's tiles `[K_local]`, detached, or None.

        Raises:
            ConfigError: the module returns something else.
        """
        k = len(places)
        everyones = group.all_rows(features, k)
        # What the module drops is the slide's, not a tile's: of whatever shape, it is drawn for one thing.
        with redrawing(first=0, count=1):
            found: Any = self.module(everyones)
        logits, weights = found if isinstance(found, tuple) else (found, None)
        self._check(logits, weights, k)
        return logits.reshape(-1), None if weights is None else weights.detach().reshape(-1)[group.share(k)]

    def _check(self, logits: Any, weights: Any, k: int) -> None:
        name = type(self.module).__name__
        if not isinstance(logits, Tensor) or logits.ndim == 0 or logits.numel() != logits.shape[-1]:
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ConfigError(f"the aggregator {name} returns {found} for a slide: must be logits, [C] or [1, C]")
        if weights is not None and (not isinstance(weights, Tensor) or weights.numel() != k):
            found = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ConfigError(f"the aggregator {name} returns weights {found} for {k} tiles: must be one per tile, [K]")
