"""Fields on a grid, of which the demo cohort's pictures are made: noise, ramps and distances."""

import numpy as np
from PIL import Image

GRID = 2
"""Pixels of level 0 between the points on which all but the nuclei is drawn."""


def noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> np.ndarray:
    """Smooth noise float32 `shape`, mean 0, standard deviation about 1, features of about `cell` points."""
    coarse = rng.standard_normal([int(side / cell) + 2 for side in shape], dtype=np.float32)
    return 1.35 * enlarge(coarse, shape)


def enlarge(field: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resample a float32 field to `shape` with cubic splines."""
    image = Image.fromarray(field.astype(np.float32, copy=False))
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BICUBIC))


def soft_step(value: np.ndarray, width: float) -> np.ndarray:
    """0 where `value` is negative, 1 where it is positive, with a linear ramp `width` wide at 0."""
    return np.clip(value / width + 0.5, 0, 1)


def distance_to(row: float, col: float, reach: float, grid: tuple[int, int]) -> tuple[tuple, np.ndarray]:
    """Distance to a point, within `reach` of it: the window (two slices) and float32 [window]; grid points."""
    centred = zip((row, col), grid, strict=True)
    window = tuple(slice(max(int(at - reach), 0), min(int(at + reach), side)) for at, side in centred)
    rows, cols = np.ogrid[window]
    return window, np.hypot(rows - row, cols - col, dtype=np.float32)


def nearest_disc(discs: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest disc's centre in units of its radius, float32 `grid`, and that disc's index."""
    nearest_distance, nearest = np.full(grid, 9.0, np.float32), np.zeros(grid, np.intp)
    for index, (row, col, radius) in enumerate(discs):
        window, distance = distance_to(row, col, 2 * radius, grid)
        nearer = distance / radius < nearest_distance[window]
        nearest_distance[window][nearer] = distance[nearer] / radius
        nearest[window][nearer] = index
    return nearest_distance, nearest
