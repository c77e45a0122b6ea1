"""Pictures of a slide's attention in three forms: PNG to look at, TIFF and GeoJSON for slide viewers such as QuPath.

A tile's attention has three measures: its share of the slide (its weight; all add up to 1), its fold (the share times
the number of tiles, so that the mean tile has 1), and its percentile among the slide's tiles.
"""

import json
import math
import uuid
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image
from scipy.stats import rankdata

from slidescale.engine.config import ATTENTION_PX
from slidescale.engine.data.slide import Slide
from slidescale.engine.data.tiling import Tiling
from slidescale.engine.evaluation.attention_picture import attention_colours, attention_overlay, with_legend
from slidescale.engine.files import check_output, file_name, replacing, save_png, write_text

# Pixels of the TIFF along a tile's side: a whole slide of 20,000 tiles is some 2,000 to 4,000 pixels wide.
PX_A_TILE = 16
TIFF_TILE_PX = 256
# Bounds between the classes of fold that the GeoJSON sorts tiles into; one more class is below them, and one above.
FOLD_BOUNDS = (0.25, 0.5, 1.0, 2.0, 4.0)
# Namespace of the objects' ids: the same tile of the same slide and run has the same id each time.
ID_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "slidescale/attention")


def write_attention(
    folder: Path,
    name: str,
    slide: Slide,
    tiling: Tiling,
    weights: np.ndarray,
    *,
    model: str,
    says: str,
    max_px: int = ATTENTION_PX,
    top: float = 1.0,
) -> list[Path]:
    """Write `<name>_attention.png`, `.tif` and `.geojson`, each whole or not at all.

    Args:
        weights: `[N]`, of the tiling's tiles, summing to 1.
        model: the model that these weights are from, in words.
        says: what it predicts, in words.
        max_px: longer side of each of the PNG's two pictures.
        top: share of the tiles, the most attended, that the GeoJSON has.

    Raises:
        SlideError: the slide cannot be read.
    """
    stem = f"{file_name(name)}_attention"
    picture = with_legend(attention_overlay(slide, tiling, weights, max_px=max_px), f"{name}: {says}", model)
    paths = [folder / f"{stem}{ending}" for ending in (".png", ".tif", ".geojson")]
    for path in paths:
        check_output(path, [slide.path])
    save_png(picture, paths[0])
    with replacing(paths[1]) as unfinished:
        write_pyramid(unfinished, slide, tiling, weights)
    origin = (slide.bounds.x, slide.bounds.y)
    collection = attention_geojson(tiling, weights, source=f"{model} {name}", top=top, origin=origin)
    write_text(paths[2], json.dumps(collection, separators=(",", ":")))
    return paths


def write_pyramid(path: Path, slide: Slide, tiling: Tiling, weights: np.ndarray) -> None:
    """Write attention as a tiled TIFF with reduced levels, which OpenSlide reads as "generic-tiff".

    It shows the PNG's colours alone, white where there is no tile. Each tile is `PX_A_TILE` pixels square, whatever the
    slide's own resolution: with d = `tiling.side_px` / `PX_A_TILE`, its pixel (i, j) covers the slide's level-0 pixels
    from (i d, j d) to ((i + 1) d, (j + 1) d), counted from the corner of `slide.bounds`. Where a file states no bounds,
    that is the slide's corner; where it does, viewers such as QuPath crop the slide to them. Scaled by d, the picture
    lies over the slide as they show it; its resolution tags state d times the slide's µm per pixel. Its last row and
    column may reach beyond the slide by less than a pixel, and within bounds tiles are placed to half a pixel, 1/32 of
    a tile. Levels halve its size down to one file tile.
    """
    downsample = tiling.side_px / PX_A_TILE
    mpp_um = slide.mpp_um * downsample
    bounds = slide.bounds
    size = (math.ceil(bounds.height / downsample), math.ceil(bounds.width / downsample))
    level = np.full((*size, 3), 255, np.uint8)
    corners = PX_A_TILE * tiling.cells - np.rint(np.array([bounds.x, bounds.y]) / downsample).astype(np.int64)
    begin, end = np.maximum(corners, 0), np.maximum(corners + PX_A_TILE, 0)  # tissue beyond the bounds is not shown
    for (x0, y0), (x1, y1), colour in zip(
        begin, end, np.rint(attention_colours(weights)).astype(np.uint8), strict=True
    ):
        level[y0:y1, x0:x1] = colour
    corner = f"the corner of its bounds ({bounds.x}, {bounds.y})" if bounds.x or bounds.y else "the same corner"
    about = f"attention; one pixel is {downsample:.6g} level-0 pixels of the slide, from {corner}"
    with tifffile.TiffWriter(path) as file:
        for index in range(64):
            file.write(
                level,
                tile=(TIFF_TILE_PX, TIFF_TILE_PX),
                compression="zlib",
                photometric="rgb",
                metadata=None,
                subfiletype=1 if index else 0,
                description=about if not index else None,
                software="slidescale",
                resolution=(1e4 / mpp_um, 1e4 / mpp_um),
                resolutionunit="CENTIMETER",
            )
            if max(level.shape) <= TIFF_TILE_PX:
                break
            level, mpp_um = np.asarray(Image.fromarray(level).reduce(2)), 2 * mpp_um


