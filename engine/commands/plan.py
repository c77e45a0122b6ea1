"""`slidescale plan`: what a training step will take, without starting a run."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import tyro

from slidescale.engine.config import Config, RunConfig
from slidescale.engine.errors import ConfigError
from slidescale.engine.memory.devices import find_device
from slidescale.engine.units import parse_size

# What --strategy stands for without a ds.json.
ZERO_STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """Say how much memory a training step takes on each rank, and what the engine will do to fit.

    Takes all settings of a run, of which those count that memory follows from. Needs no GPU and no weights: the model
    is measured on tensors without content.
    """

    k: int
    """Tiles of the largest slide (of which a bag takes --data.k at most)."""
    ranks: int = 1
    """Ranks that train together."""
    memory: str | None = None
    """Memory of each rank, such as 80GiB; by default that of --device. A part of it is kept in reserve for libraries;
    --memory.budget has no such reserve."""
    device: str | None = None
    """Accelerator, such as H100, to estimate the time of a step; cpu: a machine without one."""
    strategy: Literal["auto", "single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"] = "auto"
    """Short for --parallel.strategy; zero0 to zero3: for a ds.json with this stage and nothing else."""
    optimizer_offload: bool = False
    """Optimizer state in the host's memory, with --strategy zero1 to zero3."""
    parameter_offload: bool = False
    """Parameters in the host's memory, with --strategy zero3 or fsdp."""
    json: bool = False
    """Print JSON: sizes in bytes."""
    config: Annotated[Config, tyro.conf.arg(name="")] = Config(run=RunConfig(name="plan"))  # noqa: RUF009 (it is frozen)
    """Settings of the run."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        for name in ("k", "ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}: must be at least 1")
        if self.memory is None and self.config.memory.budget == "auto" and (self.device is None or self.on_cpu):
            raise ConfigError(
                "--memory is missing: give the memory of a rank, such as 80GiB, or name a GPU by --device"
            )
        if self.memory is not None:
            parse_size(self.memory, "--memory")
            if self.config.memory.budget != "auto":
                raise ConfigError("--memory and --memory.budget both say what a rank may take: give one")
        if self.device is not None and not self.on_cpu:
            find_device(self.device)
        chosen = self.config.parallel.strategy
        if self.strategy != "auto" and chosen not in ("auto", self.strategy):
            raise ConfigError(f"--strategy is {self.strategy} and --parallel.strategy {chosen}: give one")
        if self.strategy in ZERO_STAGES and self.config.deepspeed_config is not None:
            raise ConfigError(f"--strategy {self.strategy} is for a plan without --deepspeed_config: give one")
        if self.optimizer_offload and self.strategy not in ("zero1", "zero2", "zero3"):
            raise ConfigError("--optimizer-offload needs --strategy zero1, zero2 or zero3; a ds.json says it itself")
        if self.parameter_offload and self.strategy not in ("zero3", "fsdp"):
            raise ConfigError("--parameter-offload needs --strategy zero3 or fsdp; a ds.json says it itself")

    @property
    def on_cpu(self) -> bool:
        """Whether ranks have no accelerator."""
        return (self.device or "").lower() == "cpu"

    def settings(self) -> Config:
        """The run's settings, with what --strategy says."""
        parallel = self.config.parallel
        if self.strategy in ("single", "ddp", "fsdp"):
            parallel = replace(parallel, strategy=self.strategy)
        if self.parameter_offload and self.strategy == "fsdp":
            parallel = replace(parallel, fsdp_offload=True)
        return replace(self.config, parallel=parallel)

    def ds_content(self) -> dict[str, Any] | None:
        """What a ds.json for --strategy zero0 to zero3 would say."""
        if self.strategy not in ZERO_STAGES:
            return None
        zero: dict[str, Any] = {"stage": ZERO_STAGES[self.strategy]}
        if self.optimizer_offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.parameter_offload:
            zero["offload_param"] = {"device": "cpu"}
        return {"zero_optimization": zero}


def print_plan(request: PlanRequest) -> None:
    """Plan a step and print the answer.

    Raises:
        UserError: see `plan_answer.make_plan`.
    """
    from slidescale.engine.commands.plan_answer import describe  # imports torch, which --help does not need

    print(describe(request))
