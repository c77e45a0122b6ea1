"""How figures look: colours, strokes, axes, and words that fit."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

# Okabe & Ito's colours, which people who see colours differently tell apart; then the same in other strokes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STROKES = ("-", "--", ":", "-.")
GREY = "#8c8c8c"
PALE = "#e4e4e4"
# A line to compare with: chance, or a perfect model.
REFERENCE: dict[str, Any] = {"color": GREY, "linewidth": 1, "linestyle": (0, (2, 3))}
LONGEST_NAME = 22


def canvas(title: str, x: str, y: str, *, width: float = 5.4, height: float = 5.0) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=120, layout="compressed")
    axes = figure.add_subplot()
    style(axes, x, y)
    title_of(axes, title)
    return figure, axes


def style(axes: Axes, x: str, y: str) -> None:
    """Give axes their labels, a pale grid, and no box."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def title_of(axes: Axes, title: str) -> None:
    """Give axes a title, above their left end."""
    axes.set_title(title, fontsize=12, loc="left", fontweight="bold")


def picture(figure: Figure, about: str) -> np.ndarray:
    """The figure as uint8 RGB `[H, W, 3]`, with a line of text below where there is one."""
    if about:
        figure.supxlabel(about, fontsize=9, color="#555555", x=0.02, ha="left")
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)  # a class's name is no formula, whatever it contains
    drawn = FigureCanvasAgg(figure)
    drawn.draw()
    return np.asarray(drawn.buffer_rgba())[..., :3].copy()


def short(name: str) -> str:
    """The name of a class or label, cut where it is long."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def value_words(name: str, value: float | None) -> str:
    """A metric in a title."""
    return f"{name} undefined" if value is None else f"{name} {value:.3f}"
