"""The model held against measured steps: parts and whole steps are measured, and predictions compared."""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slidescale.engine.config import ModelConfig
from slidescale.engine.memory.planner import CHUNK_CAP
from slidescale.engine.models.make import make_model
from slidescale.engine.models.slide_model import SlideModel
from slidescale.kernels.dispatch import choose_kernels

from cells.cell import measure
from cells.harness import Limits, free_bytes
from cells.ways import CLASSES, Cell
from scaling.calibration import calibrate
from scaling.model import Costs, Job, Shape, shape_of, step_terms
from scaling.networks import Link, Network

# The largest difference between a predicted and a measured step, as a share of the measured one.
TOLERANCE = 0.15
# Most times that parts and steps are measured.
ROUNDS = 3


def check_cells(args: argparse.Namespace) -> list[Cell]:
    """List what is measured: each policy on one rank, and under each strategy on `args.ranks`."""
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
    """Make the model of a cell as a recipe does, with random weights."""
    config = replace(cell.config(), model=ModelConfig(encoder=cell.encoder, dropout=0.0, pretrained=False))
    kernels = choose_kernels(config.run.kernels, torch.device(cell.device))
    return make_model(config, classes=len(CLASSES), bf16=cell.dtype == "bfloat16", kernels=kernels)


def shape_for(cell: Cell) -> Shape:
    """Describe the model of a cell."""
    with torch.device("meta"):
        return shape_of(model_of(cell))


def costs_here(found: dict[str, Any], cell: Cell, *, threads: int, cores: float) -> Costs:
    """Return the costs of this machine, where `cell.ranks` ranks were measured at once.

    Args:
        found: as `calibrate` returns it.
        threads: with which a rank computes.
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
    """Describe the step of a cell."""
    return Job(
        shape=shape,
        strategy=cell.strategy,
        policy=cell.policy,
        tiles=cell.k // cell.ranks,
        chunk=int(cell.chunk),
        tile_ranks=tile_ranks,
    )


def median_of(rounds: list[Any]) -> Any:
    """Take the median of each number in nested dictionaries and lists of equal form."""
    first = rounds[0]
    if isinstance(first, dict):
        return {key: median_of([each[key] for each in rounds]) for key in first}
    if isinstance(first, list):
        return [median_of(list(each)) for each in zip(*rounds, strict=True)]
    return statistics.median(rounds)


def check(
    args: argparse.Namespace, slides: dict[int, Path], shape: Shape
) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """Measure parts and steps in turns.

    Returns:
        One row per cell, with predicted and measured seconds; and the parts by number of ranks.
    """
    cells, rows = check_cells(args), []
    limits = Limits(args.time_limit, free_bytes(args.device, args.ranks))
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
        # A single rank updates under no strategy; it has its own parts.
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
    """Write a line for each prediction that is not within TOLERANCE of what was measured."""
    return [
        f"{name_of(row)}: predicted {row['predicted_s']:.3g} s, measured {row['measured_s']:.3g} s: "
        f"{row['ratio'] - 1:+.0%}; {TOLERANCE:.0%} is allowed"
        for row in rows
        if not abs(row["ratio"] - 1) <= TOLERANCE  # NaN is wrong, too
    ]


def name_of(row: dict[str, Any]) -> str:
    """Name a checked configuration."""
    return f"{row['policy']}, {row['strategy']}" + (f" × {row['ranks']}" if row["ranks"] > 1 else "")
