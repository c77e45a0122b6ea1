"""Nuclei of the demo cohort's pictures: their kinds, where they lie, and how one looks."""

from dataclasses import dataclass

import numpy as np

from slidescale.engine.data.demo_fields import GRID, noise, soft_step


@dataclass(frozen=True, kw_only=True)
class Nucleus:
    """The looks of nuclei of one kind; lengths in px, densities in units of haematoxylin."""

    semi_minor: tuple[float, float]
    """Mean and standard deviation of the semi-minor axis."""
    elongation: tuple[float, float]
    """Range of the ratio of the axes."""
    density: tuple[float, float]
    """Mean and standard deviation of the haematoxylin in the body."""
    irregularity: float = 0.04
    """Relative amplitude of the outline's waves."""
    rim: float = 0.15
    """Extra haematoxylin at the membrane, relative to the body."""
    clumping: float = 0.12
    """Relative amplitude of the chromatin texture."""


FIBROBLAST = Nucleus(semi_minor=(3.6, 0.6), elongation=(1.3, 3.2), density=(1.0, 0.17))
LYMPHOCYTE = Nucleus(semi_minor=(4.9, 0.4), elongation=(1.0, 1.17), density=(1.55, 0.15), clumping=0.2)
EPITHELIAL = Nucleus(semi_minor=(5.0, 0.5), elongation=(1.2, 1.8), density=(0.95, 0.12), rim=0.3)
# The two classes. With the spacing of FOCUS_SPACING_PX both fill the same share of a focus and the darkness
# of a slide drawn as either differs by about 0.1 grey levels, where slides of one class differ by 5.
BENIGN = Nucleus(semi_minor=(4.8, 0.4), elongation=(1.0, 1.17), density=(1.0, 0.12), rim=0.3)
ATYPICAL = Nucleus(
    semi_minor=(9.8, 1.9),
    elongation=(1.05, 1.5),
    density=(0.95, 0.11),
    irregularity=0.09,
    rim=0.35,
    clumping=0.28,
)
NUCLEOLUS = Nucleus(semi_minor=(2.4, 0.35), elongation=(1.0, 1.1), density=(1.9, 0.1))
FOCUS_SPACING_PX = {BENIGN: 12.5, ATYPICAL: 26.0}

Population = tuple[Nucleus, np.ndarray, np.ndarray, np.ndarray]
"""Kind, then per nucleus [N]: row and column in px, angle of the long axis in rad from columns to rows."""


