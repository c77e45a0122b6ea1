"""The demo cohort: H&E-like slides that the project draws itself, so that it trains with no data at hand.

The slides of the two classes are the same picture but for small foci that cover a few percent of the
tissue: crowded small round nuclei in the first class, enlarged pleomorphic nuclei in the second. The foci
of both classes have the same outlines, as many pixels of nuclei and as much haematoxylin, so neither colour,
darkness, tissue area nor file size gives a class away. Foci come in two sizes, which cover as much of the tissue: large
ones fill tiles with their nuclei, small ones have a handful of nuclei each, and are harder to learn.

A slide is drawn as two density fields, haematoxylin and eosin, and stained at the end by the Beer-Lambert
law. The background lives on a grid of GRID px and is resampled, because only nuclei have finer detail.
"""

import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image
from scipy import ndimage

from slidescale.engine.config import FocusSize
from slidescale.engine.files import replacing, write_json

FORMAT_VERSION = 1
"""Part of cohort.json: raise it when the pictures change, so that an old cohort is drawn again."""

FOCUS_RADIUS_PX: dict[FocusSize, tuple[float, float]] = {"large": (42, 75), "small": (24, 36)}

MPP_UM = 0.5
GRID = 2
"""Pixels of level 0 between the points on which all but the nuclei is drawn."""

STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
"""Absorbance (natural log) of haematoxylin and eosin in R, G, B (the reference of Macenko et al. 2009)."""


@dataclass(frozen=True, kw_only=True)
class SlidePlan:
    """One row of the manifest and all that the drawing of its slide depends on."""

    slide_id: str
    case_id: str
    label: str
    split: str
    atypical: bool
    """Whether the foci hold enlarged nuclei: the slide is of the second class."""
    foci: FocusSize
    seed: tuple[int, int]
    """(cohort seed, slide index)."""

    @property
    def path(self) -> str:
        """Path of the slide relative to the manifest's folder, with forward slashes."""
        return f"slides/{self.slide_id}.svs"


@dataclass(frozen=True, kw_only=True)
class Nucleus:
    """What nuclei of one kind look like; lengths in px, densities in units of haematoxylin."""

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


def write_demo_cohort(
    folder: Path,
    *,
    slides: int = 64,
    seed: int = 0,
    workers: int | None = None,
    classes: tuple[str, str] = ("wild_type", "mutant"),
    foci: FocusSize = "large",
) -> Path:
    """Draw the cohort under `folder` and return the path of its manifest.csv.

    The files depend on `slides`, `seed`, `classes` and `foci` only, to the byte. A folder that already holds this
    cohort is left alone; an incomplete or a different one is drawn again. Only one process may call this
    for a folder at a time.

    Args:
        folder: receives `slides/<slide_id>.svs` (Aperio layout, 0.5 µm/px), `manifest.csv` (columns
            slide_id, case_id, path, label, split) and, last, `cohort.json`.
        slides: at least 4: one a class in each split; about three in eight go to `val`.
        workers: slides drawn at once; None takes the cores this process may run on.
        classes: labels of the slides without and with foci of enlarged nuclei.
        foci: their size.

    Raises:
        ValueError: fewer than 4 slides, or two equal class names.
    """
    if slides < 4:
        raise ValueError(f"slides {slides} must be >= 4: one slide a class in each of train and val")
    if classes[0] == classes[1]:
        raise ValueError(f"classes must be two different names, not {classes}")
    folder = Path(folder)
    manifest, stamp = folder / "manifest.csv", folder / "cohort.json"
    parameters = {"format": FORMAT_VERSION, "slides": slides, "seed": seed, "classes": list(classes), "foci": foci}
    plans = _plan_cohort(slides, seed, classes, foci)
    if _is_complete(stamp, parameters, [manifest, *(folder / plan.path for plan in plans)]):
        return manifest
    stamp.unlink(missing_ok=True)
    (folder / "slides").mkdir(parents=True, exist_ok=True)
    # Threads, not processes: NumPy, Pillow and the JPEG encoder release the GIL, and a spawned process would
    # import the caller's script, torch and DeepSpeed included, before it could draw.
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(lambda plan: _write_slide(folder / plan.path, plan), plans):
            pass
    _write_manifest(manifest, plans)
    write_json(stamp, parameters)
    return manifest


