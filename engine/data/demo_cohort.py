"""The demo cohort: slides that the project draws itself, with a manifest, so that it trains with no data at hand."""

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

from slidescale.engine.config import FocusSize
from slidescale.engine.data.demo_drawing import MPP_UM, draw_slide
from slidescale.engine.files import replacing, write_json

FORMAT_VERSION = 1
"""Part of cohort.json: raise it when the pictures change, so that an old cohort is drawn again."""


@dataclass(frozen=True, kw_only=True)
class SlidePlan:
    """One row of the manifest, and everything that the drawing of its slide depends on."""

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
        slides: at least 4, one per class in each split; about three in eight go to `val`.
        workers: slides drawn at once; None takes the cores this process may run on.
        classes: labels of the slides without and with foci of enlarged nuclei.
        foci: their size.

    Raises:
        ValueError: fewer than 4 slides, or two equal class names.
    """
    if slides < 4:
        raise ValueError(f"slides {slides} must be >= 4: one slide per class in each of train and val")
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
    """Deal splits, classes and cases out to the slides so that a slide's index says nothing about them."""
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
    """Write one row per slide in the order of the slide ids."""
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
