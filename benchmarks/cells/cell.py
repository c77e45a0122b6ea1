"""A cell in its own processes: steps of one configuration, their time and memory, and their error.

`measure` starts this module once per rank.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slidescale.engine.errors import ConfigError
from slidescale.engine.logger import configure_logging
from slidescale.engine.memory.two_pass import Backward, Chunks, Encoded
from slidescale.engine.memory.usage import held_bytes, peak_gib, reset_peak
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh, join, stop_world
from slidescale.engine.process.launcher import is_main_rank
from slidescale.engine.training import step
from slidescale.engine.units import GIB, format_size

from cells.baselines import KINDS
from cells.harness import OUT_OF_MEMORY, Ended, Limits, run_world
from cells.ways import POLICIES, Cell, EngineWay, Source, Way

# Tiles of the step before the timed ones, in which compilers run and the optimizer makes its state. What a larger bag
# allocates in its first timed step is left out by the median.
WARM_UP = 64
# Messages of a RuntimeError when memory was not enough: of PyTorch on a CPU, CUDA, and cuBLAS.
SIGNS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# Where the environment has this variable, gradients of the engine are wrong on purpose, for the test that finds them.
PLANTED = "SLIDESCALE_PLANT_WRONG_GRADIENT"


def measure(
    cell: Cell, *, slide: Path, limits: Limits, log: Path, reference: Path | None = None, is_reference: bool = False
) -> tuple[Ended, dict[str, Any]]:
    """Run a cell in processes of its own.

    Args:
        slide: the file to read tiles from.
        log: the file for the output of the processes.
        reference: parameters to compare with after the last step, written by a cell with as many steps.
        is_reference: write `reference` instead.

    Returns:
        How it ended; and its row, empty unless the status is "ok".
    """
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    words = ["-m", "cells.cell", json.dumps(cell.as_dict()), str(slide), str(result), "--limit", str(limits.bytes)]
    if reference:
        words += ["--write" if is_reference else "--compare", str(reference)]
    ended = run_world(words, ranks=cell.ranks, device=cell.device, limits=limits, log=log)
    if ended.status != "ok":
        return ended, {}
    row = json.loads(result.read_text(encoding="utf-8"))
    result.unlink()
    if cell.device == "cpu" and row["peak_gib"] * GIB > limits.bytes:
        held = f"held {row['peak_gib']:.2f} GiB for a moment; the limit is {format_size(limits.bytes)}"
        return Ended("out of memory", held), {}
    return ended, row


def run(cell: Cell, slide: Path, result: Path, compare: Path | None, write: Path | None) -> None:
    """Take the steps of a cell as one rank; the main rank writes the row."""
    if cell.dtype == "float32":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    mesh = join(alone=cell.strategy == "single")
    world, device = mesh.world, mesh.device
    if PLANTED in os.environ:
        plant_wrong_gradient()
    way = make_way(cell, Source(slide, cell), mesh, result.parent / f"{result.stem}-offload")
    start = {name: value.clone() for name, value in way.parameters()} if write else {}
    list(way.spend(min(cell.k, WARM_UP), 1))
    reset_peak(device)
    base = held_bytes(device)
    spent = list(way.spend(cell.k, cell.steps))
    memory = world.gather_objects((peak_gib(device), base / GIB))
    peak_of_fullest, base_of_fullest = max(memory)
    step_s = statistics.median(each.step_s for each in spent)
    in_all = sum(each.step_s for each in spent)
    row = {
        "k": cell.k,
        "policy": cell.policy,
        "strategy": cell.strategy,
        "ranks": cell.ranks,
        "encoder": cell.encoder,
        "tile": cell.tile,
        "dtype": cell.dtype,
        "device": cell.device,
        "chunk": way.chunk or -(-cell.k // way.tile_ranks),
        "tile_ranks": way.tile_ranks,
        "peak_gib": peak_of_fullest,
        "base_gib": base_of_fullest,
        "step_s": step_s,
        "tiles_per_s": cell.k / step_s,
        "slides_per_h": 3600 / step_s,
        "steps_s": [each.step_s for each in spent],
        "shares": {phase: sum(each.phases[phase] for each in spent) / in_all for phase in spent[0].phases},
        "threads": torch.get_num_threads(),
        **way.details,
    }
    if write:
        torch.save({"start": start, "end": dict(way.parameters())}, write)
    if compare:
        row["change_error"] = change_error(
            way.parameters(), torch.load(compare, map_location="cpu", weights_only=True), cell.parts
        )
    if cell.counted:
        assert isinstance(way, EngineWay), "baselines are not counted"
        row["communication"] = {k: way.count(k) for k in cell.counted}
    way.close()
    if is_main_rank():
        result.write_text(json.dumps(row), encoding="utf-8")
    stop_world()


def plant_wrong_gradient() -> None:
    """Set the gradients of the first chunk's features to zero in every step."""
    original = step.backpropagate

    def backpropagate(model: SlideModel, chunks: Chunks, encoded: Encoded, backward: Backward) -> None:
        assert encoded.features.grad is not None
        encoded.features.grad[: chunks.size] = 0
        original(model, chunks, encoded, backward)

    step.backpropagate = backpropagate


def make_way(cell: Cell, source: Source, mesh: Mesh, folder: Path) -> Way:
    """Make the engine under a policy, or a baseline."""
    if cell.policy in POLICIES:
        return EngineWay(cell, source, mesh, folder)
    return KINDS[cell.policy](cell, source, mesh.device)


def change_error(ours: Iterable[tuple[str, Tensor]], reference: dict[str, dict[str, Tensor]], parts: str) -> float:
    """Compare the model's change over all steps with that of the reference: ‖Δ - Δ'‖ / ‖Δ'‖.

    Encoder and aggregator are compared apart, and the larger error is returned. It shows a fault of one step, and a
    fault that shows only in the step after it.
    """
    squares = {part: [0.0, 0.0] for part in (("encoder", "aggregator") if parts == "all" else ("aggregator",))}
    for name, value in ours:
        part = name.split(".")[0]
        if part in squares:
            start, end = (reference[which][name].to(value.device, torch.float64) for which in ("start", "end"))
            squares[part][0] += float((value.double() - end).square().sum())
            squares[part][1] += float((end - start).square().sum())
    return max((wrong / whole) ** 0.5 for wrong, whole in squares.values())


def main() -> None:
    """Parse the command line of one rank, and run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cell", type=json.loads)
    parser.add_argument("slide", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    cell = Cell(**args.cell)
    configure_logging(is_main_rank())
    if cell.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        share = args.limit / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    try:
        run(cell, args.slide, args.result, args.compare, args.write)
    except (torch.OutOfMemoryError, MemoryError) as error:
        _say_out_of_memory(error)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in SIGNS):
            raise
        _say_out_of_memory(error)
    except ConfigError as error:
        if "does not fit" not in str(error):
            raise
        _say_out_of_memory(error)


def _say_out_of_memory(error: BaseException) -> None:
    print(str(error).splitlines()[0], file=sys.stderr, flush=True)
    os._exit(OUT_OF_MEMORY)  # the other ranks may wait for this one, and end with it


if __name__ == "__main__":
    main()
