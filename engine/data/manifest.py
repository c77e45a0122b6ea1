"""The manifest: which slides there are, what they are labelled with, and how they are split."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from slidescale.engine.config import DataConfig, SupervisionName
from slidescale.engine.data.manifest_checks import (
    bad_files,
    bad_resolutions,
    bad_splits,
    missing_cells,
    mixed_cases,
    repeated_slides,
)
from slidescale.engine.data.problems import describe
from slidescale.engine.data.records import (
    Split,
    full_columns,
    read_records,
    resolution,
    roles,
    shared_roles,
    with_splits,
)
from slidescale.engine.errors import ManifestError
from slidescale.engine.supervision.cells import Problem
from slidescale.engine.supervision.make import check_settings, supervision_of


@dataclass(frozen=True)
class ManifestRow:
    """One slide.

    Attributes:
        target: what a model is to predict of it (see the manifest's kind of supervision). classes: (index into the
            manifest's classes,); multi_label: 1.0, 0.0 or NaN (missing) for each label; regression: (number,);
            survival: (time, event), with event 1.0 when it was observed, and 0.0 when the patient was last seen
            without it.
        mpp_um: level-0 resolution in µm per pixel, in place of what the file states.
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
        classes: names of what is predicted: of the classes, in the order of the logits, or of the labels; the name of
            the label column for regression, and "risk" for survival.
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


def read_manifest(path: Path, data: DataConfig) -> Manifest:
    """Read and check a manifest.

    Raises:
        ConfigError: a setting is for another kind of supervision (see `check_settings`).
        ManifestError: lists every problem of the file, each with its row (the line of the file, whose header is in
            row 1); of many of a kind, how many and the first.
    """
    check_settings(data)
    if shared := shared_roles(data):
        raise ManifestError(f"{path}: one column has two roles: {shared}")
    records = with_splits(read_records(path, {column: setting for setting, column in roles(data)}), data)
    problems = [*missing_cells(records, full_columns(data), data), *repeated_slides(records, data)]
    problems += [*mixed_cases(records, data), *bad_splits(records, data)]
    problems += bad_resolutions(records, data)
    targets = supervision_of(data.supervision).read(records, data)
    problems += targets.problems
    files = [path.parent / record[data.path_column] for _, record in records]
    problems += bad_files(records, files, path.parent, data)
    _refuse(path, problems, len(records))
    return Manifest(
        rows=tuple(
            ManifestRow(
                slide_id=record[data.slide_column],
                case_id=record[data.case_column],
                path=file,
                target=targets.values[number],
                split=record[data.split_column],  # type: ignore[arg-type]  # checked by bad_splits
                mpp_um=resolution(record, data),
            )
            for (number, record), file in zip(records, files, strict=True)
        ),
        classes=targets.names,
        supervision=data.supervision,
    )


def read_files(path: Path, data: DataConfig) -> list[NamedFile]:
    """The slides of a manifest; only their names, paths and resolutions are read.

    Raises:
        ManifestError: it cannot be read, or rows have problems, which are all listed (the header is row 1). A missing
            slide file is none of them: it is the failure of that slide alone.
    """
    columns = {data.slide_column: "as in the run's manifest", data.path_column: "as in the run's manifest"}
    records = read_records(path, columns)
    problems = [*missing_cells(records, columns, data), *repeated_slides(records, data)]
    problems += bad_resolutions(records, data)
    _refuse(path, problems, len(records))
    return [
        NamedFile(row[data.slide_column], path.parent / row[data.path_column], resolution(row, data))
        for _, row in records
    ]


def _refuse(path: Path, problems: Sequence[Problem], rows: int) -> None:
    """Raise an error that lists all problems, if there are any."""
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise ManifestError(f"{path} has {count}:\n{describe(problems, rows)}")
