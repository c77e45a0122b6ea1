"""The folder of a run: where it is, and what it records of how it was made."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slidescale.engine.config import Config
from slidescale.engine.errors import UserError


def choose_run_folder(out: Path, name: str, *, resume: bool) -> Path:
    """`out/name` for a new run, or `out/name-2`, `-3`, … when earlier runs have it; the latest of them to resume.

    Raises:
        UserError: there is no run to resume.
    """
    taken = []
    candidate, number = out / name, 1
    while candidate.exists():
        taken.append(candidate)
        number += 1
        candidate = out / f"{name}-{number}"
    if not resume:
        return candidate
    if not taken:
        raise UserError(f"--resume: there is no run {out / name}")
    return taken[-1]


def record_run(folder: Path, config: Config, ds_config: dict[str, Any] | None, classes: tuple[str, ...]) -> None:
    """Write config.json: all settings, ds.json as completed, the commit and the versions."""
    record = {
        "config": config.as_dict(),
        "ds_config": ds_config,
        "classes": classes,
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("slidescale", "torch", "deepspeed", "timm", "openslide-python")},
    }
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def git_commit() -> str | None:
    """The commit of the code, marked when files differ from it; None when the code is not in a git checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
