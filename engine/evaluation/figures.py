"""Pictures of slide-level predictions: curves, calibration, confusion, scatter and survival."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from slidescale.engine.config import SupervisionName
from slidescale.engine.evaluation.intervals import by_patient
from slidescale.engine.evaluation.metrics import Judged, checked, measure
from slidescale.engine.supervision.base import Question
from slidescale.engine.supervision.make import supervision_of
from slidescale.engine.supervision.rates import CALIBRATION_BINS, confidence_bin

# Okabe & Ito's colours, which people who see colours differently tell apart; then the same in other strokes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STROKES = ("-", "--", ":", "-.")
GREY = "#8c8c8c"
# Classes up to which the cells of a confusion matrix have room for two lines.
ROOMY_CLASSES = 6
LONGEST_NAME = 22


class Curve(NamedTuple):
    """A line of a class or label: its points `[p]`, the area under it, and the share of slides that are positive."""

    name: str
    x: np.ndarray
    y: np.ndarray
    area: float
    positive: float


class Calibration(NamedTuple):
    """Of each bin of confidence `[15]`: slides, mean confidence and accuracy, NaN in empty bins."""

    slides: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


class SurvivalCurve(NamedTuple):
    """The share alive `[m]` from each time `[m]` to the next: time 0, then the times of events."""

    times: np.ndarray
    alive: np.ndarray


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
        kind: what the outputs are.
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
    return {name: _picture(figure, about) for name, figure in figures.items() if figure is not None}


def roc_curves(questions: Sequence[Question]) -> list[Curve]:
    """Sensitivity over 1 − specificity."""
    curves = []
    for name, truth, scores in questions:
        alarms, hits, _ = roc_curve(truth, scores)
        curves.append(Curve(name, alarms, hits, roc_auc_score(truth, scores), truth.mean()))
    return curves


def precision_recall_curves(questions: Sequence[Question]) -> list[Curve]:
    """Precision over recall, from recall 1 to 0; the area is the average precision."""
    curves = []
    for name, truth, scores in questions:
        precision, recall, _ = precision_recall_curve(truth, scores)
        curves.append(Curve(name, recall, precision, average_precision_score(truth, scores), truth.mean()))
    return curves


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


def confusion(labels: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Slides `[classes, classes]` of each true class (row) by likeliest class (column)."""
    classes = outputs.shape[1]
    return np.bincount(labels * classes + outputs.argmax(1), minlength=classes**2).reshape(classes, classes)


def kaplan_meier(times: np.ndarray, events: np.ndarray) -> SurvivalCurve:
    """The product-limit estimator (Kaplan & Meier 1958); a slide censored at an event's time was at risk of it.

    Args:
        times: `[n]`.
        events: bool `[n]`, False for censored.
    """
    at = np.unique(times[events])
    at_risk = (times >= at[:, None]).sum(1)
    died = ((times == at[:, None]) & events).sum(1)
    return SurvivalCurve(np.r_[0.0, at], np.cumprod(np.r_[1.0, 1 - died / at_risk]))


def _canvas(title: str, x: str, y: str, *, width: float = 5.4, height: float = 5.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=120, layout="compressed")
    axes = figure.add_subplot()
    _style(axes, x, y)
    axes.set_title(title, fontsize=12, loc="left", fontweight="bold")
    return figure, axes


def _style(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _picture(figure: Figure, about: str) -> np.ndarray:
    if about:
        figure.supxlabel(about, fontsize=9, color="#555555", x=0.02, ha="left")
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)  # a class's name is no formula, whatever it contains
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _value(name: str, value: float | None) -> str:
    return f"{name} undefined" if value is None else f"{name} {value:.3f}"


def _unit_square(axes: Axes) -> None:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")


