"""What a model needs in memory, measured without running it.

The engine's own code runs on fake tensors, which have shapes and no content, while every storage that an operator
makes is followed from its birth to its death. So the figures hold for any timm encoder, with dropout, autocast and
activation checkpointing as they are, and cost seconds. They are bytes that operators ask an allocator for; what a
kernel uses inside itself (a library's scratch memory) and what an allocator loses are not in them.
"""

import contextlib
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from slidescale.engine.models.dropout import Draw, drawing_for
from slidescale.engine.models.encoder import GivenFeatures
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.tile_parallel import TileGroup

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
        """For n tiles."""
        if n <= 0:
            return 0
        if len(self.tiles) == 1:
            return self.sizes[0]
        right = min(max(1, bisect_left(self.tiles, n)), len(self.tiles) - 1)
        (n0, n1), (b0, b1) = self.tiles[right - 1 : right + 1], self.sizes[right - 1 : right + 1]
        return max(0, round(b0 + (b1 - b0) * (n - n0) / (n1 - n0)))


@dataclass(frozen=True)
class Footprint:
    """What a slide model needs, beyond parameters, gradients and uint8 pixels.

    Attributes:
        flavour: device whose operators were measured ("cpu" or "cuda"; see `measure`).
        tile_px: side of a tile.
        dim: D, of the features.
        parameters: number of values in the model, and of those that train.
        trained: number of parameters that train.
        block: parameters of the encoder's largest block (FSDP gathers a block at a time).
        outside: parameters outside of the encoder's blocks.
        largest: values of the largest parameter.
        forward: peak while a chunk of n tiles is encoded without a graph.
        building: peak while it is encoded with one.
        graph: what its graph keeps, less the features.
        backward: peak over encoding it with a graph and going back.
        storage: the largest that encoding it with a graph makes.
        aggregator: peak over aggregating n tiles' features and going back, with the features' gradient and without
            the features.
        foreign: bytes that the aggregator needs for each tile of the bag that another rank has.
        flops: of a tile's forward in the encoder.
        backward_flops: of a tile's backward in the encoder, with what activation checkpointing computes again.
        aggregator_flops: of aggregating n tiles' features, without going back.
        traffic: bytes that operators write for a tile, forward and backward.
        given: features are read, and no tile is encoded (a frozen encoder).
    """

    flavour: str
    tile_px: int
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
    aggregator: Curve
    foreign: int
    flops: float
    backward_flops: float
    aggregator_flops: Curve
    traffic: float
    given: bool = False

    @property
    def tile_bytes(self) -> int:
        """Of what is read of a tile: its pixels, or its features in fp32."""
        return 4 * self.dim if self.given else 3 * self.tile_px**2


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make while the mode is on, until each is freed.

    Attributes:
        now: bytes alive.
        peak: most that was alive at once since `reset`.
        written: bytes of all storages made, freed or not.
        largest: bytes of the largest.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        """`known` tensors' storages do not count."""
        super().__init__()
        self.now = self.peak = self.written = self.largest = 0
        # A storage's address identifies it while it lives, and is forgotten when it dies.
        self._alive = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and note the storages of what it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = size
        self.now += size
        self.written += size
        self.peak = max(self.peak, self.now)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def measure(
    make: Callable[[], SlideModel],
    *,
    tile_px: int,
    chunks: Sequence[int],
    bags: Sequence[int],
    device: str = "cpu",
) -> Footprint:
    """Measure a slide model on fake tensors.

    Args:
        make: builds the model as the run will, without loading weights; called where new tensors have no content.
        chunks: numbers of tiles to measure the encoder at, ascending.
        bags: numbers of tiles to measure the aggregator at, ascending.
        device: "cpu" or "cuda". PyTorch's operators differ: CUDA's autocast keeps normalisation layers in fp32, which
            the CPU's does not, and its attention saves other tensors. Where there is no GPU, "cuda" measures CUDA's
            forward, and adds what the CPU's backward needs beyond its graph.
    """
    runs_backward = device == "cpu" or torch.cuda.is_available()
    with _fake(make, device) as model:
        forwards = [_measure_forward(model, n, tile_px, device) for n in chunks]
        graphs = [_measure_graph(model, n, tile_px, device, backward=runs_backward) for n in chunks]
        blocks = getattr(model.encoder.backbone, "blocks", None) or [model.encoder.backbone]
        inside = [_count(each.parameters()) for each in blocks]
    # FLOPs, and the aggregator, by the CPU's operators in any case: they differ little there.
    with _fake(make, "cpu") as model:
        flops, backward_flops = _count_flops(model, tile_px)
        if not runs_backward:
            ends = (chunks[0], chunks[-1])
            stand_ins = [_measure_graph(model, n, tile_px, "cpu", backward=True) for n in ends]
            beyond = Curve(ends, tuple(each.backward - each.kept for each in stand_ins))
            graphs = [
                replace(each, backward=max(each.building, each.kept + beyond(n)))
                for n, each in zip(chunks, graphs, strict=True)
            ]
            graphs[-1] = replace(graphs[-1], written=stand_ins[-1].written)
        aggregations = [_aggregation(model, n) for n in bags]
        aggregator = Curve(tuple(bags), tuple(peak for peak, _ in aggregations))
        foreign = _foreign_bytes(model, aggregator, bags[-1])
        parameters = list(model.parameters())

    def curve(sizes: list[int]) -> Curve:
        return Curve(tuple(chunks), tuple(sizes))

    return Footprint(
        flavour=device,
        tile_px=tile_px,
        dim=model.encoder.dim,
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
        aggregator=aggregator,
        foreign=foreign,
        flops=flops,
        backward_flops=backward_flops,
        aggregator_flops=Curve(tuple(bags), tuple(count for _, count in aggregations)),
        traffic=graphs[-1].written / chunks[-1],
        given=isinstance(model.encoder, GivenFeatures),
    )


