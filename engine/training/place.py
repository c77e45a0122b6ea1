"""Where a run computes: device, ranks, strategy, arithmetic and kernels."""

import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from slidescale.engine.config import Config
from slidescale.engine.errors import ConfigError, flag
from slidescale.engine.memory.policies import POLICIES
from slidescale.engine.memory.usage import keep_freed_memory, return_freed_memory
from slidescale.engine.parallel.mesh import Mesh, join, pick_device
from slidescale.engine.strategies.ds_config import complete_ds_config, read_ds_config, uses_bf16
from slidescale.engine.strategies.make import StrategyName, select_strategy
from slidescale.kernels.dispatch import KernelName, choose_kernels


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run computes, and in which arithmetic.

    Attributes:
        bf16: whether matrix products are in bf16.
        ds_content: of ds.json, as it was read; None without one.
        mesh: this process alone, until the ranks have met.
    """

    device: torch.device
    strategy: StrategyName
    bf16: bool
    kernels: KernelName
    ds_content: dict[str, Any] | None
    mesh: Mesh = field(default_factory=Mesh)


def choose_place(config: Config) -> Place:
    """Choose what can be chosen before the ranks meet, so that settings that do not go together are refused at once."""
    device = pick_device(config.local_rank)
    strategy = select_strategy(config, ranks=int(os.environ.get("WORLD_SIZE", 1)))
    bf16 = config.run.precision == "bf16" or (config.run.precision == "auto" and has_bf16(device))
    ds_content = read_ds_config(config.deepspeed_config) if config.deepspeed_config else None
    if ds_content is not None:
        bf16 = uses_bf16(complete_ds_config(ds_content, config, None, bf16=bf16))
    try:
        kernels = choose_kernels(config.run.kernels, device)
    except ValueError as error:
        raise ConfigError(f"--run.kernels: {error}") from None
    return Place(device=device, strategy=strategy, bf16=bf16, kernels=kernels, ds_content=ds_content)


def meet(config: Config, place: Place) -> Place:
    """The place with its ranks, which have met, unless one process trains alone."""
    mesh = join(config.parallel.tile_ranks, device=place.device, alone=place.strategy == "single")
    _check_alike(config, mesh)
    return replace(place, mesh=mesh)


def _check_alike(config: Config, mesh: Mesh) -> None:
    """Refuse ranks that were started with different settings, which would wait for each other for ever."""
    first, *others = mesh.world.gather_objects(config.flat() | {"local_rank": None})
    for rank, other in enumerate(others, start=1):
        different = [
            f"{flag(name)}: {first[name]!r} and {other[name]!r}" for name in first if first[name] != other[name]
        ]
        if different:
            raise ConfigError(f"ranks 0 and {rank} were started with different settings:\n  " + "\n  ".join(different))


def choose_allocation(config: Config, device: torch.device) -> None:
    """Before the model is built, what a CPU's memory does when it is freed."""
    if device.type == "cpu":
        # What is resident keeps to a budget, or else what was used once is used again, which is faster.
        has_limit = config.memory.budget != "auto" or POLICIES[config.memory.policy].away
        (return_freed_memory if has_limit else keep_freed_memory)()


def has_bf16(device: torch.device) -> bool:
    """Whether the device runs bf16 matrix products."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
