"""Provenance: which code, in which versions of the libraries, has made a result."""

import hashlib
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("slidescale", "torch", "deepspeed", "timm", "openslide-python")
ROOT = Path(__file__).resolve().parents[2]
# What a result may follow from; documents may have changed, and a benchmark writes its own page.
CODE = ("engine", "kernels", "recipes", "benchmarks")


def provenance() -> dict[str, Any]:
    """The commit (see `git_commit`), Python's version, and under "versions" those of `PACKAGES`."""
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def git_commit() -> str | None:
    """The commit of the code; None where the code is not in a git checkout of its own.

    Where the code differs from the commit, "-dirty-" and a digest of the differences follow: equal changes are equal
    code.
    """
    try:
        _git("ls-files", "--error-unmatch", "engine/training/provenance.py")  # another project's checkout lacks it
        commit, changes = _git("rev-parse", "HEAD").strip(), _git("diff", "HEAD", "--", *CODE)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + (f"-dirty-{hashlib.blake2b(changes.encode(), digest_size=4).hexdigest()}" if changes else "")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, errors="replace", check=True)
    return done.stdout
