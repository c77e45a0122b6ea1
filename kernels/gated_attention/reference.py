"""Gated attention pooling in plain PyTorch: the definition that a faster kernel must equal."""

from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Softmax-pooled state of some of a slide's tiles; partials of disjoint tiles merge into the whole's.

    Attributes:
        m: scalar, the largest score, detached (the pooled value does not depend on it); −inf without tiles.
        l: scalar, Σ exp(s_k − m).
        acc: `[D]`, Σ exp(s_k − m) h_k.
    """

    m: Tensor
    l: Tensor
    acc: Tensor


def gated_scores(
    features: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    u_weight: Tensor,
    u_bias: Tensor,
    w_weight: Tensor,
    w_bias: Tensor,
) -> Tensor:
    """Attention scores s = w · (tanh(V h + b_V) ⊙ σ(U h + b_U)) + c (Ilse et al. 2018, eq. 9).

    Args:
        features: `[K, D]`.
        v_weight, u_weight: `[L, D]`; v_bias, u_bias: `[L]`.
        w_weight: `[1, L]`; w_bias: `[1]`.

    Returns:
        `[K]` scores, before the softmax over tiles.
    """
    linear = torch.nn.functional.linear
    gate = torch.tanh(linear(features, v_weight, v_bias)) * torch.sigmoid(linear(features, u_weight, u_bias))
    return linear(gate, w_weight, w_bias).squeeze(-1)


def pool_partial(scores: Tensor, features: Tensor) -> Partial:
    """Pool tiles by the softmax of their scores, up to the normalisation that `Partial` postpones.

    Args:
        scores: `[K]`, K ≥ 0, in at least fp32 (a bf16 exponent sum loses tiles at large K).
        features: `[K, D]`.
    """
    if scores.numel() == 0:
        # Sums over no tiles, still attached to the graph, so that parameters get zero gradients, not none.
        return Partial(scores.new_tensor(-torch.inf), scores.sum(), features.sum(dim=0))
    m = scores.detach().amax()
    weights = torch.exp(scores - m)
    with torch.autocast(scores.device.type, enabled=False):  # which would run the product below in bf16
        return Partial(m, weights.sum(), weights @ features.to(weights.dtype))
