"""The folder of a run: where it is, and what it records of how it was made."""

import json
from collections.abc import Iterator
from dataclasses import fields
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from slidescale.engine.config import Config, MemoryConfig, ParallelConfig, RunConfig, flatten
from slidescale.engine.errors import UserError, flag, near
from slidescale.engine.files import write_json
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.training.checkpoint import has_checkpoint
from slidescale.engine.training.provenance import provenance

# Settings that may change when a run is resumed: they have no part in what is learnt, or only in for how long.
MAY_CHANGE = {"resume", "local_rank", "deepspeed_config", "data.manifest", "data.readers", "data.prefetch"}
MAY_CHANGE |= {"data.max_excluded", "run.name", "run.out", "run.epochs", "run.heatmaps", "optim.accumulate"}
MAY_CHANGE |= {"run.keep_checkpoints"}
MAY_CHANGE |= {"run.kernels"}  # whose kinds are equal
# Of optim.accumulate and parallel.tile_ranks, the checkpoint knows what matters: the slides of a step.
MAY_CHANGE |= {f"memory.{field.name}" for field in fields(MemoryConfig)}
MAY_CHANGE |= {f"parallel.{field.name}" for field in fields(ParallelConfig)}


def open_run_folder(out: Path, name: str) -> Path:
    """Make `out/name`, or `out/name-2`, `-3`, … when earlier runs have it."""
    for folder in _numbered(out, name):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("the numbers do not end")


def find_run_folder(out: Path, name: str) -> Path:
    """The latest of the runs called `name` that has a checkpoint.

    Raises:
        UserError: no such run has one.
    """
    runs = list(takewhile(Path.exists, _numbered(out, name)))
    for folder in reversed(runs):
        if has_checkpoint(folder / "checkpoints"):
            return folder
    raise UserError(f"--resume: there is no run {out / name} with a checkpoint")


def check_same_settings(folder: Path, config: Config) -> None:
    """Refuse to go on with a run under settings that would make it another run.

    Raises:
        UserError: lists what differs, with both values.
    """
    # A run begun before a setting was there had what is now its default.
    recorded = Config(run=RunConfig(name="any")).flat()
    recorded |= flatten(read_record(folder)["config"])
    different = [
        f"{flag(name)} was {recorded[name]!r} and is {value!r}"
        for name, value in config.flat().items()
        if name not in MAY_CHANGE and recorded[name] != value
    ]
    if different:
        raise UserError(f"--resume: {folder} was begun with other settings; repeat them:\n  " + "\n  ".join(different))


def check_same_subject(folder: Path, classes: tuple[str, ...], fingerprint: str | None) -> None:
    """Refuse to resume a run with another manifest's classes, or another frozen encoder.

    Args:
        classes: the manifest's.
        fingerprint: a frozen encoder's, whose weights are not in a checkpoint; None where the encoder trains.

    Raises:
        UserError: says which of them differs.
    """
    record = read_record(folder)
    if (before := record["classes"]) != classes:
        raise UserError(
            f"--resume: {folder} was begun to predict {', '.join(before)}, and the manifest has {', '.join(classes)}"
        )
    if fingerprint != record.get("frozen_encoder"):
        raise UserError(
            f"--resume: {folder} was begun with other weights of the frozen encoder than --model.weights or "
            "--model.pretrained gives now: bring those back"
        )


def read_record(folder: Path, *needed: str) -> dict[str, Any]:
    """Read what `record_run` wrote.

    Args:
        needed: names that must be in it, beside those that every version has written.

    Raises:
        UserError: there is no such run, or its config.json is missing, damaged or without what is needed.
    """
    if not folder.is_dir():
        runs = [path.parent.name for path in folder.parent.glob("*/config.json")]
        raise UserError(f"there is no run {folder}" + near(folder.name, runs))
    path = folder / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["config"], dict):
            raise TypeError("its settings are not a table")
        record["classes"] = tuple(record["classes"])
        return record | {name: record[name] for name in needed}
    except FileNotFoundError:
        runs = sorted(str(found.parent) for found in folder.glob("*/config.json"))
        hint = f"; it holds the runs {', '.join(runs[:5])}" if runs else ""
        raise UserError(f"{folder} is not the folder of a run: it has no config.json{hint}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path}: {type(error).__name__}: {error}") from None


def _numbered(out: Path, name: str) -> Iterator[Path]:
    yield out / name
    for number in count(2):
        yield out / f"{name}-{number}"


def record_run(
    folder: Path,
    config: Config,
    ds_config: dict[str, Any] | None,
    classes: tuple[str, ...],
    objective: Objective,
    fingerprint: str | None = None,
) -> None:
    """Write config.json: all settings, the completed ds.json, what is predicted, the commit and the versions.

    Args:
        fingerprint: a frozen encoder's: whoever predicts with the run's aggregator builds the encoder from its name and
            weights, and can see that these are the same. None where the encoder trains.
    """
    record = {
        "config": config.as_dict(),
        "ds_config": ds_config,
        "classes": classes,
        "objective": objective.record(),
        "frozen_encoder": fingerprint,
        **provenance(),
    }
    write_json(folder / "config.json", record)
