"""Learning rates and weight decay step by step, and an encoder that begins to train later, under every strategy."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import cycle, product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from slidescale.engine.api import SlideStep
from slidescale.engine.config import Config, OptimConfig, RunConfig
from slidescale.engine.data.bag import draw_bag, epoch_order
from slidescale.engine.errors import ConfigError
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.strategies import schedule as schedule_module
from slidescale.engine.strategies import zero as zero_module
from slidescale.engine.strategies.optim import make_optimizer, parameter_groups
from slidescale.engine.strategies.schedule import GroupSchedule, Schedule, make_schedule
from slidescale.engine.strategies.strategy import Strategy
from slidescale.engine.strategies.zero import ZeroStrategy

from support.equivalence import Case, make_model, make_step, mesh_for, steps, whole
from support.grids import full, rest_in_full
from support.memory_slides import BAG_SIZES, all_tiles, make_cohort

# fp32 sums in another order, over five steps (as in test_equivalence).
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
FROZEN = 2
SCHEDULE = Schedule(warmup_steps=2, total_steps=6, frozen_steps=FROZEN)
OPTIM = OptimConfig(lr=0.05, encoder_lr_scale=0.5, weight_decay=0.1, weight_decay_end=0.7, min_lr_ratio=0.1, clip=0)
# Worked out by hand from the definitions: warm-up over two steps, the cosine over the four that are left.
FALL = [1.0, 1.0, *(0.1 + 0.9 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4))]
AGGREGATOR_RATE = [0.05 * ramp * fall for ramp, fall in zip([0.5, 1, 1, 1, 1, 1], FALL, strict=True)]
ENCODER_RATE = [0.025 * ramp * fall for ramp, fall in zip([0, 0, 0.5, 1, 1, 1], FALL, strict=True)]
DECAY = [0.7 - 0.6 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]


def optimizer_for(case: Case, model: SlideModel) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW with an epsilon that does not turn rounding into steps."""
    groups = parameter_groups(model, OPTIM)
    if case.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    return torch.optim.AdamW(groups, lr=1.0, eps=1e-2, fused=True)


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        rates = AGGREGATOR_RATE if group["name"].startswith("aggregator") else ENCODER_RATE
        group["lr"] = rates[step]
        group["weight_decay"] = DECAY[step] if group["name"].endswith(".decay") else 0.0


@cache
def plain_autograd(optimizer: str, dtype: str) -> list[dict[str, Tensor]]:
    """All parameters after each step; the encoder has no gradient and no optimizer at all before it trains."""
    case = Case(strategy="single", optimizer=optimizer, dtype=dtype)
    model, cohort, found = make_model(case), make_cohort(Mesh()), []
    stepper = optimizer_for(case, model)
    for step, row in enumerate(epoch_order(cohort.usable("train"), seed=0, epoch=0)):
        set_step(stepper, step)
        bag = draw_bag(row, cohort.tilings[row.slide_id], "all", seed=0, epoch=0)
        with torch.set_grad_enabled(step >= FROZEN):
            features = model.encode(all_tiles(row.path))
        logits, _ = model.aggregate(features, bag.places, TileGroup())
        nn.functional.cross_entropy(logits[None], torch.tensor([int(row.target[0])])).backward()
        stepper.step()  # leaves alone what has no gradient
        stepper.zero_grad()
        found.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    return found


def error_of(model: SlideModel, expected: dict[str, Tensor]) -> float:
    """Largest ‖p − p'‖ / ‖p‖."""
    errors = [
        float((whole(parameter) - expected[name]).norm() / expected[name].norm().clamp_min(1e-3))
        for name, parameter in model.named_parameters()
    ]
    return max(errors)


def make(case: Case, model: SlideModel, mesh: Mesh) -> SlideStep:
    scheduler: Any = partial(GroupSchedule, config=OPTIM, schedule=SCHEDULE)
    return make_step(case, model, mesh, optimizer_for, scheduler)


def started(case: Case) -> tuple[Mesh, SlideModel, SlideStep]:
    mesh = Mesh() if case.strategy == "single" else mesh_for(case)
    model = make_model(case)
    return mesh, model, make(case, model, mesh)


