"""Exact gradients over all tiles while few chunks' activations live at a time.

Pass 1 encodes the tiles without a graph. The aggregator's backward then gives ∂L/∂h for every tile, and pass 2
encodes each chunk again, with a graph, and injects its rows of ∂L/∂h (gradient caching: Gao et al. 2021,
arXiv:2101.06983, sec. 3.2). Both passes see the same chunks, pixels, random numbers and autocast state, so pass 2
repeats pass 1's features bit by bit. A chunk whose graph pass 1 stored need not be encoded again.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slidescale.engine.errors import ConfigError
from slidescale.engine.models.dropout import Draw, drawing_for
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.seeding import seeded

Backward = Callable[[Tensor], None]
Saving = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Chunks:
    """This rank's tiles of a bag, cut into the chunks that both passes encode.

    Attributes:
        tiles: uint8 `[K_local, H, W, 3]` on the encoder's device.
        size: tiles per chunk, at most.
        count: chunks to encode, the same on every rank of the world; those past this rank's tiles are empty.
        seed: of everything random that happens to the bag, the same on every rank.
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


@dataclass(frozen=True)
class Encoded:
    """Results of the forward.

    Attributes:
        features: `[K_local, D]` of all this rank's tiles, a leaf that wants its gradient.
        graphs: rows and features, with the graph, of each chunk whose graph was stored, in the order of encoding.
    """

    features: Tensor
    graphs: list[tuple[slice, Tensor]]


def encode(model: SlideModel, chunks: Chunks, stored: int = 0, saving: Saving = nullcontext) -> Encoded:
    """Encode all this rank's tiles.

    Args:
        stored: number of chunks that keep their graph, so that the backward need not encode them again. These are the
            last ones, because the workspace of the others is then free before the first graph is stored.
        saving: opens a context in which autograd saves the tensors of a stored graph, where offloading takes them.
    """
    _refuse_batch_statistics(model.encoder)
    rows = list(chunks.rows())
    parts, graphs = [], []
    for index, row in enumerate(rows):
        if index < len(rows) - stored:
            # not inference_mode, whose tensors could not be given a gradient afterwards
            with torch.no_grad():
                parts.append(_encode_chunk(model, chunks, row))
        else:
            with saving():
                features = _encode_chunk(model, chunks, row)
            graphs.append((row, features))
            parts.append(features.detach())
    return Encoded(torch.cat(parts).requires_grad_(), graphs)


def aggregate(
    model: SlideModel,
    chunks: Chunks,
    encoded: Encoded,
    places: Tensor | None = None,
    group: TileGroup = TileGroup(),  # noqa: B008 (it is frozen)
) -> tuple[Tensor, Tensor | None]:
    """Aggregate the features of a bag, with random numbers of the bag's own.

    Args:
        places: `[K, 2]`, as `SlideModel.aggregate` takes them; None: all K tiles are here, and at one place.
        group: the ranks that share the bag.

    Returns:
        Logits `[C]` and weights `[K_local]`, as `SlideModel.aggregate` has them.
    """
    features = encoded.features
    places = features.new_zeros(len(features), 2) if places is None else places.to(features.device)
    draw = Draw(chunks.seed, chunks.offset, len(chunks.tiles))
    # What draws from PyTorch's generator, and not by tile, draws alike on every rank.
    with seeded(features.device, chunks.seed, "aggregator"), drawing_for(draw):
        return model.aggregate(features, places, group)


def backpropagate(model: SlideModel, chunks: Chunks, encoded: Encoded, backward: Backward) -> None:
    """Add to the encoder's parameters the gradient that flows through every tile of this rank, if any trains.

    Stored graphs go first, the last one first, and each is freed; then the other chunks are encoded again.

    Args:
        encoded: after the aggregator's backward; it is used up.
        backward: takes a scalar whose gradient is wanted; it is given Σ h · ∂L/∂h of one chunk at a time.
    """
    gradient = encoded.features.grad
    assert gradient is not None, "the aggregator's backward must come first"
    if not any(parameter.requires_grad for parameter in model.encoder.parameters()):
        return  # the gradient has nowhere to go
    again = chunks.count - len(encoded.graphs)
    while encoded.graphs:
        rows, features = encoded.graphs.pop()
        with _randomness(chunks, rows):  # activation checkpointing computes parts of the forward again
            backward((features * gradient[rows]).sum())
        del features
    for rows in list(chunks.rows())[:again]:
        # For a padding chunk both factors are empty: the sum is a zero that still reaches every parameter.
        with _randomness(chunks, rows):
            backward((_encode_chunk(model, chunks, rows) * gradient[rows]).sum())


def inject_zeros(model: SlideModel, chunks: Chunks, backward: Backward) -> None:
    """Give every parameter of the encoder a gradient of zeros, in place of `backpropagate`.

    A padding chunk does the same, for the same reason: ZeRO-3 would apply an earlier step's gradient to parameters that
    get none, and FSDP2 reduces in the last backward through them.
    """
    rows = slice(0, 0)
    with _randomness(chunks, rows):
        backward(_encode_chunk(model, chunks, rows).sum())


def _encode_chunk(model: SlideModel, chunks: Chunks, rows: slice) -> Tensor:
    """Features `[n, D]` of one chunk.

    A padding chunk encodes one blank tile, since few networks take a batch of none, and returns no row of it.
    """
    tiles = chunks.tiles[rows]
    padding = len(tiles) == 0
    if padding:
        tiles = tiles.new_zeros((1, *tiles.shape[1:]))
    with _randomness(chunks, rows):
        features = model.encode(tiles)
    return features[:0] if padding else features


@contextmanager
def _randomness(chunks: Chunks, rows: slice) -> Iterator[None]:
    """Draw a chunk's random numbers, the same each time.

    Dropout layers and stochastic depth draw by tile (see `models/dropout.py`). What draws from torch's generator, as
    attention's own dropout does, is seeded by the chunk's first tile, and so depends on how the bag is cut.
    """
    first, count = chunks.offset + rows.start, max(1, rows.stop - rows.start)
    with seeded(chunks.tiles.device, chunks.seed, "chunk", first), drawing_for(Draw(chunks.seed, first, count)):
        yield


def _refuse_batch_statistics(encoder: nn.Module) -> None:
    for name, module in encoder.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ConfigError(
                f"encoder layer {name!r} is a BatchNorm in training mode: its statistics would depend on the chunks "
                "and be updated twice; freeze it (.eval()), or use an encoder with GroupNorm or LayerNorm"
            )
