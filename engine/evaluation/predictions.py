"""Evaluation: whole slides, all tissue tiles, streamed through the encoder one chunk at a time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from slidescale.engine.config import SupervisionName
from slidescale.engine.data.bag import places
from slidescale.engine.data.cohort import Cohort, Fault, fault_of
from slidescale.engine.data.manifest import ManifestRow
from slidescale.engine.data.prefetch import CHUNKS_AHEAD, TileReader, TileRequest
from slidescale.engine.data.tiling import Tiling
from slidescale.engine.errors import SlideError, TrainingError
from slidescale.engine.evaluation.metrics import Judged, measure
from slidescale.engine.logger import Meter
from slidescale.engine.memory.two_pass import Chunks, encode
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.supervision.make import supervision_of
from slidescale.engine.supervision.objective import Objective


class SlideFile(Protocol):
    """A slide to predict, beside its tiling: its name, where it is, and its scale."""

    @property
    def slide_id(self) -> str:
        """Unique."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def mpp_um(self) -> float | None:
        """Level-0 resolution in place of what the file states."""


File = TypeVar("File", bound=SlideFile)


@dataclass(frozen=True)
class Output(Generic[File]):
    """What the model's forward makes of a slide, while the other tile groups have taken other slides.

    Attributes:
        row: the slide.
        logits: `[classes]`, equal on every rank of the tile group.
        tiles: N, number of the slide's tiles.
        weights: `[N]`, of each tile, on the CPU; None where the aggregator gives none.
        fault: why this rank could not read its tiles, if so; logits and weights of the slide mean nothing then, on any
            rank, and the caller passes the fault on to the other ranks.
        speaks: whether this rank is the one to pass the results on.
    """

    row: File
    logits: Tensor
    tiles: int
    weights: np.ndarray | None
    fault: Fault | None
    speaks: bool


