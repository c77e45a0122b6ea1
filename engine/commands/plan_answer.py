"""The answer of `slidescale plan`: a plan as a run makes it, for ranks and a device that need not be here."""

import dataclasses
import json
import logging
from dataclasses import dataclass
from typing import Any

import torch

from slidescale.engine.commands.plan import PlanRequest
from slidescale.engine.config import Config, PolicyName
from slidescale.engine.errors import ConfigError
from slidescale.engine.memory.devices import Device, find_device
from slidescale.engine.memory.estimate import (
    BANDWIDTH_UTILISATION,
    UTILISATION,
    largest_k,
    step_flops,
    step_seconds,
)
from slidescale.engine.memory.planner import Plan
from slidescale.engine.memory.policies import POLICIES
from slidescale.engine.models.make import make_model
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.strategies.ds_config import complete_ds_config, read_ds_config, uses_bf16
from slidescale.engine.strategies.held import MOMENTS, Holding, ModelState, model_state, optimizer_of
from slidescale.engine.strategies.make import select_strategy
from slidescale.engine.training.plan import measure_for, plan_for
from slidescale.engine.units import GIB, format_size, parse_size

# Of a GPU's memory: CUDA's context and the libraries' workspaces, in bytes; and what fragmentation costs, as a share.
CUDA_RESERVE = GIB
FRAGMENTATION = 0.05
# Resident memory of Python and the libraries before there is a model.
CPU_RESERVE = GIB

FIXED: tuple[PolicyName, ...] = ("keep", "recompute", "offload")


@dataclass(frozen=True)
class Answer:
    """A plan with what it was made from; sizes in bytes."""

    request: PlanRequest
    config: Config
    mesh: Mesh
    holding: Holding
    bf16: bool
    memory: int
    reserve: int
    state: ModelState
    plan: Plan
    largest_k: dict[str, int]
    flops: float
    seconds: float | None

    @property
    def graph(self) -> int:
        """Bytes of the graph of a chunk."""
        return self.plan.job.footprint.graph(min(self.plan.chunk, self.plan.job.local(self.plan.k)))

    @property
    def in_files(self) -> int:
        """Bytes on disk."""
        return self.plan.need.away if self.request.on_cpu or self.config.memory.offload_to == "disk" else 0

    @property
    def on_host(self) -> int:
        """Bytes in the host's memory, beside a GPU."""
        need = self.plan.need
        return self.state.host + need.host + need.away - self.in_files

    def as_dict(self) -> dict[str, Any]:
        """The answer as --json prints it."""
        plan, state, request = self.plan, self.state, self.request
        return {
            "request": {name: getattr(request, name) for name in ("k", "ranks", "memory", "device")},
            "settings": self.config.as_dict(),
            "strategy": self.holding.strategy,
            "bf16": self.bf16,
            "model_parameters": plan.job.footprint.parameters,
            "memory_bytes": self.memory,
            "reserve_bytes": self.reserve,
            "budget_bytes": plan.budget,
            "base_bytes": {
                "parameters": state.parameters,
                "gradients": state.gradients,
                "optimizer": state.optimizer,
                "buffers": state.buffers,
                "total": plan.base,
            },
            "step_bytes": dataclasses.asdict(plan.need) | {"total": plan.need.total},
            "peak_bytes": plan.peak,
            "host_bytes": self.on_host,
            "file_bytes": self.in_files,
            "k": plan.k,
            "policy": plan.policy,
            "chunk": plan.chunk,
            "chunks": plan.chunks,
            "stored_chunks": plan.stored,
            "chunk_graph_bytes": self.graph,
            "fits": not plan.warning,
            "warning": plan.warning,
            "flops": self.flops,
            "seconds": self.seconds,
            "largest_k": self.largest_k,
        }


def describe(request: PlanRequest) -> str:
    """The answer to a request, in words or as JSON.

    Raises:
        UserError: see `make_plan`.
    """
    answer = make_plan(request)
    return json.dumps(answer.as_dict(), indent=2) if request.json else format_answer(answer)


