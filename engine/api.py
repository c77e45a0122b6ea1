"""The engine as a library: exact training steps for any encoder and any aggregator, on one or several ranks."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from slidescale.engine.config import Config, MemoryConfig, OptimConfig, ParallelConfig, PolicyName, RunConfig
from slidescale.engine.errors import ConfigError
from slidescale.engine.memory.fake_model import meta_copy
from slidescale.engine.memory.planner import Plan
from slidescale.engine.memory.policies import POLICIES, Policy
from slidescale.engine.memory.two_pass import Chunks, encode
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh, join
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.strategies.ds_config import ELEMENTWISE, complete_ds_config
from slidescale.engine.strategies.held import Holding
from slidescale.engine.strategies.make import Optimizing, StrategyName, make_strategy
from slidescale.engine.strategies.strategy import Strategy
from slidescale.engine.training.bags import Bag, to_step
from slidescale.engine.training.plan import make_offload, measure_model, plan_step
from slidescale.engine.training.step import Loss, Planned, Step, StepResult, TrainStep
from slidescale.engine.training.weights import write_weights


def make_step(
    model: SlideModel,
    optimizer: Optimizer | Optimizing,
    loss: Loss,
    *,
    mesh: Mesh | None = None,
    strategy: str = "auto",
    ds_config: dict[str, Any] | None = None,
    parallel: ParallelConfig | None = None,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    clip: float = 0.0,
    chunk: int | Literal["auto"] = "auto",
    budget: str = "auto",
    policy: PolicyName = "auto",
    offload_folder: Path | None = None,
    offload_to: Literal["auto", "host", "disk"] = "auto",
    unit_numel: int | None = None,
) -> "SlideStep":
    """Put a model into the hands of a strategy and a memory policy, ready to train.

    The model is moved to the mesh's device, and from here on is the strategy's: `model.train()`, `model.eval()` and the
    optimizer's settings remain yours.

    Args:
        optimizer: over the model's parameters, before its first step; each that trains must be in one of its groups.
        loss: of one slide, `loss(logits [C], target) -> scalar`.
        mesh: as `join` returns it; None joins the ranks that a launcher has started.
        strategy: who holds parameters, gradients and optimizer state: "single", "ddp", "fsdp", or "zero0" to "zero3";
            "zero" with `ds_config`. auto: ddp where there are several ranks, else single.
        ds_config: of DeepSpeed, as `complete_ds_config` returns it.
        parallel: settings of fsdp.
        scheduler: makes one for the optimizer; it advances with each step.
        clip: the largest gradient norm to step with; 0 never clips. With `ds_config`, that says it.
        chunk: tiles that go through the encoder at once; "auto": as many as are fast, and fit.
        budget: total memory per rank, such as "16GiB"; "auto": 90% of what is free on a GPU, 50% on a CPU.
        policy: what becomes of the encoder's activations between forward and backward: "recompute", "keep", "offload",
            or "auto", which keeps as many as fit in the budget.
        offload_folder: where policy offload writes files, on a fast local disk.
        offload_to: "host", page-locked memory beside a GPU, or "disk".
        unit_numel: of fsdp, the fewest parameters of a block that is gathered by itself.

    Raises:
        ConfigError: settings that do not go together, or an optimizer that does not have the model's parameters.
    """
    name, stage = _resolve(strategy, ds_config, mesh)
    if stage and isinstance(optimizer, Optimizer):
        _check_elementwise(optimizer, strategy)
    mesh = _meet(mesh, name)
    if stage is not None:
        bf16 = model.autocast == torch.bfloat16
        ours = Config(run=RunConfig(name="library"), optim=OptimConfig(clip=clip))
        # DeepSpeed's list of tested optimizers is short; ours is of those that ZeRO may split.
        content = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
        ds_config = complete_ds_config(content, ours, None, bf16=bf16)
    memory = MemoryConfig(
        chunk=chunk, budget=budget, policy=policy, offload_folder=offload_folder, offload_to=offload_to
    )
    parallel = parallel or ParallelConfig()
    model.to(mesh.device)
    try:
        before: SlideModel | ConfigError = meta_copy(model)
    except ConfigError as error:  # where nothing is left to plan, nothing need be measured
        before = error
    optimizing = optimizer if isinstance(optimizer, Optimizing) else Optimizing.of(optimizer, scheduler, model)
    made = make_strategy(
        name, model, optimizing, mesh, clip=clip, ds_config=ds_config, parallel=parallel, unit_numel=unit_numel
    )
    holding = Holding.of(parallel, made.name, ds_config, mesh, optimizing.kind)
    return SlideStep(made, loss, mesh, memory, holding, before)


@dataclass(frozen=True)
class FixedPlan:
    """A plan without a choice: a chunk size, and a policy that does not ask for room."""

    chunk: int
    policy: Policy
    tiles: TileGroup

    def stored_chunks(self, k: int) -> int:
        """As the policy says for the fullest rank, whether it fits or not."""
        return self.policy.stored(self.tiles.chunk_count(k, self.chunk), lambda number: True)


class SlideStep:
    """A slide model in training; `make_step` makes one.

    Attributes:
        strategy: who holds the model.
        mesh: the ranks.
        plan: how steps keep to their memory; made at the first step, for a bag of its size. A larger bag is stored as
            far as it fits.
    """

    def __init__(
        self,
        strategy: Strategy,
        loss: Loss,
        mesh: Mesh,
        memory: MemoryConfig,
        holding: Holding,
        measured: SlideModel | ConfigError,
    ) -> None:
        self.strategy = strategy
        self.mesh = mesh
        self.plan: Planned | None = None
        self._loss = loss
        self._memory = memory
        self._holding = holding
        # The model as it was before the strategy had it, without content; or why there is no such copy.
        self._measured = measured
        self.offload = make_offload(memory, mesh)
        self._count = 0
        self._step: TrainStep | None = None

    @property
    def model(self) -> SlideModel:
        """The model, as its strategy holds it."""
        return self.strategy.model

    def __call__(self, *bags: Bag) -> StepResult:
        """One optimizer step: the mean of the gradients of the bags of all tile groups, each through all its tiles.

        Args:
            bags: this rank's shares; several are taken one after another (gradient accumulation).

        Raises:
            UserError: see `to_step`.
            TrainingError: loss or gradient is not finite; no optimizer step was taken.
        """
        step = to_step(bags, self.mesh, self._count)
        self._plan_first(bags[0].tiles, step)
        self._count += 1
        return self.take(step)

    def take(self, step: Step) -> StepResult:
        """One optimizer step on shares that are there already, or are read as it goes."""
        return self.train_step(step)

    @property
    def train_step(self) -> TrainStep:
        """The training step, once there is a plan."""
        assert self._step is not None, "prepare, or follow a plan, first"
        return self._step

    def prepare(self, tiles: Tensor, k: int, *, prefetch: int = 0) -> Plan:
        """Plan for bags of K tiles, alike on every rank.

        Args:
            tiles: `[n, …]`, of which shape and dtype count; n may be 0.
            k: tiles of the largest bag, over all ranks.
            prefetch: bags that are read ahead of the step.

        Raises:
            ConfigError: not even one tile fits.
        """
        if isinstance(self._measured, ConfigError):
            raise self._measured
        footprint = measure_model(self._measured, tiles[:1], self._memory, k=k, mesh=self.mesh)
        plan = plan_step(footprint, self._memory, self._holding, k=k, prefetch=prefetch, mesh=self.mesh)
        self.follow(plan)
        return plan

    def _plan_first(self, tiles: Tensor, step: Step) -> None:
        """See that there is a plan; where chunk and policy are given, nothing is measured for it."""
        if self.plan is not None:
            return
        if self._memory.chunk == "auto" or self._memory.policy == "auto":
            self.prepare(tiles, max(step.slots))
        else:
            self.follow(FixedPlan(self._memory.chunk, POLICIES[self._memory.policy], self.mesh.tiles))

    def follow(self, plan: Planned) -> None:
        """Take steps as a plan says."""
        self.plan = plan
        self._step = TrainStep(self.strategy, self._loss, self.mesh, plan, self.offload)

    def predict(self, bag: Bag) -> tuple[Tensor, Tensor | None]:
        """Logits `[C]` of this tile group's slide and weights `[K_local]` of this rank's tiles, in evaluation mode.

        Raises:
            UserError: see `to_step`.
        """
        step = to_step([bag], self.mesh, 0)
        self._plan_first(bag.tiles, step)
        assert self.plan is not None
        (share,) = step.shares
        group, device, chunk = self.mesh.tiles, self.mesh.device, self.plan.chunk
        # Each module's own: an encoder may be in evaluation mode for its BatchNorm layers, in a model that trains.
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            count = group.chunk_count(step.slots[0], chunk)
            encoded = encode(self.model, Chunks(share.tiles.to(device), chunk, count, share.seed, 0))
            with torch.no_grad():
                return self.model.aggregate(encoded.features, share.places.to(device), group)
        finally:
            for module, training in modes:
                module.training = training

    def save(self, path: Path | str) -> None:
        """Write the model's weights as safetensors, whole, whatever the strategy; every rank calls it."""
        write_weights(self.strategy, Path(path), {}, main=self.mesh.world.rank == 0)

    def close(self) -> None:
        """Delete what was offloaded to disk."""
        if self.offload is not None:
            self.offload.close()