def freeze_and_thaw(group: TileGroup, case: Case, bug: Callable[[], Any] | None = None) -> tuple[float, float]:
    """Errors after the frozen steps, and after all."""
    with bug() if bug else mock.patch.object(schedule_module, "math", math):
        _, model, step = started(case)
        start = {name: whole(parameter).clone() for name, parameter in model.encoder.named_parameters()}
        expected = plain_autograd(case.optimizer, case.dtype)
        calls = []
        encode = SlideModel.encode
        with mock.patch.object(SlideModel, "encode", lambda *args: (calls.append(1), encode(*args))[1]):
            results = steps(case, step, 0, FROZEN)
        if not case.strategy.startswith("fsdp"):  # which calls what it found when it was made
            rows = epoch_order(make_cohort(Mesh()).usable("train"), seed=0, epoch=0)[:FROZEN]
            chunks = sum(group.chunk_count(BAG_SIZES[int(row.path.name)], case.chunk) for row in rows)
            assert len(calls) == chunks + FROZEN, "one pass, and a tile that carries zeros"
        assert all(set(result.gradient_norms) == {"total", "aggregator"} for result in results)
        for name, parameter in model.encoder.named_parameters():
            assert torch.equal(whole(parameter), start[name]), f"{name} is frozen"
        before = error_of(model, expected[FROZEN - 1])
        results = steps(case, step, FROZEN)
        assert all(result.gradient_norms["encoder"] > 0 for result in results) and len(results) == 3
        return before, error_of(model, expected[-1])


def resumed(group: TileGroup, case: Case, folder: Path, at: int) -> float:
    """Error after all steps, of a run that stopped and went on in a new strategy."""
    mesh, _, step = started(case)
    steps(case, step, 0, at)
    folder.mkdir(exist_ok=True)
    mesh.world.barrier()
    step.strategy.save(folder)
    mesh.world.barrier()
    _, model, step = started(case)
    strategy = step.strategy
    strategy.load(folder)
    names = [each["name"] for each in strategy.groups()]
    rates = [AGGREGATOR_RATE if name.startswith("aggregator") else ENCODER_RATE for name in names]
    assert [each["lr"] for each in strategy.groups()] == pytest.approx([rate[at] for rate in rates])
    steps(case, step, at)
    return error_of(model, plain_autograd(case.optimizer, case.dtype)[-1])


STRATEGIES = ["ddp", "zero0", "zero1", "zero2", "zero3", "zero2+offload", "zero3+offload", "fsdp", "fsdp+hold"]


def make_case(strategy: str, optimizer: str) -> Case:
    dtype = "float32" if strategy.startswith("zero") else "float64"
    return Case(strategy=strategy, optimizer=optimizer, dtype=dtype, policy="auto-1")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_process(optimizer: str) -> None:
    """Frozen, the encoder is bitwise as it was; thawed, its optimizer is as new; decay follows its cosine."""
    assert max(freeze_and_thaw(TileGroup(), make_case("single", optimizer))) <= TOLERANCE["float64"]


@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    rest_in_full([*zip(STRATEGIES, cycle(["adamw", "sgd"]))], [*product(STRATEGIES, ["sgd", "adamw"])]),
)
def test_every_strategy(world: Any, strategy: str, optimizer: str) -> None:
    case = make_case(strategy, optimizer)
    for errors in world(2).run(freeze_and_thaw, case):
        assert max(errors) <= TOLERANCE[case.dtype], errors


@contextmanager
def deepspeeds_optimizer(kind: dict[str, Any]) -> Iterator[None]:
    """One that ds.json names, which DeepSpeed makes."""

    def make_zero(model: SlideModel, groups: Any, _: Any, scheduler: Any, *, ds_config: dict[str, Any]) -> Strategy:
        params = kind | {"lr": OPTIM.lr, "weight_decay": OPTIM.weight_decay, "eps": 1e-2}
        named = ds_config | {"optimizer": {"type": "AdamW", "params": params}, "zero_force_ds_cpu_optimizer": True}
        return ZeroStrategy(model, parameter_groups(model, OPTIM), None, scheduler, ds_config=named)

    with mock.patch.object(zero_module, "ZeroStrategy", make_zero):
        yield


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("zero0", {"torch_adam": True}),
        ("zero2", {"torch_adam": True}),
        # DeepSpeed compiles this one's operator, which takes a minute or more.
        pytest.param("zero2+offload", {}, marks=pytest.mark.full),
        pytest.param("zero3+offload", {}, marks=pytest.mark.full),
    ],
)
def test_optimizers_that_ds_json_names(world: Any, strategy: str, kind: dict[str, Any]) -> None:
    """PyTorch's, and DeepSpeed's for the CPU, which counts its steps in another way."""
    case = make_case(strategy, "adamw")
    for errors in world(2).run(freeze_and_thaw, case, partial(deepspeeds_optimizer, kind)):
        assert max(errors) <= TOLERANCE[case.dtype], errors


