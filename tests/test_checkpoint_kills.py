"""A process that is killed while it writes a checkpoint: the next one goes on from what is whole."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.training.checkpoint import Checkpoints, has_checkpoint, is_reported
from slidescale.engine.training.weights import WEIGHTS, read_metadata, read_weights

from support.checkpoints import fill, filled, progress, small_strategy

CPU = torch.device("cpu")


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
