"""Which encoder activations to store, and how many tiles to encode at once, so that a step fits into memory.

Everything here is arithmetic on a model's `Footprint`: no tensor, no device, no clock. A step's memory is

    base (model, gradients, optimizer state)  +  pixels  +  the largest of its phases,

and its phases follow one another as `two_pass.py` runs them: chunks without a graph, chunks whose graph is stored, the
aggregator, the stored graphs' backward, the other chunks again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from slidescale.engine.config import PolicyName
from slidescale.engine.errors import ConfigError
from slidescale.engine.memory.devices import Device
from slidescale.engine.memory.footprint import Footprint
from slidescale.engine.memory.offload_disk import DISK_AHEAD, STAGE
from slidescale.engine.memory.offload_host import HOST_AHEAD
from slidescale.engine.units import format_size

FP32 = 4

# Tiles a chunk beyond which a larger one is hardly faster.
CHUNK_CAP = {"cpu": 16, "cuda": 128}
# Of these, the smallest share of the cap that still counts as fast: below it, policy auto stores nothing.
FAST_SHARE = 4
# What kernels use inside themselves and allocators lose: a share of a chunk's peak, and bytes. On the CPU measured with
# `return_freed_memory` (mostly oneDNN's reordered copies, the most with convolutions in fp32); on GPUs an allowance.
SCRATCH_SHARE = {"cpu": 0.05, "cuda": 0.10}
SCRATCH_BYTES = {"cpu": 64 * 1024**2, "cuda": 0}
# What attention pooling's operators hold inside themselves, which the footprint does not see: so much a tile (several
# rows of a gate of 384), until they compute in blocks.
POOLING_TILE_BYTES = 16 * 1024
POOLING_BYTES = {"cpu": 64 * 1024**2, "cuda": 256 * 1024**2}

# Bytes that policy offload holds where it computes: on a GPU on their way out, and as many on their way back; on a CPU
# on their way to disk, and read ahead of their use, beside which one storage may be on its way.
OFFLOAD_BUFFERS = {"cuda": 2 * HOST_AHEAD, "cpu": 2 * STAGE + DISK_AHEAD}

# Share of the data sheet's arithmetic, and of its memory bandwidth, that a step is assumed to reach.
UTILISATION = 0.4
BANDWIDTH_UTILISATION = 0.7

# What a training run can be told when not even one tile fits.
HELPS = (
    "What helps: --memory.checkpoint-blocks, a smaller --data.tile-px or --data.k, more ranks, "
    "a strategy that shards or offloads the model (zero3, fsdp), a larger --memory.budget"
)


@dataclass(frozen=True)
class Need:
    """Bytes that a step needs beyond the base, at its peak.

    Attributes:
        pixels: uint8, of all bags alive; of a frozen encoder, their features as they are read.
        features: of all the rank's tiles, their gradient, and the aggregator's activations.
        graphs: stored, at the time of the peak.
        chunk: activations of the chunk that is computed, with what kernels use inside themselves.
        update: reduction and update, if these are the peak.
        host: pixels in the host's memory, beside a GPU.
        away: graphs that are offloaded, in the host's memory beside a GPU, or on disk.
    """

    pixels: int
    features: int
    graphs: int
    chunk: int
    update: int
    host: int
    away: int

    @property
    def total(self) -> int:
        """All where the rank computes."""
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
        bag = local * footprint.tile_bytes
        # `TileReader.ahead` has `prefetch` bags under way beside the one handed out, which stays on the host.
        on_host = (1 + self.prefetch) * bag
        cuda = footprint.flavour == "cuda"
        pixels = bag if cuda else on_host

        own_rows = min(local, stored * chunk) * row  # stored chunks hold their features beside the bag's
        before = max(0, stored - 1) * footprint.graph(full)  # graphs, when the last is about to be stored
        kept = before + footprint.graph(last) if stored else 0
        graphs, away = (0, kept) if offload else (kept, 0)
        phases: list[tuple[int, int, int, int]] = []  # features, graphs, chunk, update
        if stored < count:
            phases.append((local * row, 0, footprint.forward(full) + scratch, 0))
            phases.append((2 * local * row, 0, footprint.backward(full) + scratch, 0))
        if stored and offload:
            # What is saved leaves as the forward goes, which then holds no more than one without a graph, and comes
            # back as the backward goes.
            buffers = OFFLOAD_BUFFERS[footprint.flavour] + (0 if cuda else footprint.storage(full))
            beyond = max(footprint.backward(n) - footprint.graph(n) for n in {full, last})
            phases.append((local * row, 0, footprint.forward(full) + scratch + buffers, 0))
            phases.append((2 * local * row + own_rows, 0, max(beyond, footprint.forward(full)) + scratch + buffers, 0))
        elif stored:
            # The last chunk may be smaller than the one before it, whose peak is then the higher.
            building = max(
                footprint.building(last), footprint.building(full) - footprint.graph(full) if stored > 1 else 0
            )
            phases.append((local * row, before, building + scratch, 0))
            back = max(footprint.backward(last), footprint.backward(full) - footprint.graph(full) if stored > 1 else 0)
            phases.append((2 * local * row + own_rows, before, back + scratch, 0))
        pooling = min(local * POOLING_TILE_BYTES, POOLING_BYTES[footprint.flavour])
        aggregator = footprint.aggregator(local) + pooling
        phases.append((local * row + own_rows + aggregator + footprint.foreign * (k - local), graphs, 0, 0))
        phases.append((2 * local * row + own_rows, graphs, 0, 0))  # chunks' features, and the bag's that join them
        phases.append((0, 0, 0, self.update))
        phases.append((0 if cuda else bag, 0, 0, 0))  # between steps: the last bag goes when the next has come
        features, graphs, computed, update = max(phases, key=sum)
        return Need(pixels, features, graphs, computed, update, on_host if cuda else 0, away)


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


def sizes_to_measure(local: int, chunk: int | Literal["auto"], flavour: str) -> tuple[list[int], list[int]]:
    """Numbers of tiles at which to measure the encoder and the aggregator (`footprint.measure`), at least two of each.

    Args:
        local: tiles of the fullest rank.
        chunk: as `choose` is given it.
    """
    cap = max(2, min(CHUNK_CAP[flavour] if chunk == "auto" else chunk, _covering(local)))
    return sorted({1, max(1, cap // 4), cap}), sorted({1, local, 1024})


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
        ConfigError: not even one tile fits; says by how much. What helps (such as HELPS) is the caller's to add.
    """
    room = budget - base
    least = job.need(k, 1, 0)
    if policy == "auto" and least.total > room:
        raise ConfigError(_does_not_fit(job, k, budget, base, least))
    cap = min(CHUNK_CAP[job.footprint.flavour], _covering(job.local(k)))
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

        best = next((size for size in sizes if total(size) <= room), None) or min(sizes, key=total)
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


