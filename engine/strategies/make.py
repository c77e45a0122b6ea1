"""Which strategy a run has, and making it."""

from functools import partial
from typing import Any, Literal

import torch

from slidescale.engine.config import Config, ParallelConfig
from slidescale.engine.errors import ConfigError, flag
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.strategies.optim import make_optimizer, parameter_groups
from slidescale.engine.strategies.schedule import GroupSchedule, Schedule
from slidescale.engine.strategies.strategy import SingleStrategy, Strategy

StrategyName = Literal["single", "ddp", "zero", "fsdp"]


def select_strategy(config: Config, *, ranks: int) -> StrategyName:
    """Resolve "auto", and refuse what cannot be.

    Raises:
        ConfigError: the strategy, the number of ranks and the other settings do not go together.
    """
    wanted, with_ds = config.parallel.strategy, config.deepspeed_config is not None
    if wanted == "auto":
        wanted = "zero" if with_ds else "ddp" if ranks > 1 else "single"
    if wanted == "zero" and not with_ds:
        raise ConfigError("--parallel.strategy zero takes --deepspeed_config ds.json")
    if wanted != "zero" and with_ds:
        raise ConfigError(f"--deepspeed_config is for strategy zero, and --parallel.strategy is {wanted}: choose one")
    if wanted == "single" and ranks > 1:
        raise ConfigError(f"--parallel.strategy single is one process, and {ranks} were started: use ddp, fsdp or zero")
    in_row = config.parallel.tile_ranks
    if in_row != "all" and ranks % in_row:
        raise ConfigError(f"--parallel.tile-ranks is {in_row}: it must divide the number of ranks, {ranks}")
    if wanted != "fsdp":
        set_for_fsdp = [
            flag(f"parallel.{name}")
            for name, value in vars(config.parallel).items()
            if name.startswith("fsdp_") and value != getattr(ParallelConfig(), name)
        ]
        if set_for_fsdp:
            raise ConfigError(f"{', '.join(set_for_fsdp)} needs --parallel.strategy fsdp; this run's is {wanted}")
    return wanted


def make_strategy(
    name: StrategyName,
    model: SlideModel,
    config: Config,
    schedule: Schedule,
    mesh: Mesh,
    device: torch.device,
    *,
    ds_config: dict[str, Any] | None,
    bf16: bool,
) -> Strategy:
    """Hand the model over to its strategy.

    Args:
        ds_config: as completed, for "zero".
        bf16: whether the model runs under bf16 autocast.
    """
    schedule_for = partial(GroupSchedule, config=config.optim, schedule=schedule)
    clip = config.optim.clip
    if name == "fsdp":
        from slidescale.engine.strategies.fsdp import FsdpStrategy

        parallel = config.parallel
        if parallel.fsdp_gather_bf16 and not bf16:
            raise ConfigError("--parallel.fsdp-gather-bf16 needs bf16 arithmetic, and this run's is fp32")
        if parallel.fsdp_gather_bf16 and model.encoder.has_batch_norm():
            raise ConfigError(
                f"--parallel.fsdp-gather-bf16: {config.model.encoder} has BatchNorm layers, whose statistics are fp32 "
                "and do not mix with bf16 parameters; leave it off, or take an encoder with other normalisation"
            )
        assert mesh.device_mesh is not None
        return FsdpStrategy(
            model,
            mesh.device_mesh if parallel.fsdp_shard == "tiles" else mesh.device_mesh._flatten("world"),
            lambda sharded: make_optimizer(parameter_groups(sharded, config.optim), config.optim),
            schedule_for,
            device=device,
            clip=clip,
            offload=parallel.fsdp_offload,
            hold=parallel.fsdp_hold,
            gather=torch.bfloat16 if parallel.fsdp_gather_bf16 else None,
        )
    groups = parameter_groups(model, config.optim)
    if name == "zero":
        from slidescale.engine.strategies.zero import ZeroStrategy  # DeepSpeed takes seconds to import

        assert ds_config is not None
        return ZeroStrategy(
            model,
            groups,
            None if "optimizer" in ds_config else make_optimizer(groups, config.optim),
            None if "scheduler" in ds_config else schedule_for,
            ds_config=ds_config,
        )
    optimizer = make_optimizer(groups, config.optim)
    if name == "ddp":
        from slidescale.engine.strategies.ddp import DdpStrategy

        return DdpStrategy(model, optimizer, schedule_for(optimizer), device=device, clip=clip)
    return SingleStrategy(model, optimizer, schedule_for(optimizer), device=device, clip=clip)
