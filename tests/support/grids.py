"""Grids of configurations, of which `make test` runs a part."""

from typing import Any

import pytest


def full(*cases: Any) -> list[Any]:
    """Return cases (a tuple for several parameters) that only `make test-full` runs."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full) for case in cases]


def rest_in_full(few: list[tuple[Any, ...]], whole: list[tuple[Any, ...]]) -> list[Any]:
    """Return the few, and of the whole grid what is not among them for `make test-full`."""
    return [*few, *full(*(case for case in whole if case not in few))]