def old_moments() -> Any:
    return mock.patch.object(schedule_module, "_forget_count", return_value=None)


def constant_decay() -> Any:
    return mock.patch.object(GroupSchedule, "_set_decay", return_value=None)


@pytest.mark.parametrize("strategy", ["ddp", "zero3", *full("zero2", "fsdp")])
@pytest.mark.parametrize(("bug", "optimizer"), [(old_moments, "adamw"), (constant_decay, "sgd")])
def test_a_planted_bug_is_caught(world: Any, strategy: str, bug: Callable[[], Any], optimizer: str) -> None:
    for _, after in world(2).run(freeze_and_thaw, make_case(strategy, optimizer), bug):
        assert after > 100 * TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("strategy", "at"),
    rest_in_full(
        [("ddp", 2), ("zero2", 1), ("zero3", 4), ("zero3", 2), ("fsdp", 1)],
        [*product(["ddp", "zero2", "zero3", "fsdp"], [1, 2, 4])],
    ),
)
def test_resumes(world: Any, tmp_path: Path, strategy: str, at: int) -> None:
    """Within the frozen steps, at their end, and after it."""
    case = make_case(strategy, "adamw")
    assert max(world(2).run(resumed, case, tmp_path / "state", at)) <= TOLERANCE[case.dtype]


def test_rates_without_frozen_steps() -> None:
    """As warm-up and cosine always were: one shape for all groups, and decay that stays."""
    config = OptimConfig(lr=2.0, encoder_lr_scale=0.25, min_lr_ratio=0.1, weight_decay=0.3, optimizer="sgd")
    model = make_model(Case(strategy="single"))
    optimizer = make_optimizer(parameter_groups(model, config), config)
    schedule = GroupSchedule(optimizer, config, Schedule(warmup_steps=2, total_steps=6))
    for step in range(7):
        fall = 0.1 + 0.9 * (1 + math.cos(math.pi * max(0, step - 2) / 4)) / 2
        share = [0.5, 1, fall, fall, fall, fall, fall][step]
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([2 * share, 2 * share, share / 2, share / 2])
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0, 0.3, 0]
        optimizer.step()
        schedule.step()


def test_weight_decay_may_begin_at_nothing() -> None:
    """Which group decays is told by its name, not by its value."""
    config = OptimConfig(weight_decay=0.0, weight_decay_end=0.4)
    optimizer = make_optimizer(parameter_groups(make_model(Case(strategy="single")), config), config)
    schedule = GroupSchedule(optimizer, config, Schedule(warmup_steps=0, total_steps=2))
    optimizer.step()
    schedule.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.2, 0, 0.2, 0])


def test_epochs_in_steps() -> None:
    optim = OptimConfig(warmup_epochs=0.5, encoder_frozen_epochs=1.25)
    config = Config(run=RunConfig(name="t", epochs=3), optim=optim)
    assert make_schedule(config, steps_an_epoch=8) == Schedule(warmup_steps=4, total_steps=24, frozen_steps=10)


def test_an_encoder_that_never_trains_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--optim.encoder-frozen-epochs is 3: .* must be below --run.epochs, 3"):
        Config(run=RunConfig(name="t", epochs=3), optim=OptimConfig(encoder_frozen_epochs=3))
    with pytest.raises(ConfigError, match=r"--optim.encoder-frozen-epochs is 1: must be 0 with .* apex_adam"):
        OptimConfig(encoder_frozen_epochs=1, optimizer="apex_adam")
