r"""A model of a training step's time on many GPUs, each with equally many tiles, held against steps measured here.

    python benchmarks/weak_scaling.py --encoder resnet18 --tile 96 --tiles-a-rank 64 \
        --project-encoder vit_base_patch16_224 --project-tiles 1024 --device-name H100 --network dgx-h100 \
        --strategy ddp zero3 fsdp --gpus 1 8 64 512 1024 --out results/

First the parts of a step are measured on this machine, each by itself (see scaling/calibration.py). The model puts
steps together from them, and steps of the engine are measured beside. Where the two differ by more than 15%, both are
measured again, up to three times in all, and medians are compared. The exit status is 1 where these differ. Then the
same model predicts steps on devices and networks by their data sheets (see scaling/model.py and scaling/networks.py).

In --out: weak_scaling.jsonl (what was measured, one row per check, one row per projection), weak_scaling.png, logs/.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from slidescale.engine.errors import ConfigError
from slidescale.engine.files import write_text
from slidescale.engine.memory.devices import find_device

from cells.arguments import HEAD, add_common, settle
from cells.drawn_slide import write_slide
from cells.ways import STRATEGIES
from common.machine import describe_machine, machine_line
from common.page import write_section
from scaling.checking import check, check_cells, costs_here, job_of, shape_for, wrong
from scaling.networks import find_network
from scaling.picture import draw
from scaling.projection import assumptions, project, project_devices
from scaling.tables import check_table, parts_table, projection_table

# Numbers of ranks like the measured ones for which the model predicts, if there were so many on this machine.
MORE_RANKS = (1, 2, 8, 64)


def main() -> int:
    """Measure, predict, print and write; return the exit status."""
    args = parse()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of every process that is measured
    stamp = describe_machine(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"ranks of {args.threads} threads; {machine_line(stamp)}", flush=True)
    shape = shape_for(check_cells(args)[0])
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        slides = {side: Path(folder) / f"slide-{side}.tiff" for side in {args.tile, args.project_tile}}
        for side, path in slides.items():
            write_slide(path, args.ranks * args.tiles_a_rank, side)
        checked, parts = check(args, slides, shape)
    here = replace(check_cells(args)[-1], policy=args.policy)
    # More ranks would have as many cores each as these have, when all of them compute at once.
    costs = costs_here(parts[args.ranks], here, threads=args.threads, cores=args.cores)
    job = job_of(here, shape, tile_ranks=max(MORE_RANKS))
    local = project("this machine", job, costs, list(MORE_RANKS), args.check_strategy)
    projected, projected_shape = project_devices(args, parts[1]["read_s"][str(args.project_tile)])
    parts_rows = [{"kind": "parts", "ranks": ranks, **found} for ranks, found in parts.items()]
    jsonl = args.out / "weak_scaling.jsonl"
    every = (*parts_rows, *checked, *local, *projected)
    write_text(jsonl, "".join(json.dumps(row | {"stamp": stamp}) + "\n" for row in every))
    lines = wrong(checked)
    texts = [
        f"**Measured** on this machine: parts of a step by themselves ({args.encoder}, {args.tile} px, {args.dtype}, "
        f"chunks of {here.chunk}), with as many ranks at once as the first column says.",
        parts_table(parts, args.tile),
        "**The model held against measured steps** of the engine, which it has not seen:",
        check_table(checked),
        *([f"**The model is wrong here**: {'; '.join(lines)}."] if lines else []),
        f"**Modelled**: {args.project_encoder}, {args.project_tile} px, {args.project_tiles:,} tiles per GPU, policy "
        f"{args.policy}, on {args.device_name} and {args.network}. Only reading was measured.",
        projection_table(projected, "GPUs"),
        assumptions(args),
        "**Modelled** for more ranks like those of this machine, from its measured parts, as if each pair were "
        f"connected like the {args.ranks} here:",
        projection_table(local, "ranks"),
    ]
    print("\n" + "\n\n".join(texts))
    picture = args.out / "weak_scaling.png"
    title = (
        f"{args.project_encoder}, {args.project_tile} px, {args.project_tiles:,} tiles per GPU, policy {args.policy}, "
        f"{args.device_name}, {args.network}"
    )
    draw(picture, projected, shown=args.shown or args.strategy[-1], shape=projected_shape, title=title)
    print(f"\n{jsonl}, {picture}")
    if not args.no_page:
        args.page.parent.mkdir(parents=True, exist_ok=True)
        shown = args.page.with_name("weak_scaling.png")
        shutil.copyfile(picture, shown)
        command = f"    python benchmarks/weak_scaling.py {shlex.join(sys.argv[1:])}"
        image = f"![Modelled step time and efficiency against the number of GPUs]({shown.name})"
        head = ["## Weak scaling", command, f"On {machine_line(stamp)}.", image]
        write_section(args.page, HEAD, "weak scaling", "\n\n".join([*head, *texts]))
    for line in lines:
        print(f"PREDICTION IS OFF: {line}", file=sys.stderr)
    return 1 if lines else 0


def parse() -> argparse.Namespace:
    """Parse the command line.

    Raises:
        SystemExit: a setting is wrong; says which.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles-a-rank", type=int, default=64, help="measured here")
    parser.add_argument("--check-policy", nargs="+", default=["recompute", "keep"], choices=["recompute", "keep"])
    parser.add_argument("--check-strategy", nargs="+", default=["ddp", "fsdp"], choices=["ddp", "fsdp"])
    parser.add_argument("--ranks", type=int, default=2, help="measured here at once, beside a single one")
    parser.add_argument("--steps", type=int, default=5, help="steps to time; their median is compared")
    parser.add_argument("--project-encoder", default="vit_base_patch16_224", help="any timm model, modelled")
    parser.add_argument("--project-tile", type=int, default=224, help="side of a modelled tile, px")
    parser.add_argument("--project-tiles", type=int, default=1024, help="tiles per GPU, modelled")
    parser.add_argument("--device-name", default="H100", help="of the table in engine/memory/devices.py")
    parser.add_argument("--network", default="dgx-h100", help="of the table in benchmarks/scaling/networks.py")
    parser.add_argument(
        "--cores-a-gpu",
        type=float,
        default=14,
        help="host cores per GPU that read tiles; a DGX H100 has 112 for 8 GPUs",
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256, 1024])
    parser.add_argument("--tile-ranks", type=int, help="most GPUs that share a slide; default: all of them")
    parser.add_argument("--strategy", nargs="+", default=["ddp", "zero3", "fsdp"], choices=STRATEGIES[1:])
    parser.add_argument("--shown", help="strategy whose terms are drawn; default: the last one")
    parser.add_argument("--policy", default="recompute", choices=["recompute", "keep"], help="modelled")
    add_common(parser, tile=96, time_limit=600)
    args = parser.parse_args()
    if args.ranks < 2:
        parser.error(f"--ranks {args.ranks}: a single rank is measured anyway; 2 or more")
    if min(*args.gpus, args.steps, args.tile, args.tiles_a_rank, args.project_tiles) < 1:
        parser.error("--gpus, --steps, --tile, --tiles-a-rank and --project-tiles must be at least 1")
    if args.shown and args.shown not in args.strategy:
        parser.error(f"--shown {args.shown}: must be one of --strategy {' '.join(args.strategy)}")
    settle(parser, args, ranks=args.ranks)
    try:
        find_device(args.device_name)
        network = find_network(args.network)
    except ConfigError as error:
        parser.error(str(error).replace("--device is", "--device-name is"))
    args.gpus = sorted(set(args.gpus))
    for count in (*args.gpus, *([args.tile_ranks] if args.tile_ranks else [])):
        if count > network.per_node and count % network.per_node:
            parser.error(f"{count} GPUs do not fill nodes of {network.per_node}, as --network {network.name} has")
    if args.tile_ranks and any(count > args.tile_ranks and count % args.tile_ranks for count in args.gpus):
        parser.error(f"--tile-ranks {args.tile_ranks} must divide larger numbers of --gpus")
    args.cores = len(os.sched_getaffinity(0))
    args.threads = max(1, args.cores // args.ranks)
    return args


if __name__ == "__main__":
    sys.exit(main())
