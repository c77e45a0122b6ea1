"""The memory plan of a run: what a step needs, what there is, and what all ranks make of it."""

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from slidescale.engine.config import Config
from slidescale.engine.errors import ConfigError
from slidescale.engine.memory.footprint import Footprint, measure
from slidescale.engine.memory.offload import Offload
from slidescale.engine.memory.offload_disk import DiskOffload
from slidescale.engine.memory.offload_host import HostOffload
from slidescale.engine.memory.planner import (
    FP32,
    HELPS,
    MAX_LIVE,
    MOMENTS,
    REDUCE_BUCKET,
    Job,
    ModelState,
    OptimizerName,
    Plan,
    ShardingName,
    choose,
    model_state,
    sizes_to_measure,
)
from slidescale.engine.memory.usage import available_bytes, format_size, held_bytes, parse_size
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh, local_ranks

log = logging.getLogger(__name__)

# Of what is free at the start, the share that budget auto takes. On a GPU the rest covers fragmentation. On a CPU glibc
# keeps freed blocks, up to as much again as is alive in fp32 (see `return_freed_memory`), and other programs live too.
SHARE_OF_FREE = {"cuda": 0.9, "cpu": 0.5}


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
    offload_parameters = _is_offloaded(zero.get("offload_param")) or config.parallel.fsdp_offload
    optimizer = str((ds_config or {}).get("optimizer", {}).get("type", config.optim.optimizer)).lower()
    state = model_state(
        footprint,
        strategy=cast(ShardingName, strategy),
        ranks=shards,
        # DeepSpeed's other optimizers keep Adam's two moments too, or fewer.
        optimizer=cast(OptimizerName, optimizer if optimizer in MOMENTS else "adamw"),
        offload_optimizer=_is_offloaded(zero.get("offload_optimizer")),
        offload_parameters=offload_parameters,
        fsdp_hold=config.parallel.fsdp_hold,
        reduce_bucket=int(zero.get("reduce_bucket_size", REDUCE_BUCKET)),
        max_live=int(zero.get("stage3_max_live_parameters", MAX_LIVE)),
    )
    on_host = offload_parameters and device.type == "cuda"
    to_come = _to_come(state, footprint, strategy, shards, on_host=on_host)
    base = max(mesh.world.gather_objects(held_bytes(device) + to_come))
    if memory.budget == "auto":
        budget = held_bytes(device) + round(
            SHARE_OF_FREE[device.type] * available_bytes(device) / (1 if device.type == "cuda" else local_ranks())
        )
    else:
        budget = parse_size(memory.budget, "--memory.budget")
    budget = min(mesh.world.gather_objects(budget))
    job = Job(footprint=footprint, ranks=ranks, prefetch=config.data.prefetch, update=state.update)
    try:
        plan = choose(job, k=k, budget=budget, base=base, policy=memory.policy, chunk=memory.chunk)
    except ConfigError as error:
        raise ConfigError(f"{error}. {HELPS}") from None
    log.info(
        "memory: policy %s, chunks of %d tiles, graphs of %d of %d chunks stored at K = %d; planned peak %s a rank, "
        "budget %s", plan.policy, plan.chunk, plan.stored, plan.chunks, k, format_size(plan.peak), format_size(budget),
    )  # fmt: skip
    if plan.warning:
        log.warning("%s", plan.warning)
    if device.type == "cuda" and plan.need.away * local_ranks() > available_bytes(torch.device("cpu")):
        log.warning(
            "policy offload sends %s a rank away from the device, more than this machine's memory has room for: "
            "use --memory.offload-to disk, or another policy",
            format_size(plan.need.away),
        )
    return plan


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
    without_weights = dataclasses.replace(config.model, pretrained=False, weights=None)
    chunks, bags = sizes_to_measure(local_k, config.memory.chunk, device.type)
    return measure(
        partial(make_model, dataclasses.replace(config, model=without_weights)),
        tile_px=config.data.tile_px,
        chunks=chunks,
        bags=bags,
        device=device.type,
    )


def _is_offloaded(section: dict[str, Any] | None) -> bool:
    return (section or {}).get("device", "none") != "none"


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
