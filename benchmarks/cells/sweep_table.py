"""The tables of a sweep over K, and its rows in words."""

from collections.abc import Iterator
from typing import Any

from slidescale.engine.training.stopwatch import PHASES
from slidescale.engine.units import GIB, format_size

from cells.ways import BASELINES
from common.page import table


def configuration_of(row: dict[str, Any]) -> str:
    """Name a row's configuration, for tables and pictures."""
    times = f" × {row['ranks']}" if row["ranks"] > 1 else ""
    return row["policy"] + times if row["policy"] in BASELINES else f"{row['policy']}, {row['strategy']}{times}"


def row_line(row: dict[str, Any]) -> str:
    """Say in a few words how a cell ended."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['message']}"
    return f"{row['peak_gib']:.2f} GiB, {row['tiles_per_s']:,.1f} tiles/s"


def sweep_tables(found: list[list[dict[str, Any]]]) -> str:
    """Write the rows of each configuration (K ascending) as Markdown: memory and speed, growth, and phases."""
    parts = [_cells_table([row for rows in found for row in rows])]
    if grown := "\n".join(_growth(found)):
        parts += ["Memory per further tile on its rank, between the two largest K that could be run:", grown]
    parts += [
        "Share of a step's time by phase, at the largest K that could be run (the hub's main rank waits for the "
        "others):",
        table(["configuration", "K", *PHASES], list(_phases(found))),
    ]
    return "\n\n".join(parts)


def _cells_table(rows: list[dict[str, Any]]) -> str:
    hubs = {(row["ranks"], row["k"]): row["tiles_per_s"] for row in rows if row["policy"] == "hub"}
    header = [
        "configuration",
        "K",
        "chunk",
        "peak GiB",
        "of it held",
        "steps",
        "step s",
        "tiles/s",
        "slides/h",
        "× hub",
        "error",
    ]
    lines = []
    for row in rows:
        head = [configuration_of(row), f"{row['k']:,}"]
        error = "" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}"
        if row["status"] != "ok":
            lines.append([*head, "", f"**{row['status']}**", *[""] * 6, error])
            continue
        hub = hubs.get((row["ranks"], row["k"]))
        lines.append(
            [
                *head,
                str(row["chunk"]),
                f"{row['peak_gib']:.2f}",
                f"{row['base_gib']:.2f}",
                str(len(row["steps_s"])),
                *(_short(row[name]) for name in ("step_s", "tiles_per_s", "slides_per_h")),
                f"{row['tiles_per_s'] / hub:.2f}" if hub else "",
                error,
            ]
        )
    return table(header, lines)


def _short(value: float) -> str:
    """Write three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _growth(found: list[list[dict[str, Any]]]) -> Iterator[str]:
    """Yield a line for each configuration that ran at two K or more."""
    for rows in found:
        few, many = ([None, None] + [row for row in rows if row["status"] == "ok"])[-2:]
        if few and many:
            grown = (many["peak_gib"] - few["peak_gib"]) * GIB / ((many["k"] - few["k"]) / many["tile_ranks"])
            yield f"- {configuration_of(many)}: {format_size(grown)} (K = {few['k']:,} to {many['k']:,})"


def _phases(found: list[list[dict[str, Any]]]) -> Iterator[list[str]]:
    """Yield a line for each configuration that ran, at its largest K."""
    for rows in found:
        if done := [row for row in rows if row["status"] == "ok"]:
            last = done[-1]
            shares = (f"{last['shares'][phase]:.1%}" for phase in PHASES)
            yield [configuration_of(last), f"{last['k']:,}", *shares]
