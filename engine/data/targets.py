"""What the manifest says of each slide, for a model to predict: a class, labels, a number, or a time until an event."""

import math
from collections import Counter
from dataclasses import dataclass, field

from slidescale.engine.config import DataConfig
from slidescale.engine.data.problems import Problem
from slidescale.engine.data.table import Record
from slidescale.engine.errors import near
from slidescale.engine.supervision.objective import regression_scale, survival_edges

# As spreadsheets and pandas write them; a column of integers with gaps becomes one of floats there.
BINARY = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}
# How R, pandas, databases and Excel write that there is nothing, in lower case; and the errors of Excel's formulas.
MISSING = {"", "na", "n/a", "nan", "-nan", "<na>", "none", "null", "nat", "#n/a", "#na"}
MISSING |= {"#ref!", "#value!", "#name?", "#div/0!", "#null!", "#num!"}


@dataclass
class Targets:
    """The targets of a manifest's rows, as far as they could be read.

    Attributes:
        names: of what is predicted (see `Manifest.classes`).
        values: by row number; a row with a problem has none.
    """

    names: tuple[str, ...]
    values: dict[int, tuple[float, ...]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def of_train(self, records: list[Record], config: DataConfig) -> list[tuple[float, ...]]:
        """The values of the train split."""
        train = [number for number, record in records if record[config.split_column] == "train"]
        return [self.values[number] for number in train if number in self.values]


def read_targets(records: list[Record], config: DataConfig) -> Targets:
    """Read and check the targets; empty cells of columns that must be full are told of by the manifest."""
    match config.supervision:
        case "classes":
            return _classes(records, config)
        case "multi_label":
            return _multi_label(records, config)
        case "regression":
            return _regression(records, config)
        case "survival":
            return _survival(records, config)


def is_missing(cell: str) -> bool:
    """Whether a cell stands for nothing."""
    return cell.lower() in MISSING


def is_unlabelled(cell: str, config: DataConfig) -> bool:
    """Whether a label stands for nothing; a class may be called "None" where the settings name it so."""
    named = config.supervision == "classes" and (cell in config.classes or cell in config.label_map)
    return is_missing(cell) and not named


def _classes(records: list[Record], config: DataConfig) -> Targets:
    """Index of the class."""
    cells = [(number, record[config.label_column]) for number, record in records]
    labels = [(number, config.label_map.get(cell, cell)) for number, cell in cells if not is_unlabelled(cell, config)]
    train = {number for number, record in records if record[config.split_column] == "train"}
    in_train = Counter(label for number, label in labels if number in train)
    targets = Targets(config.classes or tuple(sorted(in_train)))
    source = "data.classes" if config.classes else "the labels of the train split"
    for number, label in labels:
        if label in targets.names:
            targets.values[number] = (float(targets.names.index(label)),)
        else:
            problem = f"label {label!r} is not among {source}: {', '.join(targets.names)}"
            kind = "a label that is not a class"
            targets.problems.append(Problem(number, problem + near(label, targets.names), kind))
    absent = [name for name in targets.names if name not in in_train]
    if absent and in_train:
        targets.problems.append(Problem(0, f"no train slide has label {', '.join(map(repr, absent))}"))
    if len(targets.names) < 2 and in_train:
        problem = f"all train slides have one label, {targets.names[0]!r}; there is nothing to tell apart"
        targets.problems.append(Problem(0, problem))
    if not config.classes:  # with them, a label that was not renamed is told of above
        written = {record[config.label_column] for _, record in records}
        unused = [name for name in config.label_map if name not in written]
        targets.problems += [
            Problem(0, f"data.label_map renames {name!r}, which no row has{near(name, written)}") for name in unused
        ]
    return targets


def _multi_label(records: list[Record], config: DataConfig) -> Targets:
    """0, 1 or NaN for each label."""
    columns = config.label_columns
    targets = Targets(columns)
    for number, record in records:
        values, wrong = [], []
        for column in columns:
            cell = record[column]
            if cell in BINARY:
                values.append(BINARY[cell])
            elif is_missing(cell):
                values.append(math.nan)
            else:
                wrong.append(f"{column} {cell!r} is not 0 or 1; leave the cell empty where it is not known")
        if not wrong and all(map(math.isnan, values)):
            wrong.append(f"none of {', '.join(columns)} is known; leave the row out")
        targets.problems += [Problem(number, problem, "labels that are not 0, 1 or missing") for problem in wrong]
        if not wrong:
            targets.values[number] = tuple(values)
    train = targets.of_train(records, config)
    for index, column in enumerate(columns):
        seen = {values[index] for values in train}
        if train and not {0.0, 1.0} <= seen:
            absent = " or ".join(f"{value:.0f}" for value in (0.0, 1.0) if value not in seen)
            targets.problems.append(Problem(0, f"no train slide has {column} {absent}; there is nothing to tell apart"))
    return targets


def _regression(records: list[Record], config: DataConfig) -> Targets:
    """The number."""
    column = config.label_column
    targets = Targets((column,))
    for number, record in records:
        if (value := _number(record[column])) is not None:
            targets.values[number] = (value,)
        elif not is_missing(record[column]):
            problem = f"{column} {record[column]!r} is not a finite number"
            targets.problems.append(Problem(number, problem, f"{column} is not a finite number"))
    if train := targets.of_train(records, config):
        try:
            regression_scale(train)
        except ValueError as error:
            targets.problems.append(Problem(0, f"{column} of the train split: {error}"))
    return targets


def _survival(records: list[Record], config: DataConfig) -> Targets:
    """The time, and 1 for an observed event or 0 for a censored one."""
    targets = Targets(("risk",))
    for number, record in records:
        time_cell, event_cell = record[config.label_column], record[config.event_column]
        time, event = _number(time_cell), BINARY.get(event_cell)
        if not is_missing(time_cell) and (time is None or time <= 0):
            advice = "leave the row out, or give half a unit" if time == 0 else "leave the row out"
            problem = f"{config.label_column} {time_cell!r} is not a time above 0; {advice}"
            targets.problems.append(Problem(number, problem, f"{config.label_column} is not a time above 0"))
        if not is_missing(event_cell) and event is None:
            problem = f"{config.event_column} {event_cell!r} is not 1 (observed) or 0 (censored)"
            targets.problems.append(Problem(number, problem, f"{config.event_column} is not 1 or 0"))
        if time is not None and time > 0 and event is not None:
            targets.values[number] = (time, event)
    if train := targets.of_train(records, config):
        try:
            survival_edges(train, config.survival_bins)
        except ValueError as error:
            targets.problems.append(Problem(0, f"train split: {error}; use fewer --data.survival-bins"))
    return targets


def _number(cell: str) -> float | None:
    """A finite number."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
