r"""Memory and speed of a training step as the number of tiles grows: the engine's policies and strategies, and others.

    python benchmarks/scale_k.py --k 64 256 1024 4096 --policy keep recompute offload auto \
        --strategy single zero3 fsdp --ranks 1 2 --baseline hub checkpoint frozen --out results/

Tiles are read from a slide that is drawn for it. Each cell (a configuration at one K) runs in processes of its own,
under a limit of time and memory; one that passes it is a row that says so. Each configuration's result at the smallest
K (for which plain autograd must have room) is first compared with that: where it is wrong, no speed is told, and the
exit status is 1. A sweep that was interrupted goes on where it stopped, given the same --out.

In --out: scale_k.jsonl (a row a cell), scale_k.png, tensorboard/, logs/ (what each cell's processes printed).
"""

import argparse
import math
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from slidescale.engine.errors import ConfigError
from slidescale.engine.markdown import table
from slidescale.engine.memory.usage import available_bytes
from slidescale.engine.training.stopwatch import PHASES
from slidescale.engine.units import GIB, format_size, parse_size

from arguments import HEAD, add_chunk, add_common, settle
from cells.cell import PLANTED, measure
from cells.drawn_slide import write_slide
from cells.harness import Ended, Limits, Rows, describe_machine, tell_machine
from cells.judgement import Judge
from cells.ways import BASELINES, POLICIES, STRATEGIES, Cell
from page import write_section
from picture import draw

# What a row has of its cell, and what it has measured.
SETTINGS = ("k", "policy", "strategy", "ranks", "encoder", "tile", "chunk", "dtype", "device")
MEASURED = ("peak_gib", "base_gib", "step_s", "tiles_per_s", "slides_per_h", "gradient_error")
# What this process and the system need beside the ranks, where no limit is given.
SHARE_OF_FREE = 0.9


def configurations(args: argparse.Namespace) -> tuple[list[Cell], list[str]]:
    """Each configuration at the smallest K, and what there is no such configuration of."""
    base = Cell(
        policy="",
        strategy="single",
        ranks=1,
        k=min(args.k),
        encoder=args.encoder,
        tile=args.tile,
        chunk=args.chunk,
        dtype=args.dtype,
        device=args.device,
        steps=steps_at(min(args.k), args),
    )
    found, missing = [], []
    for baseline in args.baseline:
        if baseline != "hub":
            found.append(replace(base, policy=baseline, parts="aggregator" if baseline == "frozen" else "all"))
            continue
        many = [ranks for ranks in args.ranks if ranks > 1]
        found += [replace(base, policy="hub", strategy="ddp", ranks=ranks) for ranks in many]
        if not many:
            missing.append("hub has a rank for the aggregator alone, and needs --ranks 2 or more")
    budget = parse_size(args.budget, "--budget") if args.budget else 0
    for policy in args.policy:
        for strategy in args.strategy:
            for ranks in args.ranks:
                if strategy == "single" and ranks > 1:
                    missing.append(f"single is one process: none at {ranks} ranks")
                    continue
                cell = replace(base, policy=policy, strategy=strategy, ranks=ranks)
                cell = replace(cell, budget=budget or (budget_of(cell, args) if policy == "auto" else 0))
                found.append(cell)
    return found, list(dict.fromkeys(missing))


def steps_at(k: int, args: argparse.Namespace) -> int:
    """How many steps are timed; at the smallest K, where the result is compared, at least three."""
    return max(args.steps, 3 if k == min(args.k) else math.ceil(args.least_tiles / k))


def limit_of_memory(cell: Cell, args: argparse.Namespace) -> int:
    """Bytes that a rank may hold."""
    if args.memory_limit != "auto":
        return parse_size(args.memory_limit, "--memory-limit")
    free = available_bytes(torch.device(cell.device))
    return int(SHARE_OF_FREE * free / (cell.ranks if cell.device == "cpu" else 1))


def budget_of(cell: Cell, args: argparse.Namespace) -> int:
    """What policy auto plans for; of a GPU's limit it leaves a part to the allocator, as the engine does."""
    return round(limit_of_memory(cell, args) * (SHARE_OF_FREE if cell.device == "cuda" else 1))


