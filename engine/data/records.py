"""The rows of a manifest as text: which columns it must have, and how their cells are spelt."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from slidescale.engine.config import DataConfig
from slidescale.engine.data.table import read_table
from slidescale.engine.errors import ManifestError, flag, near
from slidescale.engine.supervision.cells import Record, is_missing
from slidescale.engine.supervision.make import supervision_of

Split = Literal["train", "val", "test"]


def read_records(path: Path, columns: Mapping[str, str]) -> list[Record]:
    """The rows of a manifest.

    Args:
        columns: that there must be, each with what names it.

    Raises:
        ManifestError: it cannot be read, or lacks columns.
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


def roles(data: DataConfig) -> list[tuple[str, str]]:
    """(setting, column) of each column that a manifest must have."""
    names = ("slide_column", "case_column", "path_column", "split_column")
    own = [(flag(f"data.{name}"), getattr(data, name)) for name in names]
    return own + supervision_of(data.supervision).columns(data)


def shared_roles(data: DataConfig) -> str:
    """The columns that several settings name, in words; "" where there are none."""
    settings: dict[str, list[str]] = defaultdict(list)
    for setting, column in roles(data):
        settings[column].append(setting)
    return "; ".join(f"{column!r} of {' and '.join(those)}" for column, those in settings.items() if len(those) > 1)


def full_columns(data: DataConfig) -> dict[str, str]:
    """The columns of which no cell may be empty, with the settings that name them."""
    kind = supervision_of(data.supervision)
    optional = kind.columns(data) if kind.may_lack else []
    return {column: setting for setting, column in roles(data) if (setting, column) not in optional}


def with_splits(records: list[Record], data: DataConfig) -> list[Record]:
    """Rows whose split is spelt as here, where it differs in case only."""
    column = data.split_column
    spelt = [(number, row, row.get(column, "").lower()) for number, row in records]
    return [(number, row | {column: split} if split in get_args(Split) else row) for number, row, split in spelt]


def resolution(record: Mapping[str, str], data: DataConfig) -> float | None:
    """What a row says of its slide's resolution: µm per pixel; None where it says nothing, or has no such column."""
    cell = record.get(data.mpp_column, "")
    return None if is_missing(cell) else float(cell)
