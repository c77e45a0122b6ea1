"""`slidescale plan`: what a step will take, asked without starting a run."""

import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

from slidescale.engine.config import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerName,
    PolicyName,
    RunConfig,
)
from slidescale.engine.errors import ConfigError, flag
from slidescale.engine.memory.devices import find_device
from slidescale.engine.memory.footprint import measure
from slidescale.engine.memory.planner import (
    BANDWIDTH_UTILISATION,
    UTILISATION,
    Job,
    Plan,
    choose,
    largest_k,
    sizes_to_measure,
    step_flops,
    step_seconds,
)
from slidescale.engine.models.make import make_model
from slidescale.engine.strategies.held import (
    MOMENTS,
    ModelState,
    ShardingName,
    model_state,
)
from slidescale.engine.units import GIB, format_size, parse_size

# Of a GPU's memory: CUDA's context and the libraries' workspaces, in bytes; and what fragmentation costs, as a share.
CUDA_RESERVE = GIB
FRAGMENTATION = 0.05
# Resident memory of Python and the libraries before there is a model.
CPU_RESERVE = GIB

# As the planner's HELPS, in the words of this command.
HELPS = (
    "What helps: --checkpoint-blocks, a smaller --tile-px or --k, more --ranks, "
    "a --strategy that shards or offloads the model (zero3, fsdp), a larger --memory"
)


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """Say how much memory a training step takes on each rank, and what the engine will do to fit.

    Needs no GPU and no weights: the encoder is measured on tensors without content.
    """

    k: int
    """Tiles of the largest slide."""
    memory: str | None = None
    """Memory of each rank, such as 80GiB; by default that of --device."""
    encoder: str = "resnet50_gn"
    """A timm model name, hf-hub:owner/model, or a foundation model such as uni or virchow2."""
    ranks: int = 1
    """Ranks, which share each slide's tiles and the model."""
    strategy: ShardingName | Literal["auto"] = "auto"
    """How the model is spread over ranks; auto: single for one rank, ddp for more."""
    policy: PolicyName = "auto"
    """What becomes of the encoder's activations between forward and backward."""
    chunk: int | Literal["auto"] = "auto"
    """Tiles that go through the encoder at once."""
    tile_px: int = 224
    """Side of a tile, in pixels."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of matrix products; weights and optimizer are fp32."""
    checkpoint_blocks: bool = False
    """Activation checkpointing in each block of the encoder."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank in the encoder instead of its weights."""
    transformer_layers: int = 0
    """Transformer layers of the aggregator."""
    optimizer: OptimizerName = "adamw"
    """Optimizer, for the size of its state."""
    optimizer_offload: bool = False
    """Optimizer state in the host's memory (zero1 to zero3)."""
    parameter_offload: bool = False
    """Parameters in the host's memory (zero3, fsdp)."""
    prefetch: int = 1
    """Slides that are read ahead of the step."""
    device: str | None = None
    """Accelerator, such as H100, to estimate the time of a step; cpu: a machine without one."""
    json: bool = False
    """Print JSON: sizes in bytes."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        minima = (("k", 1), ("ranks", 1), ("tile_px", 16), ("prefetch", 1), ("lora_rank", 0), ("transformer_layers", 0))
        for name, least in minima:
            if getattr(self, name) < least:
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}: must be at least {least}")
        if self.chunk != "auto" and self.chunk < 1:
            raise ConfigError(f"--chunk is {self.chunk}: must be auto, or at least 1 tile")
        if self.memory is None and (self.device is None or self.on_cpu):
            raise ConfigError(
                "--memory is missing: give the memory of a rank, such as 80GiB, or name a GPU by --device"
            )
        if self.memory is not None:
            parse_size(self.memory, "--memory")
        if self.device is not None and not self.on_cpu:
            find_device(self.device)
        strategy = self.chosen_strategy
        if strategy == "single" and self.ranks > 1:
            raise ConfigError(f"--strategy single is one process: it cannot take --ranks {self.ranks}")
        if self.optimizer_offload and strategy not in ("zero1", "zero2", "zero3"):
            raise ConfigError(f"--optimizer-offload: {strategy} has none; use zero1, zero2 or zero3")
        if self.parameter_offload and strategy not in ("zero3", "fsdp"):
            raise ConfigError(f"--parameter-offload: {strategy} has none; use zero3 or fsdp")

    @property
    def on_cpu(self) -> bool:
        """Whether ranks have no accelerator."""
        return (self.device or "").lower() == "cpu"

    @property
    def chosen_strategy(self) -> ShardingName:
        """The strategy that auto stands for."""
        if self.strategy != "auto":
            return self.strategy
        return "ddp" if self.ranks > 1 else "single"


@dataclass(frozen=True)
class Answer:
    """A plan with what it was made from; sizes in bytes."""

    request: PlanRequest
    memory: int
    reserve: int
    parameters: int
    state: ModelState
    plan: Plan
    graphs: int
    largest_k: dict[str, int]
    flops: float
    seconds: float | None

    @property
    def on_host(self) -> int:
        """Bytes in the host's memory, beside a GPU."""
        return self.state.host + self.plan.need.host + (0 if self.request.on_cpu else self.plan.need.away)

    @property
    def in_files(self) -> int:
        """Bytes on disk."""
        return self.plan.need.away if self.request.on_cpu else 0

    def as_dict(self) -> dict[str, Any]:
        """As --json prints it."""
        plan, state = self.plan, self.state
        return {
            "request": dataclasses.asdict(self.request),
            "model_parameters": self.parameters,
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
            "policy": plan.policy,
            "chunk": plan.chunk,
            "chunks": plan.chunks,
            "stored_chunks": plan.stored,
            "chunk_graph_bytes": self.graphs,
            "fits": not plan.warning,
            "warning": plan.warning,
            "flops": self.flops,
            "seconds": self.seconds,
            "largest_k": self.largest_k,
        }


