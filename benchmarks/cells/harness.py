"""A world of processes for one cell, which ends when it is done, when a rank fails, or at a limit of time or memory."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from slidescale.engine.memory.usage import available_bytes
from slidescale.engine.units import format_size

BENCHMARKS = Path(__file__).parent.parent
# The exit status by which a rank reports that its memory did not suffice.
OUT_OF_MEMORY = 77
# Seconds between two looks at the ranks; activations grow by some hundred MiB per second on a CPU.
LOOK_S = 0.05
# The part of free memory that ranks may take; this process and the system need the rest.
SHARE_OF_FREE = 0.9


@dataclass(frozen=True)
class Limits:
    """What a cell may take.

    Attributes:
        seconds: until it must have ended.
        bytes: memory of each rank: resident memory on a CPU. A rank on a GPU limits itself.
    """

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Ended:
    """How a world ended, and why: the status is "ok", "out of memory", "out of time" or "failed"."""

    status: str
    message: str


def free_bytes(device: str, ranks: int = 1) -> int:
    """Bytes that each of `ranks` may take now: ranks share the memory of a CPU, and each has a GPU to itself."""
    return int(SHARE_OF_FREE * available_bytes(torch.device(device)) / (ranks if device == "cpu" else 1))


def run_world(words: list[str], *, ranks: int, device: str, limits: Limits, log: Path) -> Ended:
    """Run a script as `ranks` processes that can meet, and end all of them when one fails or passes a limit.

    Args:
        words: arguments of Python: a script, or -m and a module of the benchmarks' folder; then arguments of its own.
        device: "cpu" or "cuda". The memory of a GPU is not watched from outside.
        log: the file for all output of the processes.

    Raises:
        SystemExit: this process was asked to end by SIGTERM or SIGHUP; the ranks, which know nothing of it, have ended.
    """
    asked: list[int] = []

    def note(number: int, _: object) -> None:
        # Not an exception from here: inside of Popen.poll it would leave a lock that Popen.wait then waits for.
        asked.append(number)

    before = {each: signal.signal(each, note) for each in (signal.SIGTERM, signal.SIGHUP)}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": device,
    }
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # or the engine would take the GPUs that there are
    log.parent.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen] = []
    with log.open("w", encoding="utf-8") as output:
        try:
            for rank in range(ranks):
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *words],
                        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                )
            return _watch(processes, device, limits, log, asked)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for each, handler in before.items():
                signal.signal(each, handler)


def _watch(processes: list[subprocess.Popen], device: str, limits: Limits, log: Path, asked: list[int]) -> Ended:
    """Wait for the end, or leave when a signal has asked for it."""
    deadline = time.monotonic() + limits.seconds
    running = True
    while running:
        if asked:
            sys.exit(128 + asked[0])
        codes = [process.poll() for process in processes]
        running = None in codes
        # A rank whose memory was full comes first: the others may have failed because it ended.
        for rank in sorted(range(len(codes)), key=lambda rank: codes[rank] != OUT_OF_MEMORY):
            if code := codes[rank]:
                return _failure(rank, code, log)
        for rank, process in enumerate(processes):
            if device == "cpu" and (held := _resident(process)) > limits.bytes:
                return Ended(
                    "out of memory", f"rank {rank} held {format_size(held)}; the limit is {format_size(limits.bytes)}"
                )
        if time.monotonic() > deadline:
            return Ended("out of time", f"not ready after {limits.seconds:,.0f} s")
        time.sleep(LOOK_S)
    return Ended("ok", "")


def _failure(rank: int, code: int, log: Path) -> Ended:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if code == OUT_OF_MEMORY:
        return Ended("out of memory", f"rank {rank}: {last}")
    if code == -signal.SIGKILL:
        return Ended("out of memory", f"rank {rank} was killed, as the system does when its memory is full")
    return Ended("failed", f"rank {rank} ended with {code}: {last} (the whole output: {log})")


def _resident(process: subprocess.Popen) -> int:
    try:
        return psutil.Process(process.pid).memory_info().rss
    except psutil.NoSuchProcess:
        return 0
