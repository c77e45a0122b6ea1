"""Checkpoints: everything a run needs to go on, written whole or not at all."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slidescale.engine.errors import UserError
from slidescale.engine.history import EpochTotals
from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.parallel.strategy import Strategy
from slidescale.engine.weights import WEIGHTS, read_metadata, write_weights


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, beside the state of model and optimizer.

    Random numbers need no state: each is a function of the seed and of what it is drawn for.

    Attributes:
        epoch: epochs completed.
        step: optimizer steps taken.
        slides_a_step: slides of an optimizer step, S × A.
        best_score: of the best epoch so far (see `Trainer`); empty before the first.
        excluded: slides set aside for good, with the reason.
        unreported: what the last epoch's training came to, until it has been validated and told of.
    """

    epoch: int = 0
    step: int = 0
    slides_a_step: int
    best_score: tuple[float, ...] = ()
    excluded: dict[str, str]
    unreported: EpochTotals | None = None


class Checkpoints:
    """The folder of a run's checkpoints: one an epoch, of which `best` and `last` (links) are kept.

    The weights of the best epoch also stand beside the folder, in `model.safetensors`, in a form that does not depend
    on the strategy (see `weights.py`).
    """

    def __init__(self, folder: Path, world: RankGroup) -> None:
        self.folder = folder
        self._weights = folder.parent / WEIGHTS
        self._unfinished_weights = self._weights.with_name(f"{WEIGHTS}.unfinished")
        self._world = world

    def save(self, strategy: Strategy, progress: Progress) -> None:
        """Write a checkpoint and call it `last`; every rank calls it. Earlier ones stay until it is complete."""
        target = self.folder / epoch_name(progress.epoch)
        unfinished = target.with_suffix(".unfinished")
        if self._world.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self._world.barrier()
        strategy.save(unfinished)
        self._world.barrier()
        if self._world.rank == 0:
            self._write_progress(unfinished, progress, strategy.checkpoint_format)
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
            self._point("last", target)
            if not (self.folder / "best").exists():  # the first one, until it is validated
                self._point("best", target)
            self._prune()
        self._world.barrier()

    def mark_best(self, strategy: Strategy, progress: Progress) -> None:
        """Call `last` also `best`, keep the score in it, and write the model's weights; every rank calls it.

        The weights are complete under another name before `best` moves, and take theirs after it: `load` finishes
        what a run that was killed in between has left.
        """
        metadata = {"epoch": str(progress.epoch), "step": str(progress.step)}
        write_weights(strategy, self._unfinished_weights, metadata, main=self._world.rank == 0)
        if self._world.rank == 0:
            target = (self.folder / "last").resolve()
            self._point("best", target)
            self._unfinished_weights.replace(self._weights)
            self._write_progress(target, progress, _read_progress(target)["format"])
            self._prune()
        self._world.barrier()

    def mark_reported(self, progress: Progress) -> Progress:
        """Note in `last` that its epoch has been told of: a resume goes on with the next. Every rank calls it."""
        progress = replace(progress, unreported=None)
        if self._world.rank == 0:
            target = (self.folder / "last").resolve()
            self._write_progress(target, progress, _read_progress(target)["format"])
        self._world.barrier()
        return progress

    def last_is_best(self) -> bool:
        """Whether `best` names the same epoch as `last`; every rank calls it."""
        last, best = self.folder / "last", self.folder / "best"
        return self._world.ask_main(lambda: last.resolve() == best.resolve())

    def load(self, strategy: Strategy, name: str) -> Progress:
        """Restore "last" or "best"; every rank calls it.

        Raises:
            UserError: it was written in another format.
        """
        if self._world.rank == 0:
            self._finish_weights()
        folder = (self.folder / name).resolve()
        content = _read_progress(folder)
        if content["format"] != strategy.checkpoint_format:
            raise UserError(
                f"{folder} was written by {content['format']}, and this run is {strategy.checkpoint_format}: "
                "resume with the same"
            )
        strategy.load(folder)
        progress = content["progress"]
        if unreported := progress.get("unreported"):
            progress["unreported"] = EpochTotals(**unreported)
        return Progress(**(progress | {"best_score": tuple(progress["best_score"])}))

    def _finish_weights(self) -> None:
        """Where a run was killed as it marked an epoch best: name its weights, or drop what is not complete."""
        if not self._unfinished_weights.exists():
            return
        # `best` moves only once they are complete, so that it names their epoch tells that they are.
        best = (self.folder / "best").resolve().name
        try:
            complete = best == epoch_name(int(read_metadata(self._unfinished_weights)["epoch"]))
        except ValueError:
            complete = False
        if complete:
            self._unfinished_weights.replace(self._weights)
        else:
            self._unfinished_weights.unlink()

    def _write_progress(self, folder: Path, progress: Progress, written_format: str) -> None:
        text = json.dumps({"progress": asdict(progress), "format": written_format}, indent=2)
        unfinished = folder / "progress.json.unfinished"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / "progress.json")

    def _point(self, link: str, target: Path) -> None:
        """Make `link` name `target`, at no moment naming nothing."""
        unfinished = self.folder / f".{link}"
        unfinished.unlink(missing_ok=True)
        unfinished.symlink_to(target.name)
        os.replace(unfinished, self.folder / link)

    def _prune(self) -> None:
        kept = {(self.folder / link).resolve() for link in ("last", "best")}
        for folder in self.folder.glob("epoch-*"):
            if folder.resolve() not in kept:
                shutil.rmtree(folder)


def epoch_name(epoch: int) -> str:
    """The folder of the checkpoint of so many completed epochs."""
    return f"epoch-{epoch:04d}"


def is_reported(folder: Path) -> bool:
    """Whether the epoch of the last checkpoint in `folder` has been validated and told of."""
    return not _read_progress((folder / "last").resolve())["progress"].get("unreported")


def _read_progress(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "progress.json").read_text(encoding="utf-8"))