def step_flops(job: Job, plan: Plan) -> float:
    """FLOPs a rank computes in a step: forward, backward, and what is encoded again."""
    footprint, local = job.footprint, job.local(plan.k)
    again = 1 - min(1.0, plan.stored * plan.chunk / local)
    # The whole aggregator trains: its backward is twice its forward.
    return local * ((1 + again) * footprint.flops + footprint.backward_flops) + 3 * footprint.aggregator_flops(local)


def step_seconds(job: Job, plan: Plan, device: Device, *, bf16: bool) -> float:
    """Least time of a step on a device: of its arithmetic, its memory's traffic and its transfers, what takes longest.

    At UTILISATION of the device's arithmetic and BANDWIDTH_UTILISATION of its bandwidths. In memory each operator's
    result is written once and read once; what is offloaded goes to the host and comes back, one after the other.
    Reading slides and communication between ranks are not in it.
    """
    arithmetic = step_flops(job, plan) / (UTILISATION * (device.bf16 if bf16 else device.fp32))
    traffic = 2 * job.local(plan.k) * job.footprint.traffic / (BANDWIDTH_UTILISATION * device.bandwidth)
    moved = 2 * plan.need.away / (BANDWIDTH_UTILISATION * device.host)
    return max(arithmetic, traffic, moved)


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


def _covering(local: int) -> int:
    """The least power of two that is no less."""
    return 1 << (local - 1).bit_length()


def _powers_down(cap: int) -> Iterator[int]:
    while cap:
        yield cap
        cap //= 2


def _does_not_fit(job: Job, k: int, budget: int, base: int, least: Need) -> str:
    parts = [
        (least.pixels, "pixels"),
        (least.features, "features and aggregator"),
        (least.chunk, "activations"),
        (least.update, "gradient reduction and update"),
    ]
    told = ", ".join(f"{format_size(size)} of {name}" for size, name in parts if size)
    return (
        f"a bag of {k} tiles does not fit: a rank holds {format_size(base)} before the step, and the step needs "
        f"{format_size(least.total)} with one tile encoded at a time ({told}), "
        f"{format_size(base + least.total - budget)} more than the budget of {format_size(budget)}"
    )