def scatter(rng: np.random.Generator, chance: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Points of a jittered hexagonal lattice, each kept with its `chance`; rows and columns in px, [N]."""
    extent = np.array(chance.shape) * GRID
    rows, cols = np.mgrid[0 : extent[0] : 0.866 * spacing, 0 : extent[1] : spacing]
    cols[1::2] += spacing / 2
    points = np.stack([rows.ravel(), cols.ravel()]) + rng.normal(0, 0.16 * spacing, (2, rows.size))
    at = tuple(np.clip(points / GRID, 0, np.array(chance.shape)[:, None] - 1).astype(np.intp))
    kept = rng.random(rows.size) < chance[at]
    return points[0][kept], points[1][kept]


def _at(field: np.ndarray, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """Values of a grid field at points given in px."""
    return field[(row / GRID).astype(np.intp), (col / GRID).astype(np.intp)]


def lie_anyhow(kind: Nucleus, rng: np.random.Generator, row: np.ndarray, col: np.ndarray) -> Population:
    """A population of nuclei at the given points that lie in any direction."""
    return kind, row, col, rng.uniform(0, np.pi, len(row))


def fibroblasts(rng: np.random.Generator, free: np.ndarray, direction: np.ndarray) -> Population:
    """Spindle nuclei along the fibres, in drifts."""
    row, col = scatter(rng, free * np.clip(0.42 + 0.25 * noise(rng, free.shape, 60), 0.05, 1), 18)
    return FIBROBLAST, row, col, _at(direction, row, col) + rng.normal(0, 0.25, len(row))


def epithelium(rng: np.random.Generator, glands_px: np.ndarray, lumens: np.ndarray, wobble: np.ndarray) -> Population:
    """Rings of nuclei with the long axis towards the lumen; glands whose lumen is 0 are filled."""
    points = [np.empty((3, 0))]
    for (row, col, radius), lumen in zip(glands_px, lumens, strict=True):
        outermost = 0.82 * radius
        for ring in np.arange(outermost, max(lumen * radius + 9, 6), -17):
            turn = np.arange(0, 2 * np.pi, 12.5 / ring)
            turn = turn + rng.uniform(0, 2 * np.pi) + rng.normal(0, 2.2, turn.size) / ring
            # The gland's outline wobbles, and the rings follow it.
            bulge = _at(wobble, row + ring * np.sin(turn), col + ring * np.cos(turn))
            reach = ring * (1 - bulge / 0.82) + rng.normal(0, 2.5, turn.size)
            kept = rng.random(turn.size) < (0.95 if ring == outermost else 0.6)
            points.append(np.stack([row + reach * np.sin(turn), col + reach * np.cos(turn), turn])[:, kept])
    row, col, turn = np.concatenate(points, axis=1)
    return EPITHELIAL, row, col, turn + rng.normal(0, 0.2, len(turn))


def focus_nuclei(rng: np.random.Generator, inside: np.ndarray, kind: Nucleus) -> list[Population]:
    """Crowd the foci with nuclei of one class; each of the enlarged ones gets a nucleolus."""
    row, col = scatter(rng, inside, FOCUS_SPACING_PX[kind])
    populations = [lie_anyhow(kind, rng, row, col)]
    if kind is ATYPICAL:
        populations.append(lie_anyhow(NUCLEOLUS, rng, *(at + rng.normal(0, 2.2, len(row)) for at in (row, col))))
    return populations


def draw_nuclei(rng: np.random.Generator, field: np.ndarray, population: Population, chromatin: np.ndarray) -> None:
    """Raise `field` (haematoxylin, float32 [height, width]) in place to the density of the nuclei.

    `chromatin` is a texture of the same shape. Below, b is the side of a box around a nucleus, and arrays
    are float32 [N, b, b] or broadcast to it.
    """
    kind = population[0]
    row, col, angle = (part[:, None, None] for part in population[1:])
    low, high = (kind.semi_minor[0] + sign * 2 * kind.semi_minor[1] for sign in (-1, 1))
    semi_minor = np.clip(rng.normal(*kind.semi_minor, row.shape), low, high).astype(np.float32)
    semi_major = semi_minor * rng.uniform(*kind.elongation, row.shape).astype(np.float32)
    density = rng.normal(*kind.density, row.shape).astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, (2, *row.shape)).astype(np.float32)
    reach = np.ceil(1.25 * high * kind.elongation[1]) + 2
    offset = np.arange(-reach, reach + 1)
    rows = np.clip(np.rint(row) + offset[:, None], 0, field.shape[0] - 1)
    cols = np.clip(np.rint(col) + offset, 0, field.shape[1] - 1)
    where = (rows * field.shape[1] + cols).astype(np.intp)
    down, right = (rows - row).astype(np.float32), (cols - col).astype(np.float32)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    along, beside = (right * cos + down * sin) / semi_major, (down * cos - right * sin) / semi_minor
    turn = np.arctan2(beside, along)
    waves = np.sin(2 * turn + phase[0]) + np.sin(3 * turn + phase[1])
    radius = np.hypot(along, beside) * (1 + kind.irregularity * waves)
    membrane = np.exp(-(((radius - 0.85) / 0.16) ** 2))
    body = density * (1 + kind.rim * membrane + kind.clumping * chromatin.ravel()[where])
    np.maximum.at(field.ravel(), where.ravel(), (body * soft_step((1 - radius) * semi_minor, 2.2)).ravel())
