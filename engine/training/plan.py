"""The memory plan of a run: what a step needs, what there is, and what all ranks make of it."""

import logging
from typing import Literal

import torch
from torch import Tensor

from slidescale.engine.config import MemoryConfig
from slidescale.engine.data.prefetch import CHUNKS_AHEAD
from slidescale.engine.errors import ConfigError
from slidescale.engine.memory.footprint import Footprint, measure, measure_forward
from slidescale.engine.memory.needs import FP32, SCRATCH_BYTES, SCRATCH_SHARE, Job
from slidescale.engine.memory.offload import Offload
from slidescale.engine.memory.planner import CHUNK_CAP, Plan, choose, sizes_to_measure
from slidescale.engine.memory.policies import POLICIES
from slidescale.engine.memory.usage import available_bytes, held_bytes
from slidescale.engine.models.encoder import GivenFeatures
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh, local_ranks
from slidescale.engine.strategies.held import Holding, ModelState, model_state
from slidescale.engine.units import format_size, parse_size

log = logging.getLogger(__name__)

# Of what is free at the start, the share that budget auto takes. On a GPU the rest covers fragmentation. On a CPU glibc
# keeps freed blocks, up to as much again as is alive in fp32 (see `return_freed_memory`), and other programs live too.
SHARE_OF_FREE = {"cuda": 0.9, "cpu": 0.5}
# Of a frozen encoder: rows of features that pass at once where tiles would be encoded, which costs nothing.
FEATURES_CHUNK = 1024

# What a message about a step that does not fit ends with.
HELPS = (
    "What helps: --memory.checkpoint-blocks, a smaller --data.tile-px or --data.k, more ranks, "
    "a strategy that shards or offloads the model (zero3, fsdp), a larger {more}"
)


def measure_model(model: SlideModel, tiles: Tensor, memory: MemoryConfig, *, k: int, mesh: Mesh) -> Footprint:
    """Measure a model on the main rank, for all ranks.

    Args:
        model: as it was before a strategy had it, or a `meta_copy` of that.
        tiles: `[n, …]` as the encoder takes them, of which a tile's shape and dtype count; n may be 0.
        k: tiles of the largest bag.

    Raises:
        UserError: see `measure`.
    """
    tile = torch.empty(tiles.shape[1:], dtype=tiles.dtype, device="meta")
    return mesh.world.ask_main(
        lambda: measure_for(model, tile, memory.chunk, k=k, ranks=mesh.tiles.size, flavour=mesh.device.type)
    )


def measure_for(
    model: SlideModel, tile: Tensor, chunk: int | Literal["auto"], *, k: int, ranks: int, flavour: str
) -> Footprint:
    """Measure a model at the sizes that planning for bags of K tiles looks at; arguments as for `measure`."""
    chunk = FEATURES_CHUNK if isinstance(model.encoder, GivenFeatures) else chunk
    chunks, bags = sizes_to_measure(k, chunk, flavour, ranks=ranks)
    return measure(model, tile, chunks=chunks, bags=bags, ranks=ranks, device=flavour)


def plan_for(
    footprint: Footprint,
    state: ModelState,
    memory: MemoryConfig,
    *,
    k: int,
    prefetch: int,
    base: int,
    budget: int,
    more: str = "--memory.budget",
) -> Plan:
    """Decide chunk size and stored graphs.

    Args:
        state: of the model, as its strategy holds it.
        k: tiles of the largest bag, over all ranks.
        prefetch: bags that are read ahead of the step.
        base: bytes per rank before a step.
        budget: total bytes per rank.
        more: the setting that would give more, for messages.

    Raises:
        ConfigError: not even one tile fits.
    """
    job = Job(footprint=footprint, prefetch=prefetch, update=state.update)
    try:
        if footprint.given:
            return choose(job, k=k, budget=budget, base=base, policy="recompute", chunk=FEATURES_CHUNK)
        return choose(job, k=k, budget=budget, base=base, policy=memory.policy, chunk=memory.chunk)
    except ConfigError as error:
        raise ConfigError(f"{error}. {HELPS.format(more=more)}") from None


