"""The pictures of the demo cohort's slides, H&E-like, of two classes that differ in small foci alone.

A slide is drawn as two density fields, haematoxylin and eosin, and stained at the end by the Beer-Lambert law. The
background lives on a grid of GRID px and is resampled, because only nuclei have finer detail.

The slides of the two classes are the same picture but for the foci, which cover a few percent of the tissue: crowded
small round nuclei in the first class, enlarged pleomorphic nuclei in the second. The foci of both classes have the same
outlines, as many pixels of nuclei and as much haematoxylin, so neither colour, darkness, tissue area nor file size
gives a class away. Foci come in two sizes, which cover the same share of the tissue: large ones fill tiles with their
nuclei, small ones have a handful of nuclei each, and are harder to learn.
"""

import numpy as np
from scipy import ndimage

from slidescale.engine.config import FocusSize
from slidescale.engine.data.demo_fields import GRID, distance_to, enlarge, nearest_disc, noise, soft_step
from slidescale.engine.data.demo_nuclei import (
    ATYPICAL,
    BENIGN,
    LYMPHOCYTE,
    Population,
    draw_nuclei,
    epithelium,
    fibroblasts,
    focus_nuclei,
    lie_anyhow,
    scatter,
)

FOCUS_RADIUS_PX: dict[FocusSize, tuple[float, float]] = {"large": (42, 75), "small": (24, 36)}

MPP_UM = 0.5
STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
"""Absorbance (natural log) of haematoxylin and eosin in R, G, B (the reference of Macenko et al. 2009)."""


