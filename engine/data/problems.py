"""A list of what is wrong with a manifest: a line per problem, or, of many of a kind, their number and the first."""

from collections import defaultdict
from collections.abc import Iterable

from slidescale.engine.supervision.cells import Problem

# Rows of one kind that are listed each; of more, so many are shown.
MOST_OF_A_KIND, SHOWN = 10, 3


def describe(problems: Iterable[Problem], rows: int) -> str:
    """Lines that list problems by row.

    Args:
        rows: of the file in all.
    """
    of_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in sorted(problems):
        of_kind[problem.kind if problem.row else ""].append(problem)
    single: list[Problem] = []
    grouped: list[str] = []
    for kind, those in of_kind.items():
        if not kind or len(those) <= MOST_OF_A_KIND:
            single += those
            continue
        grouped.append(f"{len(those)} of {rows} rows: {kind}, such as:")
        grouped += [f"  {_line(problem)}" for problem in those[:SHOWN]]
    return "\n".join(f"  {line}" for line in [*map(_line, sorted(single)), *grouped])


def _line(problem: Problem) -> str:
    return f"row {problem.row}: {problem.text}" if problem.row else problem.text
