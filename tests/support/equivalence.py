"""The engine's steps beside plain single-process autograd; runs on every rank of a world."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import numpy as np
import timm
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partitioned_param_coordinator import InflightParamRegistry
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from slidescale.engine import api
from slidescale.engine.api import SlideStep
from slidescale.engine.config import Config, DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig
from slidescale.engine.data.bag import draw_bag, epoch_order
from slidescale.engine.data.cohort import Cohort
from slidescale.engine.data.manifest import Manifest, ManifestRow
from slidescale.engine.data.prefetch import TileRequest
from slidescale.engine.data.tiling import Tiling
from slidescale.engine.errors import SlideError, TrainingError
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
from slidescale.engine.strategies import zero as zero_module
from slidescale.engine.strategies.strategy import SingleStrategy
from slidescale.engine.strategies.zero import ZeroStrategy
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.training import step
from slidescale.engine.training.feed import Feed, Step
from slidescale.engine.training.step import StepResult
from slidescale.kernels.gated_attention import Attended, Gate, GateDropout
from slidescale.kernels.gated_attention import reference as attention_reference
from slidescale.kernels.tile_prep import reference as tile_reference

from support.transmil import TransMil

# Slides' tile counts. With 3 ranks: uneven shares, ranks without a tile (K = 2), one with all (K = 1). More than
# three steps, because several faults are right at the first step and wrong from the second.
BAG_SIZES = (7, 5, 1, 2, 11)
TILE_PX = 32
LEARNING_RATE = 0.05
EXCLUDED = Path(tempfile.gettempdir()) / f"excluded-{os.getpid()}.csv"
FSDP_UNIT_NUMEL = 1_000  # the encoders are tiny, and must fall into several units all the same
SUB_GROUP_NUMEL = 50_000  # and into several of ZeRO-3's sub-groups
# Networks that read parameters of modules which they do not call, made as narrow as they get.
_SMALL_VIT = {"img_size": TILE_PX, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
_SMALL_MAXXVIT = {"stem_width": 8, "embed_dim": (32, 32), "depths": (1, 1)}
READ_BUT_NOT_CALLED: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": _SMALL_VIT,
    "eva02_tiny_patch14_224": _SMALL_VIT,
    "swinv2_tiny_window8_256": {
        "img_size": TILE_PX,
        "embed_dim": 12,
        "depths": (1, 1),
        "num_heads": (2, 2),
        "window_size": 4,
    },
    "test_maxvit": _SMALL_MAXXVIT | {"block_type": ("M", "M")},
    "test_coatnet": _SMALL_MAXXVIT | {"block_type": ("C", "T")},
}


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


class Reading:
    """Tiles that are there already, or cannot be read."""

    def __init__(self, tiles: Tensor, *, damaged: bool) -> None:
        self.tiles = tiles
        self._damaged = damaged

    def wait(self) -> Tensor:
        if self._damaged:
            raise SlideError("damaged")
        return self.tiles


class MemoryReader:
    """Answers for slides that exist only here; the last rank that shares an unreadable one finds it so."""

    def __init__(self, unreadable: str, group: TileGroup) -> None:
        self._unreadable = unreadable if group.rank == group.size - 1 else ""

    def ahead(self, requests: Iterable[TileRequest], depth: int) -> Iterator[Reading]:
        for request in requests:
            damaged = request.path.name in self._unreadable
            yield Reading(all_tiles(request.path)[request.coords[:, 0] // 10], damaged=damaged)

    def blank(self, n: int) -> Tensor:
        return torch.zeros((n, TILE_PX, TILE_PX, 3), dtype=torch.uint8)


@cache
def all_tiles(path: Path) -> Tensor:
    """uint8 `[K, 32, 32, 3]` of a slide."""
    index = int(path.name)
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, 256, (BAG_SIZES[index], TILE_PX, TILE_PX, 3), dtype=torch.uint8, generator=generator)


@cache
def device() -> torch.device:
    """Of this rank, as its world was started."""
    return pick_device(dist.get_rank()) if dist.is_initialized() else torch.device("cpu")


def make_config(case: Case) -> Config:
    """The settings that the feed reads."""
    return Config(
        run=RunConfig(name="test"),
        data=DataConfig(tile_px=TILE_PX),
        model=ModelConfig(),
        optim=OptimConfig(accumulate=case.accumulate),
    )


def make_cohort(mesh: Mesh) -> Cohort:
    """A slide for each bag size, its tiles scattered over a plane."""
    rows = [
        ManifestRow(f"slide-{index}", f"case-{index}", Path(str(index)), (float(index % 2),), "train")
        for index in range(len(BAG_SIZES))
    ]
    cohort = Cohort(Manifest(tuple(rows), ("a", "b")), mesh.world, max_excluded=1, excluded_csv=EXCLUDED)
    for row, k in zip(rows, BAG_SIZES, strict=True):
        coords = np.stack([10 * np.arange(k), 10 * (np.arange(k) ** 2 % 5)], axis=1)
        cohort.tilings[row.slide_id] = Tiling(coords, side_px=10.0)
    return cohort


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


def create_narrow(original: Callable, name: str, **options: Any) -> nn.Module:
    """`timm.create_model`, with the options of `READ_BUT_NOT_CALLED`."""
    return original(name, **options | READ_BUT_NOT_CALLED.get(name, {}))


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
        offload_folder=None if policy != "offload" or on_gpu else Path(tempfile.mkdtemp(prefix="offload")),
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


@contextmanager
def patched(owner: Any, name: str, replacement: Callable) -> Iterator[None]:
    """Replace an attribute for a while; `replacement` takes the original first."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def dropped_merge_term() -> Any:
    """The last rank's features are left out of the merge (its weights are not: K = 1 would divide by zero)."""

    def merge(original: Callable, group: TileGroup, partial: Any) -> Tensor:
        return original(group, partial._replace(acc=partial.acc * 0) if group.rank == group.size - 1 else partial)

    return patched(TileGroup, "merge", merge)


