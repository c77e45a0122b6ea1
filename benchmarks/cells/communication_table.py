"""Tables of what ranks send each other under each strategy, by phase and as K grows."""

import math
from collections.abc import Iterator
from typing import Any

from slidescale.engine.training.stopwatch import PHASES
from slidescale.engine.units import format_size

from cells.communication import total
from common.page import table


def counts_of(timed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """List what was counted under each strategy that ran, one row per strategy and K."""
    return [
        {
            "strategy": row["strategy"],
            "k": int(k),
            "chunks": math.ceil(int(k) / row["ranks"] / row["chunk"]),
            "communication": communication,
        }
        for row in timed
        if row["status"] == "ok"
        for k, communication in row["communication"].items()
    ]


def row_line(row: dict[str, Any]) -> str:
    """Say in a few words how a strategy's cell ended."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['message']}"
    sent = format_size(total(row["communication"][str(row["k"])], "wire"))
    return f"{row['step_s']:.3g} s per step, {row['peak_gib']:.2f} GiB, {sent} sent by a rank"


def communication_tables(timed: list[dict[str, Any]], *, k: int, steps: int) -> str:
    """Write time, memory and bytes as Markdown.

    Args:
        timed: one row per strategy.
        k: number of tiles whose bytes are shown by phase.
        steps: over which results were compared.
    """
    counted = counts_of(timed)
    at_k = [row for row in counted if row["k"] == k]
    header = ["strategy", *(name for phase in PHASES for name in _columns(phase)), "in all", "calls"]
    return "\n\n".join(
        [
            f"Time and memory per rank, at K = {k:,}; the error is that of the model's change over {steps} steps, "
            "relative to plain autograd:",
            table(["strategy", "step s", "× ddp", "peak GiB", "of it held", "error"], list(_times(timed))),
            "Bytes that a rank sends per step, in rings of equal parts (gloo sends more: its reduce-scatter is an "
            "all-reduce). Under fsdp the reduction is part of pass 2:",
            table(header, [_bytes_of(row, "wire") for row in at_k]),
            "Bytes that a rank hands over per step: all that is reduced, or is there after a gather:",
            table(header, [_bytes_of(row, "payload") for row in at_k]),
            "The merge of the ranks' pooled features, with its backward, and everything else that a rank sends per "
            "step, as K grows:",
            table(["strategy", "K", "chunks", "merge, sent", "all else, sent"], [_growth_of(row) for row in counted]),
        ]
    )


def unequal_merges(counted: list[dict[str, Any]]) -> list[str]:
    """Write a line for each strategy whose merge takes no bytes, or not the same number at each K."""
    lines = []
    for strategy in dict.fromkeys(row["strategy"] for row in counted):
        found = {row["k"]: _merge(row, "payload") for row in counted if row["strategy"] == strategy}
        if found and (len(set(found.values())) > 1 or not all(found.values())):
            sizes = ", ".join(f"{size:,.0f} B at K = {k:,}" for k, size in found.items())
            lines.append(f"{strategy}: the merge takes {sizes}")
    return lines


def _merge(row: dict[str, Any], what: str) -> float:
    """Bytes of the all-reduces around pooling; gathers in the same phase are those of the aggregator's parameters."""
    return total({"aggregate": row["communication"].get("aggregate", [])}, what, operation="all-reduce")


def _times(timed: list[dict[str, Any]]) -> Iterator[list[str]]:
    ddp = next((row["step_s"] for row in timed if row["strategy"] == "ddp" and row["status"] == "ok"), None)
    for row in timed:
        error = f"{row['gradient_error']:.1e}" if "gradient_error" in row else ""
        if row["status"] != "ok":
            yield [row["strategy"], f"**{row['status']}**", "", "", "", error]
            continue
        ratio = f"{row['step_s'] / ddp:.2f}" if ddp else ""
        memory = [f"{row['peak_gib']:.2f}", f"{row['base_gib']:.2f}"]
        yield [row["strategy"], f"{row['step_s']:.3g}", ratio, *memory, error]


def _columns(phase: str) -> tuple[str, ...]:
    """The phase of aggregation has two columns: the merge, and the gathers of parameters for it."""
    return ("merge", "aggregator's gathers") if phase == "aggregate" else (phase,)


def _bytes_of(row: dict[str, Any], what: str) -> list[str]:
    """A line of the table by phase."""
    cells = []
    for phase in PHASES:
        size = total({phase: row["communication"].get(phase, [])}, what)
        merged = _merge(row, what)
        cells += [merged, size - merged] if phase == "aggregate" else [size]
    calls = total(row["communication"], "calls")
    return [row["strategy"], *(f"{size:,.0f}" for size in (*cells, sum(cells))), f"{calls:,.0f}"]


def _growth_of(row: dict[str, Any]) -> list[str]:
    """A line of the table over K."""
    merged = _merge(row, "wire")
    rest = total(row["communication"], "wire") - merged
    return [row["strategy"], f"{row['k']:,}", f"{row['chunks']:,}", f"{merged:,.0f}", f"{rest:,.0f}"]
