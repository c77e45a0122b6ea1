"""What a benchmark was measured on: processor or GPU, versions and commit."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parent.parent.parent


def describe_processor(device: str, count: int | None = None) -> str:
    """Name the processor or GPU that PyTorch computes on, and how many of them.

    Args:
        device: "cpu" or "cuda".
        count: of processors or GPUs; default: all that this process may use.
    """
    if device == "cuda":
        return f"{count or torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].split(":")[1].strip() if models else platform.machine()
    return f"{count or len(os.sched_getaffinity(0))} × {name}"


def describe_machine(device: str) -> dict[str, Any]:
    """Describe the machine and the software; results of two commands are comparable where this is equal."""
    packages = ("slidescale", "torch", "deepspeed", "timm", "openslide-python")
    return {
        "machine": describe_processor(device),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "commit": _commit(),
    }


def machine_line(stamp: dict[str, Any]) -> str:
    """Write the result of `describe_machine` in one line."""
    commit, *changes = str(stamp["commit"]).split("+")
    short = commit[:12] + (" with changes" if changes else "")
    return (
        f"{stamp['machine']}, {stamp['memory_gib']:.0f} GiB; PyTorch {stamp['torch']}, DeepSpeed {stamp['deepspeed']}, "
        f"timm {stamp['timm']}; commit {short}"
    )


def _commit() -> str | None:
    """The commit of the code, with a digest of what has changed in it since; None outside of a git checkout."""
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["diff", "HEAD", "--", "engine", "kernels", "benchmarks"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    digest = hashlib.blake2b(changes.encode(), digest_size=4).hexdigest()
    return commit.strip() + (f"+{digest}" if changes else "")
