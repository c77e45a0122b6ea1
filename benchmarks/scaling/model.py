"""The time of a training step on any number of ranks, by arithmetic from the costs of its parts.

Each rank has the same number of tiles, however many ranks there are (weak scaling). A step is the sum of its terms;
it does not include waiting for a rank that is slow by chance. Communication follows from the strategy:

- ddp and zero0: an all-reduce of all gradients, once;
- zero1 and zero2: the same, and an all-gather of all parameters after the update;
- zero3 and fsdp: an all-gather of the encoder for each chunk and each pass (forward, forward again, backward), two of
  the aggregator, and a reduce-scatter of all gradients, once;
- all strategies: the merge of the slide's pooled features, and small messages by which ranks agree.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from slidescale.engine.memory.devices import Device
from slidescale.engine.memory.estimate import BANDWIDTH_UTILISATION, UTILISATION
from slidescale.engine.memory.footprint import Footprint
from slidescale.engine.memory.needs import FP32
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.strategies.ddp import BUCKET_BYTES
from slidescale.engine.strategies.fsdp import UNIT_NUMEL, _units

from scaling.networks import Link, Network

TERMS = ("reading", "pass 1", "pass 2", "aggregator", "merge", "gathers", "reduction", "update")
SHARDING = ("zero3", "fsdp")
# All-reduces around DeepSpeed's update, and all-gathers after it, as counted of DeepSpeed 0.19.
ZERO_CALLS = 4
# Values that AdamW reads (weight, gradient, two moments) and writes (weight, moments) for each that trains.
ADAMW_VALUES = 7


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide its communication.

    Attributes:
        dim: D, width of features.
        pooled: width to which the aggregator projects features before it pools them.
        encoder: number of parameters (values).
        aggregator: number of parameters (values).
        units: number of parts of the encoder that fsdp gathers one at a time.
        modules: number of modules of the encoder with parameters of their own, which zero3 gathers one at a time.
    """

    dim: int
    pooled: int
    encoder: int
    aggregator: int
    units: int
    modules: int

    @property
    def bytes(self) -> int:
        """Bytes of all parameters, which are fp32."""
        return FP32 * (self.encoder + self.aggregator)


def shape_of(model: SlideModel) -> Shape:
    """Measure a model, whose parameters may be on the "meta" device."""

    def size(module: SlideModel | object) -> int:
        return sum(parameter.numel() for parameter in module.parameters())  # type: ignore[union-attr]

    own = [module for module in model.encoder.modules() if any(True for _ in module.parameters(recurse=False))]
    units = len(list(_units(model.encoder, UNIT_NUMEL)))
    pooled = model.aggregator.classifier.in_features
    return Shape(model.encoder.dim, pooled, size(model.encoder), size(model.aggregator), units + 1, len(own))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A step.

    Attributes:
        tiles: per rank.
        chunk: tiles that go through the encoder at once.
        policy: "recompute" or "keep".
        tile_ranks: most ranks that share a slide; with more ranks, several slides are processed at once.
    """

    shape: Shape
    strategy: str
    policy: str
    tiles: int
    chunk: int
    tile_ranks: int

    @property
    def chunks(self) -> int:
        """Chunks per rank."""
        return -(-self.tiles // self.chunk)

    def sharing(self, ranks: int) -> int:
        """Count the ranks that share a slide."""
        return min(ranks, self.tile_ranks)

    def k(self, ranks: int) -> int:
        """Count the tiles of a slide."""
        return self.sharing(ranks) * self.tiles


@dataclass(frozen=True)
class Message:
    """Equal calls of one operation in a step.

    Attributes:
        term: one of TERMS, to which their time belongs.
        operation: "all-reduce", "all-gather" or "reduce-scatter".
        ranks: number of ranks that take part.
        calls: per step.
        size: bytes of the whole per call.
    """

    term: str
    operation: str
    ranks: int
    calls: int
    size: float


def messages(job: Job, ranks: int) -> Iterator[Message]:
    """Yield all communication of a rank in a step."""
    if ranks == 1:
        return
    shape, strategy, sharing = job.shape, job.strategy, job.sharing(ranks)
    if sharing > 1:
        # The pooled features and their sum of exponentials, forward and backward; for the merge and for the tiles'
        # weights the largest score, and for the weights their sum.
        yield Message("merge", "all-reduce", sharing, 2, FP32 * (shape.pooled + 1))
        yield Message("merge", "all-reduce", sharing, 3, FP32)
    # Each slot's readable slides, as an object's length and the object.
    yield Message("merge", "all-gather", ranks, 2, 8 * ranks)
    if strategy in SHARDING:
        parts = shape.units if strategy == "fsdp" else shape.modules
        passes = 3 if job.policy == "recompute" else 2
        yield Message("gathers", "all-gather", ranks, passes * job.chunks * parts, FP32 * shape.encoder / parts)
        yield Message("gathers", "all-gather", ranks, 2, FP32 * shape.aggregator)
        units = shape.units + 1 if strategy == "fsdp" else 1
        yield Message("reduction", "reduce-scatter", ranks, units, shape.bytes / units)
        # The norm of the gradient; DeepSpeed computes it more than once.
        yield Message("update", "all-reduce", ranks, 1 if strategy == "fsdp" else ZERO_CALLS, 2 * FP32)
        return
    buckets = -(-shape.bytes // BUCKET_BYTES) if strategy == "ddp" else 1
    yield Message("reduction", "all-reduce", ranks, buckets, shape.bytes / buckets)
    if strategy in ("zero1", "zero2"):
        yield Message("update", "all-gather", ranks, ZERO_CALLS, shape.bytes / ZERO_CALLS)
        yield Message("update", "all-reduce", ranks, ZERO_CALLS, FP32)


def hub_bytes(k: int, dim: int) -> int:
    """Count the bytes of features that reach the hub per step of the published schedule; as many go back."""
    return FP32 * k * dim


def merge_bytes(pooled: int) -> int:
    """Count the bytes that a rank hands over per step to merge the pooled features, forward and backward, for any K."""
    return 2 * FP32 * (pooled + 1) + 3 * FP32


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The costs of a rank's work on one kind of machine.

    Attributes:
        forward_s: forward per tile without a graph, s.
        both_s: forward and backward per tile, s.
        aggregate_s: forward and backward of the aggregator for the rank's tiles, s.
        update_s: seconds of the update for a strategy and a number of ranks.
        read_s: processor seconds of reading a tile.
        cores: per rank, for reading.
        readers: reading threads per rank.
        computing: threads per rank that compute on the same cores: 0 on a GPU.
        hides: strategies whose gathers run while a rank computes.
    """

    forward_s: float
    both_s: float
    aggregate_s: float
    update_s: Callable[[str, int], float]
    read_s: float
    cores: float
    readers: int
    computing: int
    hides: tuple[str, ...]
    network: Network


