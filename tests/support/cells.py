"""Cells of benchmarks without processes of their own: on one rank in this process, on more in a world that is there."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from slidescale.engine.parallel.tile_parallel import TileGroup

from support.worlds import World

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def run_in_kept_worlds(monkeypatch: pytest.MonkeyPatch, world: Callable[..., World], *modules: ModuleType) -> list[int]:
    """Replace `run_world` in modules that start ranks of themselves; return a list that gets each world's size.

    Limits are not watched. Ranks are asked for their memory and time as usual, and what a rank raises fails the test.
    """
    from cells.harness import Ended

    sizes: list[int] = []

    def run_world(words: list[str], *, ranks: int, **_: Any) -> Ended:
        sizes.append(ranks)
        planted = "SLIDESCALE_PLANT_WRONG_GRADIENT" in os.environ
        if ranks == 1:
            serve(TileGroup(), words, planted)
        else:
            world(ranks).run(serve, words, planted)
        return Ended("ok", "")

    for module in modules:
        monkeypatch.setattr(module, "run_world", run_world)
    return sizes


def serve(group: TileGroup, words: list[str], planted: bool) -> None:
    """Do what `python -m module …` does as this rank, in a world that has met already."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    from importlib import import_module

    from slidescale.engine.training import step

    dash, name, *rest = words
    assert dash == "-m"
    module = import_module(name)
    place = {"RANK": str(group.rank), "LOCAL_RANK": str(group.rank)}
    if planted:
        place["SLIDESCALE_PLANT_WRONG_GRADIENT"] = "1"
    with (
        mock.patch.dict(os.environ, place),
        mock.patch.object(sys, "argv", [name, *rest]),
        mock.patch.object(module, "stop_world"),
        mock.patch.object(module, "configure_logging"),
        mock.patch.object(step, "backpropagate", step.backpropagate),  # put back what is planted
    ):
        module.main()
