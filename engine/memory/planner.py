"""Which encoder activations to store, and how many tiles to encode at once, so that a step fits into memory.

Everything here is arithmetic on a model's `Footprint`: no tensor, no device, no clock. A step's memory is

    base (model, gradients, optimizer state)  +  pixels  +  the largest of its phases,

and its phases follow one another as `two_pass.py` runs them: chunks without a graph, chunks whose graph is stored, the
aggregator, the stored graphs' backward, the other chunks again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from slidescale.engine.errors import ConfigError
from slidescale.engine.memory.devices import Device
from slidescale.engine.memory.footprint import Footprint
from slidescale.engine.memory.usage import format_size

PolicyName = Literal["auto", "keep", "recompute", "offload"]
StrategyName = Literal["single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"]
OptimizerName = Literal["adamw", "sgd", "apex_adam", "apex_lamb"]

FP32 = 4
# fp32 values of optimizer state for each that trains: two moments (Adam, LAMB), none (SGD without momentum).
MOMENTS = {"adamw": 2, "apex_adam": 2, "apex_lamb": 2, "sgd": 0}

# Tiles a chunk beyond which a larger one is hardly faster.
CHUNK_CAP = {"cpu": 16, "cuda": 128}
# Of these, the smallest share of the cap that still counts as fast: below it, policy auto stores nothing.
FAST_SHARE = 4
# What kernels use inside themselves and allocators lose: a share of a chunk's peak, and bytes. On the CPU measured with
# `return_freed_memory` (mostly oneDNN's reordered copies, the most with convolutions in fp32); on GPUs an allowance.
SCRATCH_SHARE = {"cpu": 0.05, "cuda": 0.10}
SCRATCH_BYTES = {"cpu": 64 * 1024**2, "cuda": 0}

# DeepSpeed's defaults (runtime/zero/config.py), in parameters: reduce_bucket_size, stage3_max_live_parameters.
REDUCE_BUCKET = 500_000_000
MAX_LIVE = 1_000_000_000
# Bytes of the two flat copies through which ddp's gradients travel.
DDP_BUCKETS = 2 * 25 * 1024**2
# Bytes that policy offload holds on the device on their way out, and as many on their way back.
OFFLOAD_BUFFERS = 2 * 256 * 1024**2

# Share of the data sheet's arithmetic, and of its memory bandwidth, that a step is assumed to reach.
UTILISATION = 0.4
BANDWIDTH_UTILISATION = 0.7


@dataclass(frozen=True)
class ModelState:
    """Bytes a rank holds of the model, whatever K is.

    Attributes:
        parameters: with what is gathered of other ranks' at once.
        gradients: the rank's own sum over all chunks, whole, and its shard of the reduced ones where there is one.
        optimizer: moments, and the fp32 copy of the parameters' shard that ZeRO-1 and 2 keep.
        buffers: for communication, held all the time.
        update: needed beyond these when the step's activations are gone, to reduce and to update.
        host: held in the host's memory instead (offload), beside a GPU.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    update: int
    host: int = 0

    @property
    def base(self) -> int:
        """Bytes held throughout a step."""
        return self.parameters + self.gradients + self.optimizer + self.buffers