def print_plan(request: PlanRequest) -> None:
    """Plan a step and print the answer.

    Raises:
        ConfigError: see `make_plan`.
    """
    answer = make_plan(request)
    print(json.dumps(answer.as_dict(), indent=2) if request.json else format_answer(answer))


def make_plan(request: PlanRequest) -> Answer:
    """Measure the encoder and plan a step.

    Raises:
        ConfigError: not even one tile fits, or timm has no such encoder.
    """
    device = find_device(request.device) if request.device and not request.on_cpu else None
    memory = parse_size(request.memory, "--memory") if request.memory else device.memory if device else 0
    reserve = CPU_RESERVE if request.on_cpu else CUDA_RESERVE + round(FRAGMENTATION * memory)
    if memory <= reserve:
        raise ConfigError(
            f"--memory is {format_size(memory)}, of which {format_size(reserve)} are kept in reserve for libraries: "
            "nothing is left for the model; give more"
        )
    logging.getLogger("slidescale").setLevel(logging.ERROR)  # nothing is trained, so no advice on training
    config = Config(
        run=RunConfig(name="plan"),
        data=DataConfig(tile_px=request.tile_px),
        model=ModelConfig(
            encoder=request.encoder, lora_rank=request.lora_rank, transformer_layers=request.transformer_layers
        ),
        memory=MemoryConfig(checkpoint_blocks=request.checkpoint_blocks),
    )
    kind = "cpu" if request.on_cpu else "cuda"
    local = math.ceil(request.k / request.ranks)
    chunks, bags = sizes_to_measure(local, request.chunk, kind)
    footprint = measure(
        lambda: make_model(config, classes=2, bf16=request.precision == "bf16", kernels="torch"),
        tile_px=request.tile_px,
        chunks=chunks,
        bags=bags,
        device=kind,
    )
    state = model_state(
        footprint,
        strategy=request.chosen_strategy,
        ranks=request.ranks,
        optimizer=request.optimizer,
        offload_optimizer=request.optimizer_offload,
        offload_parameters=request.parameter_offload,
    )
    job = Job(footprint=footprint, ranks=request.ranks, prefetch=request.prefetch, update=state.update)
    try:
        plan = choose(
            job, k=request.k, budget=memory - reserve, base=state.base, policy=request.policy, chunk=request.chunk
        )
    except ConfigError as error:
        raise ConfigError(f"{error}. {HELPS}") from None
    room = plan.budget - plan.base
    policies: tuple[PolicyName, ...] = ("keep", "recompute", "offload")
    return Answer(
        request,
        memory,
        reserve,
        footprint.parameters,
        state,
        plan,
        graphs=footprint.graph(min(plan.chunk, local)),
        largest_k={policy: largest_k(job, room=room, policy=policy, chunk=plan.chunk) for policy in policies},
        flops=step_flops(job, plan),
        seconds=step_seconds(job, plan, device, bf16=request.precision == "bf16") if device else None,
    )


