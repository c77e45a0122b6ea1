"""The memory plan of a run: what a step needs, what there is, and what all ranks make of it."""

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from slidescale.engine.config import (
    Config,
    OptimizerName,
)
from slidescale.engine.data.prefetch import CHUNKS_AHEAD
from slidescale.engine.errors import ConfigError
from slidescale.engine.memory.footprint import Footprint, measure, measure_forward
from slidescale.engine.memory.offload import Offload
from slidescale.engine.memory.offload_disk import DiskOffload
from slidescale.engine.memory.offload_host import HostOffload
from slidescale.engine.memory.planner import (
    CHUNK_CAP,
    FP32,
    HELPS,
    SCRATCH_BYTES,
    SCRATCH_SHARE,
    Job,
    Plan,
    choose,
    sizes_to_measure,
)
from slidescale.engine.memory.usage import available_bytes, held_bytes
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh, local_ranks
from slidescale.engine.strategies.ds_config import offload_device
from slidescale.engine.strategies.held import (
    MAX_LIVE,
    MOMENTS,
    REDUCE_BUCKET,
    ModelState,
    ShardingName,
    model_state,
)
from slidescale.engine.units import format_size, parse_size

log = logging.getLogger(__name__)

# Of what is free at the start, the share that budget auto takes. On a GPU the rest covers fragmentation. On a CPU glibc
# keeps freed blocks, up to as much again as is alive in fp32 (see `return_freed_memory`), and other programs live too.
SHARE_OF_FREE = {"cuda": 0.9, "cpu": 0.5}
# Of a frozen encoder: rows of features that pass at once where tiles would be encoded, which costs nothing.
FEATURES_CHUNK = 1024


