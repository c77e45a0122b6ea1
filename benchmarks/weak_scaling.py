r"""A model of a training step's time on many GPUs, each with as many tiles, held against steps measured here.

    python benchmarks/weak_scaling.py --encoder resnet18 --tile 96 --tiles-a-rank 64 \
        --project-encoder vit_base_patch16_224 --project-tiles 1024 --device-name H100 --network dgx-h100 \
        --strategy ddp zero3 fsdp --gpus 1 8 64 512 1024 --out results/

First the parts of a step are measured on this machine, each by itself (see calibration.py); the model makes steps of
them, and the engine's own are measured beside. Where the two differ by more than 15%, both are measured again, up to
three times in all, and medians are compared; the exit status is 1 where these differ. Then the same model tells steps
on devices and networks by their data sheets (see scaling_model.py and networks.py).

In --out: weak_scaling.jsonl (what was measured, a row a check, a row a projection), weak_scaling.png, logs/.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slidescale.engine.config import ModelConfig
from slidescale.engine.errors import ConfigError
from slidescale.engine.markdown import table
from slidescale.engine.memory.devices import find_device
from slidescale.engine.memory.estimate import BANDWIDTH_UTILISATION, UTILISATION
from slidescale.engine.memory.footprint import measure as measure_footprint
from slidescale.engine.memory.planner import CHUNK_CAP, sizes_to_measure
from slidescale.engine.memory.usage import available_bytes
from slidescale.engine.models.make import make_model
from slidescale.engine.models.slide_model import SlideModel
from slidescale.kernels.dispatch import choose_kernels

from arguments import HEAD, add_common, settle
from cells.cell import measure
from cells.drawn_slide import write_slide
from cells.harness import Limits, describe_machine, tell_machine
from cells.ways import CLASSES, STRATEGIES, Cell
from page import write_section
from scaling.calibration import calibrate
from scaling.model import TERMS, Costs, Job, Shape, device_costs, efficiency, messages, shape_of, step_terms
from scaling.networks import Link, Network, find_network
from scaling.picture import draw

# The largest difference between a predicted and a measured step, as a share of the measured one.
TOLERANCE = 0.15
# Times that parts and steps are measured, at most.
ROUNDS = 3
SHARE_OF_FREE = 0.9
# Ranks on this machine that the model is also asked about, if there were so many like those that were measured.
MORE_RANKS = (1, 2, 8, 64)


def check_cells(args: argparse.Namespace) -> list[Cell]:
    """What is measured: each policy on one rank, and under each strategy on `args.ranks`."""
    base = Cell(
        policy="",
        strategy="single",
        ranks=1,
        k=args.tiles_a_rank,
        encoder=args.encoder,
        tile=args.tile,
        chunk=min(args.tiles_a_rank, CHUNK_CAP[args.device]),
        dtype=args.dtype,
        device=args.device,
        steps=args.steps,
    )
    many = replace(base, ranks=args.ranks, k=args.ranks * args.tiles_a_rank)
    return [
        replace(cell, policy=policy, strategy=strategy)
        for cell, strategies in ((base, ["single"]), (many, args.check_strategy))
        for strategy in strategies
        for policy in args.check_policy
    ]


def model_of(cell: Cell) -> SlideModel:
    """The recipe's model for a cell, without weights."""
    config = replace(cell.config(), model=ModelConfig(encoder=cell.encoder, dropout=0.0, pretrained=False))
    kernels = choose_kernels(config.run.kernels, torch.device(cell.device))
    return make_model(config, classes=len(CLASSES), bf16=cell.dtype == "bfloat16", kernels=kernels)


def shape_for(cell: Cell) -> Shape:
    """Of its model."""
    with torch.device("meta"):
        return shape_of(model_of(cell))