def measure_forward(make: Callable[[], SlideModel], *, tile_px: int, chunks: Sequence[int], device: str) -> Curve:
    """Peak bytes of encoding a chunk of tiles without a graph; arguments as `measure`'s."""
    with _fake(make, device) as model:
        return Curve(tuple(chunks), tuple(_measure_forward(model, n, tile_px, device) for n in chunks))


def _measure_forward(model: SlideModel, n: int, tile_px: int, device: str) -> int:
    """Peak bytes of encoding n tiles without a graph."""
    tiles = _tiles(model, n, tile_px, device)
    with LiveBytes(_known(model, tiles)) as live, torch.no_grad():
        _encode(model, tiles)
    return live.peak


def _count_flops(model: SlideModel, tile_px: int) -> tuple[int, int]:
    """Of encoding one tile, and of going back."""
    with _counting_flops() as flops, torch.no_grad():
        _encode(model, _tiles(model, 1, tile_px, "cpu"))
    with _counting_flops() as both:
        _back(_encode(model, _tiles(model, 1, tile_px, "cpu")), torch.empty((1, model.encoder.dim)))
    return flops.get_total_flops(), both.get_total_flops() - flops.get_total_flops()


def _counting_flops() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


@dataclass(frozen=True)
class _Graph:
    """Bytes as in `Footprint`."""

    kept: int
    building: int
    backward: int
    storage: int
    written: int


def _measure_graph(model: SlideModel, n: int, tile_px: int, device: str, *, backward: bool) -> _Graph:
    """Encode n tiles with a graph, and go back if `backward`."""
    tiles = _tiles(model, n, tile_px, device)
    gradient = torch.empty((n, model.encoder.dim), device=tiles.device)
    with LiveBytes(_known(model, tiles, gradient)) as live:
        features = _encode(model, tiles)
        if not features.requires_grad:  # they are given
            return _Graph(0, 0, 0, 0, 0)
        kept, building, storage = live.now - features.untyped_storage().nbytes(), live.peak, live.largest
        if backward:
            _back(features, gradient)
    return _Graph(kept, building, live.peak, storage, live.written)


def _tiles(model: SlideModel, n: int, tile_px: int, device: str) -> Tensor:
    if isinstance(model.encoder, GivenFeatures):
        return torch.empty((n, model.encoder.dim), device=_fake_device(device))
    return torch.empty((n, tile_px, tile_px, 3), dtype=torch.uint8, device=_fake_device(device))


def _known(model: SlideModel, *others: Tensor) -> list[Tensor]:
    return [*model.parameters(), *model.buffers(), *others]


def _encode(model: SlideModel, tiles: Tensor) -> Tensor:
    with drawing_for(Draw(seed=0, first=0, count=len(tiles))):
        return model.encode(tiles)


def _back(features: Tensor, gradient: Tensor) -> None:
    if not features.requires_grad:
        return
    with drawing_for(Draw(seed=0, first=0, count=len(features))):  # which activation checkpointing draws again
        (features * gradient).sum().backward()


def _aggregation(model: SlideModel, n: int) -> tuple[int, int]:
    """Peak of aggregating n tiles and going back, and FLOPs of the forward."""
    features = torch.empty((n, model.encoder.dim), requires_grad=True)
    with LiveBytes(_known(model, features)) as live:
        with drawing_for(Draw(seed=0, first=0, count=n)), _counting_flops() as flops:
            logits, _ = model.aggregate(features, torch.empty((n, 2)), TileGroup())
        logits.sum().backward()
    return live.peak, flops.get_total_flops()


def _foreign_bytes(model: SlideModel, aggregator: Curve, n: int) -> int:
    """Bytes for a tile of another rank: none, unless a transformer looks at it (see `models/transformer.py`)."""
    transformer = model.aggregator.transformer
    if transformer is None:
        return 0
    # Of each layer its keys and values are saved, in fp32 at most. In one layer at a time these have a gradient, of
    # which the gather's backward makes a padded copy.
    width = 2 * transformer.norm.normalized_shape[0] * 4
    return (len(transformer.layers) + 2) * width


@contextmanager
def _fake(make: Callable[[], SlideModel], device: str) -> Iterator[SlideModel]:
    """The model with fake parameters on `device`, which need not exist."""
    with torch.device("meta"):
        model = make().train()
    with contextlib.ExitStack() as stack:
        if device == "cuda" and not torch.cuda.is_available():
            # autocast turns itself off where there is no GPU; nothing here runs on one.
            stack.enter_context(
                mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False)
            )
            stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model.to_empty(device=_fake_device(device))
        for parameter in model.parameters():
            if parameter.requires_grad:
                # As a gradient that is added to those of earlier chunks, each is freed once it is complete.
                parameter.register_post_accumulate_grad_hook(_free_gradient)
        yield model


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _fake_device(device: str) -> torch.device:
    return torch.device("cuda", 0) if device == "cuda" else torch.device(device)