def make_plan(request: PlanRequest) -> Answer:
    """Measure the model that the settings make and plan a step, as a run of these settings does.

    Raises:
        UserError: settings do not go together, not even one tile fits, or timm has no such encoder.
    """
    config = request.settings()
    device = find_device(request.device) if request.device and not request.on_cpu else None
    memory, reserve = _memory(request, config, device)
    logging.getLogger("slidescale").setLevel(logging.ERROR)  # nothing is trained, so no advice on training
    content, strategy = request.ds_content(), "zero"
    # Without a ds.json the other settings must fit to the ranks all the same.
    selected = select_strategy(config, ranks=request.ranks)
    if content is None:
        strategy = selected
        content = read_ds_config(config.deepspeed_config) if config.deepspeed_config else None
    # auto: as on the accelerators and processors that have bf16.
    bf16 = config.run.precision != "fp32"
    if content is not None:
        bf16 = uses_bf16(complete_ds_config(content, config, None, bf16=bf16))
    model, tile = _model(config, bf16=bf16)
    ds_config = None
    if content is not None:
        ds_config = complete_ds_config(content, config, None, bf16=bf16, width=model.encoder.dim)
        strategy = f"zero{ds_config['zero_optimization'].get('stage', 0)}"
    mesh = _mesh(config, request.ranks)
    k = request.k if config.data.k == "all" else min(request.k, config.data.k)
    flavour = "cpu" if request.on_cpu else "cuda"
    footprint = measure_for(model, tile, config.memory.chunk, k=k, ranks=mesh.tiles.size, flavour=flavour)
    holding = Holding.of(config.parallel, strategy, ds_config, mesh, optimizer_of(config.optim, ds_config))
    state = model_state(footprint, holding)
    plan = plan_for(
        footprint,
        state,
        config.memory,
        k=k,
        prefetch=config.data.prefetch,
        base=state.base,
        budget=memory - reserve,
        more="--memory" if request.memory or device else "--memory.budget",
    )
    room = plan.budget - plan.base
    return Answer(
        request,
        config,
        mesh,
        holding,
        bf16,
        memory,
        reserve,
        state,
        plan,
        largest_k={name: largest_k(plan.job, room=room, policy=POLICIES[name], chunk=plan.chunk) for name in FIXED},
        flops=step_flops(plan),
        seconds=step_seconds(plan, device, bf16=bf16) if device else None,
    )


def _memory(request: PlanRequest, config: Config, device: Device | None) -> tuple[int, int]:
    """Memory of a rank, and what of it is kept in reserve."""
    if config.memory.budget != "auto":
        return parse_size(config.memory.budget, "--memory.budget"), 0
    memory = parse_size(request.memory, "--memory") if request.memory else device.memory if device else 0
    reserve = CPU_RESERVE if request.on_cpu else CUDA_RESERVE + round(FRAGMENTATION * memory)
    if memory <= reserve:
        raise ConfigError(
            f"--memory is {format_size(memory)}, of which {format_size(reserve)} are kept in reserve for libraries: "
            "nothing is left for the model; give more"
        )
    return memory, reserve


def _model(config: Config, *, bf16: bool) -> tuple[SlideModel, torch.Tensor]:
    """The run's model on the "meta" device, without weights, and a tile as it takes it."""
    settings = dataclasses.replace(config.model, pretrained=False, weights=None)
    with torch.device("meta"):
        # PyTorch's operators need no less than the fused kernels; two outputs as good as any number.
        model = make_model(dataclasses.replace(config, model=settings), classes=2, bf16=bf16, kernels="torch")
        if config.model.frozen:
            return model.without_encoder(), torch.empty(model.encoder.dim)
        return model, torch.empty((config.data.tile_px, config.data.tile_px, 3), dtype=torch.uint8)


def _mesh(config: Config, ranks: int) -> Mesh:
    """One of so many ranks, without the others."""
    in_row = ranks if config.parallel.tile_ranks == "all" else config.parallel.tile_ranks
    return Mesh(RankGroup(0, ranks), TileGroup(0, in_row))


