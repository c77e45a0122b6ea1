"""What an evaluation leaves behind: a table of predictions, and pictures of where the model looked."""

import logging
from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image

from slidescale.engine.config import DataConfig
from slidescale.engine.data.cohort import Cohort, write_csv
from slidescale.engine.data.slide import Slide
from slidescale.engine.data.tiling import Tiling
from slidescale.engine.errors import SlideError
from slidescale.engine.evaluation import Evaluation

log = logging.getLogger(__name__)

# Colours run from an eighth of the mean weight to eight times it, on a log scale: attention spans orders of magnitude.
LARGEST_FOLD = 8.0
OPACITY = 0.55


def write_predictions(path: Path, evaluation: Evaluation, classes: tuple[str, ...]) -> None:
    """Write slide_id, label, probability (of the second of two classes, or of each of more), k (tiles used)."""
    if len(classes) == 2:
        columns, first = ["probability"], 1
    else:
        columns, first = [f"probability_{name}" for name in classes], 0
    rows = [
        (row.slide_id, classes[row.label], *(f"{value:.6f}" for value in probabilities[first:]), len(weights))
        for row, probabilities, _, weights in evaluation.predictions
    ]
    write_csv(path, ("slide_id", "label", *columns, "k"), rows)


def draw_heatmaps(evaluation: Evaluation, cohort: Cohort, config: DataConfig, *, count: int) -> dict[str, np.ndarray]:
    """Attention over a few slides, classes in turn: uint8 pictures by "<slide id>_<label>"."""
    classes = cohort.manifest.classes
    by_class = [[p for p in evaluation.predictions if p.row.label == label] for label in range(len(classes))]
    in_turn = [prediction for turn in zip_longest(*by_class) for prediction in turn if prediction is not None]
    pictures = {}
    for row, _, _, weights in in_turn[:count]:
        try:
            with Slide(row.path, default_mpp_um=config.default_mpp_um) as slide:
                picture = attention_overlay(slide, cohort.tilings[row.slide_id], weights)
        except SlideError as error:  # its tiles could be read, so it counts; only its picture is missing
            log.warning("no heatmap: %s", error)
            continue
        pictures[f"{row.slide_id}_{classes[row.label]}"] = picture
    return pictures


def attention_overlay(slide: Slide, tiling: Tiling, weights: np.ndarray, *, max_px: int = 640) -> np.ndarray:
    """The slide beside itself under its tiles' attention.

    Args:
        weights: `[N]`, of the tiling's tiles, summing to 1.
        max_px: longer side of each of the two pictures.

    Returns:
        uint8 `[h, 2 w, 3]`. Blue tiles weigh less than the mean tile, red ones more, up to 8-fold.
    """
    plain = slide.overview(max_px)
    scale = plain.shape[1] / slide.width
    colours = attention_colours(weights)
    overlay = plain.astype(np.float32)
    # Neighbours share an edge, so that none is coloured twice, or not at all.
    begin, end = (np.rint((tiling.cells + step) * tiling.side_px * scale).astype(int) for step in (0, 1))
    for (x0, y0), (x1, y1), colour in zip(begin, end, colours, strict=True):
        region = (slice(y0, y1), slice(x0, x1))
        overlay[region] = (1 - OPACITY) * overlay[region] + OPACITY * colour
    return np.concatenate([plain, np.rint(overlay).astype(np.uint8)], axis=1)


def attention_colours(weights: np.ndarray) -> np.ndarray:
    """Float `[N, 3]`, 0 to 255: from blue (an eighth of the mean weight or less) over grey to red (8-fold or more)."""
    fold = np.log(np.maximum(weights * len(weights), 1e-12)) / np.log(LARGEST_FOLD)
    return colormaps["coolwarm"]((np.clip(fold, -1, 1) + 1) / 2)[:, :3] * 255


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write a uint8 `[H, W, 3]` picture, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
