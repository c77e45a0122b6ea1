"""Worlds of ranks for tests: processes that meet once, over gloo, and then run many cases."""

import fcntl
import os
import random
import socket
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

# A world that has not started, or answered, by then hangs, also on a machine that is busy with other things.
PATIENCE_S = 1500


_taken: list[Any] = []


def free_port() -> int:
    """A port where ranks can meet, of which no other call on this machine knows until this process has ended.

    Below those that Linux hands out (from 32768), so that nobody gets it until the ranks have started, however late.
    """
    folder = Path(tempfile.gettempdir()) / f"slidescale-test-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        claim = (folder / str(port)).open("w")
        with socket.socket() as probe, suppress(OSError):
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            probe.bind(("127.0.0.1", port))
            _taken.append(claim)
            return port
        claim.close()


class World:
    """`size` processes that run functions together.

    Starting Python, torch and DeepSpeed costs seconds a process, so one world serves many cases.
    """

    def __init__(self, size: int, device: str = "cpu") -> None:
        """With `device` "cuda", each rank has a GPU of its own, and they talk by NCCL."""
        self.size = size
        context = mp.get_context("spawn")
        port = free_port()
        self._pipes = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, device, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(group, *args)` on every rank and return the results in rank order.

        Raises:
            AssertionError: a rank raised (with its traceback), died, or did not answer in time.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = [self._answer(rank) for rank in range(self.size)]
        failures = [f"rank {rank}:\n{answer.error}" for rank, answer in enumerate(answers) if answer.error]
        assert not failures, "\n".join(failures)
        return [answer.result for answer in answers]

    def is_alive(self) -> bool:
        """Whether all ranks can answer."""
        return all(process.is_alive() for process in self._processes)

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
            process.join(10)

    def _answer(self, rank: int) -> "_Answer":
        try:
            if self._pipes[rank].poll(PATIENCE_S):
                return self._pipes[rank].recv()
            reason = f"no answer in {PATIENCE_S} s"
        except (EOFError, ConnectionError):
            reason = f"died with exit code {self._processes[rank].exitcode}"
        self.stop()  # the others may wait for it for ever
        return _Answer(None, reason)


@dataclass
class _Answer:
    result: Any
    error: str | None


def _serve(rank: int, size: int, port: int, device: str, pipe: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "LOCAL_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": device,
    }
    import torch

    from slidescale.engine.parallel.mesh import pick_device, start_world
    from slidescale.engine.parallel.tile_parallel import TileGroup

    torch.set_num_threads(1)
    if device == "cuda":
        # Products and convolutions in full fp32, so that the CPU's tolerances hold.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    else:
        torch.cuda.is_available = lambda: False
    start_world(pick_device(rank))
    group = TileGroup(rank, size)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send(_Answer(function(group, *args), None))
        except BaseException:
            pipe.send(_Answer(None, traceback.format_exc()))
