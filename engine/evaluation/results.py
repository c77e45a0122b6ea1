"""The files that an evaluation leaves: predictions, metrics with figures, and pictures of where the model looked."""

import logging
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np

from slidescale.engine.config import DataConfig
from slidescale.engine.data.cohort import Cohort
from slidescale.engine.data.slide import open_slide
from slidescale.engine.errors import SlideError
from slidescale.engine.evaluation.attention_picture import attention_overlay, with_legend
from slidescale.engine.evaluation.figures import FIGURES, draw
from slidescale.engine.evaluation.intervals import Estimates
from slidescale.engine.evaluation.metrics import Judged
from slidescale.engine.evaluation.predictions import Evaluation, Prediction
from slidescale.engine.files import file_name, save_png, write_csv, write_json
from slidescale.engine.supervision.make import supervision_of

log = logging.getLogger(__name__)


def write_metrics(path: Path, found: Estimates, split: Literal["val", "test", "external"], *, seen: int = 0) -> None:
    """Write metrics as JSON.

    Args:
        split: the slides' split. Validation keeps the epoch that suits its slides best, so that its metrics flatter;
            the file says so.
        seen: how many of external slides are in split train or val of their manifest or of the run: these flatter, too.
    """
    about: dict[str, object] = {"split": split}
    about |= {"in_train_or_val": seen} if split == "external" else {"epoch_chosen_on_this_split": split == "val"}
    write_json(path, about | found.as_json())


def draw_figures(folder: Path, judged: Judged, slides: str, found: Estimates) -> dict[str, np.ndarray]:
    """Draw what `figures.draw` can of the predictions, as PNG into a folder of their own, and return the pictures.

    Args:
        slides: what the slides are: "validation split".
        found: the metrics, of which the headline stands below each figure.
    """
    patients = len(set(judged.cases))
    about = f"{slides}: {found.count} slides of {patients} patients; {found}"
    pictures = draw(judged.supervision, judged.targets, judged.outputs, judged.names, judged.cases, about)
    for name in FIGURES.keys() - pictures.keys():  # one that is not defined any more must not stay beside newer ones
        (folder / f"{name}.png").unlink(missing_ok=True)
    for name, picture in pictures.items():
        save_png(picture, folder / f"{name}.png")
    return pictures


def write_predictions(path: Path, evaluation: Evaluation) -> None:
    """Write slide_id, case_id, the target, what is predicted, and k (tiles used); one row per slide.

    The kind of supervision gives the columns of target and prediction (`target_columns`, `output_columns`).
    """
    kind, names = supervision_of(evaluation.supervision), evaluation.names
    header = ("slide_id", "case_id", *kind.target_columns(names), *kind.output_columns(names), "k")
    rows = [
        (
            row.slide_id,
            row.case_id,
            *kind.target_cells(names, row.target),
            *kind.output_cells(names, output),
            tiles,
        )
        for row, output, _, tiles, _ in evaluation.predictions
    ]
    write_csv(path, header, rows)


def draw_heatmaps(evaluation: Evaluation, cohort: Cohort, config: DataConfig, *, count: int) -> dict[str, np.ndarray]:
    """Attention over a few slides: uint8 pictures by file name, made of "<slide id>_<class>", or of the slide's id.

    Where slides have one class each, the classes take turns. Each picture has a legend, with the slide's name, what is
    true of it and what is predicted. An aggregator without weights of tiles has no pictures.
    """
    kind, names = supervision_of(evaluation.supervision), evaluation.names
    by_class: dict[str | None, list[Prediction]] = {name: [] for name in names}
    for prediction in evaluation.predictions:
        by_class.setdefault(kind.group(names, prediction.row.target), []).append(prediction)
    chosen = [each for turn in zip_longest(*by_class.values()) for each in turn if each is not None]
    pictures: dict[str, np.ndarray] = {}
    for row, output, _, _, weights in chosen[:count]:
        if weights is None:
            continue
        try:
            with open_slide(row.path, default_mpp_um=config.default_mpp_um, mpp_um=row.mpp_um) as slide:
                picture = attention_overlay(slide, cohort.tilings[row.slide_id], weights)
        except SlideError as error:  # its tiles could be read, so it counts; only its picture is missing
            log.warning("no heatmap: %s", error)
            continue
        name, group = row.slide_id, kind.group(names, row.target)
        if group is not None:
            name = f"{row.slide_id}_{group}"
            if file_name(name) in pictures:  # "a_b" of c, and "a" of b_c
                name = f"{row.slide_id}/{group}"
        truth, predicted = kind.target_words(names, row.target), kind.output_words(names, output)
        pictures[file_name(name)] = with_legend(picture, f"{row.slide_id} (truth: {truth}): {predicted}")
    return pictures
