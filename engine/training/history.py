"""history.csv of a run: one row per epoch, with its results."""

import csv
from dataclasses import dataclass, field
from pathlib import Path

from slidescale.engine.files import write_csv

NAME = "history.csv"


@dataclass
class EpochTotals:
    """Sums over an epoch's steps.

    Attributes:
        losses: the loss of each step.
        slides, tiles: numbers that were trained on.
        seconds: time that the steps took.
        waiting: the part of it in which a step waited for tiles to be read.
        last_scalars: values logged at the last step, by name. A resume that reports the epoch again logs them again:
            TensorBoard can drop what was logged from a step on, and the epoch's own scalars stand at its last step.
    """

    losses: list[float]
    slides: int = 0
    tiles: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    last_scalars: dict[str, float] = field(default_factory=dict)


def add_epoch(folder: Path, epoch: int, values: dict[str, float | None]) -> None:
    """Write an epoch's row. It replaces rows from this epoch on, which a run has left that was cut off and resumed.

    Args:
        epoch: completed epochs, from 1.
        values: one per column; None where it is not defined.
    """
    rows: list[dict[str, float | None]] = [row for row in read_history(folder) if (row["epoch"] or 0) < epoch]
    rows.append({"epoch": epoch, **values})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = ([_cell(row.get(name)) for name in columns] for row in rows)
    write_csv(folder / NAME, columns, cells)


def read_history(folder: Path) -> list[dict[str, float | None]]:
    """The rows so far, the first epoch first; none for a run that has not completed one."""
    try:
        with (folder / NAME).open(newline="", encoding="utf-8") as file:
            return [{name: float(cell) if cell else None for name, cell in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