def _lines(curves: list[Curve], title: str, x: str, y: str, area: str) -> Figure:
    inside = len(curves) <= 5
    figure, axes = _canvas(title, x, y, width=5.4 if inside else 7.4)
    roc = area == "AUROC"
    if roc:
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (2, 3)))
    for index, curve in enumerate(curves):
        colour = COLOURS[index % len(COLOURS)]
        if not roc:  # what a model that knows nothing has
            axes.axhline(curve.positive, color=GREY if len(curves) == 1 else colour, linewidth=1, linestyle=(0, (2, 3)))
        axes.plot(
            curve.x,
            curve.y,
            color=colour,
            linewidth=1.8,
            linestyle=STROKES[index // len(COLOURS) % len(STROKES)],
            drawstyle="default" if roc else "steps-post",
            label=f"{area} {curve.area:.3f}  {_short(curve.name)}",
            clip_on=False,
        )
    if not roc:
        axes.plot([], [], color=GREY, linewidth=1, linestyle=(0, (2, 3)), label="Share of positive slides")
    _unit_square(axes)
    style = {"fontsize": 9, "framealpha": 0.9, "edgecolor": "#e4e4e4"}
    if inside:
        axes.legend(loc="lower right" if roc else "lower left", **style)
    else:
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), **style)
    return figure


def _reliability(bins: Calibration, values: dict[str, float | None]) -> Figure:
    figure = Figure(figsize=(5.4, 6.2), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    edges = np.arange(CALIBRATION_BINS) / CALIBRATION_BINS
    shape = {"width": 1 / CALIBRATION_BINS, "align": "edge", "edgecolor": "white", "linewidth": 0.8}
    above.bar(edges, np.nan_to_num(bins.accuracy), color=COLOURS[0], label="accuracy of the bin", **shape)
    ends = edges + 1 / CALIBRATION_BINS
    above.hlines(bins.confidence, edges, ends, color=COLOURS[1], linewidth=2.2, label="its mean confidence")
    above.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (2, 3)), label="calibrated")
    _style(above, "", "Accuracy")
    above.set(xlim=(0, 1), ylim=(0, 1))
    above.legend(fontsize=9, loc="upper left", edgecolor="#e4e4e4")
    above.set_title(f"Reliability   ({_value('ECE', values['ece'])})", fontsize=12, loc="left", fontweight="bold")
    below.bar(edges, bins.slides, color=GREY, **shape)
    _style(below, "Confidence (probability of the likeliest class)", "Slides")
    below.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def _confusion(counts: np.ndarray, names: Sequence[str], values: dict[str, float | None]) -> Figure:
    classes = len(names)
    roomy = classes <= ROOMY_CLASSES
    side = min(max(4.6, 1.6 + (0.75 if roomy else 0.45) * classes), 12)
    title = f"Confusion   ({_value('accuracy', values['accuracy'])})"
    figure, axes = _canvas(title, "Predicted class", "True class", width=side + 0.8, height=side)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="Share of the true class", fraction=0.046)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    ticks = [_short(name) for name in names]
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


def _scatter(truth: np.ndarray, predicted: np.ndarray, values: dict[str, float | None]) -> Figure:
    title = f"Predicted and true   ({_value('R²', values['r2'])}, {_value('Pearson', values['pearson'])})"
    figure, axes = _canvas(title, "True value", "Predicted value")
    low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    margin = (high - low) * 0.04 or 1.0
    ends = [low - margin, high + margin]
    axes.plot(ends, ends, color=GREY, linewidth=1, linestyle=(0, (2, 3)), label="predicted = true")
    axes.scatter(truth, predicted, s=22, color=COLOURS[0], alpha=min(0.75, 12 / math.sqrt(len(truth))), linewidths=0)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.legend(fontsize=9, loc="upper left", edgecolor="#e4e4e4")
    return figure


