"""What a training step costs: its memory under each policy, and its speed beside the limits that plain PyTorch sets.

    python benchmarks/step.py memory     growth with K, budgets, offload: resident memory, a fresh process each
    python benchmarks/step.py speed      recompute and keep beside forward and forward + backward; two ranks beside one

Every comparison is of ratios within one run, on random tiles. Results are printed and, with --out, written as JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slidescale.engine.data.bag import Bag
from slidescale.engine.data.manifest import ManifestRow
from slidescale.engine.feed import Share, Step
from slidescale.engine.memory.footprint import measure
from slidescale.engine.memory.offload_disk import DiskOffload
from slidescale.engine.memory.planner import Job, choose, model_state
from slidescale.engine.memory.usage import GIB, held_bytes, keep_freed_memory, peak_gib, return_freed_memory
from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.objective import CrossEntropy
from slidescale.engine.parallel.ddp import DdpStrategy
from slidescale.engine.parallel.mesh import Mesh, make_mesh, start_world
from slidescale.engine.parallel.strategy import SingleStrategy
from slidescale.engine.step import TrainStep

CPU = torch.device("cpu")


def make_model(encoder: str, tile_px: int, *, bf16: bool) -> SlideModel:
    """The recipe's model with random weights."""
    torch.manual_seed(0)
    tiles = Encoder(encoder, tile_px=tile_px)
    aggregator = Aggregator(tiles.dim, 2, pooling="gated_attention", hidden_dim=512, attention_dim=384, dropout=0.0)
    return SlideModel(tiles, aggregator, autocast=torch.bfloat16 if bf16 else None).train()


def random_tiles(k: int, tile_px: int) -> torch.Tensor:
    """uint8 `[k, tile_px, tile_px, 3]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (k, tile_px, tile_px, 3), dtype=torch.uint8, generator=generator)


def make_step(tiles: torch.Tensor, mesh: Mesh, k: int, chunk: int, stored: int) -> Step:
    """A step on one bag."""
    row = ManifestRow("random", "random", Path("none"), 1, "train")
    bag = Bag(row, np.stack([np.arange(k), np.arange(k)], axis=1), 1.0, seed=0)
    count = mesh.tiles.chunk_count(k, chunk)
    return Step([row], k, 1 + count, iter([Share(bag, tiles, count, min(stored, count))]))


def cell(args: argparse.Namespace) -> dict[str, Any]:
    """One configuration in this process: steps of the engine, their memory and their time."""
    (return_freed_memory if args.exact_memory else keep_freed_memory)()  # as the engine does with a budget or without
    torch.set_num_threads(args.threads)
    mesh = Mesh()
    if args.ranks > 1:
        start_world(CPU)
        mesh = make_mesh(CPU, "all")
    model = make_model(args.encoder, args.tile, bf16=args.bf16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    kind = DdpStrategy if args.ranks > 1 else SingleStrategy
    strategy = kind(model, optimizer, None, device=CPU, clip=0.0)
    share = mesh.tiles.share(args.k)
    base = held_bytes(CPU)
    chunk, stored, planned = args.chunk, 0, 0
    if args.policy in ("keep", "offload"):
        stored = -(-args.k // chunk)
    elif args.policy == "auto":
        footprint = measure(
            lambda: make_model(args.encoder, args.tile, bf16=args.bf16),
            tile_px=args.tile, chunks=[1, max(2, chunk // 4), chunk], bags=[1, args.k],
        )  # fmt: skip
        state = model_state(footprint, strategy="single", ranks=1, optimizer="sgd")
        held = held_bytes(CPU) + state.gradients
        job = Job(footprint=footprint, prefetch=0, update=state.update)
        plan = choose(job, k=args.k, budget=round(args.budget_gib * GIB), base=held, chunk=chunk)
        chunk, stored, planned = plan.chunk, plan.stored, plan.peak
    tiles = random_tiles(share.stop - share.start, args.tile)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        offload = DiskOffload(Path(folder), mesh.world.rank) if args.policy == "offload" else None
        step = TrainStep(strategy, CrossEntropy((), 2), mesh, chunk=chunk, offload=offload)
        seconds = []
        for _ in range(args.steps):
            begin = time.perf_counter()
            step(make_step(tiles, mesh, args.k, chunk, stored))
            seconds.append(time.perf_counter() - begin)
        left = offload.bytes_out // args.steps if offload else 0
        if offload:
            offload.close()
    return {
        "policy": args.policy, "k": args.k, "chunk": chunk, "stored": stored, "ranks": args.ranks,
        "base_gib": base / GIB, "peak_gib": peak_gib(CPU), "planned_gib": planned / GIB, "left_gib": left / GIB,
        "budget_gib": args.budget_gib, "step_s": min(seconds), "tiles_per_s": args.k / min(seconds),
    }  # fmt: skip


def run_cell(**settings: Any) -> dict[str, Any]:
    """A configuration in processes of its own."""
    ranks = settings.get("ranks", 1)
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=29877"]
    done = subprocess.run([*launcher, __file__, "cell", *words], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(lines[0])


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Growth with K under recompute, the peak under auto for several budgets, and what offload takes away."""
    common = {"encoder": args.encoder, "tile": args.tile, "chunk": 16, "bf16": 1, "exact_memory": 1}
    few, many = args.k
    print(f"recompute, {args.encoder} {args.tile} px bf16: K = {few} and {many}")
    cells = [run_cell(policy="recompute", k=k, steps=1, **common) for k in (few, many)]
    grown = (cells[1]["peak_gib"] - cells[0]["peak_gib"]) * GIB / (many - few)
    pixels, row = args.tile**2 * 3, make_model(args.encoder, args.tile, bf16=True).encoder.dim * 4
    print(
        f"  a tile adds {grown:,.0f} bytes of resident memory; its pixels and two rows of features are "
        f"{pixels + 2 * row:,}: ratio {grown / (pixels + 2 * row):.3f}"
    )
    budgets = []
    print(f"auto, K = {few * 2}")
    for budget in (2, 4, 8):
        each = run_cell(policy="auto", k=few * 2, steps=2, budget_gib=budget, **common)
        budgets.append(each)
        print(
            f"  budget {budget} GiB: peak {each['peak_gib']:.2f} (planned {each['planned_gib']:.2f}), "
            f"{each['stored']} chunks of {each['chunk']} stored, {each['tiles_per_s']:.1f} tiles/s"
        )
    offloaded = []
    k = few // 4
    print(f"offload to disk beside keep, K = {k}, one step")
    for policy in ("keep", "offload"):
        offloaded.append(run_cell(policy=policy, k=k, steps=1, **(common | {"chunk": 4})))
        added = offloaded[-1]["peak_gib"] - offloaded[-1]["base_gib"]
        print(f"  {policy:8} adds {added:.2f} GiB to {offloaded[-1]['base_gib']:.2f}")
    left = offloaded[1]["left_gib"]
    less = offloaded[0]["peak_gib"] - offloaded[1]["peak_gib"]
    print(f"  {left:.2f} GiB of activations left the memory; its peak is lower by {less / left:.0%} of that")
    return {"recompute": cells, "growth_bytes_a_tile": grown, "auto": budgets, "offload": offloaded}


