"""Configurations whose parameters must be those of plain autograd."""

from collections.abc import Callable

from support.equivalence import (
    Case,
    compare_all,
)
from support.worlds import World

GetWorld = Callable[..., World]


# fp32 sums in another order: about 1e-6 after five steps (measured). In doubles, rounding leaves no room for a small
# fault; DeepSpeed takes none (its stage 0 refuses them, 1 and 2 keep fp32 masters).
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}


def check(world: World, cases: list[Case]) -> None:
    """Every case is within its tolerance on every rank."""
    errors = [max(ranks) for ranks in zip(*world.run(compare_all, cases), strict=True)]
    wrong = {str(case): error for case, error in zip(cases, errors, strict=True) if not error <= TOLERANCE[case.dtype]}
    assert not wrong, wrong
