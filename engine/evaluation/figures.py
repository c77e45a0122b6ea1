"""Pictures of slide-level predictions: which there are, by name; a kind of supervision names those it has."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from slidescale.engine.config import SupervisionName
from slidescale.engine.evaluation.class_figures import (
    calibration,
    confusion_figure,
    precision_recall_figure,
    reliability_figure,
    roc_figure,
)
from slidescale.engine.evaluation.figure_style import picture
from slidescale.engine.evaluation.intervals import by_patient
from slidescale.engine.evaluation.metrics import Judged, checked, measure
from slidescale.engine.evaluation.number_figures import scatter_figure, survival_figure
from slidescale.engine.supervision.base import Question
from slidescale.engine.supervision.make import supervision_of


def draw(
    kind: SupervisionName,
    targets: np.ndarray,
    outputs: np.ndarray,
    names: Sequence[str],
    cases: Sequence[str] | None = None,
    about: str = "",
) -> dict[str, np.ndarray]:
    """Draw a cohort's predictions.

    Args:
        kind: of supervision.
        targets: as in `metrics.measure`.
        outputs: as there.
        names: as there.
        cases: the patient of each slide; None: each slide has a patient of its own.
        about: what slides these are, a line below each figure.

    Returns:
        uint8 RGB pictures `[H, W, 3]` by name: of the figures that the kind of supervision names, those that are
        defined. A curve of one class is not, nor survival without events, with all risks equal or where a patient's
        slides have different times, nor anything without slides.

    Raises:
        ValueError: the arrays' shapes do not fit the kind, each other or the names.
    """
    targets, outputs = checked(kind, targets, outputs, names)
    if not len(targets):
        return {}
    judged = Judged(kind, targets, outputs, list(map(str, range(len(targets)))) if cases is None else cases, names)
    figures = {name: FIGURES[name](judged) for name in supervision_of(kind).figures}
    return {name: picture(figure, about) for name, figure in figures.items() if figure is not None}


def _roc(judged: Judged) -> Figure | None:
    questions = _questions(judged)
    return roc_figure(questions) if questions else None


def _precision_recall(judged: Judged) -> Figure | None:
    questions = _questions(judged)
    return precision_recall_figure(questions) if questions else None


def _reliability(judged: Judged) -> Figure:
    return reliability_figure(calibration(_labels(judged), judged.outputs), _values(judged)["ece"])


def _confusion(judged: Judged) -> Figure:
    guesses = supervision_of(judged.supervision).guess(judged.outputs)
    return confusion_figure(_labels(judged), guesses, judged.names, _values(judged)["accuracy"])


def _scatter(judged: Judged) -> Figure:
    return scatter_figure(judged.targets[:, 0], judged.outputs[:, 0], _values(judged))


def _kaplan_meier(judged: Judged) -> Figure | None:
    """Patients above and below the median risk (see `intervals.by_patient`)."""
    try:
        targets, outputs, _ = by_patient(judged.targets, judged.outputs, judged.cases)
    except ValueError:  # metrics.json has the reason
        return None
    high = outputs[:, 0] > np.median(outputs)
    if not high.any() or not targets[:, 1].any():
        return None
    values = measure(judged.supervision, targets, outputs, judged.names)
    return survival_figure(targets[:, 0], targets[:, 1] == 1, high, values["concordance"])


# By the names that kinds of supervision have for them. None where a figure is not defined.
FIGURES: dict[str, Callable[[Judged], Figure | None]] = {
    "roc": _roc,
    "precision_recall": _precision_recall,
    "reliability": _reliability,
    "confusion": _confusion,
    "scatter": _scatter,
    "kaplan_meier": _kaplan_meier,
}


def _values(judged: Judged) -> dict[str, float | None]:
    return measure(judged.supervision, judged.targets, judged.outputs, judged.names)


def _questions(judged: Judged) -> list[Question]:
    return supervision_of(judged.supervision).questions(judged.targets, judged.outputs, judged.names)


def _labels(judged: Judged) -> np.ndarray:
    return judged.targets[:, 0].astype(int)