def format_answer(answer: Answer) -> str:
    """The plan as a table, one line per part of the peak."""
    request, config, plan = answer.request, answer.config, answer.plan
    state, need, footprint = answer.state, answer.plan.need, answer.plan.job.footprint
    ranks, tile_ranks = answer.mesh.world.size, answer.mesh.tiles.size
    local = plan.job.local(plan.k)
    checkpointing = ", blocks checkpointed" if config.memory.checkpoint_blocks else ""
    moments = f"{answer.holding.optimizer}, {MOMENTS[answer.holding.optimizer]} × fp32 per trained parameter"
    stored = f"{plan.stored:,} of {plan.chunks:,} chunks, of {format_size(answer.graph)} each"
    base_rows = [
        ("parameters", state.parameters, f"{footprint.parameters / 1e6:,.1f} M, fp32"),
        ("gradients", state.gradients, "fp32, a rank's own sum over all chunks"),
        ("optimizer state", state.optimizer, moments),
        ("buffers", state.buffers, "communication"),
    ]
    read = "features" if footprint.given else "uint8"
    step_rows = [
        ("pixels", need.pixels, f"{read}, {local:,} tiles" + (", and what is read ahead" if request.on_cpu else "")),
        ("features and aggregator", need.features, f"{footprint.dim} per tile, fp32"),
        ("stored graphs", need.graphs, stored),
        ("chunk under way", need.chunk, f"{plan.chunk} tiles"),
        ("gradient reduction, update", need.update, "with no activations around"),
    ]
    budget = f"{format_size(answer.memory)}, less {format_size(answer.reserve)} in reserve" if answer.reserve else ""
    side_by_side = f", {ranks // tile_ranks} slides side by side" if ranks > tile_ranks else ""
    lines = [
        f"{'frozen ' * config.model.frozen}{config.model.encoder}, tiles of {config.data.tile_px} px, "
        f"{'bf16' if answer.bf16 else 'fp32'}{checkpointing}",
        f"K = {plan.k:,} tiles, {ranks} rank{'s' * (ranks > 1)}, {answer.holding.strategy}: {local:,} tiles per rank"
        + side_by_side,
        "",
        f"At the peak, the fullest of {ranks} ranks" if ranks > 1 else "At the peak",
        *(_row(*row) for row in base_rows if row[1]),
        *(_row(*row) for row in step_rows if row[1]),
        "  " + "─" * 42,
        _row("peak", plan.peak, f"{plan.peak / plan.budget:.0%} of the budget"),
        _row("budget", plan.budget, budget),
    ]
    beside = [("beside it, on the host", answer.on_host), ("beside it, in files", answer.in_files)]
    lines += [_row(name, size, "per rank") for name, size in beside if size]
    forwards = f" ({plan.again:,} chunks encoded twice)" if plan.again else " (each chunk encoded once)"
    stored = f"chunks of {plan.chunk} tiles; {plan.stored:,} of {plan.chunks:,} keep their graph"
    lines += [
        "",
        "features are read, and no tile is encoded" if footprint.given else f"policy {plan.policy}: {stored}",
        f"arithmetic: {answer.flops / 1e12:,.1f} TFLOP per rank and step{'' if footprint.given else forwards}",
    ]
    if answer.seconds is not None:
        lines.append(
            f"time: {answer.seconds:,.2f} s per step on {request.device}, at {UTILISATION:.0%} of its arithmetic or "
            f"{BANDWIDTH_UTILISATION:.0%} of the bandwidth of its memory or of its link to the host, whichever takes "
            "longer; without reading and communication between ranks"
        )
    if footprint.given:
        lines.append(f"largest K: {answer.largest_k['recompute']:,}")
    else:
        largest = ", ".join(f"{policy} {k:,}" for policy, k in answer.largest_k.items())
        lines.append(f"largest K with these chunks: {largest}")
    if request.device is None:
        lines.append("ranks are taken to be GPUs; for machines without, --device cpu")
    if plan.warning:
        lines += ["", f"DOES NOT FIT: {plan.warning}"]
    return "\n".join(lines)


def _row(name: str, size: int, note: str) -> str:
    return f"  {name:<28}{format_size(size):>14}   {note}".rstrip()
