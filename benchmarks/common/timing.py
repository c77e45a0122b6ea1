"""Clocks for pieces of work, which run in turns so that a busy neighbour slows all of them alike."""

import timeit
from collections.abc import Callable
from typing import Any

from torch.utils import benchmark


def wall_seconds(way: Callable[[], Any]) -> float:
    """Time one call, until the device is idle again; garbage collection waits.

    PyTorch's `Timer` would call it twice beforehand each time, which is right for microseconds and not for seconds.
    """
    return timeit.Timer(way, timer=benchmark.timer).timeit(1)


def gpu_seconds(way: Callable[[], Any]) -> float:
    """Time a call on the GPU alone: the median of as many as take 0.1 s, each with an empty L2 cache."""
    from triton.testing import do_bench

    return do_bench(way, return_mode="median") / 1e3


def measure_seconds(
    ways: dict[str, Callable[[], Any]], turns: int, clock: Callable[[Callable[[], Any]], float] = wall_seconds
) -> dict[str, list[float]]:
    """Time each way once per turn, in seconds; a turn before the first one warms up."""
    for way in ways.values():
        wall_seconds(way)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            seconds[name].append(clock(way))
    return seconds
