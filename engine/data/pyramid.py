"""The levels of a slide's pyramid: where their pixels lie on level 0, and whether two of them show one picture."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Pixels of a level that lie this close to those wanted, in pixels of the level, are taken as they are.
ALIGNED_PX = 0.02
# A level's size is that of level 0 divided by one number, except for rounding by at most this many of its pixels.
ROUNDING_PX = 2
# Squares of a level that are compared with a finer one: side in the level's pixels, how many along each axis it is
# searched for content with, how many with the most content are compared, and pixels that are averaged for that.
PROBE_PX, PROBES_PER_AXIS, PROBES, PROBE_CELL_PX = 128, 4, 4, 2
# A square with a smaller standard deviation (grey levels) has no content, and is compared by its mean alone.
CONTENT = 4.0
LARGEST_MEAN_DIFFERENCE = 24.0
# Levels of one picture correlate by more than 0.9, also where they were subsampled without a filter. Nowhere else,
# up to SHIFTS cells away, may they correlate much better than where they should: then the level lies elsewhere.
LEAST_CORRELATION, LARGEST_GAIN, SHIFTS = 0.8, 0.1, 3


class Level(NamedTuple):
    """A level of a slide's pyramid, by number; a pixel is `downsample` (x, y) level-0 pixels wide and high."""

    number: int
    width: int
    height: int
    downsample: tuple[float, float]


class Span(NamedTuple):
    """The pixels of a level that are read for a region, along one axis.

    Attributes:
        first, size: the pixels, from the level's beginning.
        place: where the reader is to begin, in its own units (see `slide.SlideFile`).
        begin, end: the region within what is read, in fractions of its pixels.
        whole: pixels per wanted pixel, where that is a whole number and they are aligned; else 0.
    """

    first: int
    size: int
    place: int
    begin: float
    end: float
    whole: int


Look = Callable[["Level", float, float, tuple[int, int], float], np.ndarray]


def level_downsample(full: tuple[int, int], size: tuple[int, int]) -> tuple[float, float] | None:
    """Level-0 pixels per pixel of a level, (x, y); None if no one number fits width and height.

    Pyramids are made by powers of two, and what does not fill a pixel is dropped or filled up. So such a number is
    taken where both sides agree with it within a pixel; otherwise, the quotients of the sizes.

    Args:
        full, size: (width, height) of level 0 and of the level, in pixels.
    """
    power = 2.0 ** round(math.log2(math.sqrt(full[0] * full[1] / (size[0] * size[1]))))
    if all(abs(whole / power - part) < 1 for whole, part in zip(full, size, strict=True)):
        return power, power
    smallest = max(whole / (part + ROUNDING_PX) for whole, part in zip(full, size, strict=True))
    largest = min(whole / max(part - ROUNDING_PX, 0.5) for whole, part in zip(full, size, strict=True))
    return (full[0] / size[0], full[1] / size[1]) if smallest <= largest else None


def same_picture(level: Level, finer: Level, look: Look) -> bool:
    """Whether two levels show the same in the squares of the coarser one with the most content.

    Args:
        look: reads a region of a level, in grey levels, from level-0 (x, y), with so many pixels (w, h), each of so
            many level-0 pixels along each side.
    """
    size = (min(PROBE_PX, level.width), min(PROBE_PX, level.height))
    xs, ys = (
        np.unique(np.linspace(0, whole - part, PROBES_PER_AXIS).astype(int)).tolist()
        for whole, part in zip((level.width, level.height), size, strict=True)
    )
    cells = (max(1, size[0] // PROBE_CELL_PX), max(1, size[1] // PROBE_CELL_PX))
    step = PROBE_CELL_PX * min(level.downsample)  # not beyond the level's end
    corners = [(x * level.downsample[0], y * level.downsample[1]) for y in ys for x in xs]
    squares = sorted(((look(level, *at, cells, step), at) for at in corners), key=lambda square: -square[0].std())
    if len(squares) > PROBES and squares[PROBES - 1][0].std() >= CONTENT:
        squares = squares[:PROBES]
    return all(same_content(square, look(finer, *at, cells, step)) for square, at in squares)


def same_content(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two grey pictures `[h, w]` of the same place show the same, in the same place.

    They must correlate, and not correlate much better where one is shifted.
    """
    if abs(float(one.mean() - other.mean())) > LARGEST_MEAN_DIFFERENCE:
        return False
    if max(one.std(), other.std()) < CONTENT:
        return True
    if min(one.shape) <= 2 * SHIFTS + 2:  # too few cells to say where they show it
        return _correlation(one, other) >= LEAST_CORRELATION
    height, width = (side - 2 * SHIFTS for side in one.shape)
    middle = one[SHIFTS : SHIFTS + height, SHIFTS : SHIFTS + width]
    found = {
        (y, x): _correlation(middle, other[y : y + height, x : x + width])
        for y in range(2 * SHIFTS + 1)
        for x in range(2 * SHIFTS + 1)
    }
    here = found[SHIFTS, SHIFTS]
    return here >= LEAST_CORRELATION and max(found.values()) - here <= LARGEST_GAIN


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's correlation; 0 where one of them has a single value."""
    one, other = one - one.mean(), other - other.mean()
    norm = math.sqrt(float((one**2).sum()) * float((other**2).sum()))
    return float((one * other).sum()) / norm if norm > 0 else 0.0


def span(begin: float, length: float, wanted: int, whole: int, steps: float) -> Span:
    """The pixels of a level that a region takes along one axis.

    Args:
        begin, length: the region's first pixel and its size, in pixels of the level.
        wanted: the result's size in pixels.
        whole: pixels that the level has. A filter's margin does not reach beyond them, where the reader gives the
            background's colour and no tissue.
        steps: units of the reader's places per pixel of the level (see `slide.SlideFile`). A reader takes places in
            whole units only; where a place is between two of the level's pixels, it interpolates.
    """
    end = begin + length
    first, stop = round(begin), round(end)
    place = round(first * steps)
    if (
        stop > first
        and (stop - first) % wanted == 0
        and max(abs(first - begin), abs(stop - end), abs(place / steps - first)) <= ALIGNED_PX
    ):
        return Span(first, stop - first, place, 0, stop - first, (stop - first) // wanted)
    margin = math.ceil(max(1.0, length / wanted)) + 1
    low, high = math.floor(begin), math.ceil(end)
    first, stop = max(low - margin, min(0, low)), min(high + margin, max(whole, high))
    place = math.floor(first * steps + 1e-6)
    offset = place / steps  # at most a unit before `first`: one more pixel, so that all is covered
    size = stop - first + (offset < first - 1e-6)
    return Span(first, size, place, max(begin - offset, 0.0), min(end - offset, float(size)), 0)
