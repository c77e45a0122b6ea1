r"""What ranks say to each other under each strategy: bytes a step, by phase, beside time and memory.

    python benchmarks/strategies.py --ranks 2 --encoder resnet18 --tile 224 --k 64 --policy recompute \
        --strategy ddp zero0 zero1 zero2 zero3 fsdp --device cpu --out results/

Each strategy's result is first compared with plain autograd: where it is wrong, no speed is told, and the exit status
is 1. Bytes are counted in further steps, since counting takes time; and at several K, to see that the merge of the
ranks' pooled features takes as many whatever K is. Where it does not, the exit status is 1 as well.

In --out: strategies.jsonl (a row a cell), logs/ (what each cell's processes printed).
"""

import argparse
import math
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from slidescale.engine.markdown import table
from slidescale.engine.memory.usage import available_bytes
from slidescale.engine.training.stopwatch import PHASES
from slidescale.engine.units import format_size

from arguments import HEAD, add_chunk, add_common, settle
from cells.cell import PLANTED
from cells.communication import total
from cells.drawn_slide import write_slide
from cells.harness import Limits, Rows, describe_machine, tell_machine
from cells.judgement import Judge
from cells.ways import POLICIES, STRATEGIES, Cell
from page import write_section

# The part of what is free that the ranks may take together on a CPU; this process and the system need the rest.
SHARE_OF_FREE = 0.9


