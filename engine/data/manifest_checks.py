"""Checks of a manifest: what is wrong with its slides, files, patients, splits and resolutions, row by row."""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from slidescale.engine.config import DataConfig
from slidescale.engine.data.records import Split, resolution
from slidescale.engine.data.resolution import POSSIBLE_UM
from slidescale.engine.data.same_slide import look_at, same_slides
from slidescale.engine.errors import near
from slidescale.engine.supervision.cells import Problem, Record, is_missing
from slidescale.engine.supervision.make import supervision_of


def missing_cells(records: list[Record], columns: Mapping[str, str], data: DataConfig) -> list[Problem]:
    """Cells that are empty or stand for nothing, of columns that must be full."""
    kind, problems = supervision_of(data.supervision), []
    for number, row in records:
        for name in columns:
            cell = row[name]
            missing = kind.is_unlabelled(cell, data) if name == data.label_column else is_missing(cell)
            if cell and missing and name != data.path_column:
                problems.append(Problem(number, f"{name} is missing: {cell!r}", f"{name} is missing"))
            elif not cell:
                problems.append(Problem(number, f"{name} is empty", f"{name} is missing"))
    return problems


def repeated_slides(records: list[Record], data: DataConfig) -> list[Problem]:
    """Names of slides that stand twice."""
    first: dict[str, int] = {}
    problems = []
    for number, record in records:
        slide_id = record[data.slide_column]
        if slide_id and first.setdefault(slide_id, number) != number:
            text = f"slide_id {slide_id!r} already stands in row {first[slide_id]}"
            problems.append(Problem(number, text, "a slide_id that already stands above"))
    return problems


def bad_files(records: list[Record], files: Sequence[Path], folder: Path, data: DataConfig) -> Iterable[Problem]:
    """Files that are not there, and slides that stand twice: a model would be tested on slides that it has learnt."""
    named = [index for index, (_, record) in enumerate(records) if record[data.path_column]]
    looked = look_at([files[index] for index in named])
    kind = f"no slide file (paths are relative to {folder.absolute()})"
    for index, found in zip(named, looked, strict=True):
        if found.fault is not None:
            yield Problem(records[index][0], found.fault, kind)
    for first, second, how in same_slides([files[index] for index in named], looked):
        (before, earlier), (number, record) = records[named[first]], records[named[second]]
        name, other = record[data.path_column], earlier[data.path_column]
        if name == other:
            text = f"file {name} already stands in row {before}"
        else:
            split, where = record[data.split_column], earlier[data.split_column]
            text = f"file {name}, in split {split!r}, is {how} {other}, in {where!r} in row {before}"
        yield Problem(number, text, "a slide that already stands above")


def mixed_cases(records: list[Record], data: DataConfig) -> list[Problem]:
    """Patients whose slides are in two splits: a model would be tested on patients it has learnt."""
    first: dict[str, tuple[int, str, str]] = {}
    problems = []
    for number, record in records:
        case, split = record[data.case_column], record[data.split_column]
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
    """A case's name without what spellings differ in: case, spaces and forms of letters; a number's ".0" and zeros."""
    name = " ".join(unicodedata.normalize("NFKC", case).casefold().split())
    return number[1] if (number := re.fullmatch(r"0*(\d+?)(?:\.0*)?", name)) else name


def bad_splits(records: list[Record], data: DataConfig) -> list[Problem]:
    """Splits that do not exist, and a train split without slides."""
    splits = get_args(Split)
    cells = [(number, record[data.split_column]) for number, record in records]
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


def bad_resolutions(records: list[Record], data: DataConfig) -> list[Problem]:
    """Resolutions that no slide can have."""
    low, high = POSSIBLE_UM
    problems = []
    for number, record in records:
        try:
            value = resolution(record, data)
        except ValueError:
            value = math.nan
        if value is not None and not low <= value <= high:
            cell = record[data.mpp_column]
            rule = f"must be the slide's µm per pixel, {low:g} to {high:g}, or empty"
            problems.append(Problem(number, f"{data.mpp_column} {cell!r} {rule}", f"{data.mpp_column} {rule}"))
    return problems
