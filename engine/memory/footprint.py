"""What a model needs in memory, measured without running it.

The model's own code runs on fake tensors, which have shapes and no content, while every storage that an operator makes
is followed from its birth to its death. So the figures hold for any encoder and aggregator, with dropout, autocast and
activation checkpointing as they are, and cost seconds. They are bytes that operators ask an allocator for; what a
kernel uses inside itself (a library's scratch memory) and what an allocator loses are not in them.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from slidescale.engine.memory.fake_model import FakeGroup, fake_copy, fake_device
from slidescale.engine.memory.live_bytes import LiveBytes
from slidescale.engine.models.dropout import Draw, drawing_for
from slidescale.engine.models.encoder import GivenFeatures
from slidescale.engine.models.slide_model import SlideModel

# Attention on a CPU, which PyTorch's counter leaves out.
CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}


@dataclass(frozen=True)
class Curve:
    """Bytes, or FLOPs, as a function of a number of tiles, through measured points; straight between and beyond them.

    A peak is the largest of several moments, each affine in the number of tiles, and so convex: between measured
    points the line lies above it.
    """

    tiles: tuple[int, ...]
    sizes: tuple[int, ...]

    def __call__(self, n: int) -> int:
        """The value for n tiles."""
        if n <= 0:
            return 0
        if len(self.tiles) == 1:
            return self.sizes[0]
        right = min(max(1, bisect_left(self.tiles, n)), len(self.tiles) - 1)
        (n0, n1), (b0, b1) = self.tiles[right - 1 : right + 1], self.sizes[right - 1 : right + 1]
        return max(0, round(b0 + (b1 - b0) * (n - n0) / (n1 - n0)))


@dataclass(frozen=True)
class Footprint:
    """What a slide model needs, beyond parameters, gradients and pixels.

    Attributes:
        flavour: device whose operators were measured ("cpu" or "cuda"; see `measure`).
        tile_bytes: bytes of what is read of a tile: its pixels, or its features.
        dim: D, of the features.
        parameters: number of values in the model, and of those that train.
        trained: number of values that train.
        block: parameters of the encoder's largest block (FSDP gathers a block at a time).
        outside: parameters outside of the encoder's blocks.
        largest: values of the largest parameter.
        forward: peak while a chunk of n tiles is encoded without a graph.
        building: peak while it is encoded with one.
        graph: what its graph keeps, less the features.
        backward: peak over encoding it with a graph and going back.
        storage: the largest storage made while it is encoded with a graph.
        ranks: T, that share a slide's tiles.
        aggregator: peak on the rank with the most tiles, over aggregating a bag of K tiles and going back, with the
            gradient of the rank's features and without these features.
        flops: FLOPs of the encoder's forward, per tile.
        backward_flops: FLOPs of the encoder's backward, per tile, with what activation checkpointing computes again.
        aggregator_flops: FLOPs on that rank of aggregating a bag of K tiles, without going back.
        traffic: bytes that operators write per tile, forward and backward.
        given: features are read, and no tile is encoded (a frozen encoder).
    """

    flavour: str
    tile_bytes: int
    dim: int
    parameters: int
    trained: int
    block: int
    outside: int
    largest: int
    forward: Curve
    building: Curve
    graph: Curve
    backward: Curve
    storage: Curve
    ranks: int
    aggregator: Curve
    flops: float
    backward_flops: float
    aggregator_flops: Curve
    traffic: float
    given: bool = False


def measure(
    model: SlideModel,
    tile: Tensor,
    *,
    chunks: Sequence[int],
    bags: Sequence[int],
    ranks: int = 1,
    device: str = "cpu",
) -> Footprint:
    """Measure a slide model, through copies with fake tensors.

    Args:
        model: as it will train, before a strategy has it; or a `meta_copy`. It stays as it is.
        tile: one tile as the encoder takes it, such as uint8 `[H, W, 3]` or features `[D]`; its shape and dtype count.
        chunks: numbers of tiles to measure the encoder at, ascending.
        bags: numbers of tiles K, of all ranks, to measure the aggregator at, ascending.
        ranks: T, that share a slide's tiles.
        device: "cpu" or "cuda". PyTorch's operators differ: CUDA's autocast keeps normalisation layers in fp32, which
            the CPU's does not, and its attention saves other tensors. Where there is no GPU, "cuda" measures CUDA's
            forward, and adds what the CPU's backward needs beyond its graph.

    Raises:
        ConfigError: the model cannot be copied, or does not run on tensors without content.
    """
    runs_backward = device == "cpu" or torch.cuda.is_available()
    with fake_copy(model, device) as fake:
        encoder = _Encoder(fake, tile, device)
        forwards = [encoder.forward(n) for n in chunks]
        graphs = [encoder.graph(n, backward=runs_backward) for n in chunks]
        inside = [_count(each.parameters()) for each in _blocks(fake.encoder)]
    # FLOPs, and the aggregator, by the CPU's operators in any case: they differ little there.
    with fake_copy(model, "cpu") as fake:
        encoder = _Encoder(fake, tile, "cpu")
        flops, backward_flops = encoder.flops()
        if not runs_backward:
            ends = (chunks[0], chunks[-1])
            stand_ins = [encoder.graph(n, backward=True) for n in ends]
            beyond = Curve(ends, tuple(each.backward - each.kept for each in stand_ins))
            graphs = [
                replace(each, backward=max(each.building, each.kept + beyond(n)))
                for n, each in zip(chunks, graphs, strict=True)
            ]
            graphs[-1] = replace(graphs[-1], written=stand_ins[-1].written)
        aggregations = [_aggregation(fake, encoder.one, k, ranks) for k in bags]
        parameters = list(fake.parameters())

    def curve(sizes: list[int]) -> Curve:
        return Curve(tuple(chunks), tuple(sizes))

    return Footprint(
        flavour=device,
        tile_bytes=tile.numel() * tile.element_size(),
        dim=encoder.one.shape[1],
        parameters=_count(parameters),
        trained=_count(parameter for parameter in parameters if parameter.requires_grad),
        block=max(inside),
        outside=_count(parameters) - sum(inside),
        largest=max(parameter.numel() for parameter in parameters),
        forward=curve(forwards),
        building=curve([each.building for each in graphs]),
        graph=curve([each.kept for each in graphs]),
        backward=curve([each.backward for each in graphs]),
        storage=curve([each.storage for each in graphs]),
        ranks=ranks,
        aggregator=Curve(tuple(bags), tuple(peak for peak, _ in aggregations)),
        flops=flops,
        backward_flops=backward_flops,
        aggregator_flops=Curve(tuple(bags), tuple(count for _, count in aggregations)),
        traffic=graphs[-1].written / chunks[-1],
        given=isinstance(model.encoder, GivenFeatures),
    )


def measure_forward(model: SlideModel, tile: Tensor, *, chunks: Sequence[int], device: str) -> Curve:
    """Peak bytes of encoding a chunk of tiles without a graph; arguments as for `measure`."""
    with fake_copy(model, device) as fake:
        encoder = _Encoder(fake, tile, device)
        return Curve(tuple(chunks), tuple(encoder.forward(n) for n in chunks))


@dataclass(frozen=True)
class _Graph:
    """Bytes as in `Footprint`."""

    kept: int
    building: int
    backward: int
    storage: int
    written: int


class _Encoder:
    """Measures the encoder of a `fake_copy`, inside of its context.

    Attributes:
        one: features `[1, D]` of one tile.
    """

    def __init__(self, model: SlideModel, tile: Tensor, device: str) -> None:
        self._model = model
        self._size, self._dtype, self._device = tuple(tile.shape), tile.dtype, fake_device(device)
        with torch.no_grad():
            self.one = self._encode(self._tiles(1))

    def forward(self, n: int) -> int:
        """Peak bytes of encoding n tiles without a graph."""
        tiles = self._tiles(n)
        with LiveBytes(_known(self._model, tiles)) as live, torch.no_grad():
            self._encode(tiles)
        return live.peak

    def graph(self, n: int, *, backward: bool) -> _Graph:
        """Encode n tiles with a graph, and go back if `backward`."""
        tiles, gradient = self._tiles(n), self._gradient(n)
        with LiveBytes(_known(self._model, tiles, gradient)) as live:
            features = self._encode(tiles)
            if not features.requires_grad:  # they are given, or nothing trains
                return _Graph(0, 0, 0, 0, 0)
            kept, building, storage = live.now - features.untyped_storage().nbytes(), live.peak, live.largest
            if backward:
                _back(features, gradient)
        return _Graph(kept, building, live.peak, storage, live.written)

    def flops(self) -> tuple[int, int]:
        """FLOPs of encoding one tile, and of going back."""
        with _counting_flops() as flops, torch.no_grad():
            self._encode(self._tiles(1))
        with _counting_flops() as both:
            features = self._encode(self._tiles(1))
            if features.requires_grad:
                _back(features, self._gradient(1))
        return flops.get_total_flops(), both.get_total_flops() - flops.get_total_flops()

    def _tiles(self, n: int) -> Tensor:
        return torch.empty((n, *self._size), dtype=self._dtype, device=self._device)

    def _gradient(self, n: int) -> Tensor:
        return self.one.new_empty(n, self.one.shape[1])

    def _encode(self, tiles: Tensor) -> Tensor:
        with drawing_for(Draw(seed=0, first=0, count=len(tiles))):
            return self._model.encode(tiles)


def _back(features: Tensor, gradient: Tensor) -> None:
    with drawing_for(Draw(seed=0, first=0, count=len(features))):  # which activation checkpointing draws again
        (features * gradient).sum().backward()


def _aggregation(model: SlideModel, one: Tensor, k: int, ranks: int) -> tuple[int, int]:
    """Peak on the fullest rank of aggregating K tiles and going back, and FLOPs of the forward."""
    group = FakeGroup(rank=ranks - 1, size=ranks)
    own = group.share(k)
    features = one.new_empty(own.stop - own.start, one.shape[1], requires_grad=True)
    with LiveBytes(_known(model, features)) as live:
        with drawing_for(Draw(seed=0, first=own.start, count=len(features))), _counting_flops() as flops:
            logits, _ = model.aggregate(features, torch.empty((k, 2)), group)
        logits.sum().backward()
    return live.peak, flops.get_total_flops()


def _blocks(encoder: nn.Module) -> list[nn.Module]:
    """The parts that a sharded encoder is gathered in, as far as they show: its `blocks`, or else its children."""
    network = getattr(encoder, "backbone", encoder)
    blocks = getattr(network, "blocks", None)
    parts = list(blocks if isinstance(blocks, nn.Sequential | nn.ModuleList) else network.children())
    return parts or [network]


def _counting_flops() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


def _known(model: SlideModel, *others: Tensor) -> list[Tensor]:
    return [*model.parameters(), *model.buffers(), *others]


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
