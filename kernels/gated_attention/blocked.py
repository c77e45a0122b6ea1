"""Gated attention pooling in PyTorch's operators, a block of tiles at a time, for devices without Triton.

The gate `[K, L]` never exists as a whole: the forward keeps the scores, and the backward computes each block's gate
again (as FlashAttention does with its scores: Dao et al. 2022, arXiv:2205.14135). Blocks are small enough to stay in a
CPU's cache, which makes up for the arithmetic.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from slidescale.kernels.gated_attention.reference import GateDropout, Partial, merge_partials, pool_partial
from slidescale.kernels.keyed_random import keyed_uniform

# Bytes of a block's gate, both halves: what a CPU's caches hold, with products large enough to be efficient, and what
# keeps a GPU busy.
GATE_BYTES = {"cpu": 4 * 1024**2, "gpu": 16 * 1024**2}
# Values that dropout draws for at once: each takes some integers of 64 bits.
DRAWN_VALUES = 2**18


class _GateBlocks:
    """The gate of a bag, computed a block at a time in the same buffers."""

    def __init__(
        self, features: Tensor, weights: Tensor, biases: Tensor, dropout: GateDropout | None, dtype: torch.dtype
    ) -> None:
        self.features = features
        self.weights = weights.to(dtype)
        self.width = len(weights) // 2
        # tanh(x) = 2 σ(2 x) − 1: a CPU's sigmoid is several times faster than its tanh.
        doubled = torch.ones_like(biases, dtype=dtype)
        doubled[: self.width] = 2
        self._scaled_weights = self.weights * doubled[:, None]
        self._scaled_biases = biases.to(dtype) * doubled
        self._dropout = dropout
        self.dtype = torch.promote_types(dtype, torch.float32)
        row_bytes = len(weights) * dtype.itemsize
        gate_bytes = GATE_BYTES["cpu" if features.device.type == "cpu" else "gpu"]
        self.size = max(1, min(len(features), gate_bytes // row_bytes))
        self._both = features.new_empty((self.size, len(weights)), dtype=dtype)

    def __iter__(self) -> Iterator[slice]:
        for begin in range(0, len(self.features), self.size):
            yield slice(begin, min(begin + self.size, len(self.features)))

    def halves(self, rows: slice) -> tuple[Tensor, Tensor]:
        """tanh(V h + b_V) and σ(U h + b_U), each `[n, L]` in at least fp32, until the next call."""
        h = self.features[rows].to(self.weights.dtype)
        both = torch.addmm(self._scaled_biases, h, self._scaled_weights.T, out=self._both[: len(h)])
        both = both.to(self.dtype).sigmoid_()
        return both[:, : self.width].mul_(2).sub_(1), both[:, self.width :]

    def drop(self, rows: slice, *gates: Tensor) -> None:
        """Dropout's mask on each of some `[n, L]`, in place; it is drawn once."""
        if self._dropout is None:
            return
        p, seed, first_tile = self._dropout
        begin = first_tile + rows.start
        for parts in zip(*(gate.split(max(1, DRAWN_VALUES // self.width)) for gate in gates), strict=True):
            tiles = torch.arange(begin, begin + len(parts[0]), device=parts[0].device)
            kept = keyed_uniform(seed, tiles, self.width) >= p
            for part in parts:
                part.mul_(kept).div_(1 - p)
            begin += len(tiles)


def forward(
    features: Tensor,
    weights: Tensor,
    biases: Tensor,
    w_weight: Tensor,
    w_bias: Tensor,
    mask: Tensor | None,
    dropout: GateDropout | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Partial]:
    """Scores `[K, B]` and their partial; see `operator.py` for the arguments."""
    blocks = _GateBlocks(features, weights, biases, dropout, dtype)
    w, c = w_weight.to(blocks.dtype), w_bias.to(blocks.dtype)
    scores = features.new_empty((len(features), len(w)), dtype=blocks.dtype)
    total = pool_partial(scores[:0], features[:0])
    for rows in blocks:
        tanh, sigmoid = blocks.halves(rows)
        gate = tanh.mul_(sigmoid)
        blocks.drop(rows, gate)
        block_scores = torch.addmm(c, gate, w.T, out=scores[rows])
        if mask is not None:
            block_scores.masked_fill_(~mask[rows, None], -torch.inf)
        part = pool_partial(block_scores, features[rows])
        total = merge_partials(Partial(*map(torch.stack, zip(total, part, strict=True))))
    return scores, total


def backward(
    grad_scores: Tensor,
    grad_l: Tensor,
    grad_acc: Tensor,
    features: Tensor,
    weights: Tensor,
    biases: Tensor,
    w_weight: Tensor,
    scores: Tensor,
    m: Tensor,
    dropout: GateDropout | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of features, weights, biases, w_weight and w_bias, the last four in at least fp32."""
    accumulation = scores.dtype
    blocks = _GateBlocks(features, weights, biases, dropout, dtype)
    w = w_weight.to(accumulation)
    d_features = torch.empty_like(features)
    d_weights = torch.zeros_like(weights, dtype=accumulation)
    d_biases = torch.zeros_like(biases, dtype=accumulation)
    d_w = torch.zeros_like(w)
    d_c = w.new_zeros(len(w))
    both = features.new_empty((blocks.size, len(weights)), dtype=accumulation)
    for rows in blocks:
        h = features[rows]
        tanh, sigmoid = blocks.halves(rows)
        # Tiles that do not count have p = 0, and their score is a constant.
        p = torch.exp(scores[rows] - m.clamp_min(torch.finfo(m.dtype).min))  # [n, B]
        d_scores = p * (torch.addmm(grad_l, h.to(accumulation), grad_acc.T)) + grad_scores[rows]
        d_scores.masked_fill_(scores[rows] == -torch.inf, 0)
        d_c += d_scores.sum(dim=0)
        gate, d_gate = tanh * sigmoid, d_scores @ w  # [n, L]
        blocks.drop(rows, gate, d_gate)
        d_w.addmm_(d_scores.T, gate)
        d_both = both[: len(h)]
        d_v, d_u = d_both[:, : blocks.width], d_both[:, blocks.width :]
        torch.ops.aten.tanh_backward.grad_input(torch.mul(d_gate, sigmoid, out=d_v), tanh, grad_input=d_v)
        torch.ops.aten.sigmoid_backward.grad_input(torch.mul(d_gate, tanh, out=d_u), sigmoid, grad_input=d_u)
        d_biases += d_both.sum(dim=0)
        rounded = d_both.to(dtype)
        if dtype == features.dtype == accumulation:
            d_weights.addmm_(rounded.T, h)
            torch.mm(p, grad_acc, out=d_features[rows]).addmm_(rounded, blocks.weights)
        else:
            d_weights += rounded.T @ h.to(dtype)
            d_features[rows] = (p @ grad_acc).add_(rounded @ blocks.weights)
    return d_features, d_weights, d_biases, d_w, d_c