def _kaplan_meier(times: np.ndarray, events: np.ndarray, high: np.ndarray, values: dict[str, float | None]) -> Figure:
    figure = Figure(figsize=(6.2, 5.4), dpi=120, layout="constrained")
    axes, table = figure.subplots(2, 1, sharex=True, height_ratios=(6, 1))
    groups = [(~high, "low risk", COLOURS[0]), (high, "high risk", COLOURS[1])]
    for mine, name, colour in groups:
        curve, last = kaplan_meier(times[mine], events[mine]), times[mine].max()
        axes.step(
            np.r_[curve.times, last],
            np.r_[curve.alive, curve.alive[-1]],
            where="post",
            color=colour,
            linewidth=1.8,
            label=f"{name}: {mine.sum()} patients, {events[mine].sum()} events",
        )
        censored = np.unique(times[mine & ~events])
        alive = curve.alive[np.searchsorted(curve.times, censored, side="right") - 1]
        axes.plot(censored, alive, "|", color=colour, markersize=7)
    _style(axes, "", "Share without the event")
    latest = times.max() or 1.0
    axes.set(xlim=(-0.04 * latest, 1.02 * latest), ylim=(0, 1.02))
    axes.set_title(
        f"Survival by the median risk   ({_value('concordance', values['concordance'])})",
        fontsize=12,
        loc="left",
        fontweight="bold",
    )
    axes.plot([], [], "|", color=GREY, markersize=7, label="censored")
    axes.legend(fontsize=9, loc="upper right", framealpha=0.9, edgecolor="#e4e4e4")
    ticks = [tick for tick in MaxNLocator(6).tick_values(0, latest) if 0 <= tick <= latest]
    axes.set_xticks(ticks)
    for row, (mine, _, colour) in enumerate(groups):
        for tick in ticks:
            table.text(tick, row, f"{(times[mine] >= tick).sum()}", ha="center", va="center", color=colour, fontsize=9)
    table.set_yticks(range(len(groups)), [name for _, name, _ in groups])
    table.set(ylim=(1.6, -0.6), xlabel="Time")
    table.set_title("Patients at risk", fontsize=9, loc="left")
    table.spines[["top", "right", "left"]].set_visible(False)
    table.tick_params(axis="y", length=0)
    return figure


def _values(judged: Judged) -> dict[str, float | None]:
    return measure(judged.supervision, judged.targets, judged.outputs, judged.names)


def _questions(judged: Judged) -> list[Question]:
    return supervision_of(judged.supervision).questions(judged.targets, judged.outputs, judged.names)


def draw_roc(judged: Judged) -> Figure | None:
    """Sensitivity over 1 − specificity, of each of the kind's questions."""
    curves = roc_curves(_questions(judged))
    return _lines(curves, "ROC curve", "1 − specificity", "Sensitivity", "AUROC") if curves else None


def draw_precision_recall(judged: Judged) -> Figure | None:
    """Precision over recall, of each of the kind's questions."""
    curves = precision_recall_curves(_questions(judged))
    return (
        _lines(curves, "Precision and recall", "Recall (sensitivity)", "Precision", "Average precision")
        if curves
        else None
    )


def draw_reliability(judged: Judged) -> Figure:
    """Accuracy by confidence of the likeliest class."""
    return _reliability(calibration(judged.targets[:, 0].astype(int), judged.outputs), _values(judged))


def draw_confusion(judged: Judged) -> Figure:
    """Slides by true and likeliest class."""
    return _confusion(confusion(judged.targets[:, 0].astype(int), judged.outputs), judged.names, _values(judged))


def draw_scatter(judged: Judged) -> Figure:
    """Predicted over true numbers."""
    return _scatter(judged.targets[:, 0], judged.outputs[:, 0], _values(judged))


def draw_kaplan_meier(judged: Judged) -> Figure | None:
    """Survival of the patients (see `intervals.by_patient`) above and below the median risk."""
    try:
        targets, outputs, _ = by_patient(judged.targets, judged.outputs, judged.cases)
    except ValueError:  # metrics.json has the reason
        return None
    high = outputs[:, 0] > np.median(outputs)
    if not high.any() or not targets[:, 1].any():
        return None
    values = measure(judged.supervision, targets, outputs, judged.names)
    return _kaplan_meier(targets[:, 0], targets[:, 1] == 1, high, values)


# By the names that kinds of supervision have for them. None where a figure is not defined.
FIGURES: dict[str, Callable[[Judged], Figure | None]] = {
    "roc": draw_roc,
    "precision_recall": draw_precision_recall,
    "reliability": draw_reliability,
    "confusion": draw_confusion,
    "scatter": draw_scatter,
    "kaplan_meier": draw_kaplan_meier,
}
