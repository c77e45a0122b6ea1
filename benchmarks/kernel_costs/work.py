"""The computations whose kernels are compared: gated attention and tile preparation, with their inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slidescale.kernels.gated_attention import Gate, gated_attention
from slidescale.kernels.gated_attention.reference import gated_attention as define_attention
from slidescale.kernels.tile_prep import prepare_tiles

ATTENTION, TILES = "attention", "tiles"
# In place of the name of a kernel: the definition in PyTorch's own operators.
PYTORCH = "PyTorch"


class Shape(NamedTuple):
    """Sizes of the inputs.

    Attributes:
        k: tiles of the attention.
        dim: D, width of features.
        width: L, width of the gate.
        branches: of the attention.
        tiles: tiles to prepare.
        tile_px: side of such a tile, px.
    """

    k: int
    dim: int
    width: int
    branches: int
    tiles: int
    tile_px: int

    @property
    def titles(self) -> dict[str, str]:
        """A heading per computation."""
        branches = f"{self.branches} branch{'es' * (self.branches > 1)}"
        return {
            ATTENTION: f"Gated attention, forward and backward: K = {self.k:,}, D = {self.dim}, L = {self.width}, "
            f"{branches}",
            TILES: f"Tile preparation: {self.tiles} tiles of {self.tile_px} px",
        }


def attention_inputs(shape: Shape, k: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Gate]:
    """Draw features `[k, D]` in `dtype`, and a gate in fp32."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        # In place: the peak of making the inputs must not hide that of what is measured.
        return torch.randn(size, generator=generator, device=device, dtype=dtype).mul_(scale).requires_grad_()

    wide = (shape.width, shape.dim)
    gate = Gate(
        draw(*wide, scale=shape.dim**-0.5),
        draw(shape.width),
        draw(*wide, scale=shape.dim**-0.5),
        draw(shape.width),
        draw(shape.branches, shape.width, scale=shape.width**-0.5),
        draw(shape.branches),
    )
    return draw(k, shape.dim, dtype=dtype), gate


def attend(how: str, features: Tensor, gate: Gate, dtype: torch.dtype) -> list[Tensor]:
    """Pool and back-propagate; return the pooled features and all gradients."""
    with torch.autocast(features.device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        attended = define_attention(features, gate) if how == PYTORCH else gated_attention(features, gate, kernels=how)
    pooled = attended.pooled
    return [pooled.detach(), *torch.autograd.grad(pooled, (features, *gate), torch.ones_like(pooled))]


def tile_inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tiles (uint8 `[n, px, px, 3]`), and return them with a mean and a standard deviation per channel."""
    size = (shape.tiles, shape.tile_px, shape.tile_px, 3)
    mean, std = (torch.tensor(each, device=device) for each in ([0.7, 0.6, 0.7], [0.23, 0.27, 0.21]))
    return torch.randint(0, 256, size, dtype=torch.uint8, device=device), mean, std


def prepare(how: str, tiles: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale and normalise tiles, and put channels first."""
    if how != PYTORCH:
        return prepare_tiles(tiles, mean, std, dtype=dtype, kernels=how)
    scale = 1.0 / (255.0 * std)
    return (tiles.to(mean.dtype) * scale - mean / std).permute(0, 3, 1, 2).to(dtype)


def make_work(what: str, how: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    """Bind one of the computations to inputs."""
    if what == ATTENTION:
        features, gate = attention_inputs(shape, shape.k, dtype, device)
        return partial(attend, how, features, gate, dtype)
    return partial(prepare, how, *tile_inputs(shape, device), dtype)


def work_of(what: str, how: str, shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """Return FLOPs, and bytes that must cross the memory: the inputs in each pass over them, and the results."""
    if what == TILES:
        values = shape.tiles * shape.tile_px**2 * 3
        return 2 * values, values * (1 + dtype.itemsize)
    product, features = 2 * shape.k * 2 * shape.width * shape.dim, shape.k * shape.dim * dtype.itemsize
    # Forward: the gate. Backward: ∂L/∂h, ∂L/∂V and ∂L/∂U, and the gate again, which PyTorch has kept.
    return (3 if how == PYTORCH else 4) * product, 4 * features
