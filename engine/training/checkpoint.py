"""Checkpoints: everything a run needs to go on, written whole or not at all, and compared with checksums when read."""

import logging
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slidescale.engine.errors import TrainingError, UserError
from slidescale.engine.files import point, put_in_place
from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.strategies.strategy import Strategy, find_not_finite
from slidescale.engine.training.checksums import CHECKSUMS, find_damage, read_signed, write_checksums, write_signed
from slidescale.engine.training.history import EpochTotals
from slidescale.engine.training.weights import WEIGHTS, read_metadata, write_weights

log = logging.getLogger(__name__)

PROGRESS = "progress.json"
# Ending of names of what is being written or removed.
UNFINISHED = ".unfinished"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a run, kept beside the state of model and optimizer.

    Random numbers need no state: each is a function of the seed and of the purpose it is drawn for.

    Attributes:
        epoch: epochs completed.
        step: optimizer steps taken.
        slides_a_step: slides per optimizer step, S × A.
        best_score: score of the best epoch so far (see `Trainer`); empty before the first.
        excluded: slides set aside for good, with the reason.
        unreported: results of the last epoch's training, until the epoch has been validated and reported.
    """

    epoch: int = 0
    step: int = 0
    slides_a_step: int
    best_score: tuple[float, ...] = ()
    excluded: dict[str, str]
    unreported: EpochTotals | None = None


class Checkpoints:
    """The folder of a run's checkpoints: the last epochs, the best one, and the links `best` and `last`.

    Each has checksums of its files (`training/checksums.py`) beside them. progress.json is written anew
    once the epoch has been validated, and has a checksum of its own. A checkpoint takes its name when all of it is on
    disk.

    The weights of the best epoch also stand beside the folder, in `model.safetensors`, in a form that does not depend
    on the strategy (see `training/weights.py`).

    Args:
        keep: number of the last checkpoints that are kept, beside the best one.
    """

    def __init__(self, folder: Path, world: RankGroup, keep: int = 2) -> None:
        self.folder = folder
        self._weights = folder.parent / WEIGHTS
        self._unfinished_weights = self._weights.with_name(f"{WEIGHTS}{UNFINISHED}")
        self._world = world
        self._keep = keep

    def save(self, strategy: Strategy, progress: Progress) -> None:
        """Write a checkpoint and call it `last`; every rank calls it. Earlier ones stay until it is complete.

        Raises:
            TrainingError: parameters or the optimizer's state are not finite; nothing has been written.
        """
        if found := self._not_finite(strategy):
            raise TrainingError(f"{found}: no checkpoint was written; --resume goes on from an earlier one, if any")
        target = self.folder / epoch_name(progress.epoch)
        unfinished = target.with_suffix(UNFINISHED)
        if self._world.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self._world.barrier()
        strategy.save(unfinished)
        self._world.barrier()
        write_checksums(unfinished, self._world)
        if self._world.rank == 0:
            self._write_progress(unfinished, progress, strategy.checkpoint_format)
            if target.exists():  # a damaged one, after which a resume went on from the one before
                shutil.rmtree(target)
            put_in_place(unfinished, target)
            point(self.folder / "last", target)
            if not (self.folder / "best").exists():  # the first one, until it is validated
                point(self.folder / "best", target)
            self._prune()
        self._world.barrier()

    def mark_best(self, strategy: Strategy, progress: Progress) -> None:
        """Call `last` also `best`, keep the score in it, and write the model's weights; every rank calls it.

        The weights are complete under another name before `best` moves, and take their own name after it. `load`
        finishes what a run that was killed in between has left.
        """
        metadata = {"epoch": str(progress.epoch), "step": str(progress.step)}
        write_weights(strategy, self._unfinished_weights, metadata, main=self._world.rank == 0)
        if self._world.rank == 0:
            target = (self.folder / "last").resolve()
            point(self.folder / "best", target)
            put_in_place(self._unfinished_weights, self._weights)
            self._write_progress(target, progress, strategy.checkpoint_format)
            self._prune()
        self._world.barrier()

    def mark_reported(self, progress: Progress) -> Progress:
        """Note in `last` that its epoch has been reported: a resume goes on with the next. Every rank calls it."""
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

        Where the last one is damaged, the one before is restored, with a warning that names the damage.

        Raises:
            UserError: no checkpoint is whole; or it was written in another format, or holds what is never loaded.
        """
        if self._world.rank == 0:
            self._finish_weights()
        choices = self._world.ask_main(lambda: self._newest_first() if name == "last" else [self._linked(name)])
        problems: list[str] = []
        for folder in choices:
            progress, problem = self._try(strategy, folder)
            if progress is not None:
                if name == "last" and self._world.rank == 0:
                    point(self.folder / "last", folder)
                    if not (self.folder / "best").exists():
                        point(self.folder / "best", folder)
                    self._prune()
                self._world.barrier()
                return progress
            problems.append(f"{folder} cannot be used: {problem}")
            if folder != choices[-1]:
                log.warning("%s; trying the checkpoint before it", problems[-1])
        raise UserError("\n".join([f"{self.folder} has no checkpoint to go on from", *problems]))

    def _try(self, strategy: Strategy, folder: Path) -> tuple[Progress | None, str]:
        """Restore a checkpoint, or say what is damaged in it.

        Raises:
            UserError: it is whole, and still cannot be loaded.
        """
        try:
            content = self._world.ask_main(lambda: _read_progress(folder))
        except UserError as error:
            return None, str(error)
        if not content["signed"]:
            log.warning("%s has no checksums, as an older version wrote it: nothing shows whether it is whole", folder)
        elif damage := find_damage(folder, self._world):
            return None, damage
        if content["format"] != strategy.checkpoint_format:
            raise UserError(
                f"{folder} was written by {content['format']}, and this run is {strategy.checkpoint_format}: "
                "resume with the same"
            )
        strategy.load(folder)
        if found := self._not_finite(strategy):
            return None, found
        return content["progress"], ""

    def _not_finite(self, strategy: Strategy) -> str:
        """The parameters that are not finite on any rank, in words; empty where all are. Every rank calls it."""
        parts = self._world.gather_objects(find_not_finite(strategy.held()))
        names = list(dict.fromkeys(name for part in parts for name in part))
        if not names:
            return ""
        listed = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        return f"{listed} {'has' if len(names) == 1 else 'have'} values that are not finite"

    def _linked(self, name: str) -> Path:
        return (self.folder / name).resolve()

    def _newest_first(self) -> list[Path]:
        """All checkpoints, also one that was complete when a kill kept `last` from naming it."""
        return sorted(_checkpoints(self.folder), key=lambda path: int(path.name.removeprefix("epoch-")), reverse=True)

    def _finish_weights(self) -> None:
        """Finish what a run that was killed while it marked an epoch best has left: name its weights, or drop them."""
        if not self._unfinished_weights.exists():
            return
        # `best` moves only once they are complete, so they are complete if it names their epoch.
        best = (self.folder / "best").resolve().name
        try:
            complete = best == epoch_name(int(read_metadata(self._unfinished_weights)["epoch"]))
        except (ValueError, KeyError):
            complete = False
        if complete:
            put_in_place(self._unfinished_weights, self._weights)
        else:
            self._unfinished_weights.unlink()

    def _write_progress(self, folder: Path, progress: Progress, written_format: str) -> None:
        write_signed(folder / PROGRESS, {"progress": asdict(progress), "format": written_format})

    def _prune(self) -> None:
        """Remove all but the last checkpoints and those that links name, also what a killed run has half removed."""
        kept = {self._linked(link).name for link in ("last", "best")}
        kept |= {path.name for path in self._newest_first()[: self._keep]}
        for folder in _checkpoints(self.folder):
            if folder.name not in kept:
                # Under another name first, so that an incomplete one is never taken for whole.
                removed = folder.with_suffix(UNFINISHED)
                shutil.rmtree(removed, ignore_errors=True)
                folder.rename(removed)
        for path in self.folder.glob(f"epoch-*{UNFINISHED}"):
            shutil.rmtree(path)


