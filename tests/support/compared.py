"""Configurations whose parameters must be those of plain autograd."""

from collections.abc import Callable

from support.equivalence import Case, compare_all
from support.worlds import World

GetWorld = Callable[..., World]


# fp32 sums in another order: about 1e-6 after five steps (measured). In doubles, rounding leaves no room for a small
# fault; DeepSpeed takes none (its stage 0 refuses them, 1 and 2 keep fp32 masters).
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}
# AdamW divides a gradient by its own size, so that the rounding of a small one becomes a step: in fp32 up to 2.2e-5
# (test_convnext; measured, and equal under DDP and ZeRO), a hundredth of what a planted bug makes.
ADAMW_FLOAT32 = 5e-5


def tolerance(case: Case) -> float:
    """Largest relative error of a parameter that rounding explains."""
    return ADAMW_FLOAT32 if (case.optimizer, case.dtype) == ("adamw", "float32") else TOLERANCE[case.dtype]


def check(world: World, cases: list[Case]) -> None:
    """Every case is within its tolerance on every rank."""
    errors = [max(ranks) for ranks in zip(*world.run(compare_all, cases), strict=True)]
    wrong = {str(case): error for case, error in zip(cases, errors, strict=True) if not error <= tolerance(case)}
    assert not wrong, wrong
