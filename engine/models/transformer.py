"""Transformer layers in which a slide's tiles attend to each other, over the ranks that share them.

The layers are ViT's (pre-norm: Dosovitskiy et al. 2021, arXiv:2010.11929, eq. 2 and 3), the place of a tile is given
by the 2-D sine-cosine code of MAE (He et al. 2022, arXiv:2111.06377).

Keys and values of other ranks are gathered whole, `[K, 2 · width]` per layer, and queries stay where they are. The
alternative, to pass one rank's block round after another and merge the results by log-sum-exp (ring attention: Liu et
al. 2023, arXiv:2310.01889), holds `[K / T, 2 · width]` and sends as much; but the public attention of PyTorch does not
return log-sum-exps, and what lies behind it differs from device to device. Gathered rows grow with K as the tiles'
pixels on the host do, and stay small beside them: 0.2 GB per layer in bf16 for 100,000 tiles at width 512.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from slidescale.engine.parallel.tile_parallel import TileGroup

MLP_RATIO = 4
# Longest wavelength of the position code, over 2π, in tiles (Vaswani et al. 2017, sec. 3.5).
LONGEST = 10_000.0
# The kernels that never hold all scores at once. With these alone permitted, PyTorch raises where none applies
# instead of quietly forming `[K, K]`.
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


class Transformer(nn.Module):
    """Pre-norm transformer layers over all tiles of a slide, and a final LayerNorm.

    Over T ranks each transforms its own K/T tiles; only attention looks beyond them, at the gathered keys and values of
    all (one gather per layer, of K rows of 2 · dim). The gather's backward sums over ranks, so the scaling rule of
    `parallel/tile_parallel.py` holds.

    Args:
        dim: of the features; a multiple of 4 and of `heads`.
        layers: how many.
        heads: of attention.
        dropout: probability, on the output of each attention and each MLP (Vaswani et al. 2017, sec. 5.4); attention
            weights are not dropped.
    """

    def __init__(self, dim: int, *, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(dim, heads, dropout) for _ in range(layers))
        self.norm = LayerNorm(dim)

    def forward(self, features: Tensor, coords: Tensor, group: TileGroup) -> Tensor:
        """Let tiles attend to each other.

        Args:
            features: `[K_local, dim]`, the rows `group.share(K)` of the bag's.
            coords: float `[K, 2]`, (x, y) of all the bag's tiles in units of tiles, the same on every rank.

        Returns:
            `[K_local, dim]`, in at least fp32, as is the residual stream under autocast.
        """
        k, own = len(coords), group.share(len(coords))
        coords = coords.to(features.device, torch.promote_types(features.dtype, torch.float32))
        # From the bag's own smallest x and y, so that the tissue's place on the glass does not matter.
        x = features + encode_position((coords - coords.amin(dim=0))[own], features.shape[1])

        for layer in self.layers:
            x = layer(x, lambda rows: group.all_rows(rows, k))
        return self.norm(x)


class TransformerLayer(nn.Module):
    """x += Attention(LayerNorm(x)), then x += MLP(LayerNorm(x)), each with dropout on what it adds."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.attention_output = nn.Linear(dim, dim)
        self.attention_dropout = nn.Dropout(dropout)
        self.mlp_norm = LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, MLP_RATIO * dim), nn.GELU(), nn.Linear(MLP_RATIO * dim, dim))
        self.mlp_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """Transform rows.

        Args:
            x: `[n, dim]`.
            gather: from the keys and values of these rows, `[n, 2 · dim]`, to those of all the bag's, `[K, 2 · dim]`.
        """
        dim = x.shape[1]
        query, key_value = self.query_key_value(self.attention_norm(x)).split([dim, 2 * dim], dim=1)
        attended = attend(query, gather(key_value), self.heads)
        x = x + self.attention_dropout(self.attention_output(attended))
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x)))


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its rows, also where FSDP2 gathers parameters in bf16: the CPU kernel refuses a mix."""

    def forward(self, x: Tensor) -> Tensor:
        """`[n, dim]` to the same; here always in at least fp32."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def attend(query: Tensor, key_value: Tensor, heads: int) -> Tensor:
    """Multi-head softmax attention without a mask, in memory linear in n and K.

    Args:
        query: `[n, dim]`; n may be 0.
        key_value: `[K, 2 · dim]`, keys before values, of the queries' dtype; K ≥ 1.

    Returns:
        `[n, dim]`.

    Raises:
        RuntimeError: PyTorch has no fused kernel for the device and dtype, as for fp64 on a GPU.
    """
    if len(query) == 0:
        # Nothing to attend, but the keys and values take part with zero gradients: the gather's backward is a
        # collective that the other ranks wait in.
        return query + key_value.sum()
    dim = query.shape[1]
    q = _heads_first(query, heads)
    k, v = (_heads_first(rows, heads) for rows in key_value.split(dim, dim=1))
    with sdpa_kernel(FUSED):
        attended = nn.functional.scaled_dot_product_attention(q, k, v)  # [1, heads, n, dim / heads]
    return attended[0].transpose(0, 1).reshape(query.shape)


def encode_position(coords: Tensor, dim: int) -> Tensor:
    """The 2-D sine-cosine code of positions: half of the width encodes x, half y.

    `[sin(ω x), cos(ω x), sin(ω y), cos(ω y)]` with ω_i = 10000^(−4i / dim), i < dim / 4 (MAE's `pos_embed.py`).

    Args:
        coords: `[K, 2]` (x, y) in units of tiles, of any value.
        dim: a multiple of 4.

    Returns:
        `[K, dim]`, in the coordinates' dtype.
    """
    assert dim % 4 == 0, f"a position code of width {dim}: must be a multiple of 4"
    exponents = torch.arange(dim // 4, device=coords.device, dtype=coords.dtype) / (dim // 4)
    angles = coords[:, :, None] * LONGEST**-exponents  # [K, 2, dim / 4]
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def _heads_first(rows: Tensor, heads: int) -> Tensor:
    """`[n, dim]` to `[1, heads, n, dim / heads]`; fused kernels want the batch dimension."""
    return rows.unflatten(1, (heads, -1)).transpose(0, 1)[None]