def sweep(cells: list[Cell], args: argparse.Namespace, rows: Rows, slide: Path) -> Iterator[list[dict[str, Any]]]:
    """The rows of each configuration, K ascending."""
    free = Limits(args.time_limit, available_bytes(torch.device(args.device)))
    judge = Judge(slide=slide, limits=free, folder=args.out / "logs")
    done, total = 0, len(cells) * len(args.k)
    for first in cells:
        found: list[dict[str, Any]] = []
        for k in args.k:
            cell = replace(first, k=k, steps=steps_at(k, args))
            settings = {
                **cell.as_dict(),
                "memory_limit": args.memory_limit,
                "time_limit": args.time_limit,
                "compared": not found,
                "planted": os.environ.get(PLANTED),
            }
            if args.memory_limit == "auto" and not args.budget:
                settings.pop("budget")  # it was what was free then
            row = rows.find(settings)
            again = row is not None
            if row is None:
                limits = Limits(args.time_limit, limit_of_memory(cell, args))
                row = rows.add(measure_row(cell, found, judge, limits, args, slide), settings)
            found.append(row)
            done += 1
            print(
                f"[{done}/{total}] {name_of(row)}, K = {k:,}: {tell_row(row)}{' (of before)' if again else ''}",
                flush=True,
            )
        yield found


def measure_row(
    cell: Cell, before: list[dict[str, Any]], judge: Judge, limits: Limits, args: argparse.Namespace, slide: Path
) -> dict[str, Any]:
    """A cell's row; without running it where a smaller K has failed already."""
    measured: dict[str, Any] = {}
    log = args.out / "logs" / f"{cell.policy}-{cell.strategy}-{cell.ranks}-{cell.k}.log"
    if before and before[-1]["status"] != "ok":
        last = before[-1]
        ended = Ended(
            "not run", f"{last['status']} at K = {last['k']:,}" if last["status"] != "not run" else last["message"]
        )
    elif not before:
        ended, measured = judge.judge(cell, limits=limits, log=log)
    else:
        ended, measured = measure(cell, slide=slide, limits=limits, log=log)
        measured = {**measured, "gradient_error": before[0]["gradient_error"]}
    row = {key: getattr(cell, key) for key in SETTINGS} | dict.fromkeys(MEASURED) | measured
    return {**row, "status": ended.status, "message": ended.message}


def name_of(row: dict[str, Any]) -> str:
    """A configuration, as tables and pictures call it."""
    if row["policy"] in BASELINES:
        return f"{row['policy']} × {row['ranks']}" if row["ranks"] > 1 else row["policy"]
    return f"{row['policy']}, {row['strategy']}" + (f" × {row['ranks']}" if row["ranks"] > 1 else "")


def tell_row(row: dict[str, Any]) -> str:
    """What came out, in a few words."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['message']}"
    return f"{row['peak_gib']:.2f} GiB, {row['tiles_per_s']:,.1f} tiles/s"


def tell(found: list[list[dict[str, Any]]]) -> str:
    """The tables."""
    rows = [row for each in found for row in each]
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
        head = [name_of(row), f"{row['k']:,}"]
        if row["status"] != "ok":
            lines.append([*head, "", f"**{row['status']}**", *[""] * 6, error_of(row)])
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
                error_of(row),
            ]
        )
    shares = [
        [name_of(row), f"{row['k']:,}", *(f"{row['shares'][phase]:.1%}" for phase in PHASES)]
        for each in found
        for row in each[::-1]
        if row["status"] == "ok" and row is last_ok(each)
    ]
    parts = [table(header, lines)]
    if grown := "\n".join(growth(found)):
        parts += [
            "What each further tile takes on its rank, between the two largest K that could be run:",
            grown,
        ]
    parts += [
        "Where a step's time goes, at the largest K that could be run (the hub's main rank waits for the others):",
        table(["configuration", "K", *PHASES], shares),
    ]
    return "\n\n".join(parts)


def _short(value: float) -> str:
    """Three digits that matter."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def error_of(row: dict[str, Any]) -> str:
    """The gradient's."""
    return "" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}"


