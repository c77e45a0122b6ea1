"""Predictions for more ranks than there are, by the parts of this machine or by data sheets."""

import argparse
from dataclasses import replace
from typing import Any

import torch

from slidescale.engine.memory.devices import find_device
from slidescale.engine.memory.estimate import BANDWIDTH_UTILISATION, UTILISATION
from slidescale.engine.memory.footprint import measure as measure_footprint
from slidescale.engine.memory.planner import CHUNK_CAP, sizes_to_measure

from cells.ways import Cell
from scaling.checking import job_of, model_of, shape_for
from scaling.model import Costs, Job, Shape, device_costs, efficiency, messages, step_terms
from scaling.networks import find_network


def project(kind: str, base: Job, costs: Costs, ranks: list[int], strategies: list[str]) -> list[dict[str, Any]]:
    """Predict a step for each strategy and number of ranks; one row each."""
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
    """Predict steps on the named device and network.

    Args:
        read_s: processor seconds of reading a tile.

    Returns:
        The rows, and the shape of the model.
    """
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


def assumptions(args: argparse.Namespace) -> str:
    """Write what the projection takes for granted."""
    return (
        f"Assumed: the device reaches {UTILISATION:.0%} of the bf16 arithmetic of its data sheet, and "
        f"{BANDWIDTH_UTILISATION:.0%} of the bandwidth of its memory and links; NCCL's latencies are those of its own "
        "model; parameters, gradients and gathers are fp32; AdamW; fsdp gathers a block while another computes, "
        "zero3 does not; rings inside a node and across nodes, trees across nodes where these make an all-reduce "
        "faster, and recursive doubling for small ones; ranks do not wait for a slower one; "
        f"{args.cores_a_gpu:g} host cores per GPU read tiles, each as fast as one of this "
        "machine (measured), while the GPU computes."
    )
