"""The picture of weak scaling: terms of a step, efficiency, and bytes as K grows."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from scaling.model import TERMS, Shape, hub_bytes, merge_bytes

COLOURS = {
    "reading": "#c9b45a",
    "pass 1": "#56b4e9",
    "pass 2": "#0072b2",
    "aggregator": "#009e73",
    "merge": "#000000",
    "gathers": "#d55e00",
    "reduction": "#cc79a7",
    "update": "#999999",
}
LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#555555", "#8c564b"]
MARKS = ["o", "s", "^", "D", "v", "P"]
# A term below this share of every step is too thin to see, and is left out of the legend.
VISIBLE = 0.002


def draw(path: Path, rows: list[dict[str, Any]], *, shown: str, shape: Shape, title: str) -> None:
    """Draw the terms of one strategy, the efficiency of all, and the bytes of the merge and of a gather at a hub.

    Args:
        rows: of the projection, GPUs ascending for each strategy.
        shown: the strategy whose terms are shown.
        shape: of the model.
    """
    figure, (terms, gain, size) = plt.subplots(
        1, 3, figsize=(15, 5), layout="constrained", width_ratios=[1.15, 1.1, 0.9]
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    _draw_terms(terms, [row for row in rows if row["strategy"] == shown])
    terms.set_title(f"A step of {shown}, modelled", loc="left", fontsize=11)
    _draw_efficiency(gain, rows)
    _draw_bytes(size, sorted({row["k"] for row in rows}), shape)
    for axes in (terms, gain, size):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_terms(axes: Any, rows: list[dict[str, Any]]) -> None:
    places = range(len(rows))
    below = [0.0] * len(rows)
    for term in TERMS:
        heights = [row["terms"][term] for row in rows]
        seen = any(height > VISIBLE * row["step_s"] for height, row in zip(heights, rows, strict=True))
        axes.bar(
            places, heights, bottom=below, width=0.7, color=COLOURS[term], label=term if seen else "_", linewidth=0
        )
        below = [low + height for low, height in zip(below, heights, strict=True)]
    for place, top in zip(places, below, strict=True):
        axes.annotate(f"{top:.3g}", (place, top), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(places, [f"{row['gpus']:,}" for row in rows])
    axes.set_xlabel("GPUs, each with equally many tiles")
    axes.set_ylabel("seconds per step")
    axes.set_ylim(0, 1.45 * max(below))
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper left")


def _draw_efficiency(axes: Any, rows: list[dict[str, Any]]) -> None:
    for index, strategy in enumerate(dict.fromkeys(row["strategy"] for row in rows)):
        own = [row for row in rows if row["strategy"] == strategy]
        axes.plot(
            [row["gpus"] for row in own],
            [100 * row["efficiency"] for row in own],
            label=strategy,
            linewidth=1.8,
            color=LINES[index % len(LINES)],
            marker=MARKS[index % len(MARKS)],
            markersize=5,
        )
    gpus = sorted({row["gpus"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [f"{each:,}" for each in gpus])
    axes.minorticks_off()
    axes.set_ylim(0, 108)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("tiles/s per GPU, % of those of 1 GPU")
    axes.set_title("Efficiency, modelled", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="lower left")


def _draw_bytes(axes: Any, ks: list[int], shape: Shape) -> None:
    axes.plot(ks, [hub_bytes(k, shape.dim) for k in ks], color="#8c564b", marker="P", linewidth=1.8)
    axes.plot(ks, [merge_bytes(shape.pooled)] * len(ks), color="#0072b2", marker="o", linewidth=1.8)
    axes.annotate(
        "features to a hub, as published: K × D",
        (ks[0], 2 * hub_bytes(ks[-1], shape.dim)),
        fontsize=9,
        color="#8c564b",
    )
    axes.annotate(
        "merge of pooled features, here: the same for any K",
        (ks[0], merge_bytes(shape.pooled)),
        xytext=(0, 7),
        fontsize=9,
        textcoords="offset points",
        ha="left",
        va="bottom",
        color="#0072b2",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(merge_bytes(shape.pooled) / 5, 5 * hub_bytes(ks[-1], shape.dim))
    axes.set_xlabel("K, tiles of the slide")
    axes.set_ylabel("bytes per step")
    axes.set_title("What aggregation sends", loc="left", fontsize=11)
