"""Cells of a benchmark: each in a fresh world of processes, with limits of time and memory, and kept as it ends."""

import hashlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from slidescale.engine.units import format_size

ROOT = Path(__file__).parent.parent.parent
# The exit status by which a rank says that its memory did not suffice.
OUT_OF_MEMORY = 77
# Seconds between two looks at the ranks; activations grow by some hundred MiB a second on a CPU.
LOOK_S = 0.05


@dataclass(frozen=True)
class Limits:
    """What a cell may take.

    Attributes:
        seconds: until it must have ended.
        bytes: of memory, each rank: resident on a CPU. A GPU's is limited by its ranks themselves.
    """

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Ended:
    """How a world ended: "ok", "out of memory", "out of time" or "failed"; and why."""

    status: str
    message: str


def run_world(words: list[str], *, ranks: int, device: str, limits: Limits, log: Path) -> Ended:
    """Run a script as `ranks` processes that can meet, and end all of them when one fails or a limit is passed.

    Args:
        words: Python's arguments: the script (or -m and a module of the benchmarks' folder), and the script's.
        device: "cpu" or "cuda"; a GPU's memory is not looked at from outside.
        log: where all that they print goes.
    """
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, _end)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
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
            return _watch(processes, device, limits, log)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _end(number: int, _: object) -> None:
    """On the way out the ranks are ended, too, which know nothing of this process."""
    sys.exit(128 + number)


def _watch(processes: list[subprocess.Popen], device: str, limits: Limits, log: Path) -> Ended:
    """Wait for the end."""
    deadline = time.monotonic() + limits.seconds
    running = True
    while running:
        codes = [process.poll() for process in processes]
        running = None in codes
        # One whose memory was full first: the others may have failed by its end.
        for rank in sorted(range(len(codes)), key=lambda rank: codes[rank] != OUT_OF_MEMORY):
            if code := codes[rank]:
                return _failure(rank, code, log)
        for rank, process in enumerate(processes):
            if device == "cpu" and (held := _resident(process)) > limits.bytes:
                return Ended(
                    "out of memory", f"rank {rank} held {format_size(held)}, and may {format_size(limits.bytes)}"
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
    return Ended("failed", f"rank {rank} ended with {code}: {last} ({log} has all of it)")


def _resident(process: subprocess.Popen) -> int:
    try:
        return psutil.Process(process.pid).memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def describe_machine(device: str) -> dict[str, Any]:
    """What was measured, and on what: processor or GPU, versions, commit."""
    if device == "cuda":
        processor = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else platform.machine()
        processor = f"{len(os.sched_getaffinity(0))} × {name}"
    packages = ("slidescale", "torch", "deepspeed", "timm", "openslide-python")
    return {
        "machine": processor,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the code, with a digest of what has changed in it since; None outside of a git checkout."""
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["diff", "HEAD", "--", "engine", "kernels", "benchmarks"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    digest = hashlib.blake2b(changes.encode(), digest_size=4).hexdigest()
    return commit.strip() + (f"+{digest}" if changes else "")


def tell_machine(stamp: dict[str, Any]) -> str:
    """A stamp in one line."""
    commit, *changes = str(stamp["commit"]).split("+")
    short = commit[:12] + (" with changes" if changes else "")
    return (
        f"{stamp['machine']}, {stamp['memory_gib']:.0f} GiB; PyTorch {stamp['torch']}, DeepSpeed {stamp['deepspeed']}, "
        f"timm {stamp['timm']}; commit {short}"
    )


class Rows:
    """The rows of a sweep, a JSON object a line, each written as soon as it is known.

    A row is found again by its settings and its stamp; rows of another machine, commit or versions are not.
    """

    def __init__(self, path: Path, stamp: dict[str, Any]) -> None:
        self._path = path
        self._stamp = stamp
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if path.exists():
            # An interruption may have cut the last line short, and a new one must not continue it.
            path.write_text("".join(f"{line}\n" for line in lines if _is_whole(line)), encoding="utf-8")
        self._rows = [row for line in lines if _is_whole(line) if (row := json.loads(line))["stamp"] == stamp]

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The latest row with these settings, unless it failed, which it need not do again, or was not run."""
        wanted = _as_json(settings)
        found = next((row for row in reversed(self._rows) if row["settings"] == wanted), None)
        return None if found is None or found["status"] in ("failed", "not run") else found

    def add(self, row: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        """Keep a row under its settings."""
        row = _as_json({**row, "settings": settings, "stamp": self._stamp})
        self._rows.append(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """As it is read again: tuples are lists, and keys texts."""
    return json.loads(json.dumps(value))


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False