def format_answer(answer: Answer) -> str:
    """The plan as a table, a line for each part of the peak."""
    request, plan, state, need = answer.request, answer.plan, answer.state, answer.plan.need
    share = f" of {request.ranks} ranks" if request.ranks > 1 else ""
    local = plan.job.local(plan.k)
    checkpointing = ", blocks checkpointed" if request.checkpoint_blocks else ""
    moments = f"{request.optimizer}, {MOMENTS[request.optimizer]} × fp32 a trained parameter"
    stored = f"{plan.stored:,} of {plan.chunks:,} chunks, of {format_size(answer.graphs)} each"
    base_rows = [
        ("parameters", state.parameters, f"{answer.parameters / 1e6:,.1f} M, fp32"),
        ("gradients", state.gradients, "fp32, a rank's own sum over all chunks"),
        ("optimizer state", state.optimizer, moments),
        ("buffers", state.buffers, "communication"),
    ]
    step_rows = [
        ("pixels", need.pixels, f"uint8, {local:,} tiles" + (", and what is read ahead" if request.on_cpu else "")),
        ("features and aggregator", need.features, f"{plan.job.footprint.dim} a tile, fp32"),
        ("stored graphs", need.graphs, stored),
        ("chunk under way", need.chunk, f"{plan.chunk} tiles"),
        ("gradient reduction, update", need.update, "with no activations around"),
    ]
    lines = [
        f"{request.encoder}, tiles of {request.tile_px} px, {request.precision}{checkpointing}",
        f"K = {plan.k:,} tiles, {request.ranks} rank{'s' * (request.ranks > 1)}, {answer.request.chosen_strategy}: "
        f"{local:,} tiles a rank",
        "",
        f"At the peak, the fullest{share}" if share else "At the peak",
        *(_row(*row) for row in base_rows if row[1]),
        *(_row(*row) for row in step_rows if row[1]),
        "  " + "─" * 42,
        _row("peak", plan.peak, f"{plan.peak / plan.budget:.0%} of the budget"),
        _row("budget", plan.budget, f"{format_size(answer.memory)}, less {format_size(answer.reserve)} in reserve"),
    ]
    beside = [("beside it, on the host", answer.on_host), ("beside it, in files", answer.in_files)]
    lines += [_row(name, size, "a rank") for name, size in beside if size]
    again = plan.chunks - plan.stored
    forwards = f"{again:,} chunks encoded twice" if again else "each chunk encoded once"
    lines += [
        "",
        f"policy {plan.policy}: chunks of {plan.chunk} tiles; {plan.stored:,} of {plan.chunks:,} keep their graph",
        f"arithmetic: {answer.flops / 1e12:,.1f} TFLOP a rank and step ({forwards})",
    ]
    if answer.seconds is not None:
        lines.append(
            f"time: {answer.seconds:,.2f} s a step on {request.device}, at {UTILISATION:.0%} of its arithmetic or "
            f"{BANDWIDTH_UTILISATION:.0%} of a bandwidth, its memory's or the host's; "
            "reading and communication between ranks not counted"
        )
    largest = ", ".join(f"{policy} {k:,}" for policy, k in answer.largest_k.items())
    lines.append(f"largest K with these chunks: {largest}")
    if request.device is None and not request.on_cpu:
        lines.append("ranks are taken to be GPUs; for machines without, --device cpu")
    if plan.warning:
        lines += ["", f"DOES NOT FIT: {plan.warning}"]
    return "\n".join(lines)


def _row(name: str, size: int, note: str) -> str:
    return f"  {name:<28}{format_size(size):>14}   {note}"
