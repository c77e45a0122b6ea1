r"""Communication under each strategy: bytes per step and phase, beside time and memory.

    python benchmarks/strategies.py --ranks 2 --encoder resnet18 --tile 224 --k 64 --policy recompute \
        --strategy ddp zero0 zero1 zero2 zero3 fsdp --device cpu --out results/

The result of each strategy is first compared with plain autograd. No speed is reported for a strategy that fails, and
the exit status is then 1. Bytes are counted in further steps, since counting takes time, and at several K: the merge of
the ranks' pooled features must take the same number of bytes whatever K is. Otherwise the exit status is 1 too.

In --out: strategies.jsonl (one row per cell), logs/ (the output of each cell's processes).
"""

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from cells.arguments import HEAD, add_chunk, add_common, settle
from cells.cell import PLANTED
from cells.communication_table import communication_tables, counts_of, row_line, unequal_merges
from cells.drawn_slide import write_slide
from cells.harness import Limits, free_bytes
from cells.judgement import Judge
from cells.rows import Rows
from cells.ways import POLICIES, STRATEGIES, Cell
from common.machine import describe_machine, machine_line
from common.page import write_section


def measure_all(args: argparse.Namespace, rows: Rows, slide: Path) -> list[dict[str, Any]]:
    """Measure each strategy; one row each."""
    alone = Limits(args.time_limit, free_bytes(args.device))
    shared = Limits(args.time_limit, free_bytes(args.device, args.ranks))
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
        print(f"{strategy}: {row_line(row)}", flush=True)
        found.append(row)
    return found


def main() -> int:
    """Measure, print and write; return the exit status."""
    args = parse()
    stamp = describe_machine(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.out / "strategies.jsonl", stamp)
    print(f"{len(args.strategy)} strategies on {args.ranks} ranks; {machine_line(stamp)}", flush=True)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        slide = Path(folder) / "slide.tiff"
        write_slide(slide, max(args.k, *args.merge_k), args.tile)
        timed = measure_all(args, rows, slide)
    text = communication_tables(timed, k=args.k, steps=args.steps)
    print(f"\n{text}\n\n{args.out / 'strategies.jsonl'}")
    if not args.no_page:
        command = f"    python benchmarks/strategies.py {shlex.join(sys.argv[1:])}"
        parts = ["## Communication by strategy", command, f"On {machine_line(stamp)}.", text]
        write_section(args.page, HEAD, "strategies", "\n\n".join(parts))
    wrong = [row for row in timed if row["status"] in ("wrong gradient", "failed")]
    lines = [f"{row['status'].upper()}: {row['strategy']}, K = {row['k']:,}: {row['message']}" for row in wrong]
    lines += [f"NOT CONSTANT IN K: {line}" for line in unequal_merges(counts_of(timed))]
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


def parse() -> argparse.Namespace:
    """Parse the command line.

    Raises:
        SystemExit: a setting is wrong; says which.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", nargs="+", default=list(STRATEGIES[1:]), choices=STRATEGIES[1:])
    parser.add_argument("--ranks", type=int, default=2, help="processes that share the slide, 2 or more")
    parser.add_argument("--k", type=int, default=64, help="tiles of the slide")
    parser.add_argument(
        "--merge-k", type=int, nargs="*", default=[16, 64, 256], help="further numbers of tiles at which to count bytes"
    )
    parser.add_argument("--policy", default="recompute", choices=POLICIES)
    parser.add_argument("--steps", type=int, default=3, help="steps to time, 3 or more; their median is reported")
    add_chunk(parser)
    add_common(parser)
    args = parser.parse_args()
    if args.ranks < 2:
        parser.error(f"--ranks {args.ranks}: a single rank has no communication; 2 or more")
    if args.steps < 3:
        parser.error(f"--steps {args.steps}: some faults show only after the first step; 3 or more")
    if min(args.k, *args.merge_k) < 1:
        parser.error("--k and --merge-k are 1 or more")
    settle(parser, args, ranks=args.ranks)
    return args


if __name__ == "__main__":
    sys.exit(main())
