"""Where a step's time goes; the clock of these tests is moved by what the step does, not by time."""

import time
from typing import Any
from unittest import mock

import pytest
import torch

from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.strategies.strategy import SingleStrategy
from slidescale.engine.training.feed import Feed
from slidescale.engine.training.stopwatch import PHASES, Stopwatch

from support.equivalence import Case, FixedPlan, make_config, make_model, make_step
from support.memory_slides import BAG_SIZES, MemoryReader, Reading, make_cohort

NONE = dict.fromkeys(PHASES, 0.0)


def test_laps_of_a_phase_add_up_and_the_step_before_is_forgotten() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with mock.patch.object(time, "perf_counter", side_effect=[0.0, 1.0, 3.0, 6.0, 10.0, 11.0]):
        watch.start()
        for phase in ("pass 1", "pass 2", "pass 1", "optimizer"):
            watch.lap(phase)
        assert watch.seconds() == NONE | {"pass 1": 4.0, "pass 2": 2.0, "optimizer": 4.0}
        watch.start()
    assert watch.seconds() == NONE


@pytest.mark.parametrize(
    ("what", "phases"),
    [
        ((Reading, "wait"), {"reading": 1}),
        ((SlideModel, "encode"), {"pass 1": 6, "pass 2": 4}),
        ((SlideModel, "aggregate"), {"aggregate": 1}),
        ((SingleStrategy, "step"), {"optimizer": 1}),
    ],
)
def test_each_phase_is_charged_for_what_happens_in_it(
    what: tuple[type, str], phases: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second for each call of one function: of a bag of 11 tiles in 6 chunks, of which 2 keep their graph."""
    case, now = Case(strategy="single"), [0.0]
    owner, name = what
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        now[0] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    mesh = Mesh()
    reader: Any = MemoryReader("", mesh.tiles)
    feed = Feed(make_config(case), make_cohort(mesh), reader, mesh)
    step = make_step(case, make_model(case), mesh)
    step.follow(FixedPlan(2, 2))
    spent = {batch.k: step.take(batch).seconds for batch in feed.epoch(0)}
    assert set(spent) == set(BAG_SIZES)
    assert spent[11] == NONE | phases
