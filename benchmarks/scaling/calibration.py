"""The costs of the parts of a training step on this machine, each measured by itself, on one or several ranks at once.

A rank computes, reads and communicates as in a training step, but never takes one. `calibrate` starts this module once
per rank.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from slidescale.engine.logger import configure_logging
from slidescale.engine.memory.two_pass import Chunks, backpropagate, encode
from slidescale.engine.memory.usage import keep_freed_memory
from slidescale.engine.models.make import make_model
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh, join, stop_world
from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.process.launcher import is_main_rank
from slidescale.engine.strategies.make import Optimizing, StrategyName, make_strategy
from slidescale.kernels.dispatch import choose_kernels

from cells.drawn_slide import tile_coords
from cells.harness import Limits, run_world
from cells.ways import CLASSES, Cell, Source
from scaling.networks import Link

# Chunks that the encoder takes per turn, one after another as in a pass.
CHUNKS = 2
TURNS = 8
# Sides and number of the square weights of the two networks whose parameters are gathered.
SIDES = (16, 768)
LAYERS = 6
# Rows that pass these networks, so that ranks compute between gathers and wait for each other as in a step.
ROWS = 128


def calibrate(cell: Cell, *, slides: dict[int, Path], limits: Limits, log: Path) -> dict[str, Any]:
    """Measure with `cell.ranks` processes at once.

    Args:
        cell: what to measure; its k counts the tiles of all ranks together.
        slides: files to read from, by the side of their tiles in px; the side of the cell's tiles is among them.

    Returns:
        Seconds: "forward_s" and "both_s" per tile, "aggregate_s" for the tiles of a rank, "update_s" by strategy,
        "read_s" in processor time per tile, by its side. And "links" by operation: latency in s, bandwidth in bytes/s.

    Raises:
        RuntimeError: a rank failed or passed a limit; says why.
    """
    result = log.with_suffix(".json")
    words = [
        "-m",
        "scaling.calibration",
        json.dumps(cell.as_dict()),
        json.dumps({side: str(path) for side, path in slides.items()}),
    ]
    ended = run_world([*words, str(result)], ranks=cell.ranks, device=cell.device, limits=limits, log=log)
    if ended.status != "ok":
        raise RuntimeError(f"calibration with {cell.ranks} ranks: {ended.status}: {ended.message}")
    found = json.loads(result.read_text(encoding="utf-8"))
    result.unlink()
    return found


def run(cell: Cell, slides: dict[int, Path]) -> dict[str, Any]:
    """Measure everything as one rank; return the figures of the slowest rank."""
    keep_freed_memory()
    mesh = join()
    world, device = mesh.world, mesh.device
    model = fresh_model(cell, device)
    found: dict[str, Any] = computing(model, cell, world, device)
    found["update_s"] = {
        name: updating(name, cell, mesh, world, device) for name in (["single"] if world.size == 1 else ["ddp", "fsdp"])
    }
    found["read_s"] = {side: reading(path, replace(cell, tile=side), world) for side, path in slides.items()}
    found["links"] = {} if world.size == 1 else links(world, device)
    stop_world()
    return found


def fresh_model(cell: Cell, device: torch.device) -> SlideModel:
    """Make the model as a training run does."""
    config = cell.config()
    kernels, bf16 = choose_kernels(config.run.kernels, device), cell.dtype == "bfloat16"
    return make_model(config, classes=len(CLASSES), bf16=bf16, kernels=kernels).to(device).train()


def computing(model: SlideModel, cell: Cell, world: RankGroup, device: torch.device) -> dict[str, float]:
    """Time the two passes of the encoder, and the aggregator, without reading and communication."""
    size, side, local = int(cell.chunk), cell.tile, cell.k // cell.ranks
    tiles = torch.randint(0, 256, (CHUNKS * size, side, side, 3), dtype=torch.uint8).to(device)
    features = torch.randn(local, model.encoder.dim, device=device)
    places = torch.from_numpy(tile_coords(local, side) / side).to(device, torch.float32)
    chunks = Chunks(tiles, size, CHUNKS, seed=0, offset=0)
    # In place of a loss: the gradient of one class.
    label = torch.zeros(len(CLASSES), device=device).index_fill(0, torch.tensor(1, device=device), -1.0)
    encoded = encode(model, chunks)

    def forward() -> None:
        encode(model, chunks)

    def both() -> None:
        encoded.features.grad = torch.ones_like(encoded.features)
        backpropagate(model, chunks, encoded, Tensor.backward)

    def aggregate() -> None:
        logits, _ = model.aggregate(features.requires_grad_(), places, TileGroup())
        (logits * label).sum().backward()

    forward_s, both_s, aggregate_s = medians([forward, both, aggregate], world, device)
    return {"forward_s": forward_s / len(tiles), "both_s": both_s / len(tiles), "aggregate_s": aggregate_s}


def updating(name: StrategyName, cell: Cell, mesh: Mesh, world: RankGroup, device: torch.device) -> float:
    """Time the gradient norm and optimizer step of a strategy."""
    optimizing = Optimizing.as_settings_say(cell.config().optim, cell.schedule())
    strategy = make_strategy(name, fresh_model(cell, device), optimizing, mesh)

    def fill() -> None:
        for parameter in strategy.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    return medians([lambda: strategy.step()], world, device, before=fill)[0]


def reading(path: Path, cell: Cell, world: RankGroup) -> float:
    """Measure the processor seconds of reading a tile."""
    source = Source(path, cell)
    share = TileGroup(world.rank, world.size).share(cell.k)
    list(source.bags(cell.k, 1, share))  # opens the slide
    world.barrier()
    spent = []
    for _ in range(3):
        begin = time.process_time()
        list(source.bags(cell.k, 1, share))
        spent.append((time.process_time() - begin) / (share.stop - share.start))
    source.reader.close()
    return max(world.gather_objects(statistics.median(spent)))


def links(world: RankGroup, device: torch.device) -> dict[str, tuple[float, float]]:
    """Measure latency and bandwidth of each operation, with the copies that its callers make."""
    mesh = init_device_mesh(device.type, (world.size,))
    networks = [nn.Sequential(*(nn.Linear(side, side) for _ in range(LAYERS))).to(device) for side in SIDES]
    sharded = [fully_shard(copy.deepcopy(network), mesh=mesh, reshard_after_forward=True) for network in networks]
    rows = [torch.randn(ROWS, side, device=device) for side in SIDES]
    flats = [[parameter.detach().clone() for parameter in network.parameters()] for network in networks]
    sizes = [sum(part.nbytes for part in parts) for parts in flats]

    def reduce(parts: list[Tensor]) -> None:
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat)
        flat /= world.size
        for part, new in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(new.view_as(part))

    def compute(network: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            network(x)

    def scatter(parts: list[Tensor]) -> None:
        flat = torch.cat([part.reshape(-1) for part in parts])
        padded = flat[: len(flat) // world.size * world.size]
        own = flat.new_empty(len(padded) // world.size)
        dist.reduce_scatter_single(own, padded)
        own /= world.size

    small = torch.zeros(1, device=device)
    turns: list[Callable[[], object]] = [
        lambda: dist.all_reduce(small),
        partial(reduce, flats[1]),
        partial(scatter, flats[0]),
        partial(scatter, flats[1]),
        *(partial(compute, *each) for each in zip(sharded, rows, strict=True)),
        *(partial(compute, *each) for each in zip(networks, rows, strict=True)),
    ]
    times = medians(turns, world, device)
    # The cost of gathers where they are used: the forward of a sharded network less that of the same network whole.
    gathers = [max(0.0, with_gather - without) for with_gather, without in zip(times[4:6], times[6:8], strict=True)]
    n = world.size
    return {
        "all-reduce": _fit(n, times[0:2], [small.nbytes, sizes[1]], messages=(n - 1).bit_length(), passes=2),
        "all-gather": _fit(n, gathers, sizes, messages=n - 1, passes=1),
        "reduce-scatter": _fit(n, times[2:4], sizes, messages=n - 1, passes=1),
    }


def _fit(n: int, times: list[float], sizes: list[int], *, messages: int, passes: int) -> tuple[float, float]:
    """Solve for the latency and bandwidth with which the model gives these times at two sizes.

    Args:
        messages: number of messages of the small size, one after another.
        passes: number of times that the large size passes through the ring: 2 for an all-reduce.
    """
    per_byte = max((times[1] - times[0]) / (sizes[1] - sizes[0]), 1e-15)
    link = Link(max(0.0, times[0] - per_byte * sizes[0]) / messages, passes * (n - 1) / n / per_byte)
    return link.latency, link.bandwidth


def medians(
    turns: list[Callable[[], object]],
    world: RankGroup,
    device: torch.device,
    before: Callable[[], None] = lambda: None,
) -> list[float]:
    """Time each in turns, so that a slow moment meets all of them; return medians of the slowest rank per turn, s."""
    spent: list[list[float]] = [[] for _ in turns]
    for turn in range(TURNS + 1):
        for index, each in enumerate(turns):
            before()
            world.barrier()
            begin = time.perf_counter()
            each()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first allocates and compiles
                spent[index].append(time.perf_counter() - begin)
    everyones = world.gather_objects(spent)
    return [statistics.median(map(max, zip(*ranks, strict=True))) for ranks in zip(*everyones, strict=True)]


def main() -> None:
    """Parse the command line of one rank, and run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cell", type=json.loads)
    parser.add_argument("slides", type=json.loads)
    parser.add_argument("result", type=Path)
    args = parser.parse_args()
    configure_logging(is_main_rank())
    found = run(Cell(**args.cell), {int(side): Path(path) for side, path in args.slides.items()})
    if is_main_rank():
        args.result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
