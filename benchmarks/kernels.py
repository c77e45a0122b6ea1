"""What the kernels cost: memory and time beside plain PyTorch, and what they take of GPUs that need not be there.

    python benchmarks/kernels.py                   on this machine's processors: the kernels "torch"
    python benchmarks/kernels.py --device cuda     on a GPU: "triton" too, beside the GPU's measured ceilings
    python benchmarks/kernels.py --aot             compile every Triton kernel for five architectures, without a GPU

Before a speed is printed, results are compared with the definition in fp64; if an error is too large, no speed is, and
the exit status is 1. Tables are printed, and written into docs/kernels.md, a section for each of the three.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slidescale.engine.markdown import table
from slidescale.engine.memory.usage import held_bytes, peak_gib, return_freed_memory
from slidescale.engine.units import GIB
from slidescale.kernels.gated_attention import Gate, gated_attention
from slidescale.kernels.gated_attention.reference import gated_attention as define_attention
from slidescale.kernels.tile_prep import prepare_tiles
from slidescale.kernels.tile_prep.reference import prepare_tiles as define_tiles

from ahead_of_time import Shape, compile_all, describe
from page import write_section

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
MIB = 1024**2
HEAD = """# Kernels

Written by `python benchmarks/kernels.py`, with `--aot` and `--device cuda`; not by hand.
"""


# ---- what is compared


def attention_inputs(shape: Shape, k: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Gate]:
    """Features in `dtype`, and a gate in fp32."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        # In place: the peak of making the inputs must not hide that of what is measured.
        return torch.randn(size, generator=generator, device=device, dtype=dtype).mul_(scale).requires_grad_()

    wide = (shape.width, shape.dim)
    gate = Gate(
        draw(*wide, scale=shape.dim**-0.5),
        draw(shape.width),
        draw(*wide, scale=shape.dim**-0.5),
        draw(shape.width),
        draw(shape.branches, shape.width, scale=shape.width**-0.5),
        draw(shape.branches),
    )
    return draw(k, shape.dim, dtype=dtype), gate


