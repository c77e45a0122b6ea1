"""Time and memory of kernels on this machine, beside PyTorch and beside the best that the machine does."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from common.page import table
from common.timing import gpu_seconds, measure_seconds, wall_seconds
from kernel_costs.memory import measure_memory
from kernel_costs.work import PYTORCH, Shape, make_work, work_of

MIB = 1024**2


def _seconds(ways: dict[str, Callable[[], Any]], device: torch.device, turns: int) -> dict[str, list[float]]:
    return measure_seconds(ways, turns, gpu_seconds if device.type == "cuda" else wall_seconds)


def measure_ceilings(device: torch.device, dtype: torch.dtype, turns: int) -> tuple[float, float]:
    """Measure the best that this machine does at present: bytes/s of a copy, and FLOP/s of a matrix product."""
    large = device.type == "cuda"
    source = torch.randn(2**28 if large else 2**26, device=device)
    target = torch.empty_like(source)
    n = 8192 if large else 2048
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    ways: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    best = {name: min(times) for name, times in _seconds(ways, device, turns).items()}
    return 2 * source.nbytes / best["copy"], 2 * n**3 / best["product"]


def measure_kernels(
    what: str, hows: list[str], shape: Shape, dtype: str, device: torch.device, *, threads: int, turns: int
) -> list[dict[str, Any]]:
    """Measure memory and time of one computation; one row per implementation, PyTorch among them."""
    memory = {how: measure_memory(what, how, shape, dtype=dtype, device=device.type, threads=threads) for how in hows}
    precision = getattr(torch, dtype)
    seconds = _seconds({how: make_work(what, how, shape, precision, device) for how in hows}, device, turns)
    results = []
    for how in hows:
        flops, moved = work_of(what, how, shape, precision)
        best = min(seconds[how])
        results.append(
            {
                "what": what,
                "kernels": how,
                "seconds": best,
                "median_seconds": statistics.median(seconds[how]),
                "time_ratio": best / min(seconds[PYTORCH]),
                "extra_mib": memory[how] / MIB,
                "memory_ratio": memory[how] / memory[PYTORCH],
                "bytes_per_s": moved / best,
                "flops_per_s": flops / best,
            }
        )
    return results


def kernels_table(results: list[dict[str, Any]], ceilings: tuple[float, float]) -> str:
    """Write the rows of one computation as Markdown."""
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
