"""Checkpoints: damage is found and named, kills leave one to go on from, and nothing that a file names is run."""

import functools
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from slidescale.engine.errors import TrainingError, UserError
from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.strategies.fsdp import FsdpStrategy
from slidescale.engine.strategies.strategy import Strategy
from slidescale.engine.training.checkpoint import Checkpoints
from slidescale.engine.training.checksums import CHECKSUMS, write_checksums
from slidescale.engine.training.weights import WEIGHTS, read_weights

from support import equivalence
from support.checkpoints import fill, filled, flip, progress, small_strategy, two_checkpoints
from support.equivalence import Case, mesh_for, whole
from support.grids import full
from support.worlds import World

CPU = torch.device("cpu")
STRATEGIES = ["ddp", "fsdp", "zero2", "zero3", *full("zero0", "zero1", "zero3+offload")]
GetWorld = Callable[..., World]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes(), path.stat().st_size // 2)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "replaced": lambda path: path.write_bytes(b"[1, 2]"),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["state.pt", "progress.json", CHECKSUMS])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    strategy, checkpoints = two_checkpoints(tmp_path)
    DAMAGES[how](checkpoints.folder / "epoch-0002" / name)
    with caplog.at_level(logging.WARNING):
        found = checkpoints.load(strategy, "last")
    assert (found, filled(strategy)) == (progress(1), 1)
    (warning,) = caplog.messages
    assert "epoch-0002 cannot be used" in warning and name in warning and "\n" not in warning
    assert (checkpoints.folder / "last").resolve().name == "epoch-0001"
    fill(strategy, 2)
    checkpoints.save(strategy, progress(2))
    assert Checkpoints(checkpoints.folder, RankGroup()).load(strategy, "last") == progress(2)