def plan_step(
    footprint: Footprint, memory: MemoryConfig, holding: Holding, *, k: int, prefetch: int, mesh: Mesh
) -> Plan:
    """Decide chunk size and stored graphs, alike on every rank, and say so; called once the strategy has the model.

    Args:
        footprint: the same on every rank.
        k: tiles of the largest bag, over all ranks.
        prefetch: bags that are read ahead of the step.

    Raises:
        ConfigError: not even one tile fits.
    """
    device = mesh.device
    state = model_state(footprint, holding)
    base = max(mesh.world.gather_objects(held_bytes(device) + _to_come(state, footprint, holding)))
    plan = plan_for(footprint, state, memory, k=k, prefetch=prefetch, base=base, budget=_budget(memory, mesh))
    if footprint.given:
        log.info(
            "memory: features are read, and no tile is encoded; planned peak %s per rank at K = %d, budget %s",
            format_size(plan.peak),
            k,
            format_size(plan.budget),
        )
    else:
        log.info(
            "memory: policy %s, chunks of %d tiles, graphs of %d of %d chunks stored at K = %d; "
            "planned peak %s per rank, budget %s",
            plan.policy,
            plan.chunk,
            plan.stored,
            plan.chunks,
            k,
            format_size(plan.peak),
            format_size(plan.budget),
        )
    if plan.warning:
        log.warning("%s", plan.warning)
    if device.type == "cuda" and plan.need.away * local_ranks() > available_bytes(torch.device("cpu")):
        log.warning(
            "policy offload sends %s per rank away from the device, more than this machine's memory has room for: "
            "use --memory.offload-to disk, or another policy",
            format_size(plan.need.away),
        )
    return plan


def plan_encoding(model: SlideModel, tile: Tensor, memory: MemoryConfig, *, mesh: Mesh) -> int:
    """Tiles that a frozen encoder takes at once, alike on every rank: as many as are fast, and fit.

    Args:
        tile: one, of which shape and dtype count.

    Raises:
        ConfigError: not even one tile fits.
    """
    if memory.chunk != "auto":
        return memory.chunk
    flavour = mesh.device.type
    cap = CHUNK_CAP[flavour]
    room = _budget(memory, mesh) - max(mesh.world.gather_objects(held_bytes(mesh.device)))
    tile_bytes = tile.numel() * tile.element_size()

    def fitting() -> int | None:
        forward = measure_forward(model, tile, chunks=[1, cap // 4, cap], device=flavour)
        # On a CPU the tiles that are read ahead take the same memory.
        bags = 1 if flavour == "cuda" else 2 + CHUNKS_AHEAD

        def need(size: int) -> int:
            return (
                round((1 + SCRATCH_SHARE[flavour]) * forward(size)) + SCRATCH_BYTES[flavour] + bags * size * tile_bytes
            )

        sizes = [cap >> shift for shift in range(cap.bit_length())]
        return next((size for size in sizes if need(size) <= room), None)

    chosen = mesh.world.ask_main(fitting)
    if chosen is None:
        raise ConfigError(
            f"not even one tile can be encoded in the {format_size(max(room, 0))} that --memory.budget leaves beside "
            "the encoder: give more, or take a smaller --data.tile-px or --model.encoder"
        )
    return chosen


def make_offload(memory: MemoryConfig, mesh: Mesh) -> Offload | None:
    """Where stored graphs wait, if not on the device.

    Raises:
        ConfigError: in files, and `memory.offload_folder` is None.
    """
    return POLICIES[memory.policy].open(memory, device=mesh.device, rank=mesh.world.rank)


def _budget(memory: MemoryConfig, mesh: Mesh) -> int:
    """Total bytes per rank, the least of all ranks."""
    device = mesh.device
    if memory.budget == "auto":
        share = SHARE_OF_FREE[device.type] / (1 if device.type == "cuda" else local_ranks())
        budget = held_bytes(device) + round(share * available_bytes(device))
    else:
        budget = parse_size(memory.budget, "--memory.budget")
    return min(mesh.world.gather_objects(budget))


def _to_come(state: ModelState, footprint: Footprint, holding: Holding) -> int:
    """Bytes of the model's state that are not allocated before the first step.

    Gradients and moments never are, under DeepSpeed too; its stages 1 and 2 have their fp32 copy of the weights' shard
    from the start, and stage 3 on a GPU its bucket and its shard of the gradients. Where parameters are sharded, the
    gathered ones come beside the rank's own.
    """
    to_come = state.gradients + state.buffers + state.optimizer
    if holding.strategy in ("zero1", "zero2"):
        to_come -= min(-(-FP32 * footprint.trained // holding.shards), state.optimizer)
    if holding.strategy == "zero3" and footprint.flavour == "cuda":
        to_come -= state.buffers + state.gradients - FP32 * footprint.trained
    if holding.strategy in ("zero3", "fsdp"):
        on_host = holding.offload_parameters and footprint.flavour == "cuda"  # the rank's own parameters
        to_come += max(0, state.parameters - (0 if on_host else FP32 * footprint.parameters // holding.shards))
    return to_come
