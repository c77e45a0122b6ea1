"""Ways to train on a slide's tiles, as benchmarks compare them: here what all of them share, and the engine itself."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slidescale.engine.api import make_step
from slidescale.engine.config import Config, DataConfig, MemoryConfig, ModelConfig, OptimConfig, RunConfig
from slidescale.engine.data.cohort import Cohort
from slidescale.engine.data.demo_drawing import MPP_UM
from slidescale.engine.data.manifest import Manifest, ManifestRow
from slidescale.engine.data.prefetch import TileReader, TileRequest
from slidescale.engine.data.tiling import TileSpec, Tiling
from slidescale.engine.memory.usage import keep_freed_memory, return_freed_memory
from slidescale.engine.models.make import make_model
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.strategies.ds_config import complete_ds_config
from slidescale.engine.strategies.make import Optimizing
from slidescale.engine.strategies.schedule import Schedule
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.training.feed import Feed
from slidescale.kernels.dispatch import choose_kernels

from cells.communication import Communication, CountingStopwatch
from cells.drawn_slide import tile_coords

POLICIES = ("keep", "recompute", "offload", "auto")
BASELINES = ("plain", "checkpoint", "hub", "frozen")
STRATEGIES = ("single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp")
CLASSES = ("negative", "positive")
# Momentum SGD without decay, at a constant rate: what a step changes is then proportional to gradients, and comparing
# parameters after some steps compares these.
LEARNING_RATE = 1e-2


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration, and what is measured of it.

    Attributes:
        policy: of the engine, or the name of a baseline.
        strategy: of the engine; a baseline's is given by what it is.
        ranks: processes, which share the slide's tiles.
        k: tiles of the slide.
        tile: side of a tile, px.
        chunk: tiles a chunk, or "auto".
        dtype: of matrix products, "bfloat16" or "float32".
        device: "cpu" or "cuda".
        steps: timed.
        budget: the engine's `--memory.budget`, in bytes; 0: as the engine finds.
        kernels: "auto", "triton" or "torch".
        parts: of the model that train, "all" or "aggregator".
        counted: numbers of tiles at which to count, in the end, what ranks say to each other (of the engine only).
    """

    policy: str
    strategy: str
    ranks: int
    k: int
    encoder: str
    tile: int
    chunk: int | str
    dtype: str
    device: str
    steps: int
    budget: int = 0
    kernels: str = "auto"
    parts: str = "all"
    counted: tuple[int, ...] = ()

    def config(self, offload_folder: Path | None = None) -> Config:
        """As a recipe would have it."""
        policy: Any = self.policy if self.policy in POLICIES else "keep"
        budget = f"{self.budget}B" if self.budget else "auto"
        return Config(
            run=RunConfig(
                name="benchmark",
                precision="bf16" if self.dtype == "bfloat16" else "fp32",
                kernels=self.kernels,  # type: ignore[arg-type]
            ),
            data=DataConfig(tile_px=self.tile, mpp_um=MPP_UM, classes=CLASSES),
            model=ModelConfig(encoder=self.encoder, dropout=0.0),
            memory=MemoryConfig(
                policy=policy,
                budget=budget,
                chunk=self.chunk,  # type: ignore[arg-type]
                offload_folder=offload_folder if policy == "offload" else None,
            ),
            optim=OptimConfig(optimizer="sgd", lr=LEARNING_RATE, weight_decay=0.0, warmup_epochs=0.0, clip=0.0),
        )

    def schedule(self) -> Schedule:
        """So long that the rate stays what it is."""
        return Schedule(warmup_steps=0, total_steps=10**9)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Source:
    """The tiles of the benchmark's slide, read as in training.

    Args:
        path: of a slide that `drawn_slide` wrote.
    """

    def __init__(self, path: Path, cell: Cell) -> None:
        data = cell.config().data
        self._path = path
        self._tile_px = cell.tile
        spec = TileSpec(tile_px=data.tile_px, mpp_um=data.mpp_um, min_tissue=data.min_tissue, default_mpp_um=None)
        self._prefetch = data.prefetch
        self.reader = TileReader(spec, threads=data.readers, pin=cell.device == "cuda")

    def bags(self, k: int, count: int, share: slice) -> Iterator[Tensor]:
        """The same bag `count` times: a share of its K tiles, uint8 `[n, tile, tile, 3]`, with others read ahead."""
        request = TileRequest(self._path, tile_coords(k, self._tile_px)[share])
        for reading in self.reader.ahead([request] * count, self._prefetch):
            yield reading.wait()

    def cohort(self, k: int, count: int, mesh: Mesh) -> Cohort:
        """`count` slides that are all the same file, for the engine's feed."""
        rows = tuple(
            ManifestRow(f"slide-{index}", f"case-{index}", self._path, (1.0,), "train") for index in range(count)
        )
        cohort = Cohort(Manifest(rows, CLASSES), mesh.world, max_excluded=0, excluded_csv=Path("excluded.csv"))
        tiling = Tiling(tile_coords(k, self._tile_px), float(self._tile_px))
        cohort.tilings = dict.fromkeys((row.slide_id for row in rows), tiling)
        return cohort


