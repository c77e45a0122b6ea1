"""A sweep over K: its configurations, and the rows that they give, at one K after another."""

import argparse
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from slidescale.engine.units import parse_size

from cells.cell import PLANTED, measure
from cells.harness import SHARE_OF_FREE, Ended, Limits, free_bytes
from cells.judgement import Judge
from cells.rows import Rows
from cells.sweep_table import configuration_of, row_line
from cells.ways import Cell

# Columns that every row has: those of its settings, and those that are measured.
SETTINGS = ("k", "policy", "strategy", "ranks", "encoder", "tile", "chunk", "dtype", "device")
MEASURED = ("peak_gib", "base_gib", "step_s", "tiles_per_s", "slides_per_h", "gradient_error")


def configurations(args: argparse.Namespace) -> tuple[list[Cell], list[str]]:
    """List each configuration at the smallest K, and a line for each combination that cannot be one."""
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
                cell = replace(cell, budget=budget or (_budget(cell, args) if policy == "auto" else 0))
                found.append(cell)
    return found, list(dict.fromkeys(missing))


def steps_at(k: int, args: argparse.Namespace) -> int:
    """Count the steps to time: at least three at the smallest K, where the result is compared."""
    return max(args.steps, 3 if k == min(args.k) else math.ceil(args.least_tiles / k))


def _memory_limit(cell: Cell, args: argparse.Namespace) -> int:
    """Bytes that a rank may hold."""
    if args.memory_limit != "auto":
        return parse_size(args.memory_limit, "--memory-limit")
    return free_bytes(cell.device, cell.ranks)


def _budget(cell: Cell, args: argparse.Namespace) -> int:
    """Bytes that policy auto plans for; on a GPU a part of the limit is left to the allocator, as in the engine."""
    return round(_memory_limit(cell, args) * (SHARE_OF_FREE if cell.device == "cuda" else 1))


def sweep(cells: list[Cell], args: argparse.Namespace, rows: Rows, slide: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each configuration, K ascending."""
    free = Limits(args.time_limit, free_bytes(args.device))
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
                limits = Limits(args.time_limit, _memory_limit(cell, args))
                row = rows.add(_measure_row(cell, found, judge, limits, args, slide), settings)
            found.append(row)
            done += 1
            line = f"[{done}/{total}] {configuration_of(row)}, K = {k:,}: {row_line(row)}"
            print(line + " (measured before)" * again, flush=True)
        yield found


def _measure_row(
    cell: Cell, before: list[dict[str, Any]], judge: Judge, limits: Limits, args: argparse.Namespace, slide: Path
) -> dict[str, Any]:
    """Measure a cell; it is not run where a smaller K has failed already."""
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
