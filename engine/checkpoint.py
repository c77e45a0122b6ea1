"""Checkpoints: everything a run needs to go on, written whole or not at all."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from slidescale.engine.errors import UserError
from slidescale.engine.parallel.strategy import Strategy
from slidescale.engine.parallel.tile_parallel import TileGroup


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, beside the state of model and optimizer.

    Random numbers need no state: each is a function of the seed and of what it is drawn for.

    Attributes:
        epoch: epochs completed.
        step: optimizer steps taken.
        best_score: of the best epoch so far (see `Trainer`); empty before the first.
        excluded: slides set aside, with the reason.
    """

    epoch: int = 0
    step: int = 0
    best_score: tuple[float, ...] = ()
    excluded: dict[str, str]


class Checkpoints:
    """The folder of a run's checkpoints: one an epoch, of which `best` and `last` (links) are kept.

    Args:
        strategy_name: under which the states are written; they cannot be read under another.
    """

    def __init__(self, folder: Path, group: TileGroup, strategy_name: str) -> None:
        self.folder = folder
        self._group = group
        self._written_by = {"strategy": strategy_name, "ranks": group.size}

    def save(self, strategy: Strategy, progress: Progress) -> None:
        """Write a checkpoint and call it `last`; every rank calls it. Earlier ones stay until it is complete."""
        target = self.folder / f"epoch-{progress.epoch:04d}"
        unfinished = target.with_suffix(".unfinished")
        if self._group.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self._group.barrier()
        strategy.save(unfinished)
        self._group.barrier()
        if self._group.rank == 0:
            self._write_progress(unfinished, progress)
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
            self._point("last", target)
            if not (self.folder / "best").exists():  # the first one, until it is validated
                self._point("best", target)
            self._prune()
        self._group.barrier()

    def mark_best(self, progress: Progress) -> None:
        """Call `last` also `best`, and keep the score in it; every rank calls it."""
        if self._group.rank == 0:
            target = (self.folder / "last").resolve()
            self._point("best", target)
            self._write_progress(target, progress)
            self._prune()
        self._group.barrier()

    def load(self, strategy: Strategy, name: str) -> Progress:
        """Restore "last" or "best"; every rank calls it.

        Raises:
            UserError: it was written by another strategy or number of ranks.
        """
        folder = (self.folder / name).resolve()
        content = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        if content["written_by"] != self._written_by:
            then, now = ("{strategy} on {ranks} ranks".format(**by) for by in (content["written_by"], self._written_by))
            raise UserError(f"{folder} was written by {then}, and this run is {now}: resume with the same")
        strategy.load(folder)
        progress = content["progress"]
        return Progress(**(progress | {"best_score": tuple(progress["best_score"])}))

    def _write_progress(self, folder: Path, progress: Progress) -> None:
        text = json.dumps({"progress": asdict(progress), "written_by": self._written_by}, indent=2)
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