def plan_run(
    config: Config,
    make_model: Callable[[Config], SlideModel],
    *,
    strategy: str,
    ds_config: dict[str, Any] | None,
    k: int,
    mesh: Mesh,
    device: torch.device,
) -> Plan:
    """Decide chunk size and stored graphs, alike on every rank, and say so.

    Args:
        make_model: builds the run's model for a config, on the "meta" device.
        strategy: its name, as `ModelState` knows it.
        k: tiles of the largest bag.

    Raises:
        ConfigError: not even one tile fits.
    """
    memory, ranks = config.memory, mesh.tiles.size
    footprint = None
    if mesh.world.rank == 0:
        footprint = _measure(config, make_model, local_k=-(-k // ranks), device=device)
    footprint = mesh.world.gather_objects(footprint)[0]
    assert footprint is not None
    zero = (ds_config or {}).get("zero_optimization", {})
    shards = mesh.tiles.size if config.parallel.fsdp_shard == "tiles" else mesh.world.size
    offload_parameters = bool(offload_device(zero, "offload_param")) or config.parallel.fsdp_offload
    optimizer = str((ds_config or {}).get("optimizer", {}).get("type", config.optim.optimizer)).lower()
    state = model_state(
        footprint,
        strategy=cast(ShardingName, strategy),
        ranks=shards,
        # DeepSpeed's other optimizers keep Adam's two moments too, or fewer.
        optimizer=cast(OptimizerName, optimizer if optimizer in MOMENTS else "adamw"),
        offload_optimizer=bool(offload_device(zero, "offload_optimizer")),
        offload_parameters=offload_parameters,
        fsdp_hold=config.parallel.fsdp_hold,
        reduce_bucket=int(zero.get("reduce_bucket_size", REDUCE_BUCKET)),
        max_live=int(zero.get("stage3_max_live_parameters", MAX_LIVE)),
    )
    on_host = offload_parameters and device.type == "cuda"
    to_come = _to_come(state, footprint, strategy, shards, on_host=on_host)
    base = max(mesh.world.gather_objects(held_bytes(device) + to_come))
    budget = _budget(config, mesh, device)
    job = Job(footprint=footprint, ranks=ranks, prefetch=config.data.prefetch, update=state.update)
    try:
        if footprint.given:
            plan = choose(job, k=k, budget=budget, base=base, policy="recompute", chunk=FEATURES_CHUNK)
        else:
            plan = choose(job, k=k, budget=budget, base=base, policy=memory.policy, chunk=memory.chunk)
    except ConfigError as error:
        raise ConfigError(f"{error}. {HELPS}") from None
    if footprint.given:
        log.info(
            "memory: features are read, and no tile is encoded; planned peak %s a rank at K = %d, budget %s",
            format_size(plan.peak),
            k,
            format_size(budget),
        )
    else:
        log.info(
            "memory: policy %s, chunks of %d tiles, graphs of %d of %d chunks stored at K = %d; "
            "planned peak %s a rank, budget %s",
            plan.policy,
            plan.chunk,
            plan.stored,
            plan.chunks,
            k,
            format_size(plan.peak),
            format_size(budget),
        )
    if plan.warning:
        log.warning("%s", plan.warning)
    if device.type == "cuda" and plan.need.away * local_ranks() > available_bytes(torch.device("cpu")):
        log.warning(
            "policy offload sends %s a rank away from the device, more than this machine's memory has room for: "
            "use --memory.offload-to disk, or another policy",
            format_size(plan.need.away),
        )
    return plan


def plan_encoding(
    config: Config, make_model: Callable[[Config], SlideModel], *, mesh: Mesh, device: torch.device
) -> int:
    """Tiles that a frozen encoder takes at once, alike on every rank: as many as are fast, and fit.

    Args:
        make_model: as for `plan_run`, with the encoder.

    Raises:
        ConfigError: not even one tile fits.
    """
    if config.memory.chunk != "auto":
        return config.memory.chunk
    cap = CHUNK_CAP[device.type]
    room = _budget(config, mesh, device) - max(mesh.world.gather_objects(held_bytes(device)))
    sizes = [cap >> shift for shift in range(cap.bit_length())]
    chosen = None
    if mesh.world.rank == 0:
        make = partial(make_model, _without_weights(config))
        tile_px = config.data.tile_px
        forward = measure_forward(make, tile_px=tile_px, chunks=[1, cap // 4, cap], device=device.type)
        scratch = SCRATCH_BYTES[device.type]
        # On a CPU the tiles that are read ahead take the same memory.
        bags = 1 if device.type == "cuda" else 2 + CHUNKS_AHEAD

        def need(size: int) -> int:
            return round((1 + SCRATCH_SHARE[device.type]) * forward(size)) + scratch + bags * size * 3 * tile_px**2

        chosen = next((size for size in sizes if need(size) <= room), None)
    chosen = mesh.world.gather_objects(chosen)[0]
    if chosen is None:
        raise ConfigError(
            f"not even one tile can be encoded in the {format_size(max(room, 0))} that --memory.budget leaves beside "
            "the encoder: give more, or take a smaller --data.tile-px or --model.encoder"
        )
    return chosen


def make_offload(config: Config, folder: Path, mesh: Mesh, device: torch.device) -> Offload | None:
    """Where the run's stored graphs wait, if not on the device."""
    memory = config.memory
    if memory.policy != "offload":
        return None
    if memory.offload_to == "host" or (memory.offload_to == "auto" and device.type == "cuda"):
        return HostOffload(device)
    return DiskOffload(memory.offload_folder or folder / "offload", mesh.world.rank)


def _measure(
    config: Config, make_model: Callable[[Config], SlideModel], *, local_k: int, device: torch.device
) -> Footprint:
    chunk = FEATURES_CHUNK if config.model.frozen else config.memory.chunk
    chunks, bags = sizes_to_measure(local_k, chunk, device.type)
    return measure(
        partial(make_model, _without_weights(config)),
        tile_px=config.data.tile_px,
        chunks=chunks,
        bags=bags,
        device=device.type,
    )


def _without_weights(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=False, weights=None))


def _budget(config: Config, mesh: Mesh, device: torch.device) -> int:
    """Bytes that a rank may take in all, the least of all ranks'."""
    if config.memory.budget == "auto":
        share = SHARE_OF_FREE[device.type] / (1 if device.type == "cuda" else local_ranks())
        budget = held_bytes(device) + round(share * available_bytes(device))
    else:
        budget = parse_size(config.memory.budget, "--memory.budget")
    return min(mesh.world.gather_objects(budget))


def _to_come(state: ModelState, footprint: Footprint, strategy: str, shards: int, *, on_host: bool) -> int:
    """Bytes of the model's state that are not allocated before the first step.

    Gradients and moments never are, under DeepSpeed too; its stages 1 and 2 have their fp32 copy of the weights' shard
    from the start, and stage 3 on a GPU its bucket and its shard of the gradients. Where parameters are sharded, the
    gathered ones come beside the rank's own.

    Args:
        on_host: the rank's own parameters are in the host's memory, beside a GPU.
    """
    to_come = state.gradients + state.buffers + state.optimizer
    if strategy in ("zero1", "zero2"):
        to_come -= min(-(-FP32 * footprint.trained // shards), state.optimizer)
    if strategy == "zero3" and footprint.flavour == "cuda":
        to_come -= state.buffers + state.gradients - FP32 * footprint.trained
    if strategy in ("zero3", "fsdp"):
        to_come += max(0, state.parameters - (0 if on_host else FP32 * footprint.parameters // shards))
    return to_come
