"""Gated attention pooling, forward, in Triton: scores and their softmax in one pass over the features in memory.

A program takes a block of tiles from features to a partial. It computes the gate `[tiles, L]` a block of columns at a
time, and reads its features again for each: from the L2 cache, as long as that holds the features of all programs that
run at once (50 MB on an H100 at D = 1,536). What reaches memory is the scores `[K, B]` and each block's partial, and
partials are merged in a fixed order, so that equal inputs give equal bits.

In the kernels' arguments, `dim` and `gate_dim` are D and L padded to multiples of 16 with zeros (see `block_sizes.py`),
which a gate's padding passes on, since w is zero there. Shapes stand above values or behind them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slidescale.kernels.gated_attention.block_sizes import (
    MANY_BRANCHES,
    UNALIGNED,
    branch_groups,
    pad,
    pad_halves,
    pool_blocks,
)
from slidescale.kernels.gated_attention.reference import GateDropout, Partial, merge_partials, pool_partial
from slidescale.kernels.keyed_random.device import draw_uniform


@triton.jit
def gate_block(
    features,
    weights,
    biases,
    rows,
    gates,
    k,
    dim,
    gate_dim,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """tanh(V h + b_V) and σ(U h + b_U) for a block of tiles and columns.

    `rows` int64 `[BLOCK_K]` are tiles, `gates` int32 `[BLOCK_L]` columns; those outside of K × L get anything finite.
    """
    row_in, gate_in = rows < k, gates < gate_dim
    v = tl.zeros([BLOCK_K, BLOCK_L], tl.float32)
    u = tl.zeros([BLOCK_K, BLOCK_L], tl.float32)
    u_weights = weights + gate_dim * dim
    for start in range(0, dim, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        dim_in = dims < dim
        h = tl.load(features + rows[:, None] * dim + dims[None, :], row_in[:, None] & dim_in[None, :], 0.0)
        h = h.to(weights.dtype.element_ty)  # [BLOCK_K, BLOCK_D]
        at, inside = gates[None, :] * dim + dims[:, None], gate_in[None, :] & dim_in[:, None]
        v = tl.dot(h, tl.load(weights + at, inside, 0.0), v, input_precision="ieee")
        u = tl.dot(h, tl.load(u_weights + at, inside, 0.0), u, input_precision="ieee")
    v += tl.load(biases + gates, gate_in, 0.0)[None, :]
    u += tl.load(biases + gate_dim + gates, gate_in, 0.0)[None, :]
    return 2.0 * tl.sigmoid(2.0 * v) - 1.0, tl.sigmoid(u)


@triton.jit
def drop_gate(gate, rows, gates, seed, first_tile, drop):
    """Dropout's mask on `gate` `[BLOCK_K, BLOCK_L]`, drawn by tile and column."""
    kept = draw_uniform(seed, first_tile + rows, gates.to(tl.int64)) >= drop
    return tl.where(kept, gate / (1.0 - drop), 0.0)


@triton.jit(
    do_not_specialize=["k", "branches", "stride", "seed", "first_tile"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def pool_block(
    features,
    weights,
    biases,
    w_weight,
    w_bias,
    mask,
    scores,
    part_m,
    part_l,
    part_acc,
    k: tl.int64,
    dim: tl.int32,
    gate_dim: tl.int32,
    branches: tl.int32,
    stride: tl.int32,
    seed: tl.int64,
    first_tile: tl.int64,
    drop: tl.float32,
    DROPOUT: tl.constexpr,
    BRANCHES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores and partial of one block of tiles, for `branches` (at most BRANCHES) of `stride` branches."""
    block = tl.program_id(0).to(tl.int64)
    rows = block * BLOCK_K + tl.arange(0, BLOCK_K)
    row_in = rows < k
    columns = tl.arange(0, BRANCHES)
    column_in = columns < branches
    s = tl.zeros([BLOCK_K, BRANCHES], tl.float32)
    for start in range(0, gate_dim, BLOCK_L):
        gates = start + tl.arange(0, BLOCK_L)
        tanh, sigmoid = gate_block(features, weights, biases, rows, gates, k, dim, gate_dim, BLOCK_K, BLOCK_L, BLOCK_D)
        gate = tanh * sigmoid  # [BLOCK_K, BLOCK_L]
        if DROPOUT:
            gate = drop_gate(gate, rows, gates, seed, first_tile, drop)
        for branch in range(branches):
            w = tl.load(w_weight + branch * gate_dim + gates, gates < gate_dim, 0.0)
            s += tl.where(columns[None, :] == branch, tl.sum(gate * w[None, :], 1)[:, None], 0.0)
    s += tl.load(w_bias + columns, column_in, 0.0)[None, :]
    counts = tl.load(mask + rows, row_in, 0) != 0
    s = tl.where(counts[:, None] & column_in[None, :], s, -float("inf"))
    tl.store(scores + rows[:, None] * stride + columns[None, :], s, row_in[:, None] & column_in[None, :])
    m = tl.max(s, 0)  # [BRANCHES]
    p = tl.exp(s - tl.where(m == -float("inf"), 0.0, m)[None, :])  # [BLOCK_K, BRANCHES]
    tl.store(part_m + block * stride + columns, m, column_in)
    tl.store(part_l + block * stride + columns, tl.sum(p, 0), column_in)
    for start in range(0, dim, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        dim_in = dims < dim
        h = tl.load(features + rows[:, None] * dim + dims[None, :], row_in[:, None] & dim_in[None, :], 0.0)
        h = h.to(tl.float32)
        for branch in range(branches):
            p_branch = tl.sum(tl.where(columns[None, :] == branch, p, 0.0), 1)  # [BLOCK_K]
            acc = tl.sum(p_branch[:, None] * h, 0)  # [BLOCK_D]
            tl.store(part_acc + (block * stride + branch) * dim + dims, acc, dim_in)


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
    (k, dim), branches, device = features.shape, len(w_weight), features.device
    if k == 0:
        scores = features.new_empty((0, branches), dtype=torch.float32)
        return scores, pool_partial(scores, features)
    mask = torch.ones(k, dtype=torch.bool, device=device) if mask is None else mask.contiguous()
    features = pad(features)
    padded_dim = features.shape[1]
    weights, biases = pad_halves(weights.to(dtype), 2), pad_halves(biases.to(torch.float32), 1)
    w = pad(w_weight.to(torch.float32))
    w_bias = w_bias.to(torch.float32)
    p, seed, first_tile = dropout or (0.0, 0, 0)
    blocks = pool_blocks(dtype, dropout=dropout is not None)
    count = triton.cdiv(k, blocks.tiles)
    scores = torch.empty((k, branches), device=device)
    part_m = torch.empty((count, branches), device=device)
    part_l = torch.empty((count, branches), device=device)
    part_acc = torch.empty((count, branches, padded_dim), device=device)
    for of in branch_groups(branches):
        pool_block[(count,)](
            features,
            weights,
            biases,
            w[of],
            w_bias[of],
            mask,
            scores[:, of],
            part_m[:, of],
            part_l[:, of],
            part_acc[:, of],
            k,
            padded_dim,
            w.shape[1],
            of.stop - of.start,
            branches,
            seed,
            first_tile,
            p,
            DROPOUT=dropout is not None,
            BRANCHES=1 if branches == 1 else MANY_BRANCHES,
            BLOCK_K=blocks.tiles,
            BLOCK_L=blocks.gate,
            BLOCK_D=blocks.dim,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return scores, merge_partials(Partial(part_m, part_l, part_acc[:, :, :dim]))
