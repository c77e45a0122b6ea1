"""Checkpoints: damage is found and named, kills leave one to go on from, and nothing that a file names is run."""

import functools
import logging
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor

from slidescale.engine.errors import TrainingError, UserError
from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.strategies.fsdp import FsdpStrategy
from slidescale.engine.strategies.strategy import SingleStrategy, Strategy
from slidescale.engine.training.checkpoint import Checkpoints, Progress, has_checkpoint, is_reported
from slidescale.engine.training.checksums import CHECKSUMS, write_checksums
from slidescale.engine.training.history import EpochTotals
from slidescale.engine.training.weights import WEIGHTS, read_metadata, read_weights

from support import equivalence
from support.equivalence import Case, mesh_for, whole
from support.worlds import World

CPU = torch.device("cpu")
STRATEGIES = ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3", "zero3+offload"]
GetWorld = Callable[..., World]


def progress(epoch: int) -> Progress:
    return Progress(
        epoch=epoch, step=5 * epoch, slides_a_step=1, excluded={"a": "é"}, unreported=EpochTotals([0.1, 0.2], 3)
    )


class Small(nn.Module):
    """Two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.aggregator = nn.Linear(50, 20), nn.Linear(20, 2)


def small_strategy() -> SingleStrategy:
    model: Any = Small()
    return SingleStrategy(model, torch.optim.SGD(model.parameters(), lr=0.1), None, device=CPU, clip=0)


def fill(strategy: Strategy, value: float) -> None:
    """Make all parameters `value`, as an epoch would make them something."""
    with torch.no_grad():
        for parameter in strategy.model.parameters():
            parameter.fill_(value)


def filled(strategy: Strategy) -> float:
    """What `fill` was given."""
    values = {float(value) for parameter in strategy.model.parameters() for value in parameter.detach().unique()}
    assert len(values) == 1
    return values.pop()


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes(), path.stat().st_size // 2)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "replaced": lambda path: path.write_bytes(b"[1, 2]"),
}


def two_checkpoints(folder: Path) -> tuple[SingleStrategy, Checkpoints]:
    strategy, checkpoints = small_strategy(), Checkpoints(folder / "checkpoints", RankGroup())
    for epoch in (1, 2):
        fill(strategy, epoch)
        checkpoints.save(strategy, progress(epoch))
    return strategy, checkpoints


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


# ---- kills

WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.chmod", "os.truncate"}


def kill_at(count: int) -> None:
    """End this process at once at its next file operation but `count`."""
    left = [count]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in WRITES:
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)

    sys.addaudithook(hook)


def two_epochs(folder: Path, first: int) -> None:
    """What the trainer does with checkpoints, in the epochs from `first` to 4; epoch 3 is the best."""
    strategy, checkpoints = small_strategy(), Checkpoints(folder / "checkpoints", RankGroup(), keep=2)
    begin = checkpoints.load(strategy, "last") if first > 1 or has_checkpoint(checkpoints.folder) else None
    epoch = begin.epoch if begin else 0
    if begin:
        assert filled(strategy) == epoch
    while True:
        if begin is None or begin.unreported is None:
            epoch += 1
            if epoch > 4:
                return
            fill(strategy, epoch)
            checkpoints.save(strategy, progress(epoch))
        begin = None
        if epoch in (1, 3) or checkpoints.last_is_best():
            checkpoints.mark_best(strategy, progress(epoch))
        checkpoints.mark_reported(progress(epoch))


def test_a_kill_at_any_file_operation_is_made_up_for(tmp_path: Path) -> None:
    """A process is killed at each of them in turn; the next one goes on, to the same end, and leaves nothing over."""
    template = tmp_path / "template"
    strategy, checkpoints = small_strategy(), Checkpoints(template / "checkpoints", RankGroup(), keep=2)
    for epoch in (1, 2):
        fill(strategy, epoch)
        checkpoints.save(strategy, progress(epoch))
        if epoch == 1:
            checkpoints.mark_best(strategy, progress(epoch))
        checkpoints.mark_reported(progress(epoch))
    count = 0
    while True:
        folder = tmp_path / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder, symlinks=True)
        child = os.fork()
        if child == 0:
            try:
                kill_at(count)
                two_epochs(folder, 3)
                os._exit(0)
            except BaseException:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9), f"operation {count}"
        two_epochs(folder, 3)
        left = {path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith(".")}
        assert left == {"epoch-0003", "epoch-0004", "best", "last"}, f"operation {count}"
        links = {name: (folder / "checkpoints" / name).resolve().name for name in ("best", "last")}
        assert links == {"best": "epoch-0003", "last": "epoch-0004"}, f"operation {count}"
        assert is_reported(folder / "checkpoints")
        assert read_metadata(folder / WEIGHTS)["epoch"] == "3"
        assert all(bool((value == 3).all()) for value in read_weights(folder / WEIGHTS, CPU).values())
        assert not list(folder.glob("*.unfinished"))
        if status == 0:
            break
        count += 1
    assert count > 40, "there are that many"


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