def _resolve(strategy: str, ds_config: dict[str, Any] | None, mesh: Mesh | None) -> tuple[StrategyName, int | None]:
    """The name of the strategy, and the stage of one of ZeRO for which there is no `ds_config`."""
    ranks = mesh.world.size if mesh is not None else int(os.environ.get("WORLD_SIZE", 1))
    if strategy == "auto":
        strategy = "zero" if ds_config is not None else "ddp" if ranks > 1 else "single"
    if ds_config is not None and strategy != "zero":
        raise ConfigError(f"ds_config is for strategy zero, and strategy is {strategy}: choose one")
    if strategy == "single" and ranks > 1:
        raise ConfigError(
            f"strategy single is one process, and there are {ranks} ranks: use ddp, fsdp or zero0 to zero3"
        )
    match strategy:
        case "zero0" | "zero1" | "zero2" | "zero3":
            return "zero", int(strategy[-1])
        case "zero" if ds_config is None:
            raise ConfigError("strategy zero takes a ds_config; without one, use zero0 to zero3")
        case "single" | "ddp" | "fsdp" | "zero":
            return strategy, None
    raise ConfigError(f"strategy is {strategy!r}: must be auto, single, ddp, fsdp, zero or zero0 to zero3")


def _check_elementwise(optimizer: Optimizer, strategy: str) -> None:
    known = {"Adam", "AdamW", *ELEMENTWISE}
    if not known & {kind.__name__ for kind in type(optimizer).__mro__}:
        raise ConfigError(
            f"strategy {strategy} splits parameters, and may only with an optimizer that updates each element by "
            f"itself, which is not known of {type(optimizer).__name__}: use ddp, zero0, or one of "
            f"{', '.join(sorted(known))}"
        )


def _meet(mesh: Mesh | None, name: StrategyName) -> Mesh:
    """The mesh for a strategy; all but "single" need a world, also of one process."""
    if mesh is None:
        return join(alone=name == "single")
    return join(device=mesh.device, alone=False) if name != "single" and mesh.device_mesh is None else mesh