@dataclass(frozen=True)
class Spent:
    """A step's time: in all, from the end of the step before, and of each phase, in seconds."""

    step_s: float
    phases: dict[str, float]


class Way(ABC):
    """Trains on the benchmark's slide.

    Args:
        chunk: tiles that go through the encoder at once; 0: all of a rank's.
    """

    def __init__(self, cell: Cell, source: Source, device: torch.device) -> None:
        self.cell = cell
        self.source = source
        self.device = device
        self.tile_ranks = cell.ranks  # that encode
        self.chunk = 0
        self.details: dict[str, Any] = {}  # for the row
        # As the engine does on a CPU for a run with a budget, or without.
        (return_freed_memory if cell.budget or cell.policy == "offload" else keep_freed_memory)()

    def model(self) -> SlideModel:
        """The recipe's model with random weights, the same on every rank and for every way."""
        config = self.cell.config()
        kernels = choose_kernels(config.run.kernels, self.device)
        bf16 = self.cell.dtype == "bfloat16"
        return make_model(config, classes=len(CLASSES), bf16=bf16, kernels=kernels).to(self.device).train()

    def spend(self, k: int, count: int) -> Iterator[Spent]:
        """Take `count` steps on a bag of K tiles; every rank does."""
        self.prepare(k)
        begin = time.perf_counter()
        for phases in self.steps(k, count):
            end = time.perf_counter()
            yield Spent(end - begin, phases)
            begin = end

    def prepare(self, k: int) -> None:  # noqa: B027 (most need nothing)
        """What comes once before the steps on a bag of K tiles, and is in no step's time."""

    @abstractmethod
    def steps(self, k: int, count: int) -> Iterator[dict[str, float]]:
        """The steps themselves; yields each one's phases in seconds, when the device has done it."""

    @abstractmethod
    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The model's, whole, by name, on the main rank; every rank iterates."""

    def close(self) -> None:
        """End what runs beside."""
        self.source.reader.close()


class EngineWay(Way):
    """The engine, as a run puts it together."""

    def __init__(self, cell: Cell, source: Source, mesh: Mesh, folder: Path) -> None:
        super().__init__(cell, source, mesh.device)
        config, schedule, bf16 = cell.config(folder), cell.schedule(), cell.dtype == "bfloat16"
        zero = cell.strategy.startswith("zero")
        ds_config = None
        if zero:
            stage = {"zero_optimization": {"stage": int(cell.strategy[-1])}}
            ds_config = complete_ds_config(stage, config, schedule, bf16=bf16)
        memory = config.memory
        self._config = config
        self._step = make_step(
            self.model(),
            Optimizing.as_settings_say(config.optim, schedule, ds_config),
            CrossEntropy((), len(CLASSES)).to(mesh.device),
            mesh=mesh,
            strategy="zero" if zero else cell.strategy,
            ds_config=ds_config,
            chunk=memory.chunk,
            budget=memory.budget,
            policy=memory.policy,
            offload_folder=memory.offload_folder,
        )
        plan = self._step.prepare(source.reader.blank(1), cell.k, prefetch=config.data.prefetch)
        self.chunk = plan.chunk
        self.details = {"chunks": plan.chunks, "stored": plan.stored, "planned_gib": plan.peak / 2**30}

    def steps(self, k: int, count: int) -> Iterator[dict[str, float]]:
        """An epoch of as many slides."""
        mesh = self._step.mesh
        for batch in Feed(self._config, self.source.cohort(k, count, mesh), self.source.reader, mesh).epoch(0):
            yield self._step.take(batch).seconds

    def count(self, k: int) -> dict[str, list[dict[str, Any]]]:
        """Count what a rank sends in a step on K tiles; return `Communication.summary`."""
        communication, step = Communication(), self._step.train_step
        timing, step.stopwatch = step.stopwatch, CountingStopwatch(self.device, communication)
        with communication:
            list(self.steps(k, 1))
        step.stopwatch = timing
        return communication.summary()

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Put together from all ranks."""
        strategy = self._step.strategy
        for name, parameter in strategy.model.named_parameters():
            yield name, strategy.whole(parameter)

    def close(self) -> None:
        """And delete what was offloaded to disk."""
        super().close()
        self._step.close()