class Prediction(NamedTuple):
    """One slide's `Objective.predict` `[O]`, its loss, its N tiles, and their weights `[N]`, if there are such."""

    row: ManifestRow
    output: np.ndarray
    loss: float
    tiles: int
    weights: np.ndarray | None


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a split, and what they amount to.

    Attributes:
        supervision: name of the kind of supervision.
        names: of what is predicted, as `Manifest.classes`.
        predictions: of the slides that could be read.
    """

    supervision: SupervisionName
    names: tuple[str, ...]
    predictions: list[Prediction]

    @cached_property
    def judged(self) -> Judged:
        """The predictions beside what is true; there must be some."""
        return Judged(
            self.supervision,
            np.array([prediction.row.target for prediction in self.predictions]),
            np.stack([prediction.output for prediction in self.predictions]),
            [prediction.row.case_id for prediction in self.predictions],
            self.names,
        )

    @property
    def loss(self) -> float | None:
        """Mean over slides; None without slides."""
        if not self.predictions:
            return None
        return float(np.mean([prediction.loss for prediction in self.predictions]))

    @property
    def headline(self) -> str:
        """Name of the metric that the best epoch is chosen by."""
        return supervision_of(self.supervision).headline

    @cached_property
    def metrics(self) -> dict[str, float | None]:
        """All of the supervision's metrics, None where they are undefined; empty without slides.

        The AUROC is undefined, for one, when a class has no slide.
        """
        if not self.predictions:
            return {}
        kind, targets, outputs, _, names = self.judged
        return measure(kind, targets, outputs, names)

    @property
    def score(self) -> tuple[float, ...]:
        """What "best" means, larger is better: the headline metric where there is one, and then the loss."""
        if self.loss is None:
            return ()
        value = self.metrics[self.headline]
        return (0.0 if value is None else value, -self.loss)

    def __str__(self) -> str:
        if self.loss is None:
            return "(no slides)"
        value = self.metrics[self.headline]
        title = supervision_of(self.supervision).headline_title
        return f"loss {self.loss:.3f} {title} {'undefined' if value is None else f'{value:.3f}'}"


def evaluate(
    model: SlideModel,
    rows: list[ManifestRow],
    cohort: Cohort,
    reader: TileReader,
    objective: Objective,
    mesh: Mesh,
    chunk: int,
    device: torch.device,
    what: str = "validating",
) -> Evaluation:
    """Predict slides, different ones in each tile group; a slide that cannot be read is set aside, on every rank.

    Args:
        chunk: tiles that a rank encodes at once.
        what: what is being done, for the log.

    Raises:
        TrainingError: a loss is not finite; names the slide.
    """
    predictions: dict[str, Prediction] = {}
    for output in run_model(model, rows, cohort.tilings, reader, mesh, chunk, device, what):
        cohort.exclude_faults(output.fault)
        row, logits = output.row, output.logits
        with torch.no_grad():
            target = torch.tensor(row.target, dtype=torch.float64, device=logits.device)
            loss = objective(logits, target).item()
        mine = Prediction(row, objective.predict(logits).cpu().numpy(), loss, output.tiles, output.weights)
        for prediction in mesh.world.gather_objects(mine if output.speaks else None):
            if prediction is None or prediction.row.slide_id in cohort.excluded:
                continue
            slide_id = prediction.row.slide_id
            if not math.isfinite(prediction.loss):
                raise TrainingError(
                    f"slide {slide_id}: the loss in validation is {prediction.loss}; the last checkpoint is kept"
                )
            predictions[slide_id] = prediction
    manifest = cohort.manifest
    return Evaluation(manifest.supervision, manifest.classes, list(predictions.values()))


def run_model(
    model: SlideModel,
    rows: Sequence[File],
    tilings: dict[str, Tiling],
    reader: TileReader,
    mesh: Mesh,
    chunk: int,
    device: torch.device,
    what: str,
) -> Iterator[Output[File]]:
    """Encode and aggregate whole slides, different ones in each tile group; every rank takes every output.

    Args:
        tilings: of every row, by its slide_id.
        chunk: tiles that a rank encodes at once.
        what: what is being done, for the log.
    """
    model.eval()
    rounds = [_Round(rows[at : at + mesh.slides], tilings, mesh, chunk) for at in range(0, len(rows), mesh.slides)]
    readings = reader.ahead((request for each in rounds for request in each.requests()), CHUNKS_AHEAD)
    meter, done = Meter(what, sum(each.tiles for each in rounds), "tile", main=mesh.world.rank == 0), 0
    try:
        for each in rounds:
            features: list[Tensor] = []
            fault: Fault | None = None
            for index in range(each.count):
                reading = next(readings)
                try:
                    tiles = reading.wait()
                except SlideError as error:
                    # Encode blanks, to stay in step with the ranks that could read theirs; the slide is dropped later.
                    tiles, fault = torch.zeros_like(reading.tiles), fault_of(each.row.slide_id, error)
                chunks = Chunks(tiles.to(device, non_blocking=True), chunk, count=1, seed=0, offset=0)
                features.append(encode(model, chunks).features)
                # All ranks are about as far as this one.
                meter.reach(done + each.tiles * (index + 1) // each.count)
            done += each.tiles
            with torch.no_grad():
                logits, weights = model.aggregate(torch.cat(features), each.places.to(device), mesh.tiles)
            # The first rank of a tile group speaks; where there are fewer slides than groups, the others are silent.
            speaks = mesh.tiles.rank == 0 and mesh.slide < len(each.rows)
            gathered = None if weights is None else mesh.tiles.gather_rows(weights).numpy()
            yield Output(each.row, logits, len(each.places), gathered, fault, speaks)
    finally:
        meter.close()


class _Round(Generic[File]):
    """Slides that the tile groups predict side by side; a group without one repeats the first."""

    def __init__(self, rows: Sequence[File], tilings: dict[str, Tiling], mesh: Mesh, chunk: int) -> None:
        self.rows = rows
        self.row = rows[mesh.slide] if mesh.slide < len(rows) else rows[0]
        self.tiles = sum(len(tilings[row.slide_id].coords) for row in rows)
        # Every rank of the world makes as many encoder calls as the fullest one.
        self.count = max(mesh.tiles.chunk_count(len(tilings[row.slide_id].coords), chunk) for row in rows)
        tiling = tilings[self.row.slide_id]
        self.places = places(tiling.coords, tiling.side_px)
        self._mine = tiling.coords[mesh.tiles.share(len(tiling.coords))]
        self._chunk = chunk

    def requests(self) -> Iterator[TileRequest]:
        """This rank's tiles, one chunk at a time; empty requests where other ranks have more."""
        for index in range(self.count):
            part = slice(index * self._chunk, (index + 1) * self._chunk)
            yield TileRequest(self.row.path, self._mine[part], self.row.mpp_um)
