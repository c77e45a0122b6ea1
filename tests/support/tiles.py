"""Tiles of random pixels."""

import torch
from torch import Tensor

# Where there is no GPU, Triton's kernels are emulated (see conftest.py), in which bf16 is wrong.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_tiles(n: int, height: int, width: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, height, width or height, 3), dtype=torch.uint8, generator=generator)


def random_colour(n: int, strength: float = 0.3) -> Tensor:
    """Far from the identity, so that some pixels leave the range of a byte."""
    generator = torch.Generator().manual_seed(n)
    return torch.eye(3, 4) + strength * (2 * torch.rand(n, 3, 4, generator=generator) - 1)
