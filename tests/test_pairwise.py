"""Pairwise grids: every two values that can meet do, in far fewer combinations than there are."""

from itertools import combinations, product
from typing import Any

import pytest

from support.pairwise import pairwise

SETTINGS: dict[str, list[Any]] = {
    "strategy": ["single", "ddp", "zero", "fsdp"],
    "ranks": [1, 2, 3],
    "policy": ["keep", "recompute", "auto"],
    "chunk": [1, 3, 12],
    "dropout": [0.0, 0.3],
}


def can_run(case: dict[str, Any]) -> bool:
    if case.get("strategy") == "single" and case.get("ranks", 1) > 1:
        return False
    return not (case.get("policy") == "auto" and case.get("chunk") == 12)


def pairs_of(cases: list[dict[str, Any]]) -> set[Any]:
    return {pair for case in cases for pair in combinations(case.items(), 2)}


@pytest.mark.parametrize("is_possible", [lambda _: True, can_run])
def test_all_pairs_that_can_meet_do(is_possible: Any) -> None:
    whole = [dict(zip(SETTINGS, values, strict=True)) for values in product(*SETTINGS.values())]
    possible = [case for case in whole if is_possible(case)]
    found = pairwise(SETTINGS, is_possible)
    assert pairs_of(found) == pairs_of(possible)
    assert all(case in possible for case in found)
    assert len(found) <= 18, "the two longest settings alone make 12"
    assert found == pairwise(SETTINGS, is_possible)


def test_every_value_of_one_setting_is_used() -> None:
    assert [case["b"] for case in pairwise({"a": [1], "b": [2, 3]})] == [2, 3]


def test_what_can_never_be_chosen_is_left_out() -> None:
    found = pairwise({"a": [1, 2], "b": [1, 2], "c": [1, 2]}, lambda case: case.get("a") != 2)
    assert {case["a"] for case in found} == {1}
    assert pairs_of(found) >= {(("b", i), ("c", j)) for i in (1, 2) for j in (1, 2)}