def attention_geojson(
    tiling: Tiling, weights: np.ndarray, *, source: str, top: float = 1.0, origin: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    """Attention as a GeoJSON FeatureCollection that QuPath imports: one square per tile, in level-0 pixels.

    As QuPath reads them (its `QuPathTypeAdapters`): the id is a UUID; `objectType` is "detection", of which QuPath
    draws tens of thousands, where as many annotations would be slow; `measurements` maps names to numbers, for its
    measurement maps; `classification` has a name and a colour, and sorts tiles by fold, so that they show at once.

    Rings are closed and counterclockwise (RFC 7946, section 3.1.6) with y upwards, as programs read the numbers. In an
    image, whose y points down, the same ring looks clockwise.

    Args:
        source: the model and slide, in words, which ids are made from.
        top: share of the tiles to have, the most attended, 0 < top ≤ 1; percentiles are among all of them.
        origin: level-0 (x, y) to count from. QuPath crops a slide to its bounds (unless it is opened with --no-crop),
            and takes their corner for (0, 0).
    """
    keep = np.sort(np.argsort(-weights, kind="stable")[: math.ceil(top * len(weights))])
    return {"type": "FeatureCollection", "features": list(_features(tiling, weights, keep, source, origin))}


def _features(
    tiling: Tiling, weights: np.ndarray, keep: np.ndarray, source: str, origin: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    folds = weights * len(weights)
    percentiles = 100 * rankdata(weights) / len(weights)  # ties share the mean of their ranks
    cells = tiling.cells
    # Neighbours share their edges, which are rounded as the tiles' corners are.
    x0, y0 = (np.rint(cells * tiling.side_px).astype(np.int64) - origin).T.tolist()
    x1, y1 = (np.rint((cells + 1) * tiling.side_px).astype(np.int64) - origin).T.tolist()
    classes = _fold_classes()
    for index in keep.tolist():
        left, top, right, bottom = x0[index], y0[index], x1[index], y1[index]
        yield {
            "type": "Feature",
            "id": str(uuid.uuid5(ID_NAMESPACE, f"{source} {left} {top}")),
            "geometry": {
                "type": "Polygon",
                "coordinates": [[[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]],
            },
            "properties": {
                "objectType": "detection",
                "classification": classes[int(np.searchsorted(FOLD_BOUNDS, folds[index], side="right"))],
                "measurements": {
                    "Attention share": float(f"{weights[index]:.6g}"),
                    "Attention fold": float(f"{folds[index]:.6g}"),
                    "Attention percentile": float(f"{percentiles[index]:.6g}"),
                },
            },
        }


def _fold_classes() -> list[dict[str, Any]]:
    """A class for folds below the first bound, between each two, and from the last on; coloured by its middle."""
    names = [f"Attention {low:g} to {high:g} x mean" for low, high in pairwise(FOLD_BOUNDS)]
    names = [f"Attention < {FOLD_BOUNDS[0]:g} x mean", *names, f"Attention >= {FOLD_BOUNDS[-1]:g} x mean"]
    edges = (FOLD_BOUNDS[0] / 2, *FOLD_BOUNDS, FOLD_BOUNDS[-1] * 2)
    middles = np.array([math.sqrt(low * high) for low, high in pairwise(edges)])
    colours = np.rint(attention_colours(middles / len(middles))).astype(int).tolist()
    return [{"name": name, "color": colour} for name, colour in zip(names, colours, strict=True)]