def attend(how: str, features: Tensor, gate: Gate, dtype: torch.dtype) -> list[Tensor]:
    """Pool and go back: the pooled features and all gradients."""
    with torch.autocast(features.device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        attended = (
            define_attention(features, gate) if how == "PyTorch" else gated_attention(features, gate, kernels=how)
        )
    pooled = attended.pooled
    return [pooled.detach(), *torch.autograd.grad(pooled, (features, *gate), torch.ones_like(pooled))]


def plain_tiles(tiles: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """As anyone would write it."""
    scale = 1.0 / (255.0 * std)
    return (tiles.to(mean.dtype) * scale - mean / std).permute(0, 3, 1, 2).to(dtype)


# ---- how it is measured


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_seconds(ways: dict[str, Callable[[], Any]], device: torch.device, turns: int) -> dict[str, list[float]]:
    """Seconds of each, by turns, so that all meet the same neighbours; the first turn warms up.

    A GPU is given several at a time, so that it need not wait for the host to launch each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    repeats = 10 if device.type == "cuda" else 1
    for turn in range(turns + 1):
        for name, way in ways.items():
            synchronise(device)
            begin = time.perf_counter()
            for _ in range(repeats):
                way()
            synchronise(device)
            if turn:
                seconds[name].append((time.perf_counter() - begin) / repeats)
    return seconds


def measure_ceilings(device: torch.device, dtype: torch.dtype, turns: int) -> tuple[float, float]:
    """The best that this machine does just now: bytes/s of a copy, and FLOP/s of a matrix product."""
    large = device.type == "cuda"
    source = torch.randn(2**28 if large else 2**26, device=device)
    target = torch.empty_like(source)
    n = 8192 if large else 2048
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    ways: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    seconds = {name: min(times) for name, times in measure_seconds(ways, device, turns).items()}
    return 2 * source.nbytes / seconds["copy"], 2 * n**3 / seconds["product"]


def extra_bytes(what: str, how: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> int:
    """Peak beyond the inputs, in this process, which has done nothing else."""
    return_freed_memory()  # resident memory then follows what is alive
    work = make_work(what, how, shape, dtype, device)
    warm = make_work(what, how, shape._replace(k=64, tiles=1), dtype, device)
    warm()  # libraries allocate once
    synchronise(device)
    base = held_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    work()
    synchronise(device)
    return round(peak_gib(device) * GIB) - base


def make_work(what: str, how: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    """One of the computations, with its inputs."""
    if what == "attention":
        features, gate = attention_inputs(shape, shape.k, dtype, device)
        return partial(attend, how, features, gate, dtype)
    size = (shape.tiles, shape.tile_px, shape.tile_px, 3)
    tiles = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
    mean, std = (torch.tensor(each, device=device) for each in ([0.7, 0.6, 0.7], [0.23, 0.27, 0.21]))
    if how == "PyTorch":
        return partial(plain_tiles, tiles, mean, std, dtype)
    return partial(prepare_tiles, tiles, mean, std, dtype=dtype, kernels=how)


def measure_memory(what: str, how: str, args: argparse.Namespace) -> int:
    """`extra_bytes`, in a process of its own."""
    words = [sys.executable, __file__, "--cell", what, how]
    for name in ("device", "k", "dim", "width", "branches", "tiles", "tile_px", "dtype", "threads"):
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return int(done.stdout.split()[-1])


def check(hows: list[str], shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, float]]:
    """Worst relative error of each implementation, against the definition in fp64, at a K of 2,000 at most."""
    small = shape._replace(k=min(shape.k, 2_001), tiles=min(shape.tiles, 3))
    features, gate = attention_inputs(small, small.k, dtype, device)
    exact_gate = Gate(*(each.detach().double().requires_grad_() for each in gate))
    expected = attend("PyTorch", features.detach().double().requires_grad_(), exact_gate, torch.float64)
    errors: dict[str, dict[str, float]] = {"attention": {}, "tiles": {}}
    for how in hows:
        ours = attend(how, features, gate, dtype)
        # The gradient of w's bias is a sum of shares that cancel: its error is measured by their size, 1.
        sizes = [*(float(each.norm()) for each in expected[:-1]), 1.0]
        errors["attention"][how] = max(
            float((each.double() - theirs).norm()) / size
            for each, theirs, size in zip(ours, expected, sizes, strict=True)
        )
        work = make_work("tiles", how, small, dtype, device)
        tiles, mean, std = work.args[:3]  # type: ignore[attr-defined]
        exact = define_tiles(tiles, mean.double(), std.double(), torch.float64)
        errors["tiles"][how] = float((work().double() - exact).norm() / exact.norm())
    return errors


def is_red(errors: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether an error is too large: in 16 bits more than twice PyTorch's own, in fp32 more than 1e-5."""
    most = 1e-5 if dtype == torch.float32 else 2 * errors["PyTorch"] + 1e-6
    return any(not error <= most for error in errors.values())


def work_of(what: str, how: str, shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """FLOPs, and bytes that must cross the memory: the inputs in each pass over them, and the results."""
    if what == "tiles":
        values = shape.tiles * shape.tile_px**2 * 3
        return 2 * values, values * (1 + dtype.itemsize)
    product, features = 2 * shape.k * 2 * shape.width * shape.dim, shape.k * shape.dim * dtype.itemsize
    # Forward: the gate. Backward: ∂L/∂h, ∂L/∂V and ∂L/∂U, and the gate again, which PyTorch has kept.
    return (3 if how == "PyTorch" else 4) * product, 4 * features


# ---- what is told


def machine(device: torch.device, threads: int) -> str:
    """What was measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{threads} × {model[0].split(':')[1].strip()}, PyTorch {torch.__version__}"


def measure(args: argparse.Namespace) -> int:
    """Compare, measure, print and write; the exit status."""
    device, dtype, shape = torch.device(args.device), getattr(torch, args.dtype), shape_of(args)
    hows = ["PyTorch", "torch", *["triton"] * (device.type == "cuda")]
    errors = check(hows, shape, dtype, device)
    if red := [what for what, each in errors.items() if is_red(each, dtype)]:
        print(f"WRONG RESULTS, no speed is told: {', '.join(red)}: {errors}", file=sys.stderr)
        return 1
    ceilings = measure_ceilings(device, dtype, args.turns)
    titles = {
        "attention": f"Gated attention, forward and backward: K = {shape.k:,}, D = {shape.dim}, L = {shape.width}, "
        f"{shape.branches} branch{'es' * (shape.branches > 1)}",
        "tiles": f"Tile preparation: {shape.tiles} tiles of {shape.tile_px} px",
    }
    results = [
        {**each, "error": errors[what][each["kernels"]]}
        for what in titles
        for each in measure_one(what, hows, shape, dtype, device, args)
    ]
    kind = "a GPU" if device.type == "cuda" else "a CPU"
    text = "\n\n".join(
        [
            f"## Measured on {kind}",
            "PyTorch is the definition in its own operators, and what ratios are to. Extra memory is the peak beyond "
            "the inputs, gradients included, each in a process of its own. Bytes are those that must cross the memory.",
            f"On {machine(device, args.threads)}, {args.dtype}; the best of {args.turns} turns. Measured ceilings: "
            f"{ceilings[0] / 1e9:.0f} GB/s (copy), {ceilings[1] / 1e12:.2f} TFLOP/s (matrix product).",
            *(
                part
                for what, title in titles.items()
                for part in (f"**{title}**", tell([each for each in results if each["what"] == what], ceilings))
            ),
        ]
    )
    print(text)
    write(args, f"on {kind}", text, results)
    return 0


def measure_one(
    what: str, hows: list[str], shape: Shape, dtype: torch.dtype, device: torch.device, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Memory and time of one computation, each way."""
    memory = {how: measure_memory(what, how, args) for how in hows}
    ways = {how: make_work(what, how, shape, dtype, device) for how in hows}
    seconds = measure_seconds(ways, device, args.turns)
    results = []
    for how in hows:
        flops, moved = work_of(what, how, shape, dtype)
        best = min(seconds[how])
        results.append(
            {
                "what": what,
                "kernels": how,
                "seconds": best,
                "median_seconds": statistics.median(seconds[how]),
                "time_ratio": best / min(seconds["PyTorch"]),
                "extra_mib": memory[how] / MIB,
                "memory_ratio": memory[how] / memory["PyTorch"],
                "bytes_per_s": moved / best,
                "flops_per_s": flops / best,
            }
        )
    return results


def tell(results: list[dict[str, Any]], ceilings: tuple[float, float]) -> str:
    """The table of one computation."""
    header = [
        "kernels",
        "ms",
        "time ratio",
        "median ms",
        "extra MiB",
        "memory ratio",
        "error",
        "GB/s (of ceiling)",
        "TFLOP/s (of ceiling)",
    ]
    bandwidth, flops = ceilings
    return table(
        header,
        [
            [
                each["kernels"],
                f"{1e3 * each['seconds']:.1f}",
                f"{each['time_ratio']:.2f}",
                f"{1e3 * each['median_seconds']:.1f}",
                f"{each['extra_mib']:.0f}",
                f"{each['memory_ratio']:.2f}",
                f"{each['error']:.1e}",
                f"{each['bytes_per_s'] / 1e9:.1f} ({each['bytes_per_s'] / bandwidth:.0%})",
                f"{each['flops_per_s'] / 1e12:.3f} ({each['flops_per_s'] / flops:.0%})",
            ]
            for each in results
        ],
    )


def compile_ahead(args: argparse.Namespace) -> int:
    """Compile, print and write; the exit status is 1 if anything spills or does not fit."""
    compiled = compile_all()
    text = describe(compiled, shape_of(args))
    print(text)
    write(args, "ahead of time", text, [dataclasses.asdict(each) | {"fits": each.fits} for each in compiled])
    return 0 if all(each.fits for each in compiled) else 1


def write(args: argparse.Namespace, section: str, text: str, results: list[dict[str, Any]]) -> None:
    """Write a section of the page, and JSON, where they are wanted."""
    if not args.no_page:
        write_section(args.page, HEAD, section, text)
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def shape_of(args: argparse.Namespace) -> Shape:
    """The sizes that the command line names."""
    return Shape(args.k, args.dim, args.width, args.branches, args.tiles, args.tile_px)


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aot", action="store_true", help="compile ahead of time instead of measuring")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32; on a GPU, bfloat16"
    )
    parser.add_argument("--k", type=int, default=100_000, help="tiles")
    parser.add_argument("--dim", type=int, default=512, help="D, of the features")
    parser.add_argument("--width", type=int, default=384, help="L, of the gate")
    parser.add_argument("--branches", type=int, default=1)
    parser.add_argument("--tiles", type=int, default=256, help="tiles to prepare")
    parser.add_argument("--tile-px", type=int, default=224)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown page whose section is replaced")
    parser.add_argument("--no-page", action="store_true", help="write no page")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.aot:
        return compile_ahead(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here; leave it out to measure the processors, or use --aot")
    torch.set_num_threads(args.threads)
    if args.cell:
        print(extra_bytes(*args.cell, shape_of(args), getattr(torch, args.dtype), torch.device(args.device)))
        return 0
    return measure(args)


if __name__ == "__main__":
    sys.exit(main())