def step_terms(job: Job, costs: Costs, ranks: int) -> dict[str, float]:
    """Compute the seconds that each of TERMS adds to a step."""
    terms = dict.fromkeys(TERMS, 0.0)
    terms["pass 1"] = job.tiles * costs.forward_s
    terms["pass 2"] = job.tiles * (costs.both_s - (costs.forward_s if job.policy == "keep" else 0.0))
    terms["aggregator"] = costs.aggregate_s
    terms["update"] = costs.update_s(job.strategy, ranks)
    longest = 0.0
    for message in messages(job, ranks):
        seconds = costs.network.seconds(message.operation, message.ranks, message.size)
        terms[message.term] += message.calls * seconds
        if message.term == "gathers":
            longest = max(longest, seconds)
    if job.strategy in costs.hides:
        # The next unit is gathered while this one computes; only the first one is waited for.
        terms["gathers"] = max(longest, terms["gathers"] - terms["pass 1"] - terms["pass 2"])
    terms["reading"] = reading_seconds(job.tiles * costs.read_s, sum(terms.values()), costs)
    return terms


def reading_seconds(work: float, step: float, costs: Costs) -> float:
    """Compute the seconds that reading the next slide's tiles adds to a step.

    Reading and computing threads get equal shares of the cores. With too few cores for all of them, computing slows
    down while tiles are read. Where reading takes longer than the step, computing waits for it.

    Args:
        work: processor seconds.
        step: seconds of everything else.
    """
    threads = costs.readers + costs.computing
    at_once = min(costs.readers, costs.cores * costs.readers / threads)
    lasts = work / at_once
    slowed = lasts * max(0.0, 1 - costs.cores / threads) if costs.computing else 0.0
    return max(slowed, lasts - step)


def efficiency(job: Job, costs: Costs, ranks: int) -> float:
    """Throughput per rank relative to a single rank, which has no communication."""
    return sum(step_terms(job, costs, 1).values()) / sum(step_terms(job, costs, ranks).values())


def device_costs(
    device: Device, network: Network, footprint: Footprint, job: Job, *, bf16: bool, read_s: float, cores: float
) -> Costs:
    """Compute costs from data sheets, of which the same shares are reached that the planner assumes.

    Args:
        read_s: processor seconds of reading a tile.
        cores: of the host, per device.
    """
    arithmetic = UTILISATION * (device.bf16 if bf16 else device.fp32)
    bandwidth = BANDWIDTH_UTILISATION * device.bandwidth
    both = footprint.flops + footprint.backward_flops
    # Each operator's result is written once and read once; the forward has the share of it that it has of the FLOPs.
    traffic_s = 2 * footprint.traffic / bandwidth
    trained = footprint.trained

    def update_s(strategy: str, ranks: int) -> float:
        shards = 1 if strategy in ("single", "ddp", "zero0") else ranks
        return ADAMW_VALUES * FP32 * trained / shards / bandwidth

    def achieved(link: Link) -> Link:
        return Link(link.latency, BANDWIDTH_UTILISATION * link.bandwidth)

    return Costs(
        forward_s=max(footprint.flops / arithmetic, traffic_s * footprint.flops / both),
        both_s=max(both / arithmetic, traffic_s),
        aggregate_s=3 * footprint.aggregator_flops(job.tiles) / arithmetic,
        update_s=update_s,
        read_s=read_s,
        cores=cores,
        readers=max(1, int(cores)),
        computing=0,
        hides=("fsdp",),
        network=Network(
            network.name, network.per_node, achieved(network.inside), achieved(network.across), network.start
        ),
    )
