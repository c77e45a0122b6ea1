"""Tables of weak scaling: measured parts, checked predictions, projections."""

from typing import Any

from common.page import table
from scaling.checking import name_of
from scaling.model import TERMS


def check_table(rows: list[dict[str, Any]]) -> str:
    """Write what was predicted and measured as Markdown."""
    header = ["configuration", "K", "predicted s", "measured s", "ratio"]
    return table(
        header,
        [
            [
                name_of(row),
                f"{row['k']:,}",
                f"{row['predicted_s']:.3g}",
                f"{row['measured_s']:.3g}",
                f"{row['ratio']:.2f}",
            ]
            for row in rows
        ],
    )


def projection_table(rows: list[dict[str, Any]], what: str) -> str:
    """Write a projection as Markdown; terms are in milliseconds.

    Args:
        what: heading of the column with the number of GPUs or ranks.
    """
    header = ["strategy", what, "K", "slides", "step s", *(f"{term} ms" for term in TERMS), "efficiency"]
    return table(
        header,
        [
            [
                row["strategy"],
                f"{row['gpus']:,}",
                f"{row['k']:,}",
                f"{row['slides']:,}",
                f"{row['step_s']:.3g}",
                *(
                    f"{1000 * row['terms'][term]:,.3g}"
                    if row["terms"][term] < 1
                    else f"{1000 * row['terms'][term]:,.0f}"
                    for term in TERMS
                ),
                f"{row['efficiency']:.1%}",
            ]
            for row in rows
        ],
    )


def parts_table(parts: dict[int, dict[str, Any]], tile: int) -> str:
    """Write the measured parts of a step as Markdown.

    Args:
        parts: by number of ranks.
        tile: side of the tiles whose reading is shown, px.
    """
    rows = []
    for ranks, found in parts.items():
        links = [
            f"{1000 * latency:.2g} ms, {bandwidth / 1e9:.2g} GB/s" for latency, bandwidth in found["links"].values()
        ]
        rows.append(
            [
                str(ranks),
                *(f"{1000 * found[name]:.3g}" for name in ("forward_s", "both_s", "aggregate_s")),
                f"{1000 * found['read_s'][str(tile)]:.3g}",
                ", ".join(f"{name} {1000 * seconds:.3g}" for name, seconds in found["update_s"].items()),
                *(links or [""] * 3),
            ]
        )
    header = [
        "ranks at once",
        "forward, ms per tile",
        "forward and backward",
        "aggregator, ms",
        "reading, ms per tile",
        "update, ms",
        "all-reduce",
        "all-gather",
        "reduce-scatter",
    ]
    return table(header, rows)
