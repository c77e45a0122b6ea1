"""Figures of numbers and times: scatter and survival."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import CensoredData, ecdf

from slidescale.engine.evaluation.figure_style import (
    COLOURS,
    GREY,
    PALE,
    REFERENCE,
    canvas,
    style,
    title_of,
    value_words,
)


def scatter_figure(truth: np.ndarray, predicted: np.ndarray, values: dict[str, float | None]) -> Figure:
    """Predicted over true numbers, beside where they would be equal."""
    title = f"Predicted and true   ({value_words('R²', values['r2'])}, {value_words('Pearson', values['pearson'])})"
    figure, axes = canvas(title, "True value", "Predicted value")
    low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    margin = (high - low) * 0.04 or 1.0
    ends = [low - margin, high + margin]
    axes.plot(ends, ends, **REFERENCE, label="predicted = true")
    axes.scatter(truth, predicted, s=22, color=COLOURS[0], alpha=min(0.75, 12 / math.sqrt(len(truth))), linewidths=0)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.legend(fontsize=9, loc="upper left", edgecolor=PALE)
    return figure


def kaplan_meier(times: np.ndarray, events: np.ndarray) -> Any:
    """The share alive after each time: the product-limit estimator (Kaplan & Meier 1958).

    It is what SciPy's empirical distribution makes of times that are censored on the right; a patient censored at the
    time of an event was at risk of it.

    Args:
        times: `[n]`.
        events: bool `[n]`, False for censored.

    Returns:
        SciPy's distribution: `quantiles`, `probabilities` and `evaluate(times)`.
    """
    return ecdf(CensoredData(times[events], right=times[~events])).sf


def survival_figure(times: np.ndarray, events: np.ndarray, high: np.ndarray, concordance: float | None) -> Figure:
    """Kaplan-Meier curves of two groups, above the numbers of patients at risk.

    Args:
        times: `[n]`.
        events: bool `[n]`, False for censored.
        high: bool `[n]`, who is in the group of high risk.
    """
    figure = Figure(figsize=(6.2, 5.4), dpi=120, layout="constrained")
    axes, table = figure.subplots(2, 1, sharex=True, height_ratios=(6, 1))
    groups = [(~high, "low risk", COLOURS[0]), (high, "high risk", COLOURS[1])]
    for mine, name, colour in groups:
        curve, last = kaplan_meier(times[mine], events[mine]), times[mine].max()
        axes.step(
            np.r_[0.0, curve.quantiles, last],
            np.r_[1.0, curve.probabilities, curve.evaluate(last)],
            where="post",
            color=colour,
            linewidth=1.8,
            label=f"{name}: {mine.sum()} patients, {events[mine].sum()} events",
        )
        censored = np.unique(times[mine & ~events])
        axes.plot(censored, curve.evaluate(censored), "|", color=colour, markersize=7)
    style(axes, "", "Share without the event")
    latest = times.max() or 1.0
    axes.set(xlim=(-0.04 * latest, 1.02 * latest), ylim=(0, 1.02))
    title_of(axes, f"Survival by the median risk   ({value_words('concordance', concordance)})")
    axes.plot([], [], "|", color=GREY, markersize=7, label="censored")
    axes.legend(fontsize=9, loc="upper right", framealpha=0.9, edgecolor=PALE)
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
