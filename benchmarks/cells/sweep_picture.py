"""The picture of a sweep over K."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# A colour per policy and baseline; baselines are grey and brown.
COLOURS = {
    "recompute": "#0072b2",
    "auto": "#009e73",
    "keep": "#d55e00",
    "offload": "#cc79a7",
    "plain": "#555555",
    "checkpoint": "#999999",
    "hub": "#8c564b",
    "frozen": "#c9b45a",
}
STYLES = ["-", "--", ":", "-."]
# Labelled ticks of each decade of a vertical axis.
SUBDIVISIONS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
MARKS = ["o", "s", "^", "D", "v", "P"]


def draw(path: Path, lines: list[tuple[str, list[dict[str, Any]]]], *, limit_gib: float | None) -> None:
    """Draw memory and throughput against K, both axes logarithmic, one line per configuration.

    Args:
        lines: name and rows (K ascending) of each configuration.
        limit_gib: memory limit of a rank, drawn where there is one.
    """
    figure, (memory, speed) = plt.subplots(1, 2, figsize=(12.5, 5.2), layout="constrained")
    kinds: dict[str, int] = {}
    ks = sorted({row["k"] for _, rows in lines for row in rows})
    for name, rows in lines:
        policy = rows[0]["policy"]
        turn = kinds[policy] = kinds.get(policy, -1) + 1
        look: dict[str, Any] = {
            "color": COLOURS[policy],
            "linestyle": STYLES[turn % len(STYLES)],
            "marker": MARKS[turn % len(MARKS)],
            "markersize": 5,
            "linewidth": 1.8,
        }
        done = [row for row in rows if row["status"] == "ok"]
        memory.plot([row["k"] for row in done], [row["peak_gib"] for row in done], label=name, **look)
        speed.plot([row["k"] for row in done], [row["tiles_per_s"] for row in done], label=name, **look)
        for row in rows:
            if row["status"] == "out of memory":
                _mark_end(memory, done, row, limit_gib, COLOURS[policy])
    if limit_gib:
        memory.axhline(limit_gib, color="black", linewidth=0.8)
        memory.annotate(
            f"limit {limit_gib:g} GiB", (ks[0], limit_gib), xytext=(0, 4), textcoords="offset points", fontsize=9
        )
    _leave_out_frozen(speed, lines)
    memory.set_ylabel("peak memory per rank, GiB")
    speed.set_ylabel("tiles/s of all ranks together")
    for axes in (memory, speed):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ks, [f"{k:,}" for k in ks])
        axes.set_xlabel("K, tiles of the slide")
        axes.minorticks_on()
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=SUBDIVISIONS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="major", alpha=0.3)
        axes.grid(which="minor", axis="y", alpha=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    memory.set_title("Memory (× : out of memory)", loc="left", fontsize=11)
    speed.set_title("Throughput", loc="left", fontsize=11)
    first = lines[0][1][0]
    figure.suptitle(
        f"{first['encoder']}, {first['tile']} px, {first['dtype']}, {first['device'].upper()}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    handles, labels = memory.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _mark_end(axes: Any, done: list[dict[str, Any]], row: dict[str, Any], limit_gib: float | None, colour: str) -> None:
    """Draw a cross at the limit, where memory ended, and a dotted line to it from the last K that could be run."""
    height = limit_gib or (done[-1]["peak_gib"] * row["k"] / done[-1]["k"] if done else 1.0)
    if done:
        ends = ([done[-1]["k"], row["k"]], [done[-1]["peak_gib"], height])
        axes.plot(*ends, color=colour, linestyle=(0, (1, 2)), linewidth=1.2)
    axes.plot(row["k"], height, marker="x", markersize=10, markeredgewidth=2.5, color=colour, linestyle="none")


def _leave_out_frozen(axes: Any, lines: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """Scale the axis to ways that train the encoder; the frozen one, a hundred times as fast, is written in words."""
    speeds: dict[bool, list[float]] = {False: [], True: []}
    for _, rows in lines:
        speeds[rows[0]["policy"] == "frozen"] += [row["tiles_per_s"] for row in rows if row["status"] == "ok"]
    if speeds[False]:
        axes.set_ylim(min(speeds[False]) / 1.3, max(speeds[False]) * 1.5)
        if speeds[True]:
            text = f"frozen, off the scale: {min(speeds[True]):,.0f} to {max(speeds[True]):,.0f} tiles/s"
            axes.text(0.99, 0.98, text, transform=axes.transAxes, ha="right", va="top", fontsize=9)
