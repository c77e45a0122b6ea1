"""The engine's steps beside plain single-process autograd; runs on every rank of a world."""

import atexit
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from slidescale.engine import api
from slidescale.engine.api import SlideStep
from slidescale.engine.config import Config, DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig
from slidescale.engine.data.bag import draw_bag, epoch_order
from slidescale.engine.evaluation.predictions import evaluate
from slidescale.engine.memory import offload
from slidescale.engine.models import aggregator as aggregator_module
from slidescale.engine.models import tile_prep as tile_prep_module
from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.dropout import Draw, drawing_for
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.gathered import Gathered
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh, make_mesh, pick_device
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.seeding import seeded
from slidescale.engine.strategies.strategy import SingleStrategy
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.training.feed import Feed, Step
from slidescale.engine.training.step import StepResult
from slidescale.kernels.gated_attention import Attended, Gate, GateDropout
from slidescale.kernels.gated_attention import reference as attention_reference
from slidescale.kernels.tile_prep import reference as tile_reference

from support.memory_slides import TILE_PX, MemoryReader, all_tiles, make_cohort
from support.narrow import create_narrow
from support.patching import patched
from support.transmil import TransMil

LEARNING_RATE = 0.05
FSDP_UNIT_NUMEL = 1_000  # the encoders are tiny, and must fall into several units all the same
SUB_GROUP_NUMEL = 50_000  # and into several of ZeRO-3's sub-groups


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration of the engine.

    Attributes:
        strategy: "single", "mean" (see MeanReducer), "ddp", "zero0" to "zero3", "fsdp"; with "+offload", "+hold" or
            "+tiles" (shards over the tile group).
        policy: "keep", "recompute", "offload" (to disk; from a GPU, to the host), or "auto-N": N chunks' graphs stay.
        aggregator: a pooling, after "transformer+" or nothing, with "+slide_norm" or without; or "gathered", which is
            `Gathered(TransMil(…))`.
        branches: of attention, in "gated_attention".
        kernels: "torch", or "triton", emulated where there is no GPU.
        optimizer: "sgd", or "adamw" with an epsilon large enough that it does not turn rounding into steps where a
            gradient is near zero.
        tile_ranks: T; 0 for all.
        accumulate: A.
        dropout: of encoder (stochastic depth) and aggregator, its attention's gate included.
        steepness: factor on the loss.
        unreadable: paths of slides that turn out so when their tiles are wanted, as digits.
    """

    strategy: str
    policy: str = "recompute"
    aggregator: str = "gated_attention"
    encoder: str = "test_resnet"
    optimizer: str = "sgd"
    chunk: int = 2
    dtype: str = "float32"
    tile_ranks: int = 0
    accumulate: int = 1
    dropout: float = 0.0
    checkpoint_blocks: bool = False
    steepness: float = 1.0
    unreadable: str = ""
    branches: int = 1
    kernels: str = "torch"

    def __str__(self) -> str:
        return " ".join(str(value) for value in vars(self).values() if value)


@dataclass(frozen=True)
class FixedPlan:
    """Stores so many chunks' graphs of every bag."""

    chunk: int
    stored: int

    def stored_chunks(self, k: int) -> int:
        return self.stored


class MeanReducer(SingleStrategy):
    """Hand-written data parallelism: each gradient's mean over ranks, one by one, for comparison."""

    @contextmanager
    def accumulate(self, backwards: int) -> Iterator[None]:
        yield
        for parameter in self.model.parameters():
            assert parameter.grad is not None, "every parameter gets a gradient on every rank"
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


@cache
def device() -> torch.device:
    """Of this rank, as its world was started."""
    return pick_device(dist.get_rank()) if dist.is_initialized() else torch.device("cpu")