def measure_all(args: argparse.Namespace, rows: Rows, slide: Path) -> list[dict[str, Any]]:
    """A row for each strategy."""
    device = torch.device(args.device)
    alone = Limits(args.time_limit, int(SHARE_OF_FREE * available_bytes(device)))
    shared = Limits(args.time_limit, alone.bytes // (args.ranks if args.device == "cpu" else 1))
    judge = Judge(slide=slide, limits=alone, folder=args.out / "logs")
    found = []
    for strategy in args.strategy:
        cell = Cell(
            policy=args.policy,
            strategy=strategy,
            ranks=args.ranks,
            k=args.k,
            encoder=args.encoder,
            tile=args.tile,
            chunk=args.chunk,
            dtype=args.dtype,
            device=args.device,
            steps=args.steps,
            counted=tuple(sorted({args.k, *args.merge_k})),
        )
        settings = {**cell.as_dict(), "time_limit": args.time_limit, "planted": os.environ.get(PLANTED)}
        row = rows.find(settings)
        if row is None:
            ended, measured = judge.judge(cell, limits=shared, log=args.out / "logs" / f"{strategy}-{args.ranks}.log")
            row = {"strategy": strategy, "k": args.k, **measured, "status": ended.status, "message": ended.message}
            row = rows.add(row, settings)
        print(f"{strategy}: {_tell(row)}", flush=True)
        found.append(row)
    return found


def counts_of(timed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each strategy that ran says at each K, as rows of their own."""
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


def tell(args: argparse.Namespace, timed: list[dict[str, Any]], counted: list[dict[str, Any]]) -> str:
    """The tables."""
    ddp = next((row["step_s"] for row in timed if row["strategy"] == "ddp" and row["status"] == "ok"), None)
    times = []
    for row in timed:
        error = f"{row['gradient_error']:.1e}" if "gradient_error" in row else ""
        if row["status"] != "ok":
            times.append([row["strategy"], f"**{row['status']}**", "", "", "", error])
            continue
        ratio = f"{row['step_s'] / ddp:.2f}" if ddp else ""
        memory = [f"{row['peak_gib']:.2f}", f"{row['base_gib']:.2f}"]
        times.append([row["strategy"], f"{row['step_s']:.3g}", ratio, *memory, error])
    at_k = [row for row in counted if row["k"] == args.k]
    header = ["strategy", *(name for phase in PHASES for name in _columns(phase)), "in all", "calls"]
    return "\n\n".join(
        [
            f"Time and memory of a rank, at K = {args.k:,}; the error is that of the model's change over {args.steps} "
            "steps, against plain autograd:",
            table(["strategy", "step s", "× ddp", "peak GiB", "of it held", "error"], times),
            "Bytes that a rank sends in a step, in rings of equal parts (gloo sends more: its reduce-scatter is an "
            "all-reduce). Under fsdp the reduction is part of pass 2:",
            table(header, [_bytes_of(row, "wire") for row in at_k]),
            "Bytes that a rank hands over in a step: the whole of what is reduced, or is there after a gather:",
            table(header, [_bytes_of(row, "payload") for row in at_k]),
            "The merge of the ranks' pooled features, with its backward, and all else that a rank sends in a step, as "
            "K grows:",
            table(["strategy", "K", "chunks", "merge, sent", "all else, sent"], [_growth_of(row) for row in counted]),
        ]
    )


def unequal_merges(counted: list[dict[str, Any]]) -> list[str]:
    """A line for each strategy whose merge does not take the same number of bytes at each K, or takes none."""
    lines = []
    for strategy in dict.fromkeys(row["strategy"] for row in counted):
        found = {row["k"]: merge(row, "payload") for row in counted if row["strategy"] == strategy}
        if found and (len(set(found.values())) > 1 or not all(found.values())):
            told = ", ".join(f"{size:,.0f} B at K = {k:,}" for k, size in found.items())
            lines.append(f"{strategy}: the merge takes {told}")
    return lines


def merge(row: dict[str, Any], what: str) -> float:
    """Bytes of the all-reduces around pooling; gathers in the same phase are of the aggregator's parameters."""
    return total({"aggregate": row["communication"].get("aggregate", [])}, what, operation="all-reduce")


def _tell(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['message']}"
    sent = format_size(total(row["communication"][str(row["k"])], "wire"))
    return f"{row['step_s']:.3g} s a step, {row['peak_gib']:.2f} GiB, {sent} sent by a rank"


def _columns(phase: str) -> tuple[str, ...]:
    """The phase of aggregation is told in two: what it is about, and what gathers parameters for it."""
    return ("merge", "aggregator's gathers") if phase == "aggregate" else (phase,)


def _bytes_of(row: dict[str, Any], what: str) -> list[str]:
    """A line of the table by phase."""
    cells = []
    for phase in PHASES:
        size = total({phase: row["communication"].get(phase, [])}, what)
        merged = merge(row, what)
        cells += [merged, size - merged] if phase == "aggregate" else [size]
    calls = total(row["communication"], "calls")
    return [row["strategy"], *(f"{size:,.0f}" for size in (*cells, sum(cells))), f"{calls:,.0f}"]


def _growth_of(row: dict[str, Any]) -> list[str]:
    """A line of the table over K."""
    merged = merge(row, "wire")
    rest = total(row["communication"], "wire") - merged
    return [row["strategy"], f"{row['k']:,}", f"{row['chunks']:,}", f"{merged:,.0f}", f"{rest:,.0f}"]


def main() -> int:
    """Measure, print and write; the exit status."""
    args = parse()
    stamp = describe_machine(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.out / "strategies.jsonl", stamp)
    print(f"{len(args.strategy)} strategies on {args.ranks} ranks; {tell_machine(stamp)}", flush=True)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        slide = Path(folder) / "slide.tiff"
        write_slide(slide, max(args.k, *args.merge_k), args.tile)
        timed = measure_all(args, rows, slide)
    counted = counts_of(timed)
    text = tell(args, timed, counted)
    print(f"\n{text}\n\n{args.out / 'strategies.jsonl'}")
    if not args.no_page:
        command = f"    python benchmarks/strategies.py {shlex.join(sys.argv[1:])}"
        parts = ["## What ranks say to each other, by strategy", command, f"On {tell_machine(stamp)}.", text]
        write_section(args.page, HEAD, "strategies", "\n\n".join(parts))
    wrong = [row for row in timed if row["status"] in ("wrong gradient", "failed")]
    lines = [f"{row['status'].upper()}: {row['strategy']}, K = {row['k']:,}: {row['message']}" for row in wrong]
    lines += [f"NOT CONSTANT IN K: {line}" for line in unequal_merges(counted)]
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        SystemExit: with what is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", nargs="+", default=list(STRATEGIES[1:]), choices=STRATEGIES[1:])
    parser.add_argument("--ranks", type=int, default=2, help="processes that share the slide, 2 or more")
    parser.add_argument("--k", type=int, default=64, help="tiles of the slide")
    parser.add_argument("--merge-k", type=int, nargs="*", default=[16, 64, 256], help="where bytes are counted, too")
    parser.add_argument("--policy", default="recompute", choices=POLICIES)
    parser.add_argument("--steps", type=int, default=3, help="steps to time, 3 or more; their median is told")
    add_chunk(parser)
    add_common(parser)
    args = parser.parse_args()
    if args.ranks < 2:
        parser.error(f"--ranks {args.ranks}: one rank has nobody to talk to")
    if args.steps < 3:
        parser.error(f"--steps {args.steps}: faults that are right at the first step would not be seen, 3 or more")
    if min(args.k, *args.merge_k) < 1:
        parser.error("--k and --merge-k are 1 or more")
    settle(parser, args, ranks=args.ranks)
    return args


if __name__ == "__main__":
    sys.exit(main())
