"""Figures of probabilities: ROC and precision-recall curves, reliability and confusion."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import PrecisionRecallDisplay, RocCurveDisplay, confusion_matrix

from slidescale.engine.evaluation.figure_style import (
    COLOURS,
    GREY,
    PALE,
    REFERENCE,
    STROKES,
    canvas,
    short,
    style,
    title_of,
    value_words,
)
from slidescale.engine.supervision.base import Question
from slidescale.engine.supervision.rates import CALIBRATION_BINS, confidence_bin

# Classes up to which the cells of a confusion matrix have room for two lines.
ROOMY_CLASSES = 6
# Curves up to which their legend has room inside the axes.
ROOMY_CURVES = 5


class Calibration(NamedTuple):
    """Of each bin of confidence `[15]`: slides, mean confidence and accuracy, NaN in empty bins."""

    slides: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def roc_figure(questions: Sequence[Question]) -> Figure:
    """Sensitivity over 1 − specificity, one curve per question."""
    figure, axes = _curve_canvas(len(questions), "ROC curve")
    axes.plot([0, 1], [0, 1], **REFERENCE)
    for question, display in zip(questions, roc_curves(questions, axes), strict=True):
        display.line_.set_label(f"AUROC {display.roc_auc:.3f}  {short(question.name)}")
    _finish_curves(axes, len(questions), "1 − specificity", "Sensitivity", "lower right")
    return figure


def precision_recall_figure(questions: Sequence[Question]) -> Figure:
    """Precision over recall, one curve per question, beside the share of positive slides: what chance has."""
    figure, axes = _curve_canvas(len(questions), "Precision and recall")
    for question, display in zip(questions, precision_recall_curves(questions, axes), strict=True):
        colour = GREY if len(questions) == 1 else display.line_.get_color()
        axes.axhline(display.prevalence_pos_label, **(REFERENCE | {"color": colour, "zorder": 1}))
        display.line_.set_label(f"Average precision {display.average_precision:.3f}  {short(question.name)}")
    axes.plot([], [], **REFERENCE, label="Share of positive slides")
    _finish_curves(axes, len(questions), "Recall (sensitivity)", "Precision", "lower left")
    return figure


def roc_curves(questions: Sequence[Question], axes: Axes) -> list[RocCurveDisplay]:
    """Draw the ROC curve of each question."""
    return [
        RocCurveDisplay.from_predictions(question.truth, question.scores, ax=axes, curve_kwargs=_stroke(index))
        for index, question in enumerate(questions)
    ]


def precision_recall_curves(questions: Sequence[Question], axes: Axes) -> list[PrecisionRecallDisplay]:
    """Draw precision over recall of each question, in steps, from recall 1 to 0."""
    return [
        PrecisionRecallDisplay.from_predictions(question.truth, question.scores, ax=axes, curve_kwargs=_stroke(index))
        for index, question in enumerate(questions)
    ]


def calibration(labels: np.ndarray, outputs: np.ndarray) -> Calibration:
    """How often the likeliest class is right, by its probability (Guo et al. 2017)."""
    confidence = outputs.max(1)
    bins = confidence_bin(confidence)
    slides = np.bincount(bins, minlength=CALIBRATION_BINS)
    filled = np.where(slides > 0, slides, np.nan)
    sums = [
        np.bincount(bins, weights=each, minlength=CALIBRATION_BINS)
        for each in (confidence, outputs.argmax(1) == labels)
    ]
    return Calibration(slides, sums[0] / filled, sums[1] / filled)


def reliability_figure(bins: Calibration, ece: float | None) -> Figure:
    """Accuracy by confidence, above how many slides have it."""
    figure = Figure(figsize=(5.4, 6.2), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    edges = np.arange(CALIBRATION_BINS) / CALIBRATION_BINS
    shape: dict[str, Any] = {"width": 1 / CALIBRATION_BINS, "align": "edge", "edgecolor": "white", "linewidth": 0.8}
    above.bar(edges, np.nan_to_num(bins.accuracy), color=COLOURS[0], label="accuracy of the bin", **shape)
    ends = edges + 1 / CALIBRATION_BINS
    above.hlines(bins.confidence, edges, ends, color=COLOURS[1], linewidth=2.2, label="its mean confidence")
    above.plot([0, 1], [0, 1], **REFERENCE, label="calibrated")
    style(above, "", "Accuracy")
    above.set(xlim=(0, 1), ylim=(0, 1))
    above.legend(fontsize=9, loc="upper left", edgecolor=PALE)
    title_of(above, f"Reliability   ({value_words('ECE', ece)})")
    below.bar(edges, bins.slides, color=GREY, **shape)
    style(below, "Confidence (probability of the likeliest class)", "Slides")
    below.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def confusion_figure(labels: np.ndarray, guesses: np.ndarray, names: Sequence[str], accuracy: float | None) -> Figure:
    """Slides of each true class (row) by the predicted one (column).

    Cells have two numbers, slides and their share of the true class, and colours from 0 to 1, so that two figures
    compare. scikit-learn's ConfusionMatrixDisplay writes one number, in a colour that only shows on cells whose colours
    run from its smallest to its largest.
    """
    classes = len(names)
    roomy = classes <= ROOMY_CLASSES
    side = min(max(4.6, 1.6 + (0.75 if roomy else 0.45) * classes), 12)
    title = f"Confusion   ({value_words('accuracy', accuracy)})"
    figure, axes = canvas(title, "Predicted class", "True class", width=side + 0.8, height=side)
    counts = confusion_matrix(labels, guesses, labels=range(classes))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="Share of the true class", fraction=0.046)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    ticks = [short(name) for name in names]
    upright = classes > 3 or max(map(len, ticks)) > 10
    axes.set_xticks(range(classes), ticks, rotation=40 if upright else 0, ha="right" if upright else "center")
    axes.set_yticks(range(classes), ticks)
    for row, column in np.ndindex(*counts.shape):
        if not roomy and not counts[row, column]:
            continue
        text = f"{counts[row, column]}" + (f"\n{shares[row, column]:.0%}" if roomy else "")
        colour = "white" if shares[row, column] > 0.55 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=11 if classes <= 3 else 9)
    return figure


def _curve_canvas(curves: int, title: str) -> tuple[Figure, Axes]:
    return canvas(title, "", "", width=5.4 if curves <= ROOMY_CURVES else 7.4)


def _stroke(index: int) -> dict[str, Any]:
    """How the curve of that index is drawn."""
    linestyle = STROKES[index // len(COLOURS) % len(STROKES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": linestyle, "linewidth": 1.8, "clip_on": False}


def _finish_curves(axes: Axes, curves: int, x: str, y: str, place: str) -> None:
    """Labels and legend, which scikit-learn has set in its own words."""
    axes.set(xlabel=x, ylabel=y)
    text: dict[str, Any] = {"loc": place, "fontsize": 9, "framealpha": 0.9, "edgecolor": PALE}
    if curves > ROOMY_CURVES:
        text |= {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
    axes.legend(**text)
