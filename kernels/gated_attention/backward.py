"""Gated attention pooling, backward, in Triton, without atomics: equal inputs give equal bits.

The gate's own gradient, `[K, 2 L]`, is what both matrix products of the backward read. It is computed for one stretch
of tiles at a time, with the gate, in the same memory, so that what the backward takes does not grow with K:

1. `score_gradient`: ∂L/∂s `[K, B]`;
2. for each stretch, `gate_gradient`: ∂L/∂(V h + b_V) and ∂L/∂(U h + b_U) `[stretch, 2 L]`, and each block's sums for
   w and the biases;
3. `features_gradient`: ∂L/∂h of the stretch, whole; `weights_gradient`: its addition to ∂L/∂V and ∂L/∂U, in a fixed
   number of sums over disjoint tiles, which are added up last.

Programs that read the same tiles follow each other, so that these come from the L2 cache but once. Arguments are named
as in `forward.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slidescale.kernels.gated_attention.block_sizes import (
    MANY_BRANCHES,
    UNALIGNED,
    branch_groups,
    gate_blocks,
    next_multiple,
    pad,
    pad_halves,
    product_blocks,
    score_blocks,
)
from slidescale.kernels.gated_attention.forward import drop_gate, gate_block
from slidescale.kernels.gated_attention.reference import GateDropout

# Tiles of a stretch: enough programs for the largest GPU, and 25 MB of half-precision gradients at L = 384.
STRETCH = 16_384
# Sums over disjoint tiles that the gradient of the weights is computed in, side by side.
SPLITS = 4


@triton.jit(do_not_specialize=["k", "branches", "stride"], do_not_specialize_on_alignment=UNALIGNED)
def score_gradient(
    features,
    scores,
    m,
    grad_scores,
    grad_l,
    grad_acc,
    d_scores,
    k: tl.int64,
    dim: tl.int32,
    branches: tl.int32,
    stride: tl.int32,
    BRANCHES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """∂L/∂s = p (∂L/∂l + h · ∂L/∂acc) + what other uses of the scores give, for `branches` of `stride` branches."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_in = rows < k
    columns = tl.arange(0, BRANCHES)
    column_in = columns < branches
    d = tl.zeros([BLOCK_K, BRANCHES], tl.float32)
    for start in range(0, dim, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        dim_in = dims < dim
        h = tl.load(features + rows[:, None] * dim + dims[None, :], row_in[:, None] & dim_in[None, :], 0.0)
        h = h.to(tl.float32)
        for branch in range(branches):
            g = tl.load(grad_acc + branch * dim + dims, dim_in, 0.0)
            d += tl.where(columns[None, :] == branch, tl.sum(h * g[None, :], 1)[:, None], 0.0)
    at, inside = rows[:, None] * stride + columns[None, :], row_in[:, None] & column_in[None, :]
    s = tl.load(scores + at, inside, -float("inf"))
    counts = s > -float("inf")  # the score of a tile that does not count is a constant
    p = tl.where(counts, tl.exp(s - tl.load(m + columns, column_in, 0.0)[None, :]), 0.0)
    d = p * (d + tl.load(grad_l + columns, column_in, 0.0)[None, :]) + tl.load(grad_scores + at, inside, 0.0)
    tl.store(d_scores + at, tl.where(counts, d, 0.0), inside)


@triton.jit(
    do_not_specialize=["first", "end", "branches", "seed", "first_tile"], do_not_specialize_on_alignment=UNALIGNED
)
def gate_gradient(
    features,
    weights,
    biases,
    w_weight,
    d_scores,
    d_gate,
    part_biases,
    part_w,
    first: tl.int64,
    end: tl.int64,
    dim: tl.int32,
    gate_dim: tl.int32,
    branches: tl.int32,
    seed: tl.int64,
    first_tile: tl.int64,
    drop: tl.float32,
    DROPOUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gate's gradient for a block of tiles, of those from `first` to `end`, and of columns; its sums over tiles."""
    block = tl.program_id(1).to(tl.int64)
    local = block * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = first + local
    row_in = rows < end
    gates = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    gate_in = gates < gate_dim
    tanh, sigmoid = gate_block(features, weights, biases, rows, gates, end, dim, gate_dim, BLOCK_K, BLOCK_L, BLOCK_D)
    gate = tanh * sigmoid
    if DROPOUT:
        gate = drop_gate(gate, rows, gates, seed, first_tile, drop)
    d = tl.zeros([BLOCK_K, BLOCK_L], tl.float32)  # ∂L/∂gate
    for branch in range(branches):
        d_score = tl.load(d_scores + rows * branches + branch, row_in, 0.0)  # [BLOCK_K]
        d += d_score[:, None] * tl.load(w_weight + branch * gate_dim + gates, gate_in, 0.0)[None, :]
        tl.store(part_w + (block * branches + branch) * gate_dim + gates, tl.sum(gate * d_score[:, None], 0), gate_in)
    if DROPOUT:
        d = drop_gate(d, rows, gates, seed, first_tile, drop)
    d_v = d * sigmoid * (1.0 - tanh * tanh)
    d_u = d * tanh * sigmoid * (1.0 - sigmoid)
    tl.store(part_biases + block * 2 * gate_dim + gates, tl.sum(d_v, 0), gate_in)
    tl.store(part_biases + block * 2 * gate_dim + gate_dim + gates, tl.sum(d_u, 0), gate_in)
    at, inside = d_gate + local[:, None] * 2 * gate_dim + gates[None, :], row_in[:, None] & gate_in[None, :]
    tl.store(at, d_v.to(d_gate.dtype.element_ty), inside)
    tl.store(at + gate_dim, d_u.to(d_gate.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["first", "end", "branches"], do_not_specialize_on_alignment=UNALIGNED)
def features_gradient(
    d_gate,
    weights,
    scores,
    m,
    grad_acc,
    d_features,
    first: tl.int64,
    end: tl.int64,
    dim: tl.int32,
    gate_dim: tl.int32,
    branches: tl.int32,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """∂L/∂h = ∂L/∂gate [V; U] + Σ_b p_b ∂L/∂acc_b, for a block of tiles, of those from `first` to `end`, and of D."""
    local = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = first + local
    row_in = rows < end
    dims = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    dim_in = dims < dim
    d = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, 2 * gate_dim, BLOCK_L):
        gates = start + tl.arange(0, BLOCK_L)
        gate_in = gates < 2 * gate_dim
        # [BLOCK_K, BLOCK_L] and [BLOCK_L, BLOCK_D]
        g = tl.load(d_gate + local[:, None] * 2 * gate_dim + gates[None, :], row_in[:, None] & gate_in[None, :], 0.0)
        weight = tl.load(weights + gates[:, None] * dim + dims[None, :], gate_in[:, None] & dim_in[None, :], 0.0)
        d = tl.dot(g, weight, d, input_precision="ieee")
    for branch in range(branches):
        s = tl.load(scores + rows * branches + branch, row_in, -float("inf"))
        p = tl.where(s > -float("inf"), tl.exp(s - tl.load(m + branch)), 0.0)  # [BLOCK_K]
        d += p[:, None] * tl.load(grad_acc + branch * dim + dims, dim_in, 0.0)[None, :]
    at = d_features + rows[:, None] * dim + dims[None, :]
    tl.store(at, d.to(d_features.dtype.element_ty), row_in[:, None] & dim_in[None, :])


@triton.jit(do_not_specialize=["first", "end", "split_tiles"])
def weights_gradient(
    d_gate,
    features,
    part_weights,
    first: tl.int64,
    end: tl.int64,
    dim: tl.int32,
    gate_dim: tl.int32,
    split_tiles: tl.int32,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add (∂L/∂gate)ᵀ h of `split_tiles` tiles to their split's sum, for a block of V and U."""
    gates = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    gate_in = gates < 2 * gate_dim
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dim_in = dims < dim
    split = tl.program_id(2).to(tl.int64)
    at = part_weights + (split * 2 * gate_dim + gates[:, None]) * dim + dims[None, :]
    inside = gate_in[:, None] & dim_in[None, :]
    d = tl.load(at, inside, 0.0)
    for start in range(0, split_tiles, BLOCK_K):
        local = split * split_tiles + start + tl.arange(0, BLOCK_K)
        rows = first + local
        row_in = rows < end
        # [BLOCK_L, BLOCK_K] and [BLOCK_K, BLOCK_D]
        g = tl.load(d_gate + local[None, :] * 2 * gate_dim + gates[:, None], row_in[None, :] & gate_in[:, None], 0.0)
        h = tl.load(features + rows[:, None] * dim + dims[None, :], row_in[:, None] & dim_in[None, :], 0.0)
        d = tl.dot(g, h.to(d_gate.dtype.element_ty), d, input_precision="ieee")
    tl.store(at, d, inside)


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
    """Gradients of features, weights, biases, w_weight and w_bias, the last four in fp32."""
    (k, dim), (branches, width), device = features.shape, w_weight.shape, features.device
    if k == 0:
        nothing = [torch.zeros_like(each, dtype=torch.float32) for each in (weights, biases, w_weight, m)]
        return torch.empty_like(features), nothing[0], nothing[1], nothing[2], nothing[3]
    features, grad_acc = pad(features), pad(grad_acc)
    padded_dim = features.shape[1]
    weights, biases = pad_halves(weights.to(dtype), 2), pad_halves(biases.to(torch.float32), 1)
    w = pad(w_weight.to(torch.float32))
    gate_dim = w.shape[1]
    p, seed, first_tile = dropout or (0.0, 0, 0)

    blocks = score_blocks()
    d_scores = torch.empty((k, branches), device=device)
    for of in branch_groups(branches):
        score_gradient[(triton.cdiv(k, blocks.tiles),)](
            features,
            scores[:, of],
            m[of],
            grad_scores[:, of],
            grad_l[of],
            grad_acc[of],
            d_scores[:, of],
            k,
            padded_dim,
            of.stop - of.start,
            branches,
            BRANCHES=1 if branches == 1 else MANY_BRANCHES,
            BLOCK_K=blocks.tiles,
            BLOCK_D=blocks.dim,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )

    gates = gate_blocks(features.dtype, dtype, dropout=dropout is not None)
    products = product_blocks(dtype)
    stretch = min(STRETCH, next_multiple(k, gates.tiles))
    blocks_a_stretch = triton.cdiv(stretch, gates.tiles)
    d_gate = torch.empty((stretch, 2 * gate_dim), device=device, dtype=dtype)
    part_biases = torch.empty((blocks_a_stretch, 2, gate_dim), device=device)
    part_w = torch.empty((blocks_a_stretch, branches, gate_dim), device=device)
    d_features = torch.empty_like(features)
    part_weights = torch.zeros((SPLITS, 2, gate_dim, padded_dim), device=device)
    d_biases = torch.zeros((2, gate_dim), device=device)
    d_w = torch.zeros_like(w)
    for first in range(0, k, STRETCH):
        end = min(first + STRETCH, k)
        count = triton.cdiv(end - first, gates.tiles)
        gate_gradient[(triton.cdiv(gate_dim, gates.gate), count)](
            features,
            weights,
            biases,
            w,
            d_scores,
            d_gate,
            part_biases,
            part_w,
            first,
            end,
            padded_dim,
            gate_dim,
            branches,
            seed,
            first_tile,
            p,
            DROPOUT=dropout is not None,
            BLOCK_K=gates.tiles,
            BLOCK_L=gates.gate,
            BLOCK_D=gates.dim,
            num_warps=gates.warps,
            num_stages=gates.stages,
        )
        d_biases += part_biases[:count].sum(dim=0)
        d_w += part_w[:count].sum(dim=0)
        features_gradient[(triton.cdiv(padded_dim, products.dim), triton.cdiv(end - first, products.tiles))](
            d_gate,
            weights,
            scores,
            m,
            grad_acc,
            d_features,
            first,
            end,
            padded_dim,
            gate_dim,
            branches,
            BLOCK_K=products.tiles,
            BLOCK_L=products.gate,
            BLOCK_D=products.dim,
            num_warps=products.warps,
            num_stages=products.stages,
        )
        split_tiles = next_multiple(triton.cdiv(end - first, SPLITS), products.tiles)
        weights_gradient[(triton.cdiv(2 * gate_dim, products.gate), triton.cdiv(padded_dim, products.dim), SPLITS)](
            d_gate,
            features,
            part_weights,
            first,
            end,
            padded_dim,
            gate_dim,
            split_tiles,
            BLOCK_K=products.tiles,
            BLOCK_L=products.gate,
            BLOCK_D=products.dim,
            num_warps=products.warps,
            num_stages=products.stages,
        )
    d_weights = part_weights.sum(dim=0)[:, :width, :dim].flatten(0, 1)
    d_biases = d_biases[:, :width].flatten()
    return d_features[:, :dim].contiguous(), d_weights, d_biases, d_w[:, :width].contiguous(), d_scores.sum(dim=0)
