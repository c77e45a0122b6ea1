"""What stands in a manifest's cells: rows and their problems, numbers, yes or no, and the spellings of nothing."""

import math
from typing import NamedTuple

# (row number, cells by column); a row's number is that of its first line in the file, which begins with line 1.
Record = tuple[int, dict[str, str]]

# As spreadsheets and pandas write them; a column of integers with gaps becomes one of floats there.
BINARY = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}
# How R, pandas, databases and Excel write that there is nothing, in lower case; and the errors of Excel's formulas.
MISSING = {"", "na", "n/a", "nan", "-nan", "<na>", "none", "null", "nat", "#n/a", "#na"}
MISSING |= {"#ref!", "#value!", "#name?", "#div/0!", "#null!", "#num!"}


class Problem(NamedTuple):
    """One thing that is wrong with a manifest.

    Attributes:
        row: of the file (see `Record`); 0 is the file as a whole.
        text: what is wrong there.
        kind: what such problems have in common, as in "<3 of 9 rows>: <kind>".
    """

    row: int
    text: str
    kind: str = ""


def is_missing(cell: str) -> bool:
    """Whether a cell stands for nothing."""
    return cell.lower() in MISSING


def finite_number(cell: str) -> float | None:
    """The number in a cell; None where there is none, or it is infinite or NaN."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
