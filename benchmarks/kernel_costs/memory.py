"""Peak memory of one computation, in a process of its own, which `measure_memory` starts."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from slidescale.engine.memory.usage import held_bytes, peak_gib, reset_peak, return_freed_memory
from slidescale.engine.units import GIB

from kernel_costs.work import Shape, make_work


def measure_memory(what: str, how: str, shape: Shape, *, dtype: str, device: str, threads: int) -> int:
    """Measure the peak beyond the inputs, in bytes.

    Args:
        what: the computation.
        how: its implementation.

    Raises:
        RuntimeError: the process failed; has its output.
    """
    words = ["-m", "kernel_costs.memory", what, how, json.dumps(shape), dtype, device, str(threads)]
    folders = [str(Path(__file__).parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return int(done.stdout.split()[-1])


def extra_bytes(what: str, how: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> int:
    """Measure in this process, which has done nothing else."""
    return_freed_memory()  # resident memory then follows what is alive
    work = make_work(what, how, shape, dtype, device)
    warm = make_work(what, how, shape._replace(k=64, tiles=1), dtype, device)
    warm()  # libraries allocate once
    reset_peak(device)
    base = held_bytes(device)
    work()
    return round(peak_gib(device) * GIB) - base


def main() -> None:
    """Measure what the command line names, and print the bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what")
    parser.add_argument("how")
    parser.add_argument("shape", type=json.loads)
    parser.add_argument("dtype")
    parser.add_argument("device")
    parser.add_argument("threads", type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(extra_bytes(args.what, args.how, Shape(*args.shape), getattr(torch, args.dtype), torch.device(args.device)))


if __name__ == "__main__":
    main()
