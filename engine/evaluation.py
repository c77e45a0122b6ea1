"""Evaluation: whole slides, all tissue tiles, streamed through the encoder a chunk at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from slidescale.engine.data.cohort import Cohort
from slidescale.engine.data.manifest import ManifestRow
from slidescale.engine.data.prefetch import TileReader, TileRequest
from slidescale.engine.errors import SlideError, TrainingError
from slidescale.engine.memory.two_pass import Chunks, encode
from slidescale.engine.metrics import auroc
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.objective import CrossEntropy
from slidescale.engine.parallel.tile_parallel import TileGroup

# Chunks that are read while one is encoded.
CHUNKS_AHEAD = 4


class Prediction(NamedTuple):
    """Of one slide: class probabilities `[classes]`, loss, and the weight of each of its N tiles `[N]`."""

    row: ManifestRow
    probabilities: np.ndarray
    loss: float
    weights: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a split, and what they amount to.

    Attributes:
        loss: mean over slides; None without slides.
        auroc: None when a class has no slide.
    """

    predictions: list[Prediction]
    loss: float | None
    auroc: float | None

    @property
    def score(self) -> tuple[float, ...]:
        """What "best" means, larger is better: the AUROC where there is one, and then the loss."""
        if self.loss is None:
            return ()
        return (0.0 if self.auroc is None else self.auroc, -self.loss)

    def __str__(self) -> str:
        if self.loss is None:
            return "(no slides)"
        return f"loss {self.loss:.3f} AUROC {'undefined' if self.auroc is None else f'{self.auroc:.3f}'}"


def evaluate(
    model: SlideModel,
    rows: list[ManifestRow],
    cohort: Cohort,
    reader: TileReader,
    objective: CrossEntropy,
    group: TileGroup,
    chunk: int,
    device: torch.device,
) -> Evaluation:
    """Predict slides; a slide that cannot be read is set aside, on every rank.

    Args:
        chunk: tiles that a rank encodes at once.

    Raises:
        TrainingError: a loss is not finite; names the slide.
    """
    model.eval()
    counts = [group.chunk_count(len(cohort.tilings[row.slide_id].coords), chunk) for row in rows]
    readings = reader.ahead(_requests(rows, counts, cohort, group, chunk), CHUNKS_AHEAD)
    predictions = []
    for row, count in zip(rows, counts, strict=True):
        features, fault = [], None
        for _ in range(count):
            reading = next(readings)
            try:
                tiles = reading.wait()
            except SlideError as error:
                # Encode blanks, to stay in step with the ranks that could read theirs; the slide is dropped below.
                tiles, fault = torch.zeros_like(reading.tiles), str(error)
            features.append(
                encode(model, Chunks(tiles.to(device, non_blocking=True), chunk, count=1, seed=0, offset=0))
            )
        if cohort.has_fault(row, fault):
            continue
        with torch.no_grad():
            logits, weights = model.aggregate(torch.cat(features), group)
            loss = objective(logits, row.label).item()
        if not math.isfinite(loss):
            raise TrainingError(f"slide {row.slide_id}: the loss in validation is {loss}; the last checkpoint is kept")
        probabilities = objective.probabilities(logits).cpu().numpy()
        predictions.append(Prediction(row, probabilities, loss, group.gather_rows(weights).numpy()))
    return _sum_up(predictions)


def _requests(
    rows: list[ManifestRow], counts: list[int], cohort: Cohort, group: TileGroup, chunk: int
) -> Iterator[TileRequest]:
    """This rank's tiles of each slide, a chunk at a time; empty requests where other ranks have more."""
    for row, count in zip(rows, counts, strict=True):
        coords = cohort.tilings[row.slide_id].coords
        mine = coords[group.share(len(coords))]
        for index in range(count):
            yield TileRequest(row.path, mine[index * chunk : (index + 1) * chunk])


def _sum_up(predictions: list[Prediction]) -> Evaluation:
    if not predictions:
        return Evaluation([], None, None)
    labels = np.array([prediction.row.label for prediction in predictions])
    probabilities = np.stack([prediction.probabilities for prediction in predictions])
    loss = float(np.mean([prediction.loss for prediction in predictions]))
    return Evaluation(predictions, loss, auroc(labels, probabilities))
