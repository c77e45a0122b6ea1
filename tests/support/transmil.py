"""An aggregator such as a user brings, with all that those have: a class token, attention over tiles, dropout."""

import math

import torch
from torch import Tensor, nn


class TransMil(nn.Module):
    """Two layers of attention over a square of tiles with a convolution between them, read from a class token.

    After TransMIL (Shao et al. 2021, arXiv:2106.00908), with PyTorch's attention in place of Nystrom's.
    """

    def __init__(self, dim: int, classes: int, *, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Dropout(dropout))
        self.token = nn.Parameter(torch.randn(1, 1, width) / math.sqrt(width))
        self.first = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True, norm_first=True)
        self.place = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.second = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        """`[K, D]` to logits `[1, classes]`."""
        tiles = self.project(features)[None]
        k = tiles.shape[1]
        side = math.ceil(math.sqrt(k))
        tiles = torch.cat([tiles, tiles.repeat(1, side * side // k, 1)[:, : side * side - k]], dim=1)
        x = self.first(torch.cat([self.token, tiles], dim=1))
        token, tiles = x[:, :1], x[:, 1:]
        grid = tiles.transpose(1, 2).unflatten(2, (side, side))
        tiles = (grid + self.place(grid)).flatten(2).transpose(1, 2)
        x = self.second(torch.cat([token, tiles], dim=1))
        return self.head(self.norm(x[:, 0]))
