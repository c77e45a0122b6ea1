"""Dropout whose masks belong to tiles: the same for a tile whichever rank, chunk or pass it is computed in.

PyTorch draws a mask for a whole batch from a generator's state, so it changes with how tiles are cut into batches.
Here a tile's mask is a function of (bag, layer, index of the tile in the bag), and a run gives the same losses on
any number of ranks, with any chunk size and memory policy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from slidescale.engine.seeding import derive_seed
from slidescale.kernels.keyed_random import keyed_uniform


@dataclass(frozen=True)
class Draw:
    """Which tiles a batch holds: `count` of them from index `first` of the bag that `seed` belongs to."""

    seed: int
    first: int
    count: int

    def uniform(self, layer: str, size: int, device: torch.device) -> Tensor:
        """Uniform numbers that a layer draws for the tiles: fp32 `[count, size]` in [0, 1), on `device`."""
        tiles = torch.arange(self.first, self.first + self.count, device=device)
        return keyed_uniform(self.seed_for(layer), tiles, size)

    def seed_for(self, layer: str) -> int:
        """Seed of what a layer draws for the bag's tiles."""
        return derive_seed(self.seed, layer)


# Not thread-local: where blocks are recomputed in the backward, autograd's own thread draws their masks again.
_draw: Draw | None = None


@contextmanager
def drawing_for(draw: Draw) -> Iterator[None]:
    """Make keyed layers draw for these tiles; around forward, and around a backward that recomputes."""
    global _draw
    outer, _draw = _draw, draw
    try:
        yield
    finally:
        _draw = outer


@contextmanager
def redrawing(first: int, count: int) -> Iterator[None]:
    """Draw for other tiles of the bag that an outer `drawing_for` draws for; without one, change nothing."""
    if _draw is None:
        yield
        return
    with drawing_for(replace(_draw, first=first, count=count)):
        yield


def current_draw() -> Draw:
    """The tiles of the batch that is being computed."""
    assert _draw is not None, "a layer that draws must know its tiles: see drawing_for"
    return _draw


class KeyedDropout(nn.Module):
    """Dropout, or stochastic depth, with a mask of each tile's own.

    The first dimension of its input is tiles, or tiles times parts of a tile (windows, say). Called twice for a tile,
    it draws the same mask twice.

    Args:
        p: probability of dropping, 0 < p < 1.
        whole: drop all of a tile's values or none (stochastic depth: Huang et al. 2016).
        layer: name by which the masks of this layer differ from those of others.
    """

    def __init__(self, p: float, *, whole: bool, layer: str) -> None:
        super().__init__()
        self.p = p
        self.whole = whole
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Drop values of `[n, ...]` in training, and scale the others by 1 / (1 − p)."""
        if not self.training:
            return x
        draw = current_draw()
        assert len(x) % max(1, draw.count) == 0, f"{len(x)} rows of {draw.count} tiles"
        size = 1 if self.whole else x.numel() // max(1, draw.count)
        kept = draw.uniform(self.layer, size, x.device) >= self.p
        if self.whole:
            kept = kept.repeat_interleave(len(x) // max(1, draw.count), dim=0).view(-1, *[1] * (x.ndim - 1))
        else:
            kept = kept.view(x.shape)
        # Divided by a number, not multiplied by a tensor: 1 / (1 − p) rounded to bf16 is off by up to 0.4%.
        return x * kept / (1 - self.p)

    def extra_repr(self) -> str:
        """The settings that `print(model)` shows."""
        return f"p={self.p}, layer={self.layer!r}" + (", whole" if self.whole else "")


def key_dropouts(module: nn.Module, name: str) -> None:
    """Replace PyTorch's and timm's dropout layers in `module`; `name` is where it sits in the model."""
    for child_name, child in module.named_children():
        layer = f"{name}.{child_name}"
        if isinstance(child, DropPath) and child.drop_prob:
            setattr(module, child_name, KeyedDropout(child.drop_prob, whole=True, layer=layer))
        elif isinstance(child, nn.Dropout) and child.p:
            setattr(module, child_name, KeyedDropout(child.p, whole=False, layer=layer))
        else:
            key_dropouts(child, layer)
