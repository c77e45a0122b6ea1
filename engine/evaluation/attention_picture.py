"""How a slide's attention looks: the colours of tiles, the slide beside itself under them, and a legend."""

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from slidescale.engine.data.slide import Slide
from slidescale.engine.data.tiling import Tiling

# Colours run from the mean weight to eight times it, on a log scale: attention spans orders of magnitude.
LARGEST_FOLD = 8.0
# How much of a colour is laid over the tissue, just above the mean and from the largest fold on: the tissue stays
# visible.
OPACITY = (0.2, 0.7)
# Grey of tiles up to the mean, in pictures without tissue.
PALE = 232.0
# Of the legend's bar; sizes are in pixels all the same.
DPI = 100


def attention_overlay(slide: Slide, tiling: Tiling, weights: np.ndarray, *, max_px: int = 640) -> np.ndarray:
    """The slide beside itself under its tiles' attention.

    Args:
        weights: `[N]`, of the tiling's tiles, summing to 1.
        max_px: longer side of each of the two pictures.

    Returns:
        uint8 `[h, 2 w, 3]`. Tiles that weigh no more than the mean tile stay as they are; the others get the colours of
        `attention_colours`.
    """
    plain = slide.overview(max_px)
    scale = plain.shape[1] / slide.width
    colours, opacity = attention_colours(weights), attention_opacity(weights)
    overlay = plain.astype(np.float32)
    # Neighbours share an edge, so that none is coloured twice, or not at all.
    begin, end = (np.rint((tiling.cells + step) * tiling.side_px * scale).astype(int) for step in (0, 1))
    for (x0, y0), (x1, y1), colour, share in zip(begin, end, colours, opacity, strict=True):
        region = (slice(y0, y1), slice(x0, x1))
        overlay[region] = (1 - share) * overlay[region] + share * colour
    return np.concatenate([plain, np.rint(overlay).astype(np.uint8)], axis=1)


def attention_colours(weights: np.ndarray) -> np.ndarray:
    """Float `[N, 3]`, 0 to 255: from magenta (just above the mean weight) over orange to yellow (8-fold or more).

    Lightness rises all the way, so that the order is seen by people who confuse red and green, and in grey prints. Up
    to the mean it is a pale grey, for pictures without tissue.
    """
    above = _above_mean(weights)
    ramp = colormaps["inferno"](0.4 + 0.5 * above)[:, :3] * 255
    return np.where(above[:, None] > 0, ramp, PALE)


def attention_opacity(weights: np.ndarray) -> np.ndarray:
    """How much of a tile's colour is laid over its tissue, float `[N]`: nothing up to the mean weight."""
    above = _above_mean(weights)
    low, high = OPACITY
    return np.where(above > 0, low + (high - low) * above, 0.0)


def with_legend(picture: np.ndarray, *lines: str) -> np.ndarray:
    """A slide beside its attention, with lines of text below, and a bar that shows what the colours mean.

    Args:
        picture: uint8 `[h, w, 3]`, as `attention_overlay` makes it.
        lines: of text; one without room is shortened at its end.

    Returns:
        uint8 `[h', w', 3]`; wider than `picture` only where that is too narrow for the text.
    """
    text_px = min(36, max(13, picture.shape[1] // 70))
    width = max(picture.shape[1], 38 * text_px)
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", text_px)
    step = round(1.5 * text_px)
    bar = _colour_bar(width, text_px)
    bar_top = picture.shape[0] + text_px + step * (len(lines) + 1)
    page = Image.new("RGB", (width, bar_top + bar.shape[0]), "white")
    page.paste(Image.fromarray(picture))
    page.paste(Image.fromarray(bar), (0, bar_top))
    draw = ImageDraw.Draw(page)
    what = "Attention to a tile, in multiples of the slide's mean tile (log scale); the mean and less: no colour"
    for index, line in enumerate([*lines, what]):
        top = picture.shape[0] + text_px // 2 + index * step
        draw.text((text_px, top), _fitting(line, font, width - 2 * text_px), fill="black", font=font)
    return np.asarray(page)


def _colour_bar(width: int, text_px: int) -> np.ndarray:
    """A bar with the colours of attention from the mean to the largest fold, uint8 `[h, width, 3]`.

    The colours are laid over white, as on glass; the bar begins at the mean, of which a tile is as it is.
    """
    folds = np.geomspace(1, LARGEST_FOLD, 256)
    colours, opacity = attention_colours(folds / len(folds)), attention_opacity(folds / len(folds))[:, None]
    on_white = (opacity * colours + (1 - opacity) * 255) / 255
    height = round(4.2 * text_px)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes((3 * text_px / width, 1 - 2 * text_px / height, 32 * text_px / width, 2 * text_px / height))
    shown = ScalarMappable(LogNorm(1, LARGEST_FOLD), ListedColormap(on_white))
    ticks = [2**power for power in range(round(math.log2(LARGEST_FOLD)) + 1)]
    words = ["1 (mean)", *map(str, ticks[1:-1]), f"≥ {LARGEST_FOLD:g}"]
    bar = figure.colorbar(shown, cax=axes, orientation="horizontal")
    bar.set_ticks(ticks, labels=words, fontsize=text_px * 72 / DPI)
    bar.ax.minorticks_off()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _above_mean(weights: np.ndarray) -> np.ndarray:
    """Where a weight is between the mean (0, and for all that is less) and the largest fold (1), on a log scale."""
    fold = np.log(np.maximum(weights * len(weights), 1.0)) / np.log(LARGEST_FOLD)
    # A slide whose tiles all weigh the same has none above the mean, however its weights were rounded.
    return np.where(fold < 1e-4, 0.0, np.minimum(fold, 1.0))


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, shortened at its end until it fits."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
