"""Speed of a step relative to the limits that plain PyTorch sets, for policies recompute and keep, on this machine.

    python benchmarks/step.py

Policy keep cannot be faster than forward and backward of the same chunks, and recompute takes one more forward. All
four run in turns in one process, on random tiles, so that a busy neighbour slows all of them. `scale_k.py` measures
how memory and speed change with K.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slidescale.engine.api import FixedPlan, make_step
from slidescale.engine.config import PolicyName
from slidescale.engine.files import write_json
from slidescale.engine.memory.policies import POLICIES
from slidescale.engine.memory.usage import keep_freed_memory
from slidescale.engine.models.make import make_model
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.training.bags import Bag
from slidescale.engine.training.place import has_bf16
from slidescale.kernels.dispatch import choose_kernels

from cells.ways import CLASSES, Cell
from common.timing import measure_seconds


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Measure the seconds of each way, turn by turn."""
    keep_freed_memory()  # as the engine does without a budget
    torch.set_num_threads(args.threads)
    device, k, chunk = torch.device(args.device), args.k, args.chunk
    bf16 = has_bf16(device)
    cell = Cell(
        policy="keep",
        strategy="single",
        ranks=1,
        k=k,
        encoder=args.encoder,
        tile=args.tile,
        chunk=chunk,
        dtype="bfloat16" if bf16 else "float32",
        device=args.device,
        steps=args.turns,
    )
    kernels = choose_kernels("auto", device)
    model = make_model(cell.config(), classes=len(CLASSES), bf16=bf16, kernels=kernels).to(device).train()
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (k, args.tile, args.tile, 3), dtype=torch.uint8, generator=generator).to(device)
    objective = CrossEntropy((), len(CLASSES)).to(device)
    step = make_step(model, torch.optim.SGD(model.parameters(), lr=1e-6), objective, mesh=Mesh(device=device))
    gradient = torch.randn(k, model.encoder.dim, device=device)

    def forward() -> None:
        with torch.no_grad():
            for part in tiles.split(chunk):
                model.encode(part)

    def forward_backward() -> None:
        for part, wanted in zip(tiles.split(chunk), gradient.split(chunk), strict=True):
            (model.encode(part) * wanted).sum().backward()

    def take(policy: PolicyName) -> None:
        step.follow(FixedPlan(chunk, POLICIES[policy], TileGroup()))
        step(Bag(tiles, [1.0]))

    ways: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "forward + backward": forward_backward,
        "recompute": lambda: take("recompute"),
        "keep": lambda: take("keep"),
    }
    return measure_seconds(ways, args.turns)


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--tile", type=int, default=224, help="side of a tile, px")
    parser.add_argument("--k", type=int, default=128, help="tiles")
    parser.add_argument("--chunk", type=int, default=16, help="tiles that go through the encoder at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    seconds = measure(args)
    rate = {name: args.k / min(values) for name, values in seconds.items()}
    print(f"{args.encoder} {args.tile} px, K = {args.k}, {args.device}, best of {args.turns} turns")
    for name, values in seconds.items():
        print(f"  {name:20} {rate[name]:7.1f} tiles/s (median {args.k / statistics.median(values):.1f})")
    limit = 1 / (1 / rate["forward"] + 1 / rate["forward + backward"])
    recompute, keep = rate["recompute"] / limit, rate["keep"] / rate["forward + backward"]
    print(f"  recompute is {recompute:.3f} of its limit, one more forward; keep is {keep:.3f} of forward + backward")
    if args.out:
        result = {"tiles_per_s": rate, "recompute_of_limit": recompute, "keep_of_limit": keep}
        write_json(args.out, result)


if __name__ == "__main__":
    main()
