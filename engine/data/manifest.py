"""The manifest: which slides there are, what they are labelled, and how they are split."""

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from slidescale.engine.config import DataConfig, SupervisionName
from slidescale.engine.data.problems import Problem, describe
from slidescale.engine.data.resolution import POSSIBLE_UM
from slidescale.engine.data.same_slide import look_at, same_slides
from slidescale.engine.data.table import Record, read_table
from slidescale.engine.data.targets import is_missing, is_unlabelled, read_targets
from slidescale.engine.errors import ManifestError, flag, near

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
        targets: as `ManifestRow.target`, by slide_id, of those that have one.
        cases: patient, by slide_id.
        seen: number of these slides in split train or val.
        without: of the other slides, how many there are and what is wrong with the first; "" where there are none.
    """

    targets: dict[str, tuple[float, ...]]
    cases: dict[str, str]
    seen: int
    without: str = ""


def read_manifest(path: Path, config: DataConfig) -> Manifest:
    """Read and check a manifest.

    Raises:
        ManifestError: lists every problem of the file, each with its row (the line of the file, whose header is in
            row 1); of many of a kind, how many and the first.
    """
    full = _full_columns(config)
    columns = full | dict.fromkeys(config.label_columns, "--data.label-columns")
    if len(columns) < len(_roles(config)):
        raise ManifestError(f"{path}: one column has two roles: {_shared_roles(config)}")
    records = _with_splits(_read_records(path, columns), config)
    problems = [*_missing_cells(records, full, config), *_repeated_slides(records, config)]
    problems += [*_mixed_cases(records, config), *_bad_splits(records, config)]
    problems += _bad_resolutions(records, config)
    targets = read_targets(records, config)
    problems += targets.problems
    files = [path.parent / record[config.path_column] for _, record in records]
    problems += _bad_files(records, files, path.parent, config)
    _refuse(path, problems, len(records))
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
            for (number, record), file in zip(records, files, strict=True)
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
    problems = [*_missing_cells(records, columns, config), *_repeated_slides(records, config)]
    problems += _bad_resolutions(records, config)
    _refuse(path, problems, len(records))
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
        The labels of the slides that have one of the run's; or, where there is none, what is wrong.

    Raises:
        ManifestError: it cannot be read.
    """
    records = _with_splits(_read_records(path, {}), config)
    if config.supervision == "classes":
        config = replace(config, classes=tuple(names))
    columns = config.label_columns or (config.label_column,)
    if config.supervision == "survival":
        columns = (*columns, config.event_column)
    if absent := [repr(name) for name in columns if name not in records[0][1]]:
        return f"{path} has no column {', '.join(absent)}"
    enough = any if config.supervision == "multi_label" else all
    labelled = [
        (number, row) for number, row in records if enough(not is_unlabelled(row[name], config) for name in columns)
    ]
    # What is asked of a train split is not asked of these.
    found = read_targets([(number, row | {config.split_column: ""}) for number, row in labelled], config)
    problems = {problem.row: problem.text for problem in sorted(found.problems, reverse=True)}
    problems |= dict.fromkeys({number for number, _ in records} - dict(labelled).keys(), "has no label")
    without = ""
    if problems:
        first = min(problems)
        without = f"{len(problems)} of {len(records)} slides of {path} have no label of the run's"
        without += f" (row {first}: {problems[first]})"
    known = [(row[config.slide_column], number, row) for number, row in labelled if number not in problems]
    if not known:
        return without
    return Labels(
        {slide_id: found.values[number] for slide_id, number, _ in known},
        {slide_id: _case(row.get(config.case_column, "")) or slide_id for slide_id, _, row in known},
        sum(row.get(config.split_column) in ("train", "val") for _, _, row in known),
        without,
    )


def _case(cell: str) -> str:
    return "" if is_missing(cell) else cell


def _refuse(path: Path, problems: Sequence[Problem], rows: int) -> None:
    """Tell of all problems, if there are any."""
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise ManifestError(f"{path} has {count}:\n{describe(problems, rows)}")


def _read_records(path: Path, columns: Mapping[str, str]) -> list[Record]:
    """The rows of a manifest.

    Args:
        columns: that there must be, each with what names it.
    """
    table = read_table(path)
    missing = [
        f"no column {name!r} ({source})" + near(name, table.columns)
        for name, source in columns.items()
        if name not in table.columns
    ]
    if missing:
        raise ManifestError(f"{path}: " + "; ".join(missing) + f". It has: {', '.join(filter(None, table.columns))}")
    return table.records


def _roles(config: DataConfig) -> list[tuple[str, str]]:
    """(setting, column) of each column that a manifest must have."""
    names = ["slide_column", "case_column", "path_column", "split_column"]
    if config.supervision != "multi_label":
        names.append("label_column")
    if config.supervision == "survival":
        names.append("event_column")
    roles = [(flag(f"data.{name}"), getattr(config, name)) for name in names]
    return roles + [("--data.label-columns", name) for name in config.label_columns]