@cache
def scratch() -> Path:
    """A folder of this process, which goes with it."""
    folder = tempfile.TemporaryDirectory(prefix="offload-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def make_config(case: Case) -> Config:
    """The settings that the feed reads."""
    return Config(
        run=RunConfig(name="test"),
        data=DataConfig(tile_px=TILE_PX),
        model=ModelConfig(),
        optim=OptimConfig(accumulate=case.accumulate),
    )


def make_model(case: Case) -> SlideModel:
    """A small model in its training mode."""
    *layers, pooling = case.aggregator.removesuffix("+slide_norm").split("+")
    torch.manual_seed(0)
    with patched(timm, "create_model", create_narrow):
        encoder = Encoder(case.encoder, tile_px=TILE_PX, drop_path=case.dropout, kernels=case.kernels)
    encoder.set_checkpointing(case.checkpoint_blocks)
    aggregator: nn.Module
    if pooling == "gathered":
        aggregator = Gathered(TransMil(encoder.dim, 2, dropout=case.dropout))
    else:
        aggregator = Aggregator(
            encoder.dim,
            2,
            pooling=pooling,
            hidden_dim=16,
            attention_dim=8,
            dropout=case.dropout,
            attention_branches=case.branches,
            attention_dropout=case.dropout,
            kernels=case.kernels,
            slide_norm=case.aggregator.endswith("+slide_norm"),
            transformer_layers=2 if layers else 0,
            transformer_heads=2,
        )
    return SlideModel(encoder, aggregator).to(device(), getattr(torch, case.dtype)).train()


def make_optimizer(case: Case, model: SlideModel) -> torch.optim.Optimizer:
    halves = [list(model.aggregator.parameters()), list(model.encoder.parameters())]
    groups = [{"params": parameters} for parameters in halves if parameters]
    if case.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=LEARNING_RATE)
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, eps=1e-2, weight_decay=0.1)


def plain_autograd(case: Case, slides_a_step: int) -> dict[str, Tensor]:
    """Parameters after an epoch of plain steps, each slide's tiles in one graph."""
    return _plain_autograd(
        case.aggregator,
        case.encoder,
        case.optimizer,
        case.dtype,
        case.dropout,
        case.steepness,
        case.unreadable,
        case.branches,
        slides_a_step,
    )


@cache
def _plain_autograd(
    aggregator: str,
    encoder: str,
    optimizer: str,
    dtype: str,
    dropout: float,
    steepness: float,
    unreadable: str,
    branches: int,
    slides_a_step: int,
) -> dict[str, Tensor]:
    case = Case(
        strategy="single",
        aggregator=aggregator,
        encoder=encoder,
        optimizer=optimizer,
        dtype=dtype,
        dropout=dropout,
        branches=branches,
    )
    model = make_model(case)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stepper = make_optimizer(case, model)
    cohort = make_cohort(Mesh())
    rows = epoch_order(cohort.usable("train"), seed=0, epoch=0)
    for begin in range(0, len(rows), slides_a_step):
        step_rows = rows[begin : begin + slides_a_step]
        readable = [row for row in step_rows if row.path.name not in unreadable]
        if not readable:
            continue
        for row in readable:
            bag = draw_bag(row, cohort.tilings[row.slide_id], "all", seed=0, epoch=0)
            with drawing_for(Draw(bag.seed, 0, bag.k)), by_definition():
                features = model.encode(all_tiles(row.path).to(device()))
                with seeded(device(), bag.seed, "aggregator"):
                    logits, _ = model.aggregate(features, bag.places.to(device()), TileGroup())
            loss = nn.functional.cross_entropy(logits[None], torch.tensor([int(row.target[0])], device=device()))
            (steepness * loss / len(step_rows)).backward()
        stepper.step()
        stepper.zero_grad()
    end = {name: parameter.detach() for name, parameter in model.named_parameters()}
    moved = sum(float((end[name] - start[name]).norm()) for name in start)
    assert moved > 1e-2, "the reference must have learnt something, or equality proves nothing"
    return end


@contextmanager
def by_definition() -> Iterator[None]:
    """Replace both kinds of kernels by their definitions, so that nothing under test is in the reference."""

    def attend(features: Tensor, gate: Gate, *, dropout: GateDropout | None, kernels: str) -> Attended:
        return attention_reference.gated_attention(features, gate, dropout=dropout)

    def prepare(*args: Any, kernels: str, **settings: Any) -> Tensor:
        return tile_reference.prepare_tiles(*args, **settings)

    with (
        mock.patch.object(aggregator_module, "gated_attention", attend),
        mock.patch.object(tile_prep_module, "prepare_tiles", prepare),
    ):
        yield


def make_step(
    case: Case,
    model: SlideModel,
    mesh: Mesh,
    optimizer: Callable[[Case, SlideModel], torch.optim.Optimizer] = make_optimizer,
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
) -> SlideStep:
    """The engine's own assembly, with a strategy that never clips and a plan that the case names."""
    name, *options = case.strategy.split("+")
    loss = CrossEntropy([case.steepness] * 2, 2).to(device())
    stored = {"keep": 99, "recompute": 0, "offload": 99}.get(case.policy)
    stored = int(case.policy.removeprefix("auto-")) if stored is None else stored
    policy: Any = case.policy.partition("-")[0]
    on_gpu = device().type == "cuda"
    made = api.make_step(
        model,
        optimizer(case, model),
        loss,
        mesh=mesh,
        strategy={"zero": "zero", "mean": "ddp"}.get(name[:4], name),
        ds_config=_ds_config(name, options) if name.startswith("zero") else None,
        parallel=ParallelConfig(
            fsdp_offload=name == "fsdp" and "offload" in options,
            fsdp_hold="hold" in options,
            fsdp_shard="tiles" if "tiles" in options else "world",
        ),
        scheduler=scheduler,
        chunk=case.chunk,
        policy=policy,
        offload_folder=None if policy != "offload" or on_gpu else scratch(),
        unit_numel=FSDP_UNIT_NUMEL,
    )
    if name == "mean":
        made.strategy = MeanReducer(model, optimizer(case, model), None, device=device(), clip=0.0)
    made.follow(FixedPlan(case.chunk, stored))
    return made


