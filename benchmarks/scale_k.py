r"""Memory and speed of a training step as K grows, the number of tiles: the engine beside other ways to train.

    python benchmarks/scale_k.py --k 64 256 1024 4096 --policy keep recompute offload auto \
        --strategy single zero3 fsdp --ranks 1 2 --baseline hub checkpoint frozen --out results/

Tiles are read from a slide that is drawn for it. Each cell (a configuration at one K) runs in processes of its own,
under a limit of time and memory; a cell that passes a limit is a row that says so. At the smallest K, each
configuration is first compared with plain autograd, for which memory must suffice there. No speed is reported for a
configuration that fails, and the exit status is then 1. An interrupted sweep goes on where it stopped, given the same
--out.

In --out: scale_k.jsonl (one row per cell), scale_k.png, logs/ (the output of each cell's processes).
"""

import argparse
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from slidescale.engine.errors import ConfigError
from slidescale.engine.units import GIB, parse_size

from cells.arguments import HEAD, add_chunk, add_common, settle
from cells.drawn_slide import write_slide
from cells.rows import Rows
from cells.sweep import configurations, sweep
from cells.sweep_picture import draw
from cells.sweep_table import configuration_of, sweep_tables
from cells.ways import BASELINES, POLICIES, STRATEGIES
from common.machine import describe_machine, machine_line
from common.page import write_section


def main() -> int:
    """Measure, print and write; return the exit status."""
    args = parse()
    cells, missing = configurations(args)
    stamp = describe_machine(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.out / "scale_k.jsonl", stamp)
    print(f"{len(cells)} configurations at K = {', '.join(f'{k:,}' for k in args.k)}; {machine_line(stamp)}")
    for each in missing:
        print(f"left out: {each}")
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        slide = Path(folder) / "slide.tiff"
        write_slide(slide, max(args.k), args.tile)
        found = list(sweep(cells, args, rows, slide))
    text = sweep_tables(found)
    print(f"\n{text}\n\n{args.out / 'scale_k.jsonl'}", end="")
    if any(row["status"] == "ok" for each in found for row in each):
        show(args, found, text, stamp)
    wrong = [row for each in found for row in each if row["status"] in ("wrong gradient", "failed")]
    for row in wrong:
        line = f"{row['status'].upper()}: {configuration_of(row)}, K = {row['k']:,}: {row['message']}"
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def show(args: argparse.Namespace, found: list[list[dict[str, Any]]], text: str, stamp: dict[str, Any]) -> None:
    """Draw the picture, and write tables and picture into the page."""
    picture = args.out / "scale_k.png"
    limit = None if args.memory_limit == "auto" else parse_size(args.memory_limit, "--memory-limit") / GIB
    draw(picture, [(configuration_of(each[0]), each) for each in found], limit_gib=limit)
    print(f", {picture}")
    if args.no_page:
        return
    command = f"    python benchmarks/scale_k.py {shlex.join(sys.argv[1:])}"
    parts = [f"## {args.title}", command, f"On {machine_line(stamp)}."]
    args.page.parent.mkdir(parents=True, exist_ok=True)
    if len(found) > 1:
        shown = args.page.with_name(f"{args.section}.png")
        shutil.copyfile(picture, shown)
        parts.append(f"![Memory and speed against the number of tiles]({shown.name})")
    write_section(args.page, HEAD, args.section, "\n\n".join([*parts, text]))


def parse() -> argparse.Namespace:
    """Parse the command line.

    Raises:
        SystemExit: a setting is wrong; says which.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[64, 256, 1024], help="tiles of the slide")
    parser.add_argument("--policy", nargs="*", default=["keep", "recompute", "auto"], choices=POLICIES)
    parser.add_argument("--strategy", nargs="+", default=["single"], choices=STRATEGIES)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="processes that share the slide")
    parser.add_argument("--baseline", nargs="*", default=[], choices=BASELINES, help="other ways to train")
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        help="steps to time (at least 3 at the smallest K); their median is reported",
    )
    parser.add_argument(
        "--least-tiles",
        type=int,
        default=0,
        help="time more steps where K is small (except the smallest), for at least this many tiles",
    )
    parser.add_argument(
        "--memory-limit", default="auto", metavar="SIZE", help="per rank, such as 6GiB; auto: what is free"
    )
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        help="the engine's --memory.budget; default: the memory limit for auto, none for other policies",
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