def _shared_roles(config: DataConfig) -> str:
    settings: dict[str, list[str]] = defaultdict(list)
    for setting, column in _roles(config):
        settings[column].append(setting)
    return "; ".join(f"{column!r} of {' and '.join(those)}" for column, those in settings.items() if len(those) > 1)


def _full_columns(config: DataConfig) -> dict[str, str]:
    """The columns, with the settings that name them, of which no cell may be empty; multi_label's labels may."""
    return {column: setting for setting, column in _roles(config) if setting != "--data.label-columns"}


def _with_splits(records: list[Record], config: DataConfig) -> list[Record]:
    """Rows whose split is spelt as here, where it differs in case only."""
    column = config.split_column
    spelt = [(number, row, row.get(column, "").lower()) for number, row in records]
    return [(number, row | {column: split} if split in get_args(Split) else row) for number, row, split in spelt]


def _missing_cells(records: list[Record], columns: Mapping[str, str], config: DataConfig) -> list[Problem]:
    problems = []
    for number, row in records:
        for name in columns:
            cell = row[name]
            missing = is_unlabelled(cell, config) if name == config.label_column else is_missing(cell)
            if cell and missing and name != config.path_column:
                problems.append(Problem(number, f"{name} is missing: {cell!r}", f"{name} is missing"))
            elif not cell:
                problems.append(Problem(number, f"{name} is empty", f"{name} is missing"))
    return problems


def _repeated_slides(records: list[Record], config: DataConfig) -> list[Problem]:
    first: dict[str, int] = {}
    problems = []
    for number, record in records:
        slide_id = record[config.slide_column]
        if slide_id and first.setdefault(slide_id, number) != number:
            text = f"slide_id {slide_id!r} already stands in row {first[slide_id]}"
            problems.append(Problem(number, text, "a slide_id that already stands above"))
    return problems


def _bad_files(records: list[Record], files: Sequence[Path], folder: Path, config: DataConfig) -> Iterable[Problem]:
    """Files that are not there, and slides that stand twice: a model would be tested on slides that it has learnt."""
    named = [index for index, (_, record) in enumerate(records) if record[config.path_column]]
    looked = look_at([files[index] for index in named])
    kind = f"no slide file (paths are relative to {folder.absolute()})"
    for index, found in zip(named, looked, strict=True):
        if found.fault is not None:
            yield Problem(records[index][0], found.fault, kind)
    for first, second, how in same_slides([files[index] for index in named], looked):
        (before, earlier), (number, record) = records[named[first]], records[named[second]]
        name, other = record[config.path_column], earlier[config.path_column]
        if name == other:
            text = f"file {name} already stands in row {before}"
        else:
            split, where = record[config.split_column], earlier[config.split_column]
            text = f"file {name}, in split {split!r}, is {how} {other}, in {where!r} in row {before}"
        yield Problem(number, text, "a slide that already stands above")


def _mixed_cases(records: list[Record], config: DataConfig) -> list[Problem]:
    """Patients whose slides are in two splits: a model would be tested on patients it has learnt."""
    first: dict[str, tuple[int, str, str]] = {}
    problems = []
    for number, record in records:
        case, split = record[config.case_column], record[config.split_column]
        if is_missing(case) or not split:
            continue
        where, name, other = first.setdefault(_same_case(case), (number, case, split))
        if other == split:
            continue
        if name == case:
            text = f"case {case!r} is in split {split!r}, and in {other!r} in row {where}"
        else:
            text = f"case {case!r} is in split {split!r}, and {name!r}, most likely the same one, in {other!r}"
            text += f" in row {where}"
        problems.append(Problem(number, text, "a patient of two splits"))
    return problems


def _same_case(case: str) -> str:
    """Alike for names that differ in case, spaces and forms of letters, and numbers that differ in ".0" and zeros."""
    name = " ".join(unicodedata.normalize("NFKC", case).casefold().split())
    return number[1] if (number := re.fullmatch(r"0*(\d+?)(?:\.0*)?", name)) else name


def _bad_splits(records: list[Record], config: DataConfig) -> list[Problem]:
    splits = get_args(Split)
    cells = [(number, record[config.split_column]) for number, record in records]
    problems = []
    for number, cell in cells:
        if not is_missing(cell) and cell not in splits:
            longer = [split for split in splits if cell.lower().startswith(split)]
            guess = f", did you mean {longer[0]!r}?" if longer else near(cell.lower(), splits)
            text = f"unknown split {cell!r}; use {', '.join(splits)}{guess}"
            problems.append(Problem(number, text, f"an unknown split (use {', '.join(splits)})"))
    if all(cell != "train" for _, cell in cells):
        problems.append(Problem(0, "no row is in split 'train'"))
    return problems


def _resolution(record: Mapping[str, str], config: DataConfig) -> float | None:
    """What a row says of its slide's resolution: µm a pixel; None where it says nothing, or has no such column."""
    cell = record.get(config.mpp_column, "")
    return None if is_missing(cell) else float(cell)


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
            rule = f"must be the slide's µm a pixel, {low:g} to {high:g}, or empty"
            problems.append(Problem(number, f"{config.mpp_column} {cell!r} {rule}", f"{config.mpp_column} {rule}"))
    return problems
