"""Costs of the kernels: memory and time beside plain PyTorch, and registers and shared memory on any GPU.

    python benchmarks/kernels.py                   on this machine's processors: the kernels "torch"
    python benchmarks/kernels.py --device cuda     on a GPU: "triton" too, beside the GPU's measured ceilings
    python benchmarks/kernels.py --aot             compile every Triton kernel for five architectures, without a GPU

Results are first compared with the definition in fp64. If an error is too large, no speed is reported, and the exit
status is 1. Tables are printed, and written into docs/kernels.md, one section for each of the three.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch

from slidescale.engine.files import write_json

from common.machine import describe_processor
from common.page import write_section
from kernel_costs.accuracy import errors_of, is_wrong
from kernel_costs.ahead_of_time import compile_all
from kernel_costs.compiled_table import compiled_tables
from kernel_costs.measured import kernels_table, measure_ceilings, measure_kernels
from kernel_costs.work import PYTORCH, Shape

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
HEAD = """# Kernels

Written by `python benchmarks/kernels.py`, with `--aot` and `--device cuda`; not by hand.
"""


def measure(args: argparse.Namespace) -> int:
    """Compare, measure, print and write; return the exit status."""
    device, dtype, shape = torch.device(args.device), getattr(torch, args.dtype), shape_of(args)
    hows = [PYTORCH, "torch", *["triton"] * (device.type == "cuda")]
    errors = errors_of(hows, shape, dtype, device)
    if wrong := [what for what, each in errors.items() if is_wrong(each, dtype)]:
        print(f"WRONG RESULTS, no speed is reported: {', '.join(wrong)}: {errors}", file=sys.stderr)
        return 1
    ceilings = measure_ceilings(device, dtype, args.turns)
    rows = {
        what: [
            {**row, "error": errors[what][row["kernels"]]}
            for row in measure_kernels(what, hows, shape, args.dtype, device, threads=args.threads, turns=args.turns)
        ]
        for what in shape.titles
    }
    kind = "a GPU" if device.type == "cuda" else "a CPU"
    processor = describe_processor(args.device, 1 if device.type == "cuda" else args.threads)
    text = "\n\n".join(
        [
            f"## Measured on {kind}",
            "PyTorch is the definition in its own operators, and ratios are relative to it. Extra memory is the peak "
            "beyond the inputs, gradients included, each in a process of its own. Bytes are those that must cross the "
            "memory.",
            f"On {processor}, PyTorch {torch.__version__}, {args.dtype}; the best of {args.turns} turns. Measured "
            f"ceilings: {ceilings[0] / 1e9:.0f} GB/s (copy), {ceilings[1] / 1e12:.2f} TFLOP/s (matrix product).",
            *(
                part
                for what, title in shape.titles.items()
                for part in (f"**{title}**", kernels_table(rows[what], ceilings))
            ),
        ]
    )
    print(text)
    write(args, f"on {kind}", text, [row for each in rows.values() for row in each])
    return 0


def compile_ahead(args: argparse.Namespace) -> int:
    """Compile, print and write; the exit status is 1 if anything spills or does not fit."""
    compiled = compile_all()
    text = compiled_tables(compiled, shape_of(args))
    print(text)
    write(args, "ahead of time", text, [dataclasses.asdict(each) | {"fits": each.fits} for each in compiled])
    return 0 if all(each.fits for each in compiled) else 1


def write(args: argparse.Namespace, section: str, text: str, results: list[dict[str, Any]]) -> None:
    """Write a section of the page, and JSON, where they are wanted."""
    if not args.no_page:
        write_section(args.page, HEAD, section, text)
    if args.out:
        write_json(args.out, results)


def shape_of(args: argparse.Namespace) -> Shape:
    """Return the sizes that the command line names."""
    return Shape(args.k, args.dim, args.width, args.branches, args.tiles, args.tile_px)


def main() -> int:
    """Parse the command line, and do what it asks; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aot", action="store_true", help="compile ahead of time instead of measuring")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32; on a GPU, bfloat16"
    )
    parser.add_argument("--k", type=int, default=100_000, help="tiles")
    parser.add_argument("--dim", type=int, default=512, help="D, width of features")
    parser.add_argument("--width", type=int, default=384, help="L, width of the gate")
    parser.add_argument("--branches", type=int, default=1)
    parser.add_argument("--tiles", type=int, default=256, help="tiles to prepare")
    parser.add_argument("--tile-px", type=int, default=224)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown page whose section is replaced")
    parser.add_argument("--no-page", action="store_true", help="write no page")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.aot:
        return compile_ahead(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here; leave it out to measure the processors, or use --aot")
    torch.set_num_threads(args.threads)
    return measure(args)


if __name__ == "__main__":
    sys.exit(main())
