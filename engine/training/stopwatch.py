"""Time of a step by phase."""

import time

import torch

# The phases of a training step, in their order.
PHASES = ("reading", "pass 1", "aggregate", "pass 2", "reduction", "optimizer")


class Stopwatch:
    """Seconds by phase, from lap to lap.

    On a GPU the laps are events in its stream: none of them makes it wait, and a phase is what the GPU spends on it,
    or waits for the host in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._laps: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a step; forgets the one before."""
        self._laps = [("", self._now())]

    def lap(self, phase: str) -> None:
        """Note that the time since the last lap was spent on `phase`."""
        self._laps.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, all its laps together, 0.0 for one without; waits for the GPU."""
        total = dict.fromkeys(PHASES, 0.0)
        if self._on_gpu:
            torch.cuda.synchronize()
        for (_, begin), (phase, end) in zip(self._laps, self._laps[1:], strict=False):
            if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                total[phase] += begin.elapsed_time(end) / 1000
            elif isinstance(begin, float) and isinstance(end, float):
                total[phase] += end - begin
        return total

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
