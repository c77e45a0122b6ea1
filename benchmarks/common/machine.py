"""What a benchmark was measured on: processor or GPU, versions and commit."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from slidescale.engine.training.provenance import provenance
from slidescale.engine.units import GIB


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
    memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1)
    return {"machine": describe_processor(device), "memory_gib": memory, **provenance()}


def machine_line(stamp: dict[str, Any]) -> str:
    """Write the result of `describe_machine` in one line."""
    commit, _, changes = str(stamp["commit"]).partition("-dirty-")
    versions = stamp["versions"]
    return (
        f"{stamp['machine']}, {stamp['memory_gib']:.0f} GiB; PyTorch {versions['torch']}, DeepSpeed "
        f"{versions['deepspeed']}, timm {versions['timm']}; commit {commit[:12]}{' with changes' * bool(changes)}"
    )
