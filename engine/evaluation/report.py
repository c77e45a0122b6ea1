"""What an evaluation leaves behind: predictions, metrics and their figures, and pictures of where the model looked."""

import logging
import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from slidescale.engine.config import DataConfig, SupervisionName
from slidescale.engine.data.cohort import Cohort
from slidescale.engine.data.manifest import Manifest
from slidescale.engine.data.slide import open_slide
from slidescale.engine.errors import SlideError
from slidescale.engine.evaluation.attention_picture import attention_overlay, with_legend
from slidescale.engine.evaluation.figures import NAMES, draw
from slidescale.engine.evaluation.intervals import Report
from slidescale.engine.evaluation.predictions import Evaluation
from slidescale.engine.files import file_name, save_png, write_csv, write_json

log = logging.getLogger(__name__)


class Judged(NamedTuple):
    """Slides' predictions beside what is true of them, as `intervals.report` takes them."""

    supervision: SupervisionName
    targets: np.ndarray
    outputs: np.ndarray
    cases: list[str]
    names: Sequence[str]


def judge(evaluation: Evaluation, manifest: Manifest) -> Judged:
    """The predictions of an evaluation that has some."""
    cases = [prediction.row.case_id for prediction in evaluation.predictions]
    return Judged(manifest.supervision, evaluation.targets, evaluation.outputs, cases, manifest.classes)


def write_metrics(path: Path, found: Report, split: Literal["val", "test", "external"], *, seen: int = 0) -> None:
    """Write metrics as JSON.

    Args:
        split: whose slides these are. Of the epochs that validation sees, the one that suits its slides best is kept,
            so that its metrics flatter; the file says so.
        seen: of external slides, how many are in split train or val, of their manifest or of the run: these flatter,
            too.
    """
    about: dict[str, object] = {"split": split}
    about |= {"in_train_or_val": seen} if split == "external" else {"epoch_chosen_on_this_split": split == "val"}
    write_json(path, about | found.as_json())


def draw_figures(folder: Path, judged: Judged, slides: str, found: Report) -> dict[str, np.ndarray]:
    """Draw what `figures.draw` can of the predictions, as PNG into a folder of their own, and return the pictures.

    Args:
        slides: whose predictions these are: "validation split".
        found: the metrics, of which the headline stands below each figure.
    """
    patients = len(set(judged.cases))
    about = f"{slides}: {found.count} slides of {patients} patients; {found}"
    pictures = draw(judged.supervision, judged.targets, judged.outputs, judged.names, judged.cases, about)
    for name in NAMES - set(pictures):  # one that is not defined any more must not stay beside newer ones
        (folder / f"{name}.png").unlink(missing_ok=True)
    for name, picture in pictures.items():
        save_png(picture, folder / f"{name}.png")
    return pictures


def write_predictions(path: Path, evaluation: Evaluation, manifest: Manifest) -> None:
    """Write slide_id, case_id, the target, what is predicted (see `output_columns`), and k (tiles used).

    The target's columns: label; label_<name> of each label, empty where it is missing; target; or time and event.
    """
    kind, names = manifest.supervision, manifest.classes
    target_columns = {
        "classes": ["label"],
        "multi_label": [f"label_{name}" for name in names],
        "regression": ["target"],
        "survival": ["time", "event"],
    }[kind]
    rows = [
        (
            row.slide_id,
            row.case_id,
            *_target_cells(kind, names, row.target),
            *output_cells(kind, names, output),
            len(weights),
        )
        for row, output, _, weights in evaluation.predictions
    ]
    write_csv(path, ("slide_id", "case_id", *target_columns, *output_columns(kind, names), "k"), rows)


def output_columns(supervision: SupervisionName, names: Sequence[str]) -> list[str]:
    """The columns of a prediction, beside the slide's own.

    probability_<name>, of the second of two classes, of each of more, or of each label; prediction, in the manifest's
    unit; or risk, larger for an earlier event.

    Args:
        names: as `Manifest.classes`.
    """
    match supervision:
        case "classes" if len(names) == 2:
            return [f"probability_{names[1]}"]
        case "classes" | "multi_label":
            return [f"probability_{name}" for name in names]
        case "regression":
            return ["prediction"]
        case "survival":
            return ["risk"]


def output_cells(supervision: SupervisionName, names: Sequence[str], output: np.ndarray) -> list[str]:
    """The cells of `output_columns`, of a slide's `Prediction.output`."""
    if supervision == "classes" and len(names) == 2:
        output = output[1:]
    digits = ".6f" if supervision in ("classes", "multi_label") else ".7g"
    return [format(value, digits) for value in output.tolist()]


def output_words(supervision: SupervisionName, names: Sequence[str], output: np.ndarray) -> str:
    """What is predicted of a slide, in words: probabilities by class or label, a number, or a risk."""
    if supervision in ("classes", "multi_label"):
        shown = list(zip(names, output.tolist(), strict=True))
        if supervision == "classes" and len(names) == 2:
            shown = shown[1:]
        return ", ".join(f"probability of {name} {value:.3f}" for name, value in shown)
    return f"{'predicted' if supervision == 'regression' else 'risk'} {output[0]:.4g}"


def _target_words(supervision: SupervisionName, names: Sequence[str], target: tuple[float, ...]) -> str:
    if supervision == "survival":
        return f"{'event at' if target[1] else 'no event until'} {target[0]:g}"
    if supervision == "multi_label":
        return ", ".join(name for name, value in zip(names, target, strict=True) if value == 1) or "no label"
    return names[int(target[0])] if supervision == "classes" else f"{target[0]:g}"


def _target_cells(supervision: SupervisionName, names: Sequence[str], target: tuple[float, ...]) -> list[str]:
    match supervision:
        case "classes":
            return [names[int(target[0])]]
        case "multi_label":
            return ["" if math.isnan(value) else f"{value:.0f}" for value in target]
        case "regression":
            return [repr(target[0])]
        case "survival":
            return [repr(target[0]), f"{target[1]:.0f}"]


def draw_heatmaps(evaluation: Evaluation, cohort: Cohort, config: DataConfig, *, count: int) -> dict[str, np.ndarray]:
    """Attention over a few slides: uint8 pictures by file name, of "<slide id>_<label>", or of the slide's id alone.

    Of classes, slides are taken in turn. Each picture has a legend, with the slide's name, what is true of it and what
    is predicted.
    """
    manifest, chosen = cohort.manifest, evaluation.predictions
    if manifest.supervision == "classes":
        by_class = [[p for p in chosen if p.row.target == (index,)] for index in range(len(manifest.classes))]
        chosen = [prediction for turn in zip_longest(*by_class) for prediction in turn if prediction is not None]
    pictures = {}
    for row, output, _, weights in chosen[:count]:
        try:
            with open_slide(row.path, default_mpp_um=config.default_mpp_um, mpp_um=row.mpp_um) as slide:
                picture = attention_overlay(slide, cohort.tilings[row.slide_id], weights)
        except SlideError as error:  # its tiles could be read, so it counts; only its picture is missing
            log.warning("no heatmap: %s", error)
            continue
        kind, names = manifest.supervision, manifest.classes
        truth, says = _target_words(kind, names, row.target), output_words(kind, names, output)
        name = row.slide_id
        if manifest.supervision == "classes":
            label = manifest.classes[int(row.target[0])]
            name = f"{row.slide_id}_{label}"
            if file_name(name) in pictures:  # "a_b" of c, and "a" of b_c
                name = f"{row.slide_id}/{label}"
        pictures[file_name(name)] = with_legend(picture, f"{row.slide_id} (truth: {truth}): {says}")
    return pictures