def test_every_byte_of_a_checkpoint_counts(tmp_path: Path) -> None:
    strategy, checkpoints = two_checkpoints(tmp_path)
    path = checkpoints.folder / "epoch-0002" / "state.pt"
    content = path.read_bytes()
    for at in range(0, len(content), len(content) // 50):
        path.write_bytes(flip(content, at))
        assert checkpoints.load(strategy, "last").epoch == 1, f"byte {at}"
    path.write_bytes(content)
    assert checkpoints.load(strategy, "last").epoch == 2


def test_no_checkpoint_is_whole(tmp_path: Path) -> None:
    strategy, checkpoints = two_checkpoints(tmp_path)
    for epoch in ("epoch-0001", "epoch-0002"):
        DAMAGES["cut"](checkpoints.folder / epoch / "state.pt")
    with pytest.raises(UserError, match=r"no checkpoint to go on from\n.*epoch-0002.*state.pt has .* bytes.*\n.*0001"):
        checkpoints.load(strategy, "last")
    with pytest.raises(UserError, match=r"epoch-0001 cannot be used: state.pt has [\d,]+ bytes, and [\d,]+ were"):
        checkpoints.load(strategy, "best")


def test_a_checkpoint_of_an_older_version_is_loaded_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strategy, checkpoints = two_checkpoints(tmp_path)
    folder = checkpoints.folder / "epoch-0002"
    (folder / CHECKSUMS).unlink()
    text = (folder / "progress.json").read_text()
    (folder / "progress.json").write_text(text[: text.rindex(",")] + "}")
    assert checkpoints.load(strategy, "last").epoch == 2
    assert "has no checksums, as an older version wrote it" in caplog.text


def test_the_last_checkpoints_are_kept_and_the_best(tmp_path: Path) -> None:
    strategy, checkpoints = small_strategy(), Checkpoints(tmp_path / "checkpoints", RankGroup(), keep=2)
    for epoch in range(1, 5):
        checkpoints.save(strategy, progress(epoch))
        if epoch == 1:
            checkpoints.mark_best(strategy, progress(epoch))
    epochs = {path.name for path in checkpoints.folder.glob("epoch-*")}
    assert epochs == {"epoch-0001", "epoch-0003", "epoch-0004"}
    assert (checkpoints.folder / "best").resolve().name == "epoch-0001"
    (checkpoints.folder / "epoch-0002.unfinished").mkdir()
    Checkpoints(checkpoints.folder, RankGroup(), keep=1).load(strategy, "last")
    assert {path.name for path in checkpoints.folder.glob("epoch-*")} == {"epoch-0001", "epoch-0004"}


def test_values_that_are_not_finite_are_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    strategy, checkpoints = two_checkpoints(tmp_path)
    name, parameter = next(iter(strategy.model.named_parameters()))
    parameter.data.view(-1)[-1] = torch.nan
    with pytest.raises(TrainingError, match=f"{name} has values that are not finite: no checkpoint was written"):
        checkpoints.save(strategy, progress(3))
    assert not (checkpoints.folder / "epoch-0003").exists()
    # One that an older version has written all the same.
    state = checkpoints.folder / "epoch-0002" / "state.pt"
    content = torch.load(state, weights_only=True)
    content["model"][name].fill_(torch.inf)
    torch.save(content, state)
    write_checksums(state.parent, RankGroup())
    assert checkpoints.load(strategy, "last").epoch == 1
    assert f"{name} has values that are not finite" in caplog.text


# ---- strategies


class Harmful:
    """Whoever unpickles it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def made(case: Case, folder: Path) -> tuple[Strategy, Checkpoints]:
    """A strategy after a step or more, and two checkpoints of it, of different weights."""
    mesh = mesh_for(case)
    step = equivalence.make_step(case, equivalence.make_model(case), mesh)
    strategy = step.strategy
    checkpoints = Checkpoints(folder / "checkpoints", mesh.world)
    for epoch in (1, 2):
        equivalence.train(case, step)
        checkpoints.save(strategy, progress(epoch))
    return strategy, checkpoints


def values_of(strategy: Strategy) -> torch.Tensor:
    return torch.cat([whole(parameter).reshape(-1).clone() for parameter in strategy.model.parameters()])


@contextmanager
def on_main(path: Path, change: Callable[[Path], object]) -> Iterator[None]:
    """Change a file, while all ranks wait, and bring it back."""
    before = path.read_bytes()
    dist.barrier()
    if dist.get_rank() == 0:
        change(path)
    dist.barrier()
    yield
    dist.barrier()
    if dist.get_rank() == 0:
        path.write_bytes(before)
    dist.barrier()


def damage_each_file(strategy: Strategy, checkpoints: Checkpoints) -> int:
    """All ranks go back to the checkpoint before, whichever of the files is damaged; the number of files."""
    assert checkpoints.load(strategy, "last").epoch == 2
    second = values_of(strategy)
    files = sorted(path for path in (checkpoints.folder / "epoch-0002").rglob("*") if path.is_file())
    for path in files:
        with on_main(path, DAMAGES["flipped"]):
            assert checkpoints.load(strategy, "last").epoch == 1, path
            assert not torch.equal(values_of(strategy), second)
    assert checkpoints.load(strategy, "last").epoch == 2
    assert torch.equal(values_of(strategy), second)
    return len(files)


def make_harmful(path: Path, marker: Path) -> None:
    if path.name == ".metadata":
        path.write_bytes(pickle.dumps(Harmful(marker)))
    else:
        torch.save({"module": Harmful(marker)}, path)


def plant_harmful(strategy: Strategy, checkpoints: Checkpoints) -> list[str]:
    """What loading says of each pickled file that is replaced, under checksums that fit."""
    last, marker = checkpoints.folder / "epoch-0002", checkpoints.folder / "marker"
    told: list[str] = []

    def load() -> None:
        write_checksums(last, checkpoints._world)
        with pytest.raises(UserError) as refused:
            checkpoints.load(strategy, "last")
        told.append(str(refused.value))
        assert not marker.exists(), told[-1]

    for path in sorted(path for path in last.rglob("*") if path.suffix == ".pt" or path.name == ".metadata"):
        with on_main(path, functools.partial(make_harmful, marker=marker)):
            load()
    if isinstance(strategy, FsdpStrategy):  # a value beside the tensors, which is a pickle too
        state = strategy._state()
        state["optimizer"]["param_groups"][0]["lr"] = Harmful(marker)
        if dist.get_rank() == 0:
            shutil.rmtree(last / "state")
        dist.barrier()
        dcp.save(state, checkpoint_id=last / "state")
        load()
    return told


def test_nothing_that_a_checkpoint_of_one_process_names_is_run(tmp_path: Path) -> None:
    strategy, checkpoints = two_checkpoints(tmp_path)
    state, marker = checkpoints.folder / "epoch-0002" / "state.pt", tmp_path / "marker"
    make_harmful(state, marker)
    write_checksums(state.parent, RankGroup())
    with pytest.raises(UserError, match=r"state.pt names posix.mkdir, which could run anything: it was not loaded"):
        checkpoints.load(strategy, "last")
    assert not marker.exists()
    torch.load(state, weights_only=False)
    assert marker.exists(), "it is harmful"


def spoil(strategy: Strategy, checkpoints: Checkpoints) -> str:
    """What saving says once a value of one rank is not finite; loading restores the checkpoint before."""
    name, parameter = next((n, p) for n, p in strategy.model.named_parameters() if "conv" in n)
    if dist.get_rank() == 1:
        value: Any = getattr(parameter, "ds_tensor", parameter).detach()
        value = value.to_local() if isinstance(value, DTensor) else value
        value.view(-1)[0] = torch.nan
    with pytest.raises(TrainingError) as refused:
        checkpoints.save(strategy, progress(3))
    assert name in str(refused.value)
    assert not list(checkpoints.folder.glob("epoch-0003*"))
    assert checkpoints.load(strategy, "last").epoch == 2
    return str(refused.value)


def examine(_: TileGroup, case: Case, folder: Path) -> tuple[int, str, list[str]]:
    strategy, checkpoints = made(case, folder)
    return (
        damage_each_file(strategy, checkpoints),
        spoil(strategy, checkpoints),
        plant_harmful(strategy, checkpoints),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_agree_on_what_is_no_good(world: GetWorld, tmp_path: Path, strategy: str) -> None:
    """Damaged files, values that are not finite, and a pickle that would make a folder in place of each file."""
    first, second = world(2).run(examine, Case(strategy=strategy, optimizer="adamw"), tmp_path)
    assert first == second
    files, not_finite, harmful = first
    assert files >= 3
    assert "values that are not finite: no checkpoint was written" in not_finite
    assert len(harmful) == {"ddp": 1, "zero0": 1, "fsdp": 2, "zero3": 4, "zero3+offload": 4}.get(strategy, 3)
    assert all("names posix.mkdir, which could run anything" in text and "\n" not in text for text in harmful)


# ---- the weights of the best epoch


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    strategy, checkpoints = two_checkpoints(tmp_path)
    checkpoints.mark_best(strategy, replace(progress(2), unreported=None))
    path = tmp_path / WEIGHTS
    content = path.read_bytes()
    assert set(read_weights(path, CPU)) == set(strategy.model.state_dict())
    for at in [*range(0, 400, 7), *range(400, len(content), len(content) // 50), len(content) - 1]:
        path.write_bytes(flip(content, at))
        with pytest.raises(UserError, match=r"model.safetensors is damaged") as refused:
            read_weights(path, CPU)
        assert "\n" not in str(refused.value)
    for end in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match=r"model.safetensors is damaged"):
            read_weights(path, CPU)
