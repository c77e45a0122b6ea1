"""The folder of a run: where it is, and what it records of how it was made."""

import json
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import version
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from slidescale.engine.config import Config, MemoryConfig, ParallelConfig, RunConfig, flatten
from slidescale.engine.errors import UserError, flag
from slidescale.engine.files import write_json
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.training.checkpoint import has_checkpoint

# Settings that a resumed run may have otherwise: they do not change what has been learnt, or only for how long.
MAY_CHANGE = {"resume", "local_rank", "deepspeed_config", "data.manifest", "data.readers", "data.prefetch"}
MAY_CHANGE |= {"data.max_excluded", "run.name", "run.out", "run.epochs", "run.heatmaps", "optim.accumulate"}
MAY_CHANGE |= {"run.keep_checkpoints"}
MAY_CHANGE |= {"run.kernels"}  # whose kinds are equal
# Of optim.accumulate and parallel.tile_ranks, the checkpoint knows what matters: the slides of a step.
MAY_CHANGE |= {f"memory.{field.name}" for field in fields(MemoryConfig)}
MAY_CHANGE |= {f"parallel.{field.name}" for field in fields(ParallelConfig)} | {"model.transformer_spread"}


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
        UserError: there is none.
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


def check_same_subject(folder: Path, classes: tuple[str, ...], frozen_encoder: str | None) -> None:
    """Refuse to resume a run with another manifest's classes, or another frozen encoder.

    Args:
        classes: of the manifest.
        frozen_encoder: fingerprint of the encoder, if it is frozen: its weights are not in a checkpoint.

    Raises:
        UserError: says which of them differs.
    """
    record = read_record(folder)
    if (before := record["classes"]) != classes:
        raise UserError(
            f"--resume: {folder} was begun to predict {', '.join(before)}, and the manifest has {', '.join(classes)}"
        )
    if frozen_encoder != record.get("frozen_encoder"):
        raise UserError(
            f"--resume: {folder} was begun with other weights of the frozen encoder than --model.weights or "
            "--model.pretrained gives now: bring those back"
        )


def read_record(folder: Path) -> dict[str, Any]:
    """What `record_run` wrote.

    Raises:
        UserError: config.json is missing or damaged.
    """
    path = folder / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["config"], dict):
            raise TypeError("its settings are not a table")
        record["classes"] = tuple(record["classes"])
        return record
    except FileNotFoundError:
        raise UserError(f"{folder} is not the folder of a run: it has no config.json") from None
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
    frozen_encoder: str | None = None,
) -> None:
    """Write config.json: all settings, ds.json as completed, what is predicted, the commit and the versions.

    Args:
        frozen_encoder: fingerprint of the encoder, if it is frozen: whoever predicts with the run's aggregator builds
            the encoder from its name and weights, and can see that these are the same.
    """
    record = {
        "config": config.as_dict(),
        "ds_config": ds_config,
        "classes": classes,
        "objective": objective.record(),
        "frozen_encoder": frozen_encoder,
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("slidescale", "torch", "deepspeed", "timm", "openslide-python")},
    }
    write_json(folder / "config.json", record)


def git_commit() -> str | None:
    """The commit of the code, marked when files differ from it; None when the code is not in a git checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