def measure_speed(args: argparse.Namespace) -> dict[str, Any]:
    """Tiles a second of each policy beside its limit, by turns in one process; then two ranks beside one."""
    keep_freed_memory()  # as the engine does without a budget
    torch.set_num_threads(args.threads)
    k, chunk = args.k[0], 16
    model = make_model(args.encoder, args.tile, bf16=True)
    tiles, mesh = random_tiles(k, args.tile), Mesh()
    strategy = SingleStrategy(model, torch.optim.SGD(model.parameters(), lr=1e-6), None, device=CPU, clip=0.0)
    step = TrainStep(strategy, CrossEntropy((), 2), mesh, chunk=chunk)
    gradient = torch.randn(k, model.encoder.dim)

    def forward() -> None:
        with torch.no_grad():
            for part in tiles.split(chunk):
                model.encode(part)

    def forward_backward() -> None:
        for part, wanted in zip(tiles.split(chunk), gradient.split(chunk), strict=True):
            (model.encode(part) * wanted).sum().backward()

    ways: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "forward + backward": forward_backward,
        "recompute": lambda: step(make_step(tiles, mesh, k, chunk, 0)),
        "keep": lambda: step(make_step(tiles, mesh, k, chunk, k)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.turns + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if turn:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - begin)
    rate = {name: k / min(values) for name, values in seconds.items()}
    print(f"{args.encoder} {args.tile} px bf16, K = {k}, {args.threads} threads, best of {args.turns} turns")
    for name in ways:
        print(f"  {name:20} {rate[name]:7.1f} tiles/s (median {k / statistics.median(seconds[name]):.1f})")
    limit = 1 / (1 / rate["forward"] + 1 / rate["forward + backward"])
    recompute, keep = rate["recompute"] / limit, rate["keep"] / rate["forward + backward"]
    print(f"  recompute is {recompute:.3f} of its limit, one more forward; keep is {keep:.3f} of forward + backward")
    pairs = []
    for _ in range(args.pairs):
        one, two = (
            run_cell(policy="recompute", k=k, steps=4, ranks=ranks, threads=1, encoder=args.encoder, tile=args.tile,
                     chunk=chunk, bf16=1)
            for ranks in (1, 2)
        )  # fmt: skip
        pairs.append(two["tiles_per_s"] / one["tiles_per_s"])
        print(f"  2 ranks × 1 thread: {two['tiles_per_s']:.1f} tiles/s, {pairs[-1]:.2f} times 1 rank × 1 thread")
    return {"tiles_per_s": rate, "recompute_of_limit": recompute, "keep_of_limit": keep, "two_ranks": pairs}


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "speed", "cell"])
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--tile", type=int, default=224)
    parser.add_argument("--k", type=int, nargs="+", default=None, help="tiles: two numbers for memory, one for speed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    for name, default in (("policy", "recompute"), ("chunk", 16), ("ranks", 1), ("steps", 1), ("bf16", 1)):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=argparse.SUPPRESS)
    parser.add_argument("--exact-memory", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--budget-gib", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "cell":
        args.k = args.k[0]
        result = cell(args)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(result))
        return
    args.k = args.k or ([256, 2048] if args.what == "memory" else [128])
    result = measure_memory(args) if args.what == "memory" else measure_speed(args)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
