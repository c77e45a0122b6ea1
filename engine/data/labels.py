"""Labels of slides that a trained run is to predict: what a manifest says of them, if anything."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from slidescale.engine.config import DataConfig
from slidescale.engine.data.records import read_records, with_splits
from slidescale.engine.supervision.cells import is_missing
from slidescale.engine.supervision.make import supervision_of


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


def read_labels(path: Path, data: DataConfig, names: Sequence[str]) -> Labels | str:
    """What a manifest says of slides that a trained run is to predict, in the columns of the run's own manifest.

    A slide without a patient is taken as a patient's only one.

    Args:
        data: of the run.
        names: of what it predicts, as `Manifest.classes`.

    Returns:
        The labels of the slides that have one of the run's; or, where there is none, what is wrong.

    Raises:
        ManifestError: it cannot be read.
    """
    kind = supervision_of(data.supervision)
    data = kind.with_names(data, names)
    records = with_splits(read_records(path, {}), data)
    columns = [column for _, column in kind.columns(data)]
    if absent := [repr(name) for name in columns if name not in records[0][1]]:
        return f"{path} has no column {', '.join(absent)}"
    enough = any if kind.may_lack else all
    labelled = [
        (number, row) for number, row in records if enough(not kind.is_unlabelled(row[name], data) for name in columns)
    ]
    # What is asked of a train split is not asked of these.
    found = kind.read([(number, row | {data.split_column: ""}) for number, row in labelled], data)
    problems = {problem.row: problem.text for problem in sorted(found.problems, reverse=True)}
    problems |= dict.fromkeys({number for number, _ in records} - dict(labelled).keys(), "has no label")
    without = ""
    if problems:
        first = min(problems)
        without = f"{len(problems)} of {len(records)} slides of {path} have no label of the run's"
        without += f" (row {first}: {problems[first]})"
    known = [(row[data.slide_column], number, row) for number, row in labelled if number not in problems]
    if not known:
        return without
    return Labels(
        {slide_id: found.values[number] for slide_id, number, _ in known},
        {slide_id: _case(row.get(data.case_column, "")) or slide_id for slide_id, _, row in known},
        sum(row.get(data.split_column) in ("train", "val") for _, _, row in known),
        without,
    )


def _case(cell: str) -> str:
    return "" if is_missing(cell) else cell