def _is_complete(stamp: Path, parameters: dict, files: list[Path]) -> bool:
    """Whether `stamp` records a finished cohort with these parameters and every file is still there."""
    if not stamp.exists() or json.loads(stamp.read_text(encoding="utf-8")) != parameters:
        return False
    return all(file.exists() for file in files)


def _plan_cohort(slides: int, seed: int, classes: tuple[str, str], foci: FocusSize) -> list[SlidePlan]:
    """Deal splits, classes and cases out to the slides so that a slide's index tells nothing."""
    rng = np.random.default_rng(seed)
    in_val = max(2, round(slides * 3 / 8))
    cases = []  # (split, class index, slides of this case)
    for split, size in (("train", slides - in_val), ("val", in_val)):
        for class_index, members in ((0, size - size // 2), (1, size // 2)):
            pairs = members // 5
            cases += [(split, class_index, 2)] * pairs + [(split, class_index, 1)] * (members - 2 * pairs)
    rng.shuffle(cases)
    rows = [(f"case-{number:03d}", *case[:2]) for number, case in enumerate(cases) for _ in range(case[2])]
    rng.shuffle(rows)
    return [
        SlidePlan(
            slide_id=f"slide-{index:03d}",
            case_id=case_id,
            label=classes[class_index],
            split=split,
            atypical=class_index == 1,
            foci=foci,
            seed=(seed, index),
        )
        for index, (case_id, split, class_index) in enumerate(rows)
    ]


def _write_manifest(path: Path, plans: list[SlidePlan]) -> None:
    """Write one row a slide in the order of the slide ids."""
    columns = ["slide_id", "case_id", "path", "label", "split"]
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([getattr(plan, column) for column in columns] for plan in plans)


def _write_slide(path: Path, plan: SlidePlan) -> None:
    """Draw one slide and write it as Aperio does: level 0, thumbnail, levels 1/4 and 1/16."""
    image = draw_slide(np.random.default_rng(plan.seed), atypical=plan.atypical, foci=plan.foci)
    height, width = image.shape[:2]
    head = f"Aperio Image Library (drawn by slidescale)\r\n{width}x{height} [0,0 {width}x{height}] (256x256)"
    description = f"{head} JPEG/RGB Q=80|AppMag = 20|MPP = {MPP_UM}"
    # Photometric RGB: OpenSlide takes a YCbCr tag at its word, and tifffile writes the tiles as RGB.
    jpeg: dict[str, Any] = {
        "photometric": "rgb",
        "compression": "jpeg",
        "compressionargs": {"level": 80},
        "metadata": None,
    }
    tiles = {**jpeg, "tile": (256, 256), "maxworkers": 1}
    with replacing(path) as temporary, tifffile.TiffWriter(temporary) as tiff:
        tiff.write(image, description=description, software=False, **tiles)
        # OpenSlide knows Aperio's thumbnail by its place, second, and by its strips.
        tiff.write(_shrink(image, 4), description=description, software=False, rowsperstrip=16, **jpeg)
        for downsample in (4, 16):
            tiff.write(_shrink(image, downsample), description=description, software=False, **tiles)


def _shrink(image: np.ndarray, factor: int) -> np.ndarray:
    """Average an image over squares of `factor` px; an incomplete last row or column is left out."""
    height, width = (side // factor * factor for side in image.shape[:2])
    return np.asarray(Image.fromarray(image[:height, :width]).reduce(factor))


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
    wobble = 0.16 * _noise(rng, grid, 45)
    focus = _nearest(discs, grid)[0] + wobble
    gland, index = _nearest(glands, grid)
    in_gland, in_focus = _soft_step(1 - gland - wobble, 0.06), _soft_step(1 - focus, 0.15)
    cellular = np.maximum(in_gland, in_focus)
    lumen = in_gland * _soft_step(lumens[index] - gland - wobble - 0.12 * _noise(rng, grid, 16), 0.07)
    stroma, direction, clefts = _stroma(rng, grid)

    secretion = np.clip(0.12 + 0.12 * _noise(rng, grid, 60), 0.02, 0.3)
    eosin = stroma + cellular * (0.40 + 0.04 * _noise(rng, grid, 10) - stroma)
    eosin = tissue * (eosin + lumen * (secretion - eosin))
    haematoxylin = tissue * (0.05 + 0.14 * cellular) * (1 - lumen)
    free = tissue * (1 - cellular) * (1 - clefts)
    crowd = np.clip(1.4 - _nearest(aggregates, grid)[0] - wobble, 0, 1)
    populations = [
        _fibroblasts(rng, free * (1 - crowd), direction),
        _round(LYMPHOCYTE, rng, *_scatter(rng, free * np.maximum(crowd, 0.02), 13.5)),
        _epithelium(rng, glands * GRID, lumens, wobble),
        *_focus_nuclei(focus_rng, _soft_step(0.97 - focus, 0.05), ATYPICAL if atypical else BENIGN),
    ]
    return _stain(rng, _enlarge(haematoxylin, shape), _enlarge(eosin, shape), populations)


def _noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> np.ndarray:
    """Smooth noise float32 `shape`, mean 0, standard deviation about 1, features of about `cell` points."""
    coarse = rng.standard_normal([int(side / cell) + 2 for side in shape], dtype=np.float32)
    return 1.35 * _enlarge(coarse, shape)


def _enlarge(field: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resample a float32 field to `shape` with cubic splines."""
    image = Image.fromarray(field.astype(np.float32, copy=False))
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BICUBIC))


def _soft_step(value: np.ndarray, width: float) -> np.ndarray:
    """0 where `value` is negative, 1 where it is positive, with a linear ramp `width` wide at 0."""
    return np.clip(value / width + 0.5, 0, 1)


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
        level += amplitude * _noise(rng, grid, cell)
    # Glass on all four sides: the level falls steeply at the border.
    level -= 20 * np.clip(np.maximum(np.abs(rows), np.abs(cols)) - 0.93, 0, None)
    share = rng.uniform(1.2e6, 1.7e6) / (level.size * GRID**2)
    return _soft_step(level - np.quantile(level, 1 - share), 0.01).astype(np.float32)


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
        window, distance = _distance(row, col, 200 / GRID, room.shape)
        np.minimum(room[window], distance - radius, out=room[window])
    return np.array(discs).reshape(-1, 3)


def _distance(row: float, col: float, reach: float, grid: tuple[int, int]) -> tuple[tuple, np.ndarray]:
    """Distance to a point, within `reach` of it: the window (two slices) and float32 [window]; grid points."""
    centred = zip((row, col), grid, strict=True)
    window = tuple(slice(max(int(at - reach), 0), min(int(at + reach), side)) for at, side in centred)
    rows, cols = np.ogrid[window]
    return window, np.hypot(rows - row, cols - col, dtype=np.float32)


def _nearest(discs: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest disc's centre in units of its radius, float32 `grid`, and that disc's index."""
    nearest_distance, nearest = np.full(grid, 9.0, np.float32), np.zeros(grid, np.intp)
    for index, (row, col, radius) in enumerate(discs):
        window, distance = _distance(row, col, 2 * radius, grid)
        nearer = distance / radius < nearest_distance[window]
        nearest_distance[window][nearer] = distance[nearer] / radius
        nearest[window][nearer] = index
    return nearest_distance, nearest


def _stroma(rng: np.random.Generator, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fibrous stroma: eosin, direction of the fibres in rad, and white clefts in 0..1; each float32 `grid`."""
    rows, cols = (axis.astype(np.float32) for axis in np.ogrid[: grid[0], : grid[1]])
    turn = rng.uniform(0, np.pi)
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    across = rows * cos - cols * sin + 48 * _noise(rng, grid, 190) + 6 * _noise(rng, grid, 45)
    along = rows * sin + cols * cos + 60 * _noise(rng, grid, 190)
    # A texture stretched along the fibres, read at the bent coordinates; it repeats where they leave it.
    straight = 0.6 * _noise(rng, (1024, 256), 2.4) + 0.8 * _noise(rng, (1024, 256), 7)
    bent = np.stack([across / 1.3, along / 13])
    fibres = ndimage.map_coordinates(straight, bent, order=1, mode="grid-wrap", output=np.float32)
    slope_row, slope_col = np.gradient(across)
    clefts = _soft_step(-fibres - 1.9 + 0.6 * _noise(rng, grid, 80), 0.7)
    eosin = 0.52 + 0.10 * fibres + 0.08 * _noise(rng, grid, 110) + 0.03 * _noise(rng, grid, 5)
    return eosin * (1 - 0.9 * clefts), np.arctan2(-slope_col, slope_row), clefts


def _scatter(rng: np.random.Generator, chance: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
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


def _round(kind: Nucleus, rng: np.random.Generator, row: np.ndarray, col: np.ndarray) -> Population:
    """Nuclei at the given points that lie in any direction."""
    return kind, row, col, rng.uniform(0, np.pi, len(row))


def _fibroblasts(rng: np.random.Generator, free: np.ndarray, direction: np.ndarray) -> Population:
    """Spindle nuclei along the fibres, in drifts."""
    row, col = _scatter(rng, free * np.clip(0.42 + 0.25 * _noise(rng, free.shape, 60), 0.05, 1), 18)
    return FIBROBLAST, row, col, _at(direction, row, col) + rng.normal(0, 0.25, len(row))


def _epithelium(rng: np.random.Generator, glands_px: np.ndarray, lumens: np.ndarray, wobble: np.ndarray) -> Population:
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


def _focus_nuclei(rng: np.random.Generator, inside: np.ndarray, kind: Nucleus) -> list[Population]:
    """Crowd the foci with nuclei of one class's kind; the enlarged ones get a nucleolus each."""
    row, col = _scatter(rng, inside, FOCUS_SPACING_PX[kind])
    populations = [_round(kind, rng, row, col)]
    if kind is ATYPICAL:
        populations.append(_round(NUCLEOLUS, rng, *(at + rng.normal(0, 2.2, len(row)) for at in (row, col))))
    return populations


def _draw_nuclei(rng: np.random.Generator, field: np.ndarray, population: Population, chromatin: np.ndarray) -> None:
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
    np.maximum.at(field.ravel(), where.ravel(), (body * _soft_step((1 - radius) * semi_minor, 2.2)).ravel())


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
    lamp = 1 + 0.006 * _noise(rng, shape, 600)
    chromatin, grain = _noise(rng, shape, 2.6), rng.standard_normal(shape, dtype=np.float32)
    nuclear = np.zeros(shape, np.float32)
    for population in populations:
        _draw_nuclei(rng, nuclear, population, chromatin)
    # Little cytoplasm lies over or under a nucleus.
    eosin = np.clip(eosin, 0, None) * (1 - 0.5 * np.minimum(nuclear, 1)) * (1 + 0.04 * chromatin)
    haematoxylin = np.maximum(np.clip(haematoxylin, 0, None), nuclear)
    image = np.empty((*shape, 3), np.uint8)
    for channel in range(3):
        absorbed = stains[0, channel] * haematoxylin + stains[1, channel] * eosin
        light = glass[channel] * lamp * np.exp(-absorbed) + 2.0 * np.roll(grain, 7 * channel)
        image[..., channel] = np.clip(light, 0, 255)
    return image
