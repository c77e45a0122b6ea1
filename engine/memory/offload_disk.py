"""Policy `offload` to files: real on any machine, since what has been written is no longer resident."""

import errno
import os
import tempfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from slidescale.engine.errors import UserError
from slidescale.engine.memory.offload import Away, Offload
from slidescale.engine.memory.usage import return_freed_memory
from slidescale.engine.units import MIB, format_size

DISK_AHEAD = 64 * MIB
"""Bytes read ahead of their use, beyond one storage: enough to hide a read behind a layer's backward."""
STAGE = 16 * MIB
"""Bytes of each of the two buffers through which storages go to disk; all that waits to be written is in them."""


class DiskOffload(Offload["Future[Tensor]"]):
    """Offloads to a file, with plain reads and writes: resident memory falls on a machine without accelerator too.

    Two threads read and write beside the computation. Memory holds at most two buffers of STAGE bytes that wait to be
    written, and DISK_AHEAD bytes and one storage that were read ahead. The file has no name, so nothing is left behind
    even when the process is killed; it is as large as the largest step, and emptied after each.

    Args:
        folder: on a fast local disk, made if missing; not a tmpfs, which is memory.
        rank: names the file where the file system cannot do without a name for an instant.

    Raises:
        UserError: no file can be made there.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(DISK_AHEAD)
        self._folder = folder
        self._filled = 0  # bytes in the buffer that is being filled
        self._end = 0  # of the file, with all that waits to be written
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, prefix=f"rank{rank}-", buffering=0)  # noqa: SIM115 (close)
        except OSError as error:
            raise self._failure(error) from error
        return_freed_memory()
        self._writer = ThreadPoolExecutor(1, "offload-write")
        self._reader = ThreadPoolExecutor(1, "offload-read")
        self._stages: deque[Tensor] = deque()  # the two buffers; [0] is being filled
        self._writes: deque[Future[None]] = deque()

    def close(self) -> None:
        """Free the file and end the threads; may be called again."""
        if not self._file.closed:
            self.clear()
            self._writer.shutdown()
            self._reader.shutdown()
            self._stages.clear()
            self._file.close()

    def _send(self, content: Tensor, tensor: Tensor) -> int:
        # Copied before the forward goes on: what it then does to the tensor in place cannot reach the file.
        if not self._stages:
            pinned = content.is_cuda
            self._stages.extend(torch.empty(STAGE, dtype=torch.uint8, pin_memory=pinned) for _ in range(2))
        offset = self._end
        while len(content):
            taken = min(len(content), STAGE - self._filled)
            self._stages[0][self._filled : self._filled + taken].copy_(content[:taken])
            content = content[taken:]
            self._filled += taken
            self._end += taken
            if self._filled == STAGE:
                self._write_stage()
        return offset

    def _write_stage(self) -> None:
        """Hand the buffer that is being filled to the writer, and go on with the other once that is written."""
        start = self._end - self._filled
        content = self._stages[0][: self._filled]
        self._writes.append(self._writer.submit(_write, self._file.fileno(), content, start))
        self._wait_for_writes(but=1)
        self._stages.rotate()
        self._filled = 0

    def _wait_for_writes(self, *, but: int = 0) -> None:
        while len(self._writes) > but:
            try:
                self._writes.popleft().result()
            except OSError as error:
                raise self._failure(error) from error

    def _fetch(self, away: Away) -> "Future[Tensor]":
        if self._filled:
            self._write_stage()
        self._wait_for_writes()
        return self._reader.submit(_read, self._file.fileno(), away.offset, away.nbytes)

    def _receive(self, away: Away, ticket: "Future[Tensor]") -> torch.UntypedStorage:
        try:
            return ticket.result().to(away.device).untyped_storage()
        except OSError as error:
            raise self._failure(error) from error

    def _abandon(self, ticket: "Future[Tensor]") -> None:
        ticket.cancel()  # a read that has begun goes to memory that nobody holds then

    def _reset(self) -> None:
        wait(self._writes)  # without their errors: these bytes are not wanted any more
        self._writes.clear()
        self._filled = self._end = 0
        self._file.truncate(0)

    def _failure(self, error: OSError) -> UserError:
        size = f" after {format_size(self._end)}" if self._end else ""
        return UserError(
            f"cannot keep activations in {self._folder}: {error.strerror}{size}; make room there, name a folder on "
            "another disk with --memory.offload-folder, or take --memory.policy recompute"
        )


def _write(file: int, content: Tensor, offset: int) -> None:
    view = content.numpy().data
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _read(file: int, offset: int, nbytes: int) -> Tensor:
    content = torch.empty(nbytes, dtype=torch.uint8)
    view = content.numpy().data
    while view:
        got = os.preadv(file, [view], offset)
        if got == 0:
            raise OSError(errno.EIO, "the file ends too early")
        view, offset = view[got:], offset + got
    return content
