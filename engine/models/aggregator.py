"""Aggregators: from the features of a slide's tiles, spread over ranks, to the slide's logits."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from slidescale.engine.config import PoolingName
from slidescale.engine.models.dropout import current_draw
from slidescale.engine.models.transformer import Transformer
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.kernels.dispatch import KernelName
from slidescale.kernels.gated_attention import Gate, GateDropout, Partial, gated_attention, pool_partial


class Pooled(NamedTuple):
    """The result of a pooling.

    Attributes:
        features: of the whole slide, equal on every rank of the tile group: `[D]`, or of B branches `[B · D]`.
        weights: `[K_local]`, the share of each of this rank's tiles in it, detached; they sum to 1 over the group.
    """

    features: Tensor
    weights: Tensor


class GatedAttentionPooling(nn.Module):
    """Attention-weighted means of tiles (ABMIL: Ilse et al. 2018, eq. 8 and 9; the pooling of GMA).

    Args:
        dim: D, of the features.
        attention_dim: L, width of the gate.
        branches: B, means of different weights over one gate, which the classifier sees side by side.
        dropout: probability, on the gate, drawn by tile (see `models/dropout.py`).
        kernels: "triton" or "torch".
    """

    def __init__(
        self, dim: int, attention_dim: int, *, branches: int = 1, dropout: float = 0.0, kernels: KernelName = "torch"
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.kernels = kernels
        # Its own parameters and not three Linear modules: ZeRO-3 gathers a module's own parameters around its
        # forward, and a kernel wants the tensors.
        self.v_weight, self.v_bias = _linear_parameters(dim, attention_dim)
        self.u_weight, self.u_bias = _linear_parameters(dim, attention_dim)
        self.w_weight, self.w_bias = _linear_parameters(attention_dim, branches)

    def forward(self, features: Tensor, group: TileGroup) -> Pooled:
        """Pool `[K_local, D]` over the tile group."""
        gate = Gate(self.v_weight, self.v_bias, self.u_weight, self.u_bias, self.w_weight, self.w_bias)
        dropout = None
        if self.dropout and self.training:
            draw = current_draw()
            dropout = GateDropout(self.dropout, draw.seed_for("aggregator.pooling"), draw.first)
        scores, partial = gated_attention(features, gate, dropout=dropout, kernels=self.kernels)
        weights = _softmax_over_group(scores.detach(), partial, group)
        return Pooled(group.merge(partial).flatten(), weights.mean(dim=1))

    def extra_repr(self) -> str:
        """The settings that `print(model)` shows."""
        branches, width = self.w_weight.shape
        return f"{branches} branches over a gate of {width}, dropout={self.dropout}, kernels={self.kernels!r}"


class MeanPooling(nn.Module):
    """Mean over tiles: attention pooling with equal scores."""

    def forward(self, features: Tensor, group: TileGroup) -> Pooled:
        """Pool `[K_local, D]` over the tile group."""
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        scores = features.new_zeros((len(features), 1))
        partial = pool_partial(scores, features)
        weights = _softmax_over_group(scores, partial, group)
        return Pooled(group.merge(partial)[0], weights[:, 0])


class MaxPooling(nn.Module):
    """Maximum over tiles, a feature at a time; tied tiles share the gradient, as in `torch.amax`."""

    def forward(self, features: Tensor, group: TileGroup) -> Pooled:
        """Pool `[K_local, D]` over the tile group."""
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        lowest = features.new_full((1, features.shape[1]), -torch.inf)
        largest = group.max(torch.cat([features.detach(), lowest]).amax(dim=0))
        holds_max = (features.detach() == largest).to(features.dtype)
        ties = group.sum(holds_max.sum(dim=0))
        # where, not a product: 0 · inf would poison features that do not hold the maximum.
        pooled = group.sum(torch.where(holds_max.bool(), features, 0).sum(dim=0)) / ties
        return Pooled(pooled, (holds_max / ties).mean(dim=1))


class SlideNorm(nn.Module):
    """Standardise each feature over the tiles of the slide (instance normalisation, Ulyanov et al. 2016, over a bag).

    An untrained encoder gives all tiles nearly the same features, and a slide's stain moves them all alike; both
    drown the differences between its tiles, which pooling has to find. The price is the slide's mean: what is the
    same in all its tiles is lost to the classifier.
    """

    # Variance below which a feature says nothing: it becomes zeros, without the gradient that rounding would give it.
    # So does every feature of a slide of one tile.
    DEAD = 1e-10

    def forward(self, features: Tensor, group: TileGroup) -> Tensor:
        """`[K_local, D]` to the same, of mean 0 and variance 1 over the tile group: two sums of D numbers."""
        ones = features.new_ones(len(features))
        k = group.sum(ones.sum())
        centred = features - group.sum(features.sum(dim=0)) / k
        variance = group.sum(centred.square().sum(dim=0)) / k
        return centred * torch.rsqrt(variance.clamp_min(self.DEAD)) * (variance > self.DEAD)


class Aggregator(nn.Module):
    """Normalisation, projection, transformer, pooling, classifier; without the transformer, the arrangement of GMA
    (Campanella et al. 2024).

    The projection is two Linear-ReLU-Dropout layers per tile; in the transformer's layers, if any, tiles attend to each
    other; the classifier, one linear layer per slide, is replicated and sees the same pooled features on every rank.
    In training, dropout draws by tile, for those that `drawing_for` in `models/dropout.py` names.

    Args:
        dim: D, of the encoder's features.
        classes: number of logits.
        pooling: "gated_attention", "mean" or "max".
        hidden_dim: width of the projection.
        attention_dim: L, width of the attention gate (gated attention only).
        attention_branches: B, weightings of the tiles, pooled side by side (gated attention only).
        attention_dropout: probability, on the gate (gated attention only).
        dropout: probability, after each projection layer, and on what each transformer layer's attention and MLP add.
        slide_norm: standardise features over the slide's tiles first (see `SlideNorm`).
        transformer_layers: number of transformer layers; 0: tiles do not see each other before pooling.
        transformer_heads: attention heads of each.
        kernels: that pool by gated attention.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        pooling: PoolingName,
        hidden_dim: int,
        attention_dim: int,
        dropout: float,
        attention_branches: int = 1,
        attention_dropout: float = 0.0,
        slide_norm: bool = False,
        transformer_layers: int = 0,
        transformer_heads: int = 8,
        kernels: KernelName = "torch",
    ) -> None:
        super().__init__()
        self.norm = SlideNorm() if slide_norm else None
        self.projection = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.transformer = None
        if transformer_layers:
            self.transformer = Transformer(
                hidden_dim,
                layers=transformer_layers,
                heads=transformer_heads,
                dropout=dropout,
            )
        self.pooling: nn.Module
        match pooling:
            case "gated_attention":
                self.pooling = GatedAttentionPooling(
                    hidden_dim, attention_dim, branches=attention_branches, dropout=attention_dropout, kernels=kernels
                )
            case "mean":
                self.pooling = MeanPooling()
            case "max":
                self.pooling = MaxPooling()
        branches = attention_branches if pooling == "gated_attention" else 1
        self.classifier = nn.Linear(branches * hidden_dim, classes)

    def forward(self, features: Tensor, coords: Tensor, group: TileGroup) -> tuple[Tensor, Tensor]:
        """Aggregate the features of a tile group.

        Args:
            features: `[K_local, D]`, the rows `group.share(K)` of the bag's.
            coords: float `[K, 2]`, (x, y) of all the bag's tiles in units of tiles, the same on every rank; only
                transformer layers look at more than their number.

        Returns:
            logits `[classes]`, equal on every rank, and tile weights `[K_local]` (see `Pooled.weights`).
        """
        own = group.share(len(coords))
        assert len(features) == own.stop - own.start, (
            f"rank {group.rank} of {group.size} has {len(features)} rows of features, and tiles {own} of {len(coords)}"
        )
        if self.norm is not None:
            features = self.norm(features, group)
        projected = self.projection(features)
        if self.transformer is not None:
            projected = self.transformer(projected, coords, group)
        pooled = self.pooling(projected, group)
        return self.classifier(pooled.features), pooled.weights


def _linear_parameters(in_dim: int, out_dim: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias with the initial values of nn.Linear."""
    layer = nn.Linear(in_dim, out_dim)
    return nn.Parameter(layer.weight), nn.Parameter(layer.bias)


def _softmax_over_group(scores: Tensor, partial: Partial, group: TileGroup) -> Tensor:
    """Softmax of `[K_local, B]` scores over all the group's tiles, detached."""
    largest = group.max(partial.m)
    total = group.sum(partial.l.detach() * torch.exp(partial.m - largest))
    return torch.exp(scores - largest) / total
