"""Exact gradients over all tiles while only one chunk's activations live at a time.

Pass 1 encodes the tiles without a graph. The aggregator's backward then gives ∂L/∂h for every tile, and pass 2
encodes each chunk again, with a graph, and injects its rows of ∂L/∂h (gradient caching: Gao et al. 2021,
arXiv:2101.06983, sec. 3.2). Both passes see the same chunks, pixels, random numbers and autocast state, so pass 2
repeats pass 1's features bit by bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slidescale.engine.errors import ConfigError
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.seeding import derive_seed

Backward = Callable[[Tensor], None]


@dataclass(frozen=True)
class Chunks:
    """This rank's tiles of a bag, cut into the chunks that both passes encode.

    Attributes:
        tiles: uint8 `[K_local, H, W, 3]` on the encoder's device.
        size: tiles a chunk, at most.
        count: chunks to encode, the same on every rank of the tile group; those past this rank's tiles are empty.
        seed: of the bag's randomness, the same on every rank.
        offset: index in the bag of this rank's first tile.
    """

    tiles: Tensor
    size: int
    count: int
    seed: int
    offset: int

    def rows(self) -> Iterator[slice]:
        """The rows of `tiles` that each chunk takes; an empty slice for a chunk that only pads."""
        k = len(self.tiles)
        for index in range(self.count):
            yield slice(min(index * self.size, k), min((index + 1) * self.size, k))


def encode(model: SlideModel, chunks: Chunks) -> Tensor:
    """Pass 1: features `[K_local, D]` of all this rank's tiles, without a graph.

    `no_grad` and not `inference_mode`, whose tensors could not be given a gradient afterwards.
    """
    _refuse_batch_statistics(model.encoder)
    with torch.no_grad():
        return torch.cat([_encode_chunk(model, chunks, rows) for rows in chunks.rows()])


def backpropagate(model: SlideModel, chunks: Chunks, gradient: Tensor | None, backward: Backward) -> None:
    """Pass 2: add to the encoder's parameters the gradient that flows through every tile of this rank.

    Args:
        gradient: ∂L/∂h, `[K_local, D]`.
        backward: takes a scalar whose gradient is wanted; it is given Σ h · ∂L/∂h of one chunk at a time.
    """
    assert gradient is not None, "the aggregator's backward must come first"
    for rows in chunks.rows():
        # For a padding chunk both factors are empty: the sum is a zero that still reaches every parameter.
        backward((_encode_chunk(model, chunks, rows) * gradient[rows]).sum())


@contextmanager
def seeded(device: torch.device, *key: int | str) -> Iterator[None]:
    """Draw torch's random numbers on the CPU and `device` from a key, and put the generators back afterwards."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(derive_seed(*key))
        yield


def _encode_chunk(model: SlideModel, chunks: Chunks, rows: slice) -> Tensor:
    """Features `[n, D]` of one chunk.

    A chunk is seeded by its first tile's index in the bag: whoever encodes it draws the same numbers (where dropout is
    on, another number of ranks cuts other chunks, and so draws others). A padding chunk encodes one blank tile,
    since few networks take a batch of none, and returns no row of it.
    """
    tiles = chunks.tiles[rows]
    padding = len(tiles) == 0
    if padding:
        tiles = tiles.new_zeros((1, *tiles.shape[1:]))
    with seeded(tiles.device, chunks.seed, "chunk", chunks.offset + rows.start):
        features = model.encode(tiles)
    return features[:0] if padding else features


def _refuse_batch_statistics(encoder: nn.Module) -> None:
    for name, module in encoder.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ConfigError(
                f"encoder layer {name!r} is a BatchNorm in training mode: its statistics would depend on the chunks "
                "and be updated twice; freeze it (.eval()), or use an encoder with GroupNorm or LayerNorm"
            )
