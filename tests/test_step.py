"""What a step tells of itself: gradient norms of both halves, and the entropy of the attention."""

import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from slidescale.engine.data.bag import draw_bag, epoch_order
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.strategies import strategy as strategy_module
from slidescale.engine.training.step import StepResult, _entropy

from support.equivalence import Case, make_model, make_optimizer, make_step, mesh_for, steps
from support.memory_slides import BAG_SIZES, all_tiles, make_cohort

# fp32 sums in another order; in doubles the norms are exact, and weights of the attention are fp32 or better.
TOLERANCE = {"float32": 2e-5, "float64": 1e-9}


@cache
def by_definition(case: Case, slides_a_step: int) -> list[dict[str, float]]:
    """Of each step of plain autograd."""
    model = make_model(case)
    stepper = make_optimizer(case, model)
    cohort, told = make_cohort(Mesh()), []
    rows = epoch_order(cohort.usable("train"), seed=0, epoch=0)
    for begin in range(0, len(rows), slides_a_step):
        step_rows = rows[begin : begin + slides_a_step]
        entropies, shares = [], []
        for row in step_rows:
            bag = draw_bag(row, cohort.tilings[row.slide_id], "all", seed=0, epoch=0)
            logits, weights = model.aggregate(model.encode(all_tiles(row.path)), bag.places, TileGroup())
            loss = nn.functional.cross_entropy(logits[None], torch.tensor([int(row.target[0])]))
            (loss / len(step_rows)).backward()
            entropies.append(-sum(w * math.log(w) for w in weights.tolist() if w > 0))
            shares.append(entropies[-1] / math.log(bag.k) if bag.k > 1 else 1.0)
        squares = {
            half: sum(float(p.grad.double().square().sum()) for p in getattr(model, half).parameters())  # type: ignore[union-attr]
            for half in ("aggregator", "encoder")
        }
        told.append(
            {half: math.sqrt(square) for half, square in squares.items()}
            | {"total": math.sqrt(sum(squares.values())), "attention_entropy": sum(shares) / len(shares)}
            | {"effective_tiles": math.exp(sum(entropies) / len(entropies))}
        )
        stepper.step()
        stepper.zero_grad()
    return told


def told(result: StepResult) -> dict[str, float]:
    both = {"attention_entropy": result.attention_entropy, "effective_tiles": result.effective_tiles}
    return result.gradient_norms | both


def worst(group: TileGroup, case: Case, bug: str = "") -> float:
    """Largest relative error of anything that any step tells, against its definition."""
    mesh = mesh_for(case) if group.size > 1 or case.strategy != "single" else Mesh()
    expected = by_definition(
        Case(strategy="single", aggregator=case.aggregator, dtype=case.dtype), mesh.slides * case.accumulate
    )
    planted: Any = {
        "": mock.patch.object(RankGroup, "max", RankGroup.max),
        "copies": mock.patch.object(strategy_module, "_copies", return_value=1),
        "own shards": mock.patch.object(strategy_module, "dist", SimpleNamespace(all_reduce=lambda x: x)),
        "own tiles": mock.patch.object(RankGroup, "sum", lambda self, x: x if x.numel() == 2 else _sum(self, x)),
    }[bug]
    model = make_model(case)
    made = make_step(case, model, mesh)
    with planted:
        found = [told(result) for result in steps(case, made)]
    assert len(found) == len(expected) >= 3
    for each in found:
        halves = math.hypot(each["aggregator"], each["encoder"])
        assert bug or halves == pytest.approx(each["total"], rel=TOLERANCE["float32"]), "squares add up"
    errors = [
        abs(ours[name] - theirs[name]) / theirs[name]
        for ours, theirs in zip(found, expected, strict=True)
        for name in theirs
    ]
    assert all(set(ours) == set(expected[0]) for ours in found)
    return max(errors)


_sum = RankGroup.sum


STRATEGIES = {
    2: ["ddp", "zero0", "zero1", "zero2", "zero3", "zero2+offload", "zero3+offload", "fsdp", "fsdp+offload"],
    3: ["zero2", "zero3", "fsdp"],
}
SIDE_BY_SIDE = ["ddp", "zero2", "zero3", "fsdp+tiles"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_strategy_tells_what_plain_autograd_does(world: Any, ranks: int) -> None:
    """A slide over all ranks, some without a tile of it; and slides side by side, which leaves ranks without one."""
    cases = [Case(strategy=name) for name in STRATEGIES[ranks]]
    if ranks == 2:
        cases += [Case(strategy=name, tile_ranks=1, policy="auto-1") for name in SIDE_BY_SIDE]
    cases = [case if "zero" in case.strategy else replace(case, dtype="float64") for case in cases]
    errors = {case: max(world(ranks).run(worst, case)) for case in cases}
    wrong = {str(case): error for case, error in errors.items() if not error <= TOLERANCE[case.dtype]}
    assert not wrong, wrong


@pytest.mark.parametrize("aggregator", ["gated_attention", "mean", "max"])
def test_one_process_tells_what_plain_autograd_does(aggregator: str) -> None:
    case = Case(strategy="single", aggregator=aggregator, dtype="float64", accumulate=2)
    assert worst(TileGroup(), case) <= TOLERANCE["float64"]


@pytest.mark.parametrize(
    ("strategy", "tile_ranks", "bug"),
    [("fsdp+tiles", 1, "copies"), ("fsdp", 0, "own shards"), ("ddp", 0, "own tiles"), ("zero3", 1, "own tiles")],
)
def test_a_planted_bug_is_caught(world: Any, strategy: str, tile_ranks: int, bug: str) -> None:
    errors = world(2).run(worst, Case(strategy=strategy, tile_ranks=tile_ranks), bug)
    assert max(errors) > 100 * TOLERANCE["float32"], errors


def test_entropy_of_attention_that_is_known() -> None:
    for k in (2, 7, 129):
        relative, nats = _entropy(torch.full((k,), 1 / k), k).tolist()
        assert (relative, math.exp(nats)) == pytest.approx((1, k), rel=1e-5)
        assert _entropy(nn.functional.one_hot(torch.tensor(1), k).float(), k).tolist() == [0, 0]
    assert _entropy(torch.ones(1), 1).tolist() == [1, 0]
    assert _entropy(torch.ones(0), 1).tolist() == [0, 0], "a rank without the tile adds nothing"
    assert 1 in BAG_SIZES, "and such a bag is among those that the steps above train on"
