"""Bytes that a training step needs: arithmetic on a model's `Footprint`, without tensors, devices or clocks.

A step's memory is

    base (model, gradients, optimizer state)  +  pixels  +  the largest of its phases,

and its phases follow one another as `two_pass.py` runs them: chunks without a graph, chunks whose graph is stored, the
aggregator, the stored graphs' backward, the other chunks again.
"""

from dataclasses import dataclass

from slidescale.engine.memory.footprint import Footprint
from slidescale.engine.memory.offload_disk import DISK_AHEAD, STAGE
from slidescale.engine.memory.offload_host import HOST_AHEAD

FP32 = 4

# What kernels use inside themselves and allocators lose: a share of a chunk's peak, and bytes. On the CPU measured with
# `return_freed_memory` (mostly oneDNN's reordered copies, the most with convolutions in fp32); on GPUs an allowance.
SCRATCH_SHARE = {"cpu": 0.05, "cuda": 0.10}
SCRATCH_BYTES = {"cpu": 64 * 1024**2, "cuda": 0}
# What attention pooling's operators hold inside themselves, which the footprint does not see: so much per tile (several
# rows of a gate of 384), until they compute in blocks.
POOLING_TILE_BYTES = 16 * 1024
POOLING_BYTES = {"cpu": 64 * 1024**2, "cuda": 256 * 1024**2}

# Bytes that graphs on their way hold where the rank computes: on a GPU those that leave, and as many that come back; on
# a CPU those on their way to disk and those read ahead, beside which one storage may be under way.
OFFLOAD_BUFFERS = {"cuda": 2 * HOST_AHEAD, "cpu": 2 * STAGE + DISK_AHEAD}


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
        """All bytes where the rank computes."""
        return self.pixels + self.features + self.graphs + self.chunk + self.update


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a step's memory follows from, beside K.

    Attributes:
        prefetch: bags that are read ahead.
        update: see `ModelState`.
    """

    footprint: Footprint
    prefetch: int = 1
    update: int = 0

    def local(self, k: int) -> int:
        """Tiles of the fullest rank."""
        return -(-k // self.footprint.ranks)

    def chunks(self, k: int, chunk: int) -> int:
        """Chunks of the fullest rank."""
        return -(-self.local(k) // chunk)

    def need(self, k: int, chunk: int, stored: int, *, away: bool = False) -> Need:
        """Bytes of a step on K tiles, of whose chunks the last `stored` keep their graph.

        Args:
            away: stored graphs leave the device (policy `offload`).
        """
        footprint, local = self.footprint, self.local(k)
        count = self.chunks(k, chunk)
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
        graphs, gone = (0, kept) if away else (kept, 0)
        phases: list[tuple[int, int, int, int]] = []  # features, graphs, chunk, update
        if stored < count:
            phases.append((local * row, 0, footprint.forward(full) + scratch, 0))
            phases.append((2 * local * row, 0, footprint.backward(full) + scratch, 0))
        if stored and away:
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
        aggregator = footprint.aggregator(k) + min(local * POOLING_TILE_BYTES, POOLING_BYTES[footprint.flavour])
        phases.append((local * row + own_rows + aggregator, graphs, 0, 0))
        phases.append((2 * local * row + own_rows, graphs, 0, 0))  # chunks' features, and the bag's that join them
        phases.append((0, 0, 0, self.update))
        phases.append((0 if cuda else bag, 0, 0, 0))  # between steps: the last bag goes when the next has come
        features, graphs, computed, update = max(phases, key=sum)
        return Need(pixels, features, graphs, computed, update, on_host if cuda else 0, gone)