def costs_here(found: dict[str, Any], cell: Cell, *, threads: int, cores: float) -> Costs:
    """Of this machine, where `cell.ranks` ranks were measured at once.

    Args:
        found: as `calibrate` returns it.
        threads: that a rank computes with.
        cores: of the machine.
    """
    nothing = Link(0.0, float("inf"))
    measured = {operation: Link(*link) for operation, link in found["links"].items()}
    on_gpu = cell.device == "cuda"
    return Costs(
        forward_s=found["forward_s"],
        both_s=found["both_s"],
        aggregate_s=found["aggregate_s"],
        update_s=lambda strategy, ranks: found["update_s"][strategy if ranks > 1 else "single"],
        read_s=found["read_s"][str(cell.tile)],
        cores=cores / cell.ranks,
        readers=cell.config().data.readers,
        computing=0 if on_gpu else threads,
        hides=("fsdp",) if on_gpu else (),
        network=Network("this machine", 1 << 30, nothing, nothing, measured=measured),
    )


def job_of(cell: Cell, shape: Shape, *, tile_ranks: int) -> Job:
    """A cell's step."""
    return Job(
        shape=shape,
        strategy=cell.strategy,
        policy=cell.policy,
        tiles=cell.k // cell.ranks,
        chunk=int(cell.chunk),
        tile_ranks=tile_ranks,
    )


def median_of(rounds: list[Any]) -> Any:
    """The median of each number in dictionaries and lists of one form."""
    first = rounds[0]
    if isinstance(first, dict):
        return {key: median_of([each[key] for each in rounds]) for key in first}
    if isinstance(first, list):
        return [median_of(list(each)) for each in zip(*rounds, strict=True)]
    return statistics.median(rounds)


def check(
    args: argparse.Namespace, slides: dict[int, Path], shape: Shape
) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """Parts and steps measured in turns: a row a cell, with predicted and measured seconds; and the parts by ranks."""
    cells, rows = check_cells(args), []
    sharing = args.ranks if args.device == "cpu" else 1  # a GPU is one rank's alone
    limits = Limits(args.time_limit, int(SHARE_OF_FREE * available_bytes(torch.device(args.device)) / sharing))
    parts: dict[int, list[dict[str, Any]]] = {}
    steps: dict[Cell, list[float]] = {}
    for turn in range(1, ROUNDS + 1):
        for ranks in sorted({cell.ranks for cell in cells}):
            mine = [cell for cell in cells if cell.ranks == ranks]
            log = args.out / "logs" / f"weak-scaling-parts-{ranks}.log"
            sides = slides if ranks == 1 else {args.tile: slides[args.tile]}
            parts.setdefault(ranks, []).append(calibrate(mine[0], slides=sides, limits=limits, log=log))
            for cell in mine:
                log = args.out / "logs" / f"weak-scaling-{cell.strategy}-{cell.policy}-{ranks}.log"
                ended, row = measure(cell, slide=slides[args.tile], limits=limits, log=log)
                if ended.status != "ok":
                    raise RuntimeError(f"{cell.policy}, {cell.strategy} × {ranks}: {ended.status}: {ended.message}")
                steps.setdefault(cell, []).append(row["step_s"])
        found = {ranks: median_of(each) for ranks, each in parts.items()}
        # A rank alone has no strategy to be told of, and its own parts.
        whole = {ranks: each | {"update_s": found[1]["update_s"] | each["update_s"]} for ranks, each in found.items()}
        rows = []
        for cell in cells:
            costs = costs_here(whole[cell.ranks], cell, threads=args.threads, cores=args.cores)
            terms = step_terms(job_of(cell, shape, tile_ranks=cell.ranks), costs, cell.ranks)
            predicted, measured = sum(terms.values()), statistics.median(steps[cell])
            rows.append(
                {
                    "kind": "check",
                    "policy": cell.policy,
                    "strategy": cell.strategy,
                    "ranks": cell.ranks,
                    "k": cell.k,
                    "predicted_s": predicted,
                    "measured_s": measured,
                    "ratio": predicted / measured,
                    "terms": terms,
                    "rounds": turn,
                }
            )
        ratios = ", ".join(f"{name_of(row)} {row['ratio']:.2f}" for row in rows)
        print(f"round {turn}, predicted / measured: {ratios}", flush=True)
        if not wrong(rows):
            break
    return rows, whole


