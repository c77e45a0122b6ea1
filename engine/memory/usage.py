"""Amounts of memory: what a rank has used, and how sizes are written."""

import re
import resource

import torch

from slidescale.engine.errors import ConfigError

GIB = 1024**3
UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": GIB, "TiB": 1024**4}


def parse_size(text: str, setting: str) -> int:
    """Bytes of a size such as "8GiB" or "512 MiB".

    Raises:
        ConfigError: names the setting.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMGT]iB|B)", text.strip())
    if not match or float(match[1]) == 0:
        raise ConfigError(f"{setting} is {text!r}: must be a size such as 8GiB (units: {', '.join(UNITS)})")
    return int(float(match[1]) * UNITS[match[2]])


def format_size(size: float) -> str:
    """Bytes in the largest unit of which there is one: "1.50 GiB"."""
    unit = next((unit for unit, factor in reversed(UNITS.items()) if abs(size) >= factor), "B")
    return f"{size / UNITS[unit]:.{0 if unit == 'B' else 2}f} {unit}"


def peak_gib(device: torch.device) -> float:
    """The most this process has held so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux counts in KiB
