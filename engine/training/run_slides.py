"""slides.json of a run: the split and the target of every slide, by which a resume knows that they are the same."""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slidescale.engine.data.manifest import Manifest, ManifestRow, NamedFile
from slidescale.engine.errors import UserError
from slidescale.engine.files import write_json
from slidescale.engine.supervision.make import supervision_of

log = logging.getLogger(__name__)

SLIDES = "slides.json"
# Slides that a message names for each kind of change.
NAMED = 5


def record_slides(folder: Path, manifest: Manifest) -> None:
    """Write slides.json."""
    slides = {row.slide_id: _describe(row) | {"file": str(row.path.resolve())} for row in manifest.rows}
    write_json(folder / SLIDES, slides)


def known_splits(folder: Path, files: Sequence[NamedFile]) -> Counter[str]:
    """Count the slides that a run has in its splits train and val, found by their files or their names.

    Raises:
        UserError: the run's record is damaged.
    """
    recorded = _read(folder / SLIDES) or {}
    by_file = {slide["file"]: slide["split"] for slide in recorded.values()}
    found: Counter[str] = Counter()
    for file in files:
        split = by_file.get(str(file.path.resolve())) or recorded.get(file.slide_id, {}).get("split")
        if split in ("train", "val"):
            found[split] += 1
    return found


def check_same_slides(folder: Path, manifest: Manifest) -> None:
    """Refuse to go on with a run on other slides, splits or targets: it could be judged by slides it has learnt from.

    Slides that were added or removed are refused as well. Added ones would change the length of an epoch, on which the
    learning rate depends, and the scores by which the best epoch is chosen; `slidescale predict` is there for further
    test slides. A slide's file may have moved. A run that was begun before slides were recorded goes on with a warning.

    Raises:
        UserError: says how many slides differ in what, and names some.
    """
    recorded = _read(folder / SLIDES)
    if recorded is None:
        log.warning(
            "%s has no %s, for an earlier version began it: nothing shows whether the manifest's splits and labels are "
            "the same as then",
            folder,
            SLIDES,
        )
        return
    now = {row.slide_id: _describe(row) for row in manifest.rows}
    both = [name for name in now if name in recorded]
    changes = {
        "are in another split": [
            f"{name} ({recorded[name]['split']}, now {now[name]['split']})"
            for name in both
            if recorded[name]["split"] != now[name]["split"]
        ],
        "have another label": [
            f"{name} ({_label(recorded[name], manifest)}, now {_label(now[name], manifest)})"
            for name in both
            if recorded[name]["target"] != now[name]["target"]
        ],
        "are new": [name for name in now if name not in recorded],
        "are missing": [name for name in recorded if name not in now],
    }
    lines = [
        f"  {len(names)} of {len(now)} slides {what}: {', '.join(names[:NAMED])}{', …' * (len(names) > NAMED)}"
        for what, names in changes.items()
        if names
    ]
    if lines:
        raise UserError(
            f"--resume: the manifest is not the one that {folder} was begun with; bring that back, or begin another "
            "run:\n" + "\n".join(lines)
        )


def _describe(row: ManifestRow) -> dict[str, Any]:
    """The split and the target; a label that is missing, NaN, has no number in JSON."""
    return {"split": row.split, "target": [None if math.isnan(value) else value for value in row.target]}


def _label(slide: dict[str, Any], manifest: Manifest) -> str:
    """A target as predictions.csv has it; the manifest has its classes in the recorded order."""
    kind = supervision_of(manifest.supervision)
    target = tuple(math.nan if value is None else value for value in slide["target"])
    try:
        return " ".join(cell or "missing" for cell in kind.target_cells(manifest.classes, target))
    except IndexError:  # somebody has edited the record
        return str(slide["target"])


def _read(path: Path) -> dict[str, dict[str, Any]] | None:
    """Read what `record_slides` wrote; None for a run of before it existed.

    Raises:
        UserError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: {"split": str(each["split"]), "target": list(each["target"]), "file": str(each["file"])}
            for name, each in content.items()
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}; move it away to go on without it") from None