def draw_slide(rng: np.random.Generator, *, atypical: bool, foci: FocusSize = "large") -> np.ndarray:
    """Draw one slide, uint8 [height, width, 3]; only the nuclei inside the foci depend on `atypical`."""
    height, width = rng.integers(1600, 2001, size=2).tolist()
    shape = (height, width)
    grid = (shape[0] // GRID + 1, shape[1] // GRID + 1)
    # A generator of its own, and drawn last: all but the foci is then the same for both classes.
    focus_rng = rng.spawn(1)[0]
    tissue = _tissue(rng, grid)
    # Distance to the nearest edge or disc: what still fits where.
    room = ndimage.distance_transform_edt(tissue > 0.5).astype(np.float32)
    area = float(tissue.sum())
    discs = _place_discs(rng, room, rng.uniform(0.035, 0.055) * area, FOCUS_RADIUS_PX[foci])
    glands = _place_discs(rng, room, rng.uniform(0.10, 0.25) * area, (36, 80))
    aggregates = _place_discs(rng, room, rng.uniform(0.0, 0.05) * area, (30, 60))
    lumens = np.where(rng.random(len(glands)) < 0.7, rng.uniform(0.25, 0.5, len(glands)), 0.0)
    wobble = 0.16 * noise(rng, grid, 45)
    focus = nearest_disc(discs, grid)[0] + wobble
    gland, index = nearest_disc(glands, grid)
    in_gland, in_focus = soft_step(1 - gland - wobble, 0.06), soft_step(1 - focus, 0.15)
    cellular = np.maximum(in_gland, in_focus)
    lumen = in_gland * soft_step(lumens[index] - gland - wobble - 0.12 * noise(rng, grid, 16), 0.07)
    stroma, direction, clefts = _stroma(rng, grid)

    secretion = np.clip(0.12 + 0.12 * noise(rng, grid, 60), 0.02, 0.3)
    eosin = stroma + cellular * (0.40 + 0.04 * noise(rng, grid, 10) - stroma)
    eosin = tissue * (eosin + lumen * (secretion - eosin))
    haematoxylin = tissue * (0.05 + 0.14 * cellular) * (1 - lumen)
    free = tissue * (1 - cellular) * (1 - clefts)
    crowd = np.clip(1.4 - nearest_disc(aggregates, grid)[0] - wobble, 0, 1)
    populations = [
        fibroblasts(rng, free * (1 - crowd), direction),
        lie_anyhow(LYMPHOCYTE, rng, *scatter(rng, free * np.maximum(crowd, 0.02), 13.5)),
        epithelium(rng, glands * GRID, lumens, wobble),
        *focus_nuclei(focus_rng, soft_step(0.97 - focus, 0.05), ATYPICAL if atypical else BENIGN),
    ]
    return _stain(rng, enlarge(haematoxylin, shape), enlarge(eosin, shape), populations)


def _tissue(rng: np.random.Generator, grid: tuple[int, int]) -> np.ndarray:
    """Coverage float32 `grid` in 0..1 of one or two ragged fragments; 1.2 to 1.7 Mpx in all."""
    rows, cols = np.ogrid[-1 : 1 : grid[0] * 1j, -1 : 1 : grid[1] * 1j]
    level = np.full(grid, -np.inf, np.float32)
    axis = rng.uniform(0, np.pi)
    for offset in (-0.42, 0.42) if rng.random() < 0.5 else (0.0,):
        row, col = offset * np.array([np.sin(axis), np.cos(axis)]) + rng.normal(0, 0.04, size=2)
        reach_row, reach_col = rng.uniform(0.75, 1.1, size=2)
        np.maximum(level, -np.hypot((rows - row) / reach_row, (cols - col) / reach_col), out=level)
    for cell, amplitude in ((160, 0.09), (50, 0.03), (14, 0.008)):
        level += amplitude * noise(rng, grid, cell)
    # Glass on all four sides: the level falls steeply at the border.
    level -= 20 * np.clip(np.maximum(np.abs(rows), np.abs(cols)) - 0.93, 0, None)
    share = rng.uniform(1.2e6, 1.7e6) / (level.size * GRID**2)
    return soft_step(level - np.quantile(level, 1 - share), 0.01).astype(np.float32)


def _place_discs(rng: np.random.Generator, room: np.ndarray, area: float, radius_px: tuple[float, float]) -> np.ndarray:
    """Throw discs where they fit until they cover `area` points; lower `room` in place.

    Returns float [n, 3]: row, column and radius, all in grid points.
    """
    discs = []
    for _ in range(3000):
        radius = rng.uniform(*radius_px) / GRID
        row, col = (int(rng.integers(side)) for side in room.shape)
        if room[row, col] < radius + 4:
            continue
        if area < 0.5 * np.pi * radius**2:
            break
        discs.append((row, col, radius))
        area -= np.pi * radius**2
        # No disc is large enough to notice this one from farther away.
        window, distance = distance_to(row, col, 200 / GRID, room.shape)
        np.minimum(room[window], distance - radius, out=room[window])
    return np.array(discs).reshape(-1, 3)


def _stroma(rng: np.random.Generator, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fibrous stroma: eosin, direction of the fibres in rad, and white clefts in 0..1; each float32 `grid`."""
    rows, cols = (axis.astype(np.float32) for axis in np.ogrid[: grid[0], : grid[1]])
    turn = rng.uniform(0, np.pi)
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    across = rows * cos - cols * sin + 48 * noise(rng, grid, 190) + 6 * noise(rng, grid, 45)
    along = rows * sin + cols * cos + 60 * noise(rng, grid, 190)
    # A texture stretched along the fibres, read at the bent coordinates; it repeats where they leave it.
    straight = 0.6 * noise(rng, (1024, 256), 2.4) + 0.8 * noise(rng, (1024, 256), 7)
    bent = np.stack([across / 1.3, along / 13])
    fibres = ndimage.map_coordinates(straight, bent, order=1, mode="grid-wrap", output=np.float32)
    slope_row, slope_col = np.gradient(across)
    clefts = soft_step(-fibres - 1.9 + 0.6 * noise(rng, grid, 80), 0.7)
    eosin = 0.52 + 0.10 * fibres + 0.08 * noise(rng, grid, 110) + 0.03 * noise(rng, grid, 5)
    return eosin * (1 - 0.9 * clefts), np.arctan2(-slope_col, slope_row), clefts


def _stain(
    rng: np.random.Generator, haematoxylin: np.ndarray, eosin: np.ndarray, populations: list[Population]
) -> np.ndarray:
    """Draw the nuclei and turn the densities (float32 [height, width]) into light: uint8 [height, width, 3].

    Hue and strength of both stains vary from slide to slide.
    """
    strength = rng.uniform(0.85, 1.2, size=(2, 1))
    stains = (strength * (STAINS + rng.normal(0, 0.025, STAINS.shape))).astype(np.float32)
    glass = rng.normal((243, 242, 241), 1.5).astype(np.float32)
    shape = eosin.shape
    lamp = 1 + 0.006 * noise(rng, shape, 600)
    chromatin, grain = noise(rng, shape, 2.6), rng.standard_normal(shape, dtype=np.float32)
    nuclear = np.zeros(shape, np.float32)
    for population in populations:
        draw_nuclei(rng, nuclear, population, chromatin)
    # Little cytoplasm lies over or under a nucleus.
    eosin = np.clip(eosin, 0, None) * (1 - 0.5 * np.minimum(nuclear, 1)) * (1 + 0.04 * chromatin)
    haematoxylin = np.maximum(np.clip(haematoxylin, 0, None), nuclear)
    image = np.empty((*shape, 3), np.uint8)
    for channel in range(3):
        absorbed = stains[0, channel] * haematoxylin + stains[1, channel] * eosin
        light = glass[channel] * lamp * np.exp(-absorbed) + 2.0 * np.roll(grain, 7 * channel)
        image[..., channel] = np.clip(light, 0, 255)
    return image
