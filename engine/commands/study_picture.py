"""The picture of a K study."""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

END_TO_END, FROZEN = "#0072b2", "#d55e00"


class Point(NamedTuple):
    """A run in the picture: its arm, its tiles per training bag, and the value drawn."""

    arm: str
    frozen: bool
    tiles: float
    value: float


def draw_against_k(train_loss: Sequence[Point], metric: Sequence[Point], metric_name: str) -> np.ndarray:
    """Draw training loss and a validation metric against K, uint8 `[H, W, 3]`.

    A line joins the medians over seeds, bars span all seeds, and dots are the runs; a frozen encoder, which saw all
    tiles, is a level to compare with.
    """
    figure = Figure(figsize=(10.5, 4.4), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw(left, train_loss, "training loss, last epoch")
    _draw(right, metric, f"validation {metric_name}, last epoch")
    seeds = max(Counter(point.arm for point in train_loss).values(), default=0)
    figure.suptitle(f"More tiles per slide (median and range of {seeds} seeds, the same slides)", x=0.01, ha="left")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw(axes: Axes, points: Sequence[Point], label: str) -> None:
    trained = [point for point in points if not point.frozen]
    arms = {arm: [point for point in trained if point.arm == arm] for arm in dict.fromkeys(p.arm for p in trained)}
    # An arm has one place, though "all" differs a little from seed to seed where slides were set aside.
    at = {arm: round(statistics.median(point.tiles for point in points)) for arm, points in arms.items()}
    places = list(at.values())
    groups = [[point.value for point in points] for points in arms.values()]
    medians = [statistics.median(group) for group in groups]
    spans = [
        [middle - min(group) for middle, group in zip(medians, groups, strict=True)],
        [max(group) - middle for middle, group in zip(medians, groups, strict=True)],
    ]
    axes.errorbar(
        places,
        medians,
        yerr=spans,
        color=END_TO_END,
        marker="o",
        markersize=6,
        capsize=4,
        linewidth=1.8,
        label="encoder and aggregator trained together",
    )
    axes.plot([at[p.arm] for p in trained], [p.value for p in trained], "o", color=END_TO_END, ms=4, alpha=0.35)
    if frozen := [point.value for point in points if point.frozen]:
        axes.axhline(
            statistics.median(frozen), color=FROZEN, linestyle="--", linewidth=1.8, label="frozen encoder, all tiles"
        )
        axes.axhspan(min(frozen), max(frozen), color=FROZEN, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(places)), [f"{place:,}" for place in sorted(set(places))])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("K, tiles per training bag")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
