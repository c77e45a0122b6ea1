"""Choosing a strategy, and making it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from slidescale.engine.config import Config, OptimConfig, ParallelConfig
from slidescale.engine.errors import ConfigError, flag
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.strategies.held import optimizer_of
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


@dataclass(frozen=True)
class Optimizing:
    """Optimizer and scheduler of a model, made once a strategy has it, because FSDP2 replaces the parameters.

    Attributes:
        groups: of the model's parameters, as torch optimizers take them, none with parameters of both halves; each may
            have a `name`, which begins with "encoder" or "aggregator".
        optimizer: over these groups; None where ds.json names one.
        scheduler: of that optimizer; None where there is none, or ds.json names one.
        kind: of optimizer, in lower case, for the size of its state.
    """

    groups: Callable[[SlideModel], list[dict[str, Any]]]
    optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    kind: str = "adamw"

    @classmethod
    def as_settings_say(
        cls, config: OptimConfig, schedule: Schedule, ds_config: dict[str, Any] | None = None
    ) -> "Optimizing":
        """Make the ones that `optim`'s settings name, unless a ds.json names its own.

        Args:
            ds_config: as completed.
        """
        named = ds_config or {}
        return cls(
            partial(parameter_groups, config=config),
            None if "optimizer" in named else partial(make_optimizer, config=config),
            None if "scheduler" in named else partial(GroupSchedule, config=config, schedule=schedule),
            optimizer_of(config, ds_config),
        )

    @classmethod
    def of(
        cls, optimizer: Optimizer, scheduler: Callable[[Optimizer], LRScheduler] | None, model: SlideModel
    ) -> "Optimizing":
        """An optimizer that is there already, over the model's parameters as they are before a strategy has them.

        Its groups are cut into those of the aggregator and those of the encoder, with the same settings.

        Raises:
            ConfigError: it has taken a step, has other parameters, or lacks one that trains.
        """
        if optimizer.state:
            raise ConfigError(
                "the optimizer has taken a step: make a new one, for the model may be spread over ranks now"
            )
        names = {parameter: name for name, parameter in model.named_parameters()}
        grouped: list[list[str]] = []
        halves = []
        for group in optimizer.param_groups:
            if strange := [list(parameter.shape) for parameter in group["params"] if parameter not in names]:
                raise ConfigError(f"the optimizer has parameters that are not the model's, such as one of {strange[0]}")
            for half in ("aggregator", "encoder"):
                mine = [names[p] for p in group["params"] if names[p].startswith(f"{half}.")]
                if mine:
                    halves.append({**group, "params": [p for p in group["params"] if names[p] in mine]})
                    grouped.append(mine)
        known = {name for each in grouped for name in each}
        if left := [name for name, p in model.named_parameters() if p.requires_grad and name not in known]:
            raise ConfigError(
                f"{len(left)} parameters train and are in no group of the optimizer, such as {left[0]}: add them, or "
                "leave them as they are by requires_grad_(False)"
            )
        optimizer.param_groups[:] = halves

        def groups(held: SlideModel) -> list[dict[str, Any]]:
            parameters = dict(held.named_parameters())
            for group, mine in zip(optimizer.param_groups, grouped, strict=True):
                group["params"] = [parameters[name] for name in mine]
            return optimizer.param_groups

        kind = type(optimizer).__name__.lower()
        return cls(groups, lambda _: optimizer, scheduler, kind)


def make_strategy(
    name: StrategyName,
    model: SlideModel,
    optimizing: Optimizing,
    mesh: Mesh,
    *,
    clip: float = 0.0,
    ds_config: dict[str, Any] | None = None,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 (it is frozen)
    unit_numel: int | None = None,
) -> Strategy:
    """Hand the model over to its strategy.

    Args:
        clip: the largest gradient norm to step with, unless ds.json says it; 0 never clips.
        ds_config: as completed, for "zero".
        parallel: has the settings of "fsdp".
        unit_numel: of "fsdp", the fewest parameters of a block that is gathered by itself; None: `fsdp.UNIT_NUMEL`.
    """
    scheduler = optimizing.scheduler

    def make_with(groups: list[dict[str, Any]]) -> Optimizer:
        assert optimizing.optimizer is not None, "ds.json names the optimizer of strategy zero only"
        return optimizing.optimizer(groups)

    if name == "fsdp":
        from slidescale.engine.strategies.fsdp import UNIT_NUMEL, FsdpStrategy

        if parallel.fsdp_gather_bf16:
            _check_gather_bf16(model)
        assert mesh.device_mesh is not None
        return FsdpStrategy(
            model,
            mesh.device_mesh if parallel.fsdp_shard == "tiles" else mesh.device_mesh._flatten("world"),
            lambda sharded: make_with(optimizing.groups(sharded)),
            scheduler,
            device=mesh.device,
            clip=clip,
            offload=parallel.fsdp_offload,
            hold=parallel.fsdp_hold,
            gather=torch.bfloat16 if parallel.fsdp_gather_bf16 else None,
            unit_numel=UNIT_NUMEL if unit_numel is None else unit_numel,
        )
    groups = optimizing.groups(model)
    if name == "zero":
        from slidescale.engine.strategies.zero import ZeroStrategy  # DeepSpeed takes seconds to import

        assert ds_config is not None
        optimizer = make_with(groups) if optimizing.optimizer else None
        return ZeroStrategy(model, groups, optimizer, scheduler, ds_config=ds_config)
    optimizer = make_with(groups)
    schedule = scheduler(optimizer) if scheduler else None
    if name == "ddp":
        from slidescale.engine.strategies.ddp import DdpStrategy

        return DdpStrategy(model, optimizer, schedule, device=mesh.device, clip=clip)
    return SingleStrategy(model, optimizer, schedule, device=mesh.device, clip=clip)


def _check_gather_bf16(model: SlideModel) -> None:
    if model.autocast != torch.bfloat16:
        raise ConfigError("--parallel.fsdp-gather-bf16 needs bf16 arithmetic, and this run's is fp32")
    if any(isinstance(module, _BatchNorm) for module in model.encoder.modules()):
        raise ConfigError(
            "--parallel.fsdp-gather-bf16: the encoder has BatchNorm layers, whose statistics are fp32 and do not mix "
            "with bf16 parameters; leave it off, or take an encoder with other normalisation"
        )