def wrong(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each prediction that is not within TOLERANCE of what was measured."""
    return [
        f"{name_of(row)}: predicted {row['predicted_s']:.3g} s, measured {row['measured_s']:.3g} s: "
        f"{row['ratio'] - 1:+.0%}, and may differ by {TOLERANCE:.0%}"
        for row in rows
        if not abs(row["ratio"] - 1) <= TOLERANCE  # and so is one that is not a number
    ]


def name_of(row: dict[str, Any]) -> str:
    """A checked configuration."""
    return f"{row['policy']}, {row['strategy']}" + (f" × {row['ranks']}" if row["ranks"] > 1 else "")


def project(kind: str, base: Job, costs: Costs, ranks: list[int], strategies: list[str]) -> list[dict[str, Any]]:
    """A row for each strategy and number of ranks."""
    rows = []
    for strategy in strategies:
        job = replace(base, strategy=strategy)
        for n in ranks:
            terms = step_terms(job, costs, n)
            rows.append(
                {
                    "kind": kind,
                    "strategy": strategy,
                    "policy": job.policy,
                    "gpus": n,
                    "k": job.k(n),
                    "slides": n // job.sharing(n),
                    "tiles_a_rank": job.tiles,
                    "step_s": sum(terms.values()),
                    "terms": terms,
                    "efficiency": efficiency(job, costs, n),
                    "bytes": sum(message.calls * message.size for message in messages(job, n)),
                }
            )
    return rows


def project_devices(args: argparse.Namespace, read_s: float) -> tuple[list[dict[str, Any]], Shape]:
    """On the named device and network; and the shape of the model."""
    cell = Cell(
        policy=args.policy,
        strategy="single",
        ranks=1,
        k=args.project_tiles,
        encoder=args.project_encoder,
        tile=args.project_tile,
        chunk=min(args.project_tiles, CHUNK_CAP["cuda"]),
        dtype="bfloat16",
        device="cpu",
        steps=1,
    )
    chunks, bags = sizes_to_measure(args.project_tiles, int(cell.chunk), "cpu")
    with torch.device("meta"):
        tile = torch.empty((cell.tile, cell.tile, 3), dtype=torch.uint8)
        footprint = measure_footprint(model_of(cell), tile, chunks=[chunks[0], chunks[-1]], bags=bags)
    job = job_of(cell, shape_for(cell), tile_ranks=args.tile_ranks or max(args.gpus))
    costs = device_costs(
        find_device(args.device_name),
        find_network(args.network),
        footprint,
        job,
        bf16=True,
        read_s=read_s,
        cores=args.cores_a_gpu,
    )
    return project("projection", job, costs, args.gpus, args.strategy), job.shape


def tell_check(rows: list[dict[str, Any]]) -> str:
    """The table of what was predicted and measured."""
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


def tell_projection(rows: list[dict[str, Any]], what: str) -> str:
    """The table of a projection; terms in milliseconds."""
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


def tell_parts(parts: dict[int, dict[str, Any]], tile: int) -> str:
    """The table of what was measured by itself."""
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
        "forward, ms a tile",
        "forward and backward",
        "aggregator, ms",
        "reading, ms a tile",
        "update, ms",
        "all-reduce",
        "all-gather",
        "reduce-scatter",
    ]
    return table(header, rows)


def assumptions(args: argparse.Namespace) -> str:
    """What the projection takes for granted."""
    return (
        f"Assumed: the device reaches {UTILISATION:.0%} of its data sheet's bf16 arithmetic and "
        f"{BANDWIDTH_UTILISATION:.0%} of its memory's bandwidth and of its links'; NCCL's latencies are those of its "
        "own model; parameters, gradients and gathers are fp32; AdamW; fsdp gathers a block while another computes, "
        "zero3 does not; rings inside a node and across nodes, trees across where an all-reduce is faster so, and "
        "recursive doubling for small ones; ranks do not wait for a slower one; "
        f"{args.cores_a_gpu:g} host cores a GPU read tiles, each as fast as one of this "
        "machine (measured), while the GPU computes."
    )


def main() -> int:
    """Measure, predict, print and write; the exit status."""
    args = parse()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of every process that is measured
    stamp = describe_machine(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"ranks of {args.threads} threads; {tell_machine(stamp)}", flush=True)
    shape = shape_for(check_cells(args)[0])
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        slides = {side: Path(folder) / f"slide-{side}.tiff" for side in {args.tile, args.project_tile}}
        for side, path in slides.items():
            write_slide(path, args.ranks * args.tiles_a_rank, side)
        checked, parts = check(args, slides, shape)
    here = replace(check_cells(args)[-1], policy=args.policy)
    # Ranks share the cores with the most at once, and have no more of them if there were more.
    costs = costs_here(parts[args.ranks], here, threads=args.threads, cores=args.cores)
    job = job_of(here, shape, tile_ranks=max(MORE_RANKS))
    local = project("this machine", job, costs, list(MORE_RANKS), args.check_strategy)
    projected, projected_shape = project_devices(args, parts[1]["read_s"][str(args.project_tile)])
    parts_rows = [{"kind": "parts", "ranks": ranks, **found} for ranks, found in parts.items()]
    jsonl = args.out / "weak_scaling.jsonl"
    jsonl.write_text(
        "".join(json.dumps(row | {"stamp": stamp}) + "\n" for row in (*parts_rows, *checked, *local, *projected)),
        encoding="utf-8",
    )
    lines = wrong(checked)
    texts = [
        f"**Measured** on this machine: parts of a step by themselves ({args.encoder}, {args.tile} px, {args.dtype}, "
        f"chunks of {here.chunk}), with as many ranks computing at once as told.",
        tell_parts(parts, args.tile),
        "**The model held against measured steps** of the engine, which it has not seen:",
        tell_check(checked),
        *([f"**The model is wrong here**: {'; '.join(lines)}."] if lines else []),
        f"**Modelled**: {args.project_encoder}, {args.project_tile} px, {args.project_tiles:,} tiles a GPU, policy "
        f"{args.policy}, on {args.device_name} and {args.network}. Nothing of it was measured but reading.",
        tell_projection(projected, "GPUs"),
        assumptions(args),
        f"**Modelled** for more ranks like this machine's, from its measured parts, as if each pair were connected as "
        f"the {args.ranks} here:",
        tell_projection(local, "ranks"),
    ]
    print("\n" + "\n\n".join(texts))
    picture = args.out / "weak_scaling.png"
    title = (
        f"{args.project_encoder}, {args.project_tile} px, {args.project_tiles:,} tiles a GPU, policy {args.policy}, "
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
        head = ["## Weak scaling", command, f"On {tell_machine(stamp)}.", image]
        write_section(args.page, HEAD, "weak scaling", "\n\n".join([*head, *texts]))
    for line in lines:
        print(f"PREDICTION IS OFF: {line}", file=sys.stderr)
    return 1 if lines else 0


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        SystemExit: with what is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles-a-rank", type=int, default=64, help="measured here")
    parser.add_argument("--check-policy", nargs="+", default=["recompute", "keep"], choices=["recompute", "keep"])
    parser.add_argument("--check-strategy", nargs="+", default=["ddp", "fsdp"], choices=["ddp", "fsdp"])
    parser.add_argument("--ranks", type=int, default=2, help="measured here at once, beside one alone")
    parser.add_argument("--steps", type=int, default=5, help="steps to time; their median is compared")
    parser.add_argument("--project-encoder", default="vit_base_patch16_224", help="any timm model, modelled")
    parser.add_argument("--project-tile", type=int, default=224, help="side of a modelled tile, px")
    parser.add_argument("--project-tiles", type=int, default=1024, help="tiles a GPU, modelled")
    parser.add_argument("--device-name", default="H100", help="of the table in engine/memory/devices.py")
    parser.add_argument("--network", default="dgx-h100", help="of the table in benchmarks/networks.py")
    parser.add_argument("--cores-a-gpu", type=float, default=14, help="that read tiles; a DGX H100 has 112 for 8 GPUs")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256, 1024])
    parser.add_argument("--tile-ranks", type=int, help="most GPUs that share a slide; default: all of them")
    parser.add_argument("--strategy", nargs="+", default=["ddp", "zero3", "fsdp"], choices=STRATEGIES[1:])
    parser.add_argument("--shown", help="strategy whose terms are drawn; default: the last one")
    parser.add_argument("--policy", default="recompute", choices=["recompute", "keep"], help="modelled")
    add_common(parser, tile=96, time_limit=600)
    args = parser.parse_args()
    if args.ranks < 2:
        parser.error(f"--ranks {args.ranks}: one rank alone is measured anyway, 2 or more")
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
