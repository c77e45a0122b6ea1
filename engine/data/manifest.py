"""The manifest: which slides there are, what they are labelled, and how they are split."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from slidescale.engine.config import DataConfig
from slidescale.engine.data.resolution import POSSIBLE_UM
from slidescale.engine.data.targets import MISSING, Problem, Record, near, read_targets
from slidescale.engine.errors import ManifestError
from slidescale.engine.objective import SupervisionName

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class ManifestRow:
    """One slide.

    Attributes:
        target: what a model is to predict of it. classes: (index into the manifest's classes,); multi_label: 1.0, 0.0
            or NaN (missing) for each label; regression: (number,); survival: (time, event), with event 1.0 when it was
            observed, and 0.0 when the patient was last seen without it.
        mpp_um: level-0 resolution in µm a pixel, in place of what the file states.
    """

    slide_id: str
    case_id: str
    path: Path
    target: tuple[float, ...]
    split: Split
    mpp_um: float | None = None


@dataclass(frozen=True)
class Manifest:
    """All slides of a study, checked.

    Attributes:
        classes: names of what is predicted: of the classes, in the order of the logits, or of the labels; the label
            column's for regression, and "risk" for survival.
    """

    rows: tuple[ManifestRow, ...]
    classes: tuple[str, ...]
    supervision: SupervisionName = "classes"

    def split(self, name: Split) -> list[ManifestRow]:
        """The rows of one split, in the manifest's order."""
        return [row for row in self.rows if row.split == name]


class NamedFile(NamedTuple):
    """A slide to predict; no label, no split. For `mpp_um` see `ManifestRow`."""

    slide_id: str
    path: Path
    mpp_um: float | None = None


class Labels(NamedTuple):
    """What a manifest says of slides that are to be predicted.

    Attributes:
        targets: as `ManifestRow.target`, by slide_id.
        cases: patient, by slide_id.
        seen: number of slides in split train or val.
    """

    targets: dict[str, tuple[float, ...]]
    cases: dict[str, str]
    seen: int


def read_manifest(path: Path, config: DataConfig) -> Manifest:
    """Read and check a manifest.

    Raises:
        ManifestError: lists every problem of the file, each with its row (the header is row 1).
    """
    full = _full_columns(config)
    records = _read_records(path, full | dict.fromkeys(config.label_columns, "--data.label-columns"))
    problems = [*_missing_cells(records, full), *_repeated_slides(records, config), *_mixed_cases(records, config)]
    problems += [*_bad_splits(records, config), *_bad_resolutions(records, config)]
    targets = read_targets(records, config)
    problems += targets.problems
    rows: list[tuple[int, dict[str, str], Path]] = []
    first: dict[str, int] = {}
    for number, record in records:
        name = record[config.path_column]
        file = path.parent / name
        if name and first.setdefault(name, number) != number:
            problems.append((number, f"file {name} already stands in row {first[name]}"))
        if record[config.path_column] and not file.is_file():
            problems.append((number, f"no file {file}"))
        rows.append((number, record, file))
    _refuse(path, problems)
    return Manifest(
        rows=tuple(
            ManifestRow(
                slide_id=record[config.slide_column],
                case_id=record[config.case_column],
                path=file,
                target=targets.values[number],
                split=record[config.split_column],  # type: ignore[arg-type]  # checked by _bad_splits
                mpp_um=_resolution(record, config),
            )
            for number, record, file in rows
        ),
        classes=targets.names,
        supervision=config.supervision,
    )


def read_files(path: Path, config: DataConfig) -> list[NamedFile]:
    """The slides of a manifest, of which only names, paths and resolutions are looked at.

    Raises:
        ManifestError: it cannot be read, or lists every row that has a problem (the header is row 1). That a slide's
            file is missing is not among these: it is that slide's failure alone.
    """
    columns = {config.slide_column: "as in the run's manifest", config.path_column: "as in the run's manifest"}
    records = _read_records(path, columns)
    _refuse(
        path,
        [*_missing_cells(records, columns), *_repeated_slides(records, config), *_bad_resolutions(records, config)],
    )
    return [
        NamedFile(row[config.slide_column], path.parent / row[config.path_column], _resolution(row, config))
        for _, row in records
    ]


def read_labels(path: Path, config: DataConfig, names: Sequence[str]) -> Labels | str:
    """What a manifest says of slides that a trained run is to predict, in the columns of the run's own manifest.

    A slide without a patient is taken as a patient's only one.

    Args:
        config: of the run.
        names: of what it predicts, as `Manifest.classes`.

    Returns:
        The labels; or, where the manifest does not have one of the run's for every slide, what is wrong.

    Raises:
        ManifestError: it cannot be read.
    """
    records = _read_records(path, {})
    columns = config.label_columns or (config.label_column,)
    if config.supervision == "survival":
        columns = (*columns, config.event_column)
    if absent := [repr(name) for name in columns if name not in records[0][1]]:
        return f"{path} has no column {', '.join(absent)}"
    enough = any if config.supervision == "multi_label" else all
    missing = {""} if config.supervision == "classes" else MISSING
    blank = [number for number, row in records if not enough(row[name].lower() not in missing for name in columns)]
    if blank:
        return f"{path} has no label in row {', '.join(map(str, blank[:5]))}{', …' * (len(blank) > 5)}"
    if config.supervision == "classes":
        config = replace(config, classes=tuple(names))
    # What is asked of a train split is not asked of these.
    targets = read_targets([(number, row | {config.split_column: ""}) for number, row in records], config)
    if targets.problems:
        number, text = min(targets.problems)
        more = len(targets.problems) - 1
        return f"{path}, row {number}: {text}" + (f" (and {more} more)" if more else "")
    return Labels(
        {row[config.slide_column]: targets.values[number] for number, row in records},
        {row[config.slide_column]: row.get(config.case_column) or row[config.slide_column] for _, row in records},
        seen=sum(row.get(config.split_column) in ("train", "val") for _, row in records),
    )


def _refuse(path: Path, problems: list[Problem]) -> None:
    """Tell of all problems, if there are any."""
    if problems:
        lines = "\n".join(f"  row {number}: {text}" if number else f"  {text}" for number, text in sorted(problems))
        raise ManifestError(f"{path} has {len(problems)} problem{'s' * (len(problems) > 1)}:\n{lines}")


def _read_records(path: Path, columns: Mapping[str, str]) -> list[Record]:
    """(row number, cells) of each row.

    Args:
        columns: that there must be, each with what names it.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            found = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = found
            records = [
                (number, {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)})
                for number, row in enumerate(reader, start=2)
            ]
    except OSError as error:
        raise ManifestError(f"cannot read the manifest {path}: {error.strerror}") from None
    except csv.Error as error:
        raise ManifestError(f"{path} is not CSV: {error}") from None
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    missing = [
        f"no column {name!r} ({source})" + near(name, found) for name, source in columns.items() if name not in found
    ]
    if missing:
        raise ManifestError(f"{path}: " + "; ".join(missing) + f". It has: {', '.join(found) or 'nothing'}")
    if not records:
        raise ManifestError(f"{path} has a header and no rows")
    return records


def _full_columns(config: DataConfig) -> dict[str, str]:
    """The columns, with the settings that name them, of which no cell may be empty; multi_label's labels may."""
    names = ["slide_column", "case_column", "path_column", "split_column"]
    if config.supervision != "multi_label":
        names.append("label_column")
    if config.supervision == "survival":
        names.append("event_column")
    return {getattr(config, name): f"--data.{name.replace('_', '-')}" for name in names}


def _missing_cells(records: list[Record], columns: Mapping[str, str]) -> list[Problem]:
    return [(number, f"{name} is empty") for number, row in records for name in columns if not row[name]]


def _repeated_slides(records: list[Record], config: DataConfig) -> list[Problem]:
    first: dict[str, int] = {}
    problems = []
    for number, record in records:
        slide_id = record[config.slide_column]
        if slide_id and first.setdefault(slide_id, number) != number:
            problems.append((number, f"slide_id {slide_id!r} already stands in row {first[slide_id]}"))
    return problems


def _mixed_cases(records: list[Record], config: DataConfig) -> list[Problem]:
    """Patients whose slides are in two splits: a model would be tested on patients it has learnt."""
    first: dict[str, tuple[int, str]] = {}
    problems = []
    for number, record in records:
        case, split = record[config.case_column], record[config.split_column]
        if not case or not split:
            continue
        where, other = first.setdefault(case, (number, split))
        if other != split:
            problems.append((number, f"case {case!r} is in split {split!r}, and in {other!r} in row {where}"))
    return problems


def _bad_splits(records: list[Record], config: DataConfig) -> list[Problem]:
    splits = get_args(Split)
    cells = [(number, record[config.split_column]) for number, record in records]
    problems = [
        (number, f"unknown split {cell!r}; use {', '.join(splits)}" + near(cell, splits))
        for number, cell in cells
        if cell and cell not in splits
    ]
    if all(cell != "train" for _, cell in cells):
        problems.append((0, "no row is in split 'train'"))
    return problems


def _resolution(record: Mapping[str, str], config: DataConfig) -> float | None:
    """What a row says of its slide's resolution: µm a pixel; None where it says nothing, or has no such column."""
    cell = record.get(config.mpp_column, "")
    return float(cell) if cell else None


def _bad_resolutions(records: list[Record], config: DataConfig) -> list[Problem]:
    low, high = POSSIBLE_UM
    problems = []
    for number, record in records:
        try:
            value = _resolution(record, config)
        except ValueError:
            value = math.nan
        if value is not None and not low <= value <= high:
            cell = record[config.mpp_column]
            problems.append(
                (number, f"{config.mpp_column} {cell!r} must be the slide's µm a pixel, {low:g} to {high:g}, or empty")
            )
    return problems