def epoch_name(epoch: int) -> str:
    """The folder of the checkpoint of so many completed epochs."""
    return f"epoch-{epoch:04d}"


def has_checkpoint(folder: Path) -> bool:
    """Whether a run's folder of checkpoints has any."""
    return (folder / "last").exists() or bool(_checkpoints(folder))


def is_reported(folder: Path) -> bool:
    """Whether the last checkpoint in `folder` can be read, and its epoch has been validated and reported."""
    try:
        content, _ = read_signed(folder / "last" / PROGRESS)
        return not content["progress"].get("unreported")
    except (UserError, KeyError, AttributeError):
        return False


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("epoch-*") if re.fullmatch(r"epoch-\d{4,}", path.name)]


def _read_progress(folder: Path) -> dict[str, Any]:
    """The content of progress.json: "progress", "format", and whether it has a checksum, "signed".

    Raises:
        UserError: it is missing, damaged, or another version's; the message names it by its name alone.
    """
    content, signed = read_signed(folder / PROGRESS)
    if not signed and (folder / CHECKSUMS).exists():  # an older version's has no checksums at all
        raise UserError(f"{PROGRESS} has other content than was written")
    try:
        values = content["progress"]
        if unreported := values.get("unreported"):
            values["unreported"] = EpochTotals(**unreported)
        progress = Progress(**(values | {"best_score": tuple(values["best_score"])}))
        return {"progress": progress, "format": str(content["format"]), "signed": signed}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{PROGRESS} is damaged, or another version's: {error}") from None