def model_state(
    footprint: Footprint,
    *,
    strategy: StrategyName,
    ranks: int,
    optimizer: OptimizerName = "adamw",
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    fsdp_hold: bool = False,
) -> ModelState:
    """What a rank holds of the model with fp32 weights.

    Under ZeRO-1 to 3 and FSDP2 every rank sums its gradients over the step's chunks as a whole, locally, and reduces
    once (DeepSpeed's `coalesce_grad_reduction`, FSDP2's `set_requires_gradient_sync`). ZeRO-1 and 2 clone the shard
    they update even if the model is fp32 already (DeepSpeed 0.19: `single_partition_of_fp32_groups` in
    `stage_1_and_2.py`); ZeRO-3 does so only to offload it (`fp32_partitioned_groups_flat` in `stage3.py`).

    Args:
        ranks: that the model is spread over.
    """
    cuda = footprint.flavour == "cuda"
    weights, trained = FP32 * footprint.parameters, FP32 * footprint.trained
    shard = -(-trained // ranks)
    moments = MOMENTS[optimizer]
    # PyTorch updates all tensors at once on a GPU, through temporaries of their size, and one by one on a CPU.
    temporary = 2 * trained if cuda else 2 * FP32 * footprint.largest
    bucket = FP32 * REDUCE_BUCKET if cuda else min(trained, FP32 * REDUCE_BUCKET)  # a CPU's is touched as it fills
    match strategy:
        case "single":
            return ModelState(weights, trained, moments * trained, 0, temporary)
        case "ddp":
            return ModelState(weights, trained, moments * trained, 0, max(DDP_BUCKETS, temporary))
        case "zero0":
            return ModelState(weights, trained, moments * trained, 0, max(min(bucket, trained), temporary))
        case "zero1" | "zero2":
            state = (1 + moments) * shard
            update = max(bucket + shard, 2 * shard + min(temporary, 2 * shard))
            if offload_optimizer:
                # the reduced shard too, and a buffer through which updated weights come back
                return _offloaded(ModelState(weights, trained, 0, 0, bucket), host=state + 2 * shard, cuda=cuda)
            return ModelState(weights, trained, state, 0, update)
        case "zero3":
            own, gathered = -(-weights // ranks), min(weights, FP32 * MAX_LIVE)
            host = (own if offload_parameters else 0) + ((2 + moments) * shard if offload_optimizer else 0)
            held = ModelState(
                gathered + (0 if offload_parameters else own),
                trained + (0 if offload_optimizer else shard),
                0 if offload_optimizer else moments * shard,
                bucket,
                shard + min(temporary, 2 * shard),
            )
            return _offloaded(held, host=host, cuda=cuda)
        case "fsdp":
            own = -(-weights // ranks)
            # the block that computes, the next one on its way, and what lies outside of blocks
            block = FP32 * footprint.block
            gathered = weights if fsdp_hold else min(weights, 2 * block + max(0, FP32 * footprint.outside))
            if offload_parameters:
                held = ModelState(gathered, trained, 0, 0, block)
                return _offloaded(held, host=own + (1 + moments) * shard, cuda=cuda)
            return ModelState(own + gathered, trained + shard, moments * shard, 0, min(temporary, 2 * shard))


def _offloaded(state: ModelState, *, host: int, cuda: bool) -> ModelState:
    """On a machine without accelerator, the host's memory is the same memory."""
    if cuda:
        return ModelState(state.parameters, state.gradients, state.optimizer, state.buffers, state.update, host)
    return ModelState(state.parameters, state.gradients, state.optimizer + host, state.buffers, state.update)


@dataclass(frozen=True)
class Need:
    """Bytes that a step needs beyond the base, at its peak.

    Attributes:
        pixels: uint8, of all bags alive.
        features: of all the rank's tiles, their gradient, and the aggregator's activations.
        graphs: stored, at the time of the peak.
        chunk: activations of the chunk that is computed, with what kernels use inside themselves.
        update: reduction and update, if these are the peak.
        host: in the host's memory: pixels beside a GPU, and graphs that are offloaded.
    """

    pixels: int
    features: int
    graphs: int
    chunk: int
    update: int
    host: int

    @property
    def total(self) -> int:
        """All but the host's."""
        return self.pixels + self.features + self.graphs + self.chunk + self.update


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a step's memory follows from, beside K.

    Attributes:
        ranks: T, that share a slide's tiles.
        prefetch: bags that are read ahead.
        update: see `ModelState`.
    """

    footprint: Footprint
    ranks: int = 1
    prefetch: int = 1
    update: int = 0

    def local(self, k: int) -> int:
        """Tiles of the fullest rank."""
        return -(-k // self.ranks)

    def need(self, k: int, chunk: int, stored: int, *, offload: bool = False) -> Need:
        """Bytes of a step on K tiles, of whose chunks the last `stored` keep their graph.

        Args:
            offload: stored graphs leave the device (policy `offload`).
        """
        footprint, local = self.footprint, self.local(k)
        count = -(-local // chunk)
        full, last = min(chunk, local), local - (count - 1) * chunk
        share = SCRATCH_SHARE[footprint.flavour]
        scratch = round(share * footprint.backward(full)) + SCRATCH_BYTES[footprint.flavour]
        row = FP32 * footprint.dim
        bag = local * footprint.tile_px**2 * 3
        # `TileReader.ahead` has `prefetch` bags under way beside the one handed out, which stays on the host.
        on_host = (1 + self.prefetch) * bag
        cuda = footprint.flavour == "cuda"
        pixels = bag if cuda else on_host

        own_rows = min(local, stored * chunk) * row  # stored chunks hold their features beside the bag's
        graphs = 0
        if stored and not offload:
            graphs = (stored - 1) * footprint.graph(full) + footprint.graph(last)
        buffers = OFFLOAD_BUFFERS if offload else 0
        before = max(0, graphs - footprint.graph(last)) if graphs else 0
        phases: list[tuple[int, int, int, int]] = []  # features, graphs, chunk, update
        if stored < count:
            phases.append((local * row, 0, footprint.forward(full) + scratch, 0))
            phases.append((2 * local * row, 0, footprint.backward(full) + scratch, 0))
        if stored:
            # The last chunk may be smaller than the one before it, whose peak is then the higher.
            building = max(
                footprint.building(last), footprint.building(full) - footprint.graph(full) if stored > 1 else 0
            )
            phases.append((local * row, before, building + scratch + buffers, 0))
            back = max(
                before + footprint.backward(last),
                (before + footprint.backward(full) - footprint.graph(full)) if stored > 1 else 0,
            )
            phases.append((2 * local * row + own_rows, before, back - before + scratch + buffers, 0))
        phases.append(
            (local * row + own_rows + footprint.aggregator(local) + footprint.foreign * (k - local), graphs, 0, 0)
        )
        phases.append((2 * local * row + own_rows, graphs, 0, 0))  # chunks' features, and the bag's that join them
        phases.append((0, 0, 0, self.update))
        phases.append((0 if cuda else bag, 0, 0, 0))  # between steps: the last bag goes when the next has come
        features, kept, computed, update = max(phases, key=sum)
        away = (count - 1) * footprint.graph(full) + footprint.graph(last) if offload else 0
        return Need(pixels, features, kept, computed, update, (on_host if cuda else 0) + away)


@dataclass(frozen=True)
class Plan:
    """How steps keep to their memory.

    Attributes:
        policy: that was asked for.
        chunk: tiles that go through the encoder at once.
        k: tiles of the bag that it was made for, the largest.
        chunks: that the fullest rank encodes of it.
        stored: of these, the number whose graphs are stored.
        base: bytes held before the step.
        budget: bytes that a rank may take.
        need: what the step adds at its peak.
        warning: what does not fit, or "".
    """

    policy: PolicyName
    chunk: int
    k: int
    chunks: int
    stored: int
    base: int
    budget: int
    need: Need
    warning: str
    job: Job
    may_store: bool

    @property
    def peak(self) -> int:
        """Bytes at the peak of the step on `k` tiles."""
        return self.base + self.need.total

    def stored_chunks(self, k: int) -> int:
        """How many chunks' graphs to store for a bag of K tiles; the same on every rank, for it follows from K."""
        count = -(-self.job.local(k) // self.chunk)
        if self.policy in ("keep", "offload"):
            return count
        if self.policy == "recompute" or not self.may_store:
            return 0
        return _most_stored(self.job, k, self.chunk, self.budget - self.base)


def choose(
    job: Job,
    *,
    k: int,
    budget: int,
    base: int,
    policy: PolicyName = "auto",
    chunk: int | Literal["auto"] = "auto",
) -> Plan:
    """Choose the chunk size, and how many chunks keep their graph.

    Policy auto takes, of the fast chunk sizes, the one for which most tiles are stored (the larger of two that store
    as many). With room for one chunk, that is the last one of pass 1, whose graph takes the room that pass 2 needs for
    each chunk anyway. Where no fast size fits it takes the largest that does, and stores nothing. Other policies take
    the largest chunk that fits. A policy that does not fit is carried out all the same, with a warning.

    Args:
        k: tiles of the largest bag, over all ranks.
        budget: bytes that a rank's process may take in all; with several ranks, the least of theirs.
        base: bytes it holds with parameters, gradients and optimizer state in place; of several ranks, the most.

    Raises:
        ConfigError: not even one tile fits; says by how much, and what helps.
    """
    room = budget - base
    least = job.need(k, 1, 0)
    if policy == "auto" and least.total > room:
        raise ConfigError(_does_not_fit(job, k, budget, base, least))
    cap = min(CHUNK_CAP[job.footprint.flavour], 1 << (job.local(k) - 1).bit_length())
    sizes = [chunk] if chunk != "auto" else list(_powers_down(cap))
    may_store, stored = True, 0
    if policy == "auto":
        fast = [size for size in sizes if chunk != "auto" or size * FAST_SHARE >= cap]
        fitting = [size for size in fast if job.need(k, size, 0).total <= room]
        if fitting:
            best = max(fitting, key=lambda size: (min(job.local(k), _most_stored(job, k, size, room) * size), size))
            stored = _most_stored(job, k, best, room)
        else:
            best = next((size for size in sizes if job.need(k, size, 0).total <= room), sizes[-1])
            may_store = False
    else:

        def total(size: int) -> int:
            return job.need(k, size, _fixed(policy, job, k, size), offload=policy == "offload").total

        best = next((size for size in sizes if total(size) <= room), min(sizes, key=total))
        stored = _fixed(policy, job, k, best)
    need = job.need(k, best, stored, offload=policy == "offload")
    warning = ""
    if need.total > room:
        warning = (
            f"policy {policy} with chunks of {best} tiles needs {format_size(base + need.total)} for {k} tiles, "
            f"{format_size(need.total - room)} more than the budget of {format_size(budget)}"
        )
    chunks = -(-job.local(k) // best)
    return Plan(policy, best, k, chunks, stored, base, budget, need, warning, job, may_store)


def largest_k(job: Job, *, room: int, policy: PolicyName, chunk: int) -> int:
    """The most tiles, over all ranks, of which a step fits into `room` bytes beyond the base; 0 if none."""

    def fits(local: int) -> bool:
        k = local * job.ranks
        return job.need(k, chunk, _fixed(policy, job, k, chunk), offload=policy == "offload").total <= room

    if not fits(1):
        return 0
    high = 2
    while fits(high):
        high *= 2
        if high > 1 << 40:
            raise ValueError(f"any number of tiles fits into {room} bytes: the footprint does not grow with them")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * job.ranks


def step_flops(job: Job, plan: Plan, *, checkpoint_blocks: bool) -> float:
    """FLOPs a rank computes in a step: forward, twice that backward, and what is encoded again."""
    local = job.local(plan.k)
    again = 1 - min(1.0, plan.stored * plan.chunk / local)
    forwards = 3 + again + (1 if checkpoint_blocks else 0)
    return local * (forwards * job.footprint.flops + 3 * job.footprint.aggregator_flops)


def step_seconds(job: Job, plan: Plan, device: Device, *, bf16: bool, checkpoint_blocks: bool) -> float:
    """Least time of a step's computation on a device: its arithmetic, or its memory traffic if that takes longer.

    At UTILISATION of the device's arithmetic and BANDWIDTH_UTILISATION of its bandwidth, each operator's result being
    written once and read once. Reading slides and communication are not in it.
    """
    flops = step_flops(job, plan, checkpoint_blocks=checkpoint_blocks)
    arithmetic = flops / (UTILISATION * (device.bf16 if bf16 else device.fp32))
    traffic = 2 * job.local(plan.k) * job.footprint.traffic / (BANDWIDTH_UTILISATION * device.bandwidth)
    return max(arithmetic, traffic)


def _most_stored(job: Job, k: int, chunk: int, room: int) -> int:
    """The largest number of stored chunks that fits, by bisection: need grows with it."""
    low, high = 0, -(-job.local(k) // chunk)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if job.need(k, chunk, middle).total <= room else (low, middle - 1)
    return low


def _fixed(policy: PolicyName, job: Job, k: int, chunk: int) -> int:
    """Stored chunks of a policy that leaves no choice; of auto, the fewest."""
    return -(-job.local(k) // chunk) if policy in ("keep", "offload") else 0


def _powers_down(cap: int) -> Iterator[int]:
    while cap:
        yield cap
        cap //= 2


def _does_not_fit(job: Job, k: int, budget: int, base: int, least: Need) -> str:
    return (
        f"a bag of {k} tiles does not fit: a rank holds {format_size(base)} before the step, and the step needs "
        f"{format_size(least.total)} with one tile encoded at a time ({format_size(least.pixels)} of pixels, "
        f"{format_size(least.features)} of features, {format_size(least.chunk)} of activations), "
        f"{format_size(base + least.total - budget)} more than the budget of {format_size(budget)}. What helps: "
        "--memory.checkpoint-blocks, a smaller --data.tile-px or --data.k, more ranks, "
        "a strategy that shards or offloads the model (zero3, fsdp), a larger --memory.budget"
    )