def skipped_chunk() -> Any:
    """The encoder never hears of the gradient of each bag's first chunk."""

    def backpropagate(original: Callable, model: Any, chunks: Any, encoded: Any, backward: Any) -> None:
        encoded.features.grad[: chunks.size] = 0
        original(model, chunks, encoded, backward)

    return patched(step, "backpropagate", backpropagate)


def other_chunks_in_second_pass() -> Any:
    """Pass 2 cuts smaller chunks, as many, so that the last tiles are not among them."""

    def backpropagate(original: Callable, model: Any, chunks: Any, encoded: Any, backward: Any) -> None:
        original(model, replace(chunks, size=chunks.size - 1), encoded, backward)

    return patched(step, "backpropagate", backpropagate)


def silent_phase() -> Any:
    """From the second step on, the encoder gets no gradient at all, and what it got before may be applied again."""
    calls = []

    def backpropagate(original: Callable, model: Any, chunks: Any, encoded: Any, backward: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            original(model, chunks, encoded, backward)

    return patched(step, "backpropagate", backpropagate)


def reduced_at_each_backward() -> Any:
    """DeepSpeed reduces gradients as each backward ends, and not once a step."""

    @contextmanager
    def accumulate(original: Callable, strategy: Any, backwards: int) -> Iterator[None]:
        yield

    return patched(ZeroStrategy, "accumulate", accumulate)


def scaled_by_the_world() -> Any:
    """Each rank's loss is divided by their number, though the reducer takes the mean already."""

    def cross_entropy(original: Callable, self: CrossEntropy, logits: Tensor, target: Tensor) -> Tensor:
        return original(self, logits, target) / dist.get_world_size()

    return patched(CrossEntropy, "forward", cross_entropy)


def default_clipping() -> Any:
    """DeepSpeed's `gradient_clipping` is left out, which clips at a norm of 1; the loss is steep enough to show it."""

    def initialize(original: Callable, **settings: Any) -> Any:
        del settings["config"]["gradient_clipping"]
        return original(**settings)

    return patched(deepspeed, "initialize", initialize)


def refused_step(_: TileGroup, strategy_name: str, what: str) -> tuple[str, float]:
    """The error of a step whose loss or gradient is not finite, and how far the parameters moved in it."""
    case = Case(strategy=strategy_name, aggregator="mean")
    mesh, model = mesh_for(case), make_model(case)
    made = make_step(case, model, mesh)
    before = {name: whole(parameter).clone() for name, parameter in model.named_parameters()}

    def broken(original: Callable, self: CrossEntropy, logits: Tensor, target: Tensor) -> Tensor:
        loss = original(self, logits, target)
        if what == "loss":
            return loss * torch.nan
        loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    with patched(CrossEntropy, "forward", broken):
        try:
            train(case, made)
        except TrainingError as error:
            return str(error), worst_error(before, model)
    return "no error", worst_error(before, model)


@dataclass
class Gathers:
    """What ZeRO-3 gathers in an epoch.

    Attributes:
        by_hooks: parameters that are gathered because a module is called, each time.
        on_access: parameters that are gathered because one that is not there is read.
        left: elements that are whole after a pass over the encoder, or after a step; the most at once.
    """

    by_hooks: int = 0
    on_access: int = 0
    left: int = 0


def gathers(_: TileGroup, case: Case, mutation: Callable[[], Any] = nullcontext) -> Gathers:
    """Train an epoch under ZeRO-3 and count."""
    mesh, model, counted = mesh_for(case), make_model(case), Gathers()
    with mutation():
        made = make_step(case, model, mesh)

    def count_hooks(original: Callable, registry: Any, parameter: Any, handle: Any) -> None:
        counted.by_hooks += 1
        original(registry, parameter, handle)

    def count_access(original: Callable, *args: Any, **kwargs: Any) -> Any:
        counted.on_access += 1
        return original(*args, **kwargs)

    def then_count_left(original: Callable, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        counted.left = max(counted.left, sum(parameter.numel() for parameter in model.parameters()))
        return result

    with ExitStack() as stack:
        stack.enter_context(patched(InflightParamRegistry, "__setitem__", count_hooks))
        for parameter in model.parameters():
            stack.enter_context(patched(parameter, "all_gather", count_access))
        for owner, name in ((step, "encode"), (step, "backpropagate"), (made.strategy, "step")):
            stack.enter_context(patched(owner, name, then_count_left))
        train(case, made)
    return counted


def unmarked_forwards() -> Any:
    """ZeRO-3 gathers for modules that are called, and for nothing else."""
    return patched(zero_module, "_gather_on_access", lambda original, half: None)


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


def fail_alone(group: TileGroup, case: Case, told: Path) -> None:
    """The last rank's second pass fails; it must get out of the step with its error, and end."""

    def backpropagate(*_: Any) -> None:
        raise MemoryError("only this rank")

    if group.rank < group.size - 1:
        compare(group, case)
        return
    try:
        compare(group, case, lambda: patched(step, "backpropagate", backpropagate))
    except MemoryError as error:
        told.write_text(str(error))
        os._exit(3)