def _ds_config(name: str, options: list[str]) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": int(name[-1]), "stage3_param_persistence_threshold": 0}
    zero["sub_group_size"] = SUB_GROUP_NUMEL
    if "buckets" in options:  # as Hugging Face's formulae have them for a width of 16
        zero |= {"reduce_bucket_size": 256, "stage3_prefetch_bucket_size": 230}
        zero["stage3_param_persistence_threshold"] = 160
    if "offload" in options:
        zero["offload_optimizer"] = {"device": "cpu"}
        if name == "zero3":
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # What a run under bf16 passes: the model's own autocast must not make DeepSpeed round its gradients.
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        "zero_optimization": zero,
    }


def train(case: Case, step: SlideStep) -> list[float]:
    """An epoch of the engine's own steps; their losses."""
    return [result.loss for result in steps(case, step)]


def steps(case: Case, step: SlideStep, first: int = 0, last: int = 99) -> list[StepResult]:
    """The engine's own steps of an epoch, those from `first` up to `last`; the result of each."""
    mesh = step.mesh
    reader: Any = MemoryReader(case.unreadable, mesh.tiles)
    feed = Feed(make_config(case), make_cohort(mesh), reader, mesh)
    with mock.patch.object(offload, "SMALLEST", 1):
        found = [step.take(each) for index, each in enumerate(feed.epoch(0)) if first <= index < last or skipped(each)]
    if step.offload is not None:
        assert step.offload.bytes_out > 0, "something has really left"
        step.close()
    return found


def skipped(each: Step) -> bool:
    """False, once a step's bags have been taken from the feed."""
    return sum(1 for _ in each.shares) < 0


def whole(parameter: Tensor) -> Tensor:
    """A parameter's value, put together from all ranks."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor()
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def worst_error(expected: dict[str, Tensor], model: SlideModel) -> float:
    """Largest ‖p − p'‖ / ‖p‖ over parameters."""
    errors = [
        float((whole(parameter) - expected[name]).norm() / expected[name].norm().clamp_min(1e-3))
        for name, parameter in model.named_parameters()
    ]
    return max(errors)


def mesh_for(case: Case) -> Mesh:
    """Arrange the ranks of this world as the case says."""
    return _mesh(case.tile_ranks or dist.get_world_size())


@cache
def _mesh(tile_ranks: int) -> Mesh:
    return make_mesh(device(), tile_ranks)


def compare(_: TileGroup, case: Case, mutation: Callable[[], Any] = nullcontext) -> float:
    """Worst relative parameter error of the engine after all steps; `mutation` is a context that plants a bug."""
    mesh = mesh_for(case)
    expected = plain_autograd(case, mesh.slides * case.accumulate)
    model = make_model(case)
    with mutation():
        train(case, make_step(case, model, mesh))
    return worst_error(expected, model)


def compare_all(group: TileGroup, cases: list[Case]) -> list[float]:
    """`compare`, for many cases in one call."""
    return [compare(group, case) for case in cases]


def losses_of(_: TileGroup, case: Case) -> list[float]:
    """The loss of each step."""
    mesh, model = mesh_for(case), make_model(case)
    return train(case, make_step(case, model, mesh))


def predictions(_: TileGroup, case: Case) -> list[tuple[str, float, int, float]]:
    """Of an untrained model, for each slide: its name, loss, tiles, and the sum of their weights."""
    mesh, model = mesh_for(case), make_model(case)
    if case.strategy == "zero3":
        make_step(case, model, mesh)
    cohort, reader = make_cohort(mesh), MemoryReader(case.unreadable, mesh.tiles)
    objective = CrossEntropy((), 2).to(device())
    rows = cohort.usable("train")
    found = evaluate(model, rows, cohort, reader, objective, mesh, case.chunk, device())  # type: ignore[arg-type]
    return [(each.row.slide_id, each.loss, each.tiles, float(each.weights.sum())) for each in found.predictions]
