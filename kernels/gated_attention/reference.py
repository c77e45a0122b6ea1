"""Gated attention pooling in plain PyTorch: the definition that faster kernels must equal.

Ilse et al. 2018, "Attention-based Deep Multiple Instance Learning" (arXiv:1802.04712), eq. 8 and 9, with any number of
attention branches over one gate, as where each class or head attends for itself.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from slidescale.kernels.keyed_random import keyed_uniform


class Gate(NamedTuple):
    """Parameters of the attention scores.

    Attributes:
        v_weight: `[L, D]`, of the tanh half; L is the gate's width.
        v_bias: `[L]`.
        u_weight: `[L, D]`, of the sigmoid half.
        u_bias: `[L]`.
        w_weight: `[B, L]`; B is the number of attention branches.
        w_bias: `[B]`.
    """

    v_weight: Tensor
    v_bias: Tensor
    u_weight: Tensor
    u_bias: Tensor
    w_weight: Tensor
    w_bias: Tensor


class GateDropout(NamedTuple):
    """Dropout on the gate, whose mask belongs to the tiles and not to who computes them.

    Attributes:
        p: probability of dropping a value, 0 < p < 1.
        seed: of the bag and the layer, 63 bits.
        first_tile: index in the bag of the first row of features; the others follow it.
    """

    p: float
    seed: int
    first_tile: int


class Partial(NamedTuple):
    """Softmax-pooled state of some of a slide's tiles; partials of disjoint tiles merge into the whole's.

    Attributes:
        m: `[B]`, the largest score, detached (the pooled value does not depend on it); −inf without tiles.
        l: `[B]`, Σ exp(s_k − m).
        acc: `[B, D]`, Σ exp(s_k − m) h_k.
    """

    m: Tensor
    l: Tensor
    acc: Tensor


class Attended(NamedTuple):
    """What pooling gives.

    Attributes:
        scores: `[K, B]`, before the softmax over tiles; −inf for tiles that do not count.
        partial: of these tiles; see `Partial`.
    """

    scores: Tensor
    partial: Partial

    @property
    def pooled(self) -> Tensor:
        """`[B, D]`, Σ a_k h_k with a the softmax of the scores, where these are all of the slide's tiles.

        Not a number where no tile counts.
        """
        return self.partial.acc / self.partial.l[:, None]


def gated_attention(
    features: Tensor, gate: Gate, *, mask: Tensor | None = None, dropout: GateDropout | None = None
) -> Attended:
    """Pool tiles by gated attention; arguments as in `gated_scores`. Scores and sums are in at least fp32."""
    scores = gated_scores(features, gate, mask=mask, dropout=dropout)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return Attended(scores, pool_partial(scores, features))


def gated_scores(
    features: Tensor, gate: Gate, *, mask: Tensor | None = None, dropout: GateDropout | None = None
) -> Tensor:
    """Attention scores s = w · (tanh(V h + b_V) ⊙ σ(U h + b_U)) + c (Ilse et al. 2018, eq. 9).

    Args:
        features: `[K, D]`.
        mask: bool `[K]`, True for tiles that count; the others' features must be finite too; None: all count.
        dropout: on the product of tanh and sigmoid.

    Returns:
        `[K, B]` scores, before the softmax over tiles; −inf for tiles that do not count.
    """
    gated = torch.tanh(linear(features, gate.v_weight, gate.v_bias)) * torch.sigmoid(
        linear(features, gate.u_weight, gate.u_bias)
    )
    if dropout is not None:
        tiles = torch.arange(dropout.first_tile, dropout.first_tile + len(features), device=features.device)
        kept = keyed_uniform(dropout.seed, tiles, gated.shape[1]) >= dropout.p
        gated = gated * kept / (1 - dropout.p)
    scores = linear(gated, gate.w_weight, gate.w_bias)
    return scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf)


def pool_partial(scores: Tensor, features: Tensor) -> Partial:
    """Pool tiles by the softmax of their scores, up to the normalisation that `Partial` postpones.

    Args:
        scores: `[K, B]`, K ≥ 0, in at least fp32 (a bf16 exponent sum loses tiles at large K).
        features: `[K, D]`.
    """
    lowest = scores.new_full((1, scores.shape[1]), -torch.inf)
    m = torch.cat([scores.detach(), lowest]).amax(dim=0)
    # Without any tile that counts, m is −inf, and −inf − m not a number.
    weights = torch.exp(scores - m.clamp_min(torch.finfo(m.dtype).min))
    with torch.autocast(scores.device.type, enabled=False):  # which would run the product below in bf16
        return Partial(m, weights.sum(dim=0), weights.T @ features.to(weights.dtype))


def merge_partials(parts: Partial) -> Partial:
    """Merge partials of disjoint tiles, stacked in a first dimension: m and l `[N, B]`, acc `[N, B, D]`, N ≥ 1."""
    m = parts.m.amax(dim=0)
    scale = torch.exp(parts.m - m.clamp_min(torch.finfo(m.dtype).min))
    return Partial(m, (parts.l * scale).sum(dim=0), (parts.acc * scale[:, :, None]).sum(dim=0))