def last_ok(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """At the largest K that could be run."""
    return next((row for row in reversed(rows) if row["status"] == "ok"), None)


def growth(found: list[list[dict[str, Any]]]) -> Iterator[str]:
    """A line for each configuration that ran at two K or more."""
    for rows in found:
        few, many = ([None, None] + [row for row in rows if row["status"] == "ok"])[-2:]
        if few and many:
            grown = (many["peak_gib"] - few["peak_gib"]) * GIB / ((many["k"] - few["k"]) / many["tile_ranks"])
            yield f"- {name_of(many)}: {format_size(grown)} (K = {few['k']:,} to {many['k']:,})"


def write_board(folder: Path, found: list[list[dict[str, Any]]], picture: Path) -> None:
    """Curves over K in TensorBoard, a run a configuration."""
    shutil.rmtree(folder, ignore_errors=True)  # curves of an earlier run of this sweep would be doubled
    for rows in found:
        with SummaryWriter(str(folder / name_of(rows[0]).replace(" ", "").replace("×", "x"))) as board:
            for row in rows:
                if row["status"] != "ok":
                    board.add_text("ended", f"K = {row['k']:,}: {tell_row(row)}", row["k"])
                    continue
                for name in ("peak_gib", "base_gib"):
                    board.add_scalar(f"memory/{name}", row[name], row["k"])
                for name in ("step_s", "tiles_per_s", "slides_per_h"):
                    board.add_scalar(f"speed/{name}", row[name], row["k"])
                for phase, share in row["shares"].items():
                    board.add_scalar(f"share/{phase.replace(' ', '_')}", share, row["k"])
    with SummaryWriter(str(folder)) as board:
        board.add_image("scale_k", imread(picture)[..., :3], 0, dataformats="HWC")


def main() -> int:
    """Measure, print and write; the exit status."""
    args = parse()
    cells, missing = configurations(args)
    stamp = describe_machine(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.out / "scale_k.jsonl", stamp)
    print(f"{len(cells)} configurations at K = {', '.join(f'{k:,}' for k in sorted(args.k))}; {tell_machine(stamp)}")
    for each in missing:
        print(f"left out: {each}")
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        slide = Path(folder) / "slide.tiff"
        write_slide(slide, max(args.k), args.tile)
        found = list(sweep(cells, args, rows, slide))
    text = tell(found)
    print(f"\n{text}\n\n{args.out / 'scale_k.jsonl'}", end="")
    if any(row["status"] == "ok" for each in found for row in each):
        show(args, found, text, stamp)
    wrong = [row for each in found for row in each if row["status"] in ("wrong gradient", "failed")]
    for row in wrong:
        print(f"{row['status'].upper()}: {name_of(row)}, K = {row['k']:,}: {row['message']}", file=sys.stderr)
    return 1 if wrong else 0


def show(args: argparse.Namespace, found: list[list[dict[str, Any]]], text: str, stamp: dict[str, Any]) -> None:
    """Draw the picture; write TensorBoard's curves and, with tables and picture, the page."""
    picture = args.out / "scale_k.png"
    limit = None if args.memory_limit == "auto" else parse_size(args.memory_limit, "--memory-limit") / GIB
    draw(picture, [(name_of(each[0]), each) for each in found], limit_gib=limit)
    write_board(args.out / "tensorboard", found, picture)
    print(f", {picture}; tensorboard --logdir {args.out / 'tensorboard'}")
    if args.no_page:
        return
    command = f"    python benchmarks/scale_k.py {shlex.join(sys.argv[1:])}"
    parts = [f"## {args.title}", command, f"On {tell_machine(stamp)}."]
    args.page.parent.mkdir(parents=True, exist_ok=True)
    if len(found) > 1:
        shown = args.page.with_name(f"{args.section}.png")
        shutil.copyfile(picture, shown)
        parts.append(f"![Memory and speed against the number of tiles]({shown.name})")
    write_section(args.page, HEAD, args.section, "\n\n".join([*parts, text]))


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        SystemExit: with what is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[64, 256, 1024], help="tiles of the slide")
    parser.add_argument("--policy", nargs="*", default=["keep", "recompute", "auto"], choices=POLICIES)
    parser.add_argument("--strategy", nargs="+", default=["single"], choices=STRATEGIES)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="processes that share the slide")
    parser.add_argument("--baseline", nargs="*", default=[], choices=BASELINES, help="what to compare with")
    parser.add_argument(
        "--steps", type=int, default=3, help="steps to time (at the smallest K, 3 at least); their median is told"
    )
    parser.add_argument(
        "--least-tiles",
        type=int,
        default=0,
        help="more steps where K is small (not at the smallest), until so many tiles",
    )
    parser.add_argument(
        "--memory-limit", default="auto", metavar="SIZE", help="of a rank, such as 6GiB; auto: what is free"
    )
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        help="the engine's --memory.budget; default: the memory limit for auto, none for others",
    )
    parser.add_argument("--section", default="scale_k", help="name of the section, and of its picture")
    parser.add_argument("--title", default="Memory and speed as K grows", help="heading of the section")
    add_chunk(parser)
    add_common(parser)
    args = parser.parse_args()
    args.k = sorted(set(args.k))
    settle(parser, args, ranks=max(args.ranks))
    if min(*args.k, *args.ranks, args.steps, args.tile) < 1:
        parser.error("--k, --ranks, --steps and --tile must be at least 1")
    try:
        for size, name in ((args.memory_limit, "--memory-limit"), (args.budget or "auto", "--budget")):
            if size != "auto":
                parse_size(size, name)
    except ConfigError as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    sys.exit(main())
