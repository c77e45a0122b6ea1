"""Amounts of memory in words: "8GiB"."""

import re

from slidescale.engine.errors import ConfigError

MIB = 1024**2
GIB = 1024**3


UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": GIB, "TiB": 1024**4}


DECIMAL_UNITS = {"kB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}


def parse_size(text: str, setting: str) -> int:
    """Bytes of a size such as "8GiB" or "512 MiB", or "24 GB": 24 · 10⁹, a little less than 24 GiB.

    Raises:
        ConfigError: names the setting.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([A-Za-z]+)", text.strip())
    units = {unit.lower(): size for unit, size in (UNITS | DECIMAL_UNITS).items()}
    if not match or float(match[1]) == 0 or match[2].lower() not in units:
        known = ", ".join((*UNITS, *DECIMAL_UNITS))
        raise ConfigError(f"{setting} is {text!r}: must be a size such as 8GiB or 24GB (units: {known})")
    return int(float(match[1]) * units[match[2].lower()])


def format_size(size: float) -> str:
    """Bytes in the largest unit of which there is one: "1.50 GiB"."""
    unit = next((unit for unit, factor in reversed(UNITS.items()) if abs(size) >= factor), "B")
    return f"{size / UNITS[unit]:.{0 if unit == 'B' else 2}f} {unit}"
