"""Policy `offload`: what autograd saves for the encoder's backward waits away from the device, and comes back for it.

Hooks on saved tensors (`torch.autograd.graph.saved_tensors_hooks`) see each tensor that a stored graph keeps. Its
storage is copied out once, however many tensors view it, and autograd is left with a note of where it went. In the
backward the first tensor wanted brings its storage back, and those saved before it are fetched ahead of their use;
autograd drops its notes node by node as it goes, and a storage is freed with the last note of it.
"""

import errno
import os
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.memory.usage import format_size, return_freed_memory

MIB = 1024**2
SMALLEST = 64 * 1024
"""Bytes below which a storage stays: a transfer's fixed cost (10 to 100 µs) would exceed that of its bytes, and what
stays is little: per-channel statistics, and the activations of a tile or two at the last layers."""
PART = 4
"""A view that spans less than 1/PART of its storage is taken by itself, so that a slice does not bring the whole along.
More than the three views q, k, v of one projection: those share one copy of it."""
DISK_AHEAD = 64 * MIB
"""Bytes read ahead from disk of their use, and one storage: enough to hide a read behind a layer's backward."""
HOST_AHEAD = 256 * MIB
"""Bytes of device memory, and one storage, that copies to the host hold, and as many for copies back. The largest
storage of a chunk has about this size, so that two are under way at a time."""
STAGE = 16 * MIB
"""Bytes of each of the two buffers through which storages go to disk: all that ever waits to be written is in them."""
SLAB = 256 * MIB
"""Page-locked memory is taken in blocks of so many bytes; PyTorch rounds each up to a power of two."""

Ticket = TypeVar("Ticket")


@dataclass(eq=False)
class _Away:
    """Bytes of one storage that left the device. Only autograd's notes (`_Note`) hold it, so it goes with the last."""

    index: int  # in the order of saving
    offset: int  # where its bytes are, in the file or in the host's memory
    nbytes: int
    device: torch.device
    origin: StorageWeakRef  # while this lives, no other storage can appear at the same address and be mistaken for it
    back: torch.UntypedStorage | None = None  # its bytes, once they are back on the device


@dataclass(frozen=True)
class _Note:
    """What autograd holds in a tensor's place: a view of bytes that are away. `offset` counts elements from them."""

    away: _Away
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Stayed:
    """What autograd holds in a small tensor's place. `version` as it was saved: autograd no longer checks it itself."""

    tensor: Tensor
    version: int


class Offload(ABC, Generic[Ticket]):
    """Takes tensors that autograd saves away from the device, and brings them back for the backward.

    One per rank, for the whole run; not for graphs that are back-propagated twice. A step is: forward of the stored
    chunks, each inside `saving()`; their backward, outside of it; `clear()`, also after an exception.

    Parameters and their views never leave, nor what is too small to be worth it (SMALLEST). The copies of weights that
    autocast makes in its own dtype are no parameters: each chunk's leave with it. Tensors return with the same bytes,
    dtype, size and stride, and see through their storage whatever shared it. A part of the model under activation
    checkpointing saves no more than its inputs, and those leave.

    Attributes:
        bytes_out: that left the device, since the start.
        bytes_back: that came back to it, since the start.
    """

    def __init__(self, ahead: int) -> None:
        self.bytes_out = 0
        self.bytes_back = 0
        self._limit = ahead  # bytes that may be fetched before they are used; the last storage may exceed it
        self._order: list[ref[_Away]] = []
        self._known: WeakValueDictionary[tuple[int, ...], _Away] = WeakValueDictionary()
        self._ahead: dict[int, Ticket] = {}  # by index: fetched, or being fetched, and not used yet

    def saving(self) -> AbstractContextManager[None]:
        """A context around the forward of a chunk whose graph is stored.

        Raises:
            UserError: in it or in the backward, when there is no room or the disk fails.
        """
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def clear(self) -> None:
        """Forget the step: its bytes are given up, and their room is used again. Its graphs can no longer be used."""
        for ticket in self._ahead.values():
            self._abandon(ticket)
        self._ahead.clear()
        self._order.clear()
        self._known.clear()  # graphs of a step that failed may live on in its traceback
        self._reset()

    @abstractmethod
    def close(self) -> None:
        """Give everything back; the object is of no more use."""

    @abstractmethod
    def _send(self, content: Tensor, tensor: Tensor) -> int:
        """Copy uint8 `[nbytes]`, on the device, out, and say where to; `tensor` is the one saved, in these bytes."""

    @abstractmethod
    def _fetch(self, away: _Away) -> Ticket:
        """Begin to bring bytes back, without waiting for them."""

    @abstractmethod
    def _receive(self, away: _Away, ticket: Ticket) -> torch.UntypedStorage:
        """The bytes that `_fetch` began to bring, on the device and safe to use there."""

    @abstractmethod
    def _abandon(self, ticket: Ticket) -> None:
        """Do without bytes that `_fetch` began to bring."""

    @abstractmethod
    def _reset(self) -> None:
        """Give up all bytes that are away."""

    def _pack(self, tensor: Tensor) -> Tensor | _Note | _Stayed:
        if isinstance(tensor, nn.Parameter):
            return tensor  # itself: sharding exchanges a parameter's data between forward and backward
        if isinstance(tensor._base, nn.Parameter):
            return tensor.detach()
        # A node must not hold its own output, which holds the node: hence detached.
        if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
            return _Stayed(tensor.detach(), tensor._version)
        storage = tensor.untyped_storage()
        start, nbytes = 0, storage.nbytes()
        away = self._known.get(_key(tensor, start, nbytes))
        if away is None:
            span_start, span = _span(tensor)
            if span * PART < nbytes:
                start, nbytes = span_start, span
            if nbytes < SMALLEST:
                # The copy of a small part lets go of the rest.
                kept = tensor.detach() if nbytes == storage.nbytes() else _view(_part(storage, start, nbytes), tensor)
                return _Stayed(kept, kept._version)
            away = self._known.get(_key(tensor, start, nbytes))
        if away is None:
            away = self._take(tensor, start, nbytes)
        offset = int(tensor.storage_offset()) - start // tensor.itemsize
        return _Note(away, tensor.dtype, tensor.size(), tensor.stride(), offset)

    def _take(self, tensor: Tensor, start: int, nbytes: int) -> _Away:
        storage = tensor.untyped_storage()
        place = self._send(_bytes(storage)[start : start + nbytes], tensor)
        away = _Away(len(self._order), place, nbytes, tensor.device, StorageWeakRef(storage))
        self._order.append(ref(away))
        self._known[_key(tensor, start, nbytes)] = away
        self.bytes_out += nbytes
        return away

    def _unpack(self, packed: Tensor | _Note | _Stayed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed, _Stayed):
            if packed.tensor._version != packed.version:
                raise _modified(packed.tensor.size())
            return packed.tensor
        away = packed.away
        if away.back is None:
            away.back = self._bring(away)
        return torch.empty(0, dtype=packed.dtype, device=away.device).set_(
            away.back, packed.offset, packed.size, packed.stride
        )

    def _bring(self, away: _Away) -> torch.UntypedStorage:
        if away.index >= len(self._order) or self._order[away.index]() is not away:
            raise RuntimeError("a tensor saved for the backward was wanted after Offload.clear() ended its step")
        ticket = self._ahead.pop(away.index) if away.index in self._ahead else self._fetch(away)
        self._fetch_ahead(away.index)
        storage = self._receive(away, ticket)
        self.bytes_back += away.nbytes
        return storage

    def _fetch_ahead(self, index: int) -> None:
        """Begin to fetch what was saved before `index`: the backward goes the forward's way in reverse."""
        waiting = 0
        for each in list(self._ahead):
            away = self._order[each]()
            if away is None:  # autograd has dropped it unused
                self._abandon(self._ahead.pop(each))
            else:
                waiting += away.nbytes
        while index > 0 and waiting < self._limit:
            index -= 1
            away = self._order[index]()
            if away is not None and away.back is None and index not in self._ahead:
                self._ahead[index] = self._fetch(away)
                waiting += away.nbytes


class DiskOffload(Offload["Future[Tensor]"]):
    """To a file, with plain reads and writes, so that resident memory falls on a machine without accelerator too.

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

    def _fetch(self, away: _Away) -> "Future[Tensor]":
        if self._filled:
            self._write_stage()
        self._wait_for_writes()
        return self._reader.submit(_read, self._file.fileno(), away.offset, away.nbytes)

    def _receive(self, away: _Away, ticket: "Future[Tensor]") -> torch.UntypedStorage:
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


@dataclass(eq=False)
class _Leaving:
    """A tensor whose bytes are being copied to the host; it is held until the compute stream waits for that."""

    tensor: Tensor
    version: int
    index: int
    nbytes: int
    copied: torch.cuda.Event


class HostOffload(Offload["tuple[Tensor, torch.cuda.Event]"]):
    """To page-locked memory of the host, on streams of its own beside the computation. For GPUs.

    The CPU never waits for a copy; the compute stream does, for an event: before memory that was copied out is used
    again, and before memory that was copied in is read. All device memory belongs to the compute stream, so the
    allocator needs no `record_stream`, which would free it late. The host's memory is taken as needed, at the first
    steps, and used again by each step.

    Raises:
        ConfigError: `device` is no GPU.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(HOST_AHEAD)
        if device.type != "cuda":
            raise ConfigError(
                f"--memory.offload-to host needs a GPU and this run computes on {device.type}, whose memory the host's "
                "is: --memory.offload-to disk is what helps here"
            )
        self._device = device
        self._out = torch.cuda.Stream(device)
        self._back = torch.cuda.Stream(device)
        self._slabs: list[Tensor] = []
        self._end = 0  # of the bytes in the slabs
        self._leaving: deque[_Leaving] = deque()
        self._copied: list[torch.cuda.Event] = []  # by index: its bytes are all in the host's memory
        self._torn: set[int] = set()  # indices whose bytes changed while they were copied

    def close(self) -> None:
        """Give the host's memory back, once no copy uses it; may be called again."""
        self.clear()
        self._out.synchronize()
        self._back.synchronize()
        self._slabs.clear()
        torch.accelerator.empty_host_cache()  # PyTorch keeps page-locked memory that was freed for itself

    def _pack(self, tensor: Tensor) -> Tensor | _Note | _Stayed:
        if not tensor.is_cuda and not isinstance(tensor, nn.Parameter):
            return _Stayed(tensor.detach(), tensor._version)
        return super()._pack(tensor)

    def _send(self, content: Tensor, tensor: Tensor) -> int:
        offset, nbytes = self._end, len(content)
        self._end += nbytes
        self._make_room()
        self._out.wait_stream(torch.cuda.current_stream(self._device))  # whose kernels still write the content
        with torch.cuda.stream(self._out):
            for host, rows in self._pieces(offset, nbytes):
                host.copy_(content[rows], non_blocking=True)
            copied = self._out.record_event()
        self._leaving.append(_Leaving(tensor.detach(), tensor._version, len(self._copied), nbytes, copied))
        self._copied.append(copied)
        while sum(each.nbytes for each in self._leaving) - self._leaving[-1].nbytes >= HOST_AHEAD:
            self._let_go()
        return offset

    def _let_go(self) -> None:
        """Hold the oldest tensor that leaves no longer: from here on the compute stream may write to its memory."""
        oldest = self._leaving.popleft()
        torch.cuda.current_stream(self._device).wait_event(oldest.copied)
        if oldest.tensor._version != oldest.version:
            self._torn.add(oldest.index)

    def _fetch(self, away: _Away) -> "tuple[Tensor, torch.cuda.Event]":
        while self._leaving:
            self._let_go()
        content = torch.empty(away.nbytes, dtype=torch.uint8, device=self._device)
        # Kernels that were given this memory before may still run. The one that is about to start need not end first.
        self._back.wait_stream(torch.cuda.current_stream(self._device))
        self._back.wait_event(self._copied[away.index])
        with torch.cuda.stream(self._back):
            for host, rows in self._pieces(away.offset, away.nbytes):
                content[rows].copy_(host, non_blocking=True)
            return content, self._back.record_event()

    def _receive(self, away: _Away, ticket: "tuple[Tensor, torch.cuda.Event]") -> torch.UntypedStorage:
        content, arrived = ticket
        torch.cuda.current_stream(self._device).wait_event(arrived)
        if away.index in self._torn:
            raise _modified(content.size())
        return content.untyped_storage()

    def _abandon(self, ticket: "tuple[Tensor, torch.cuda.Event]") -> None:
        torch.cuda.current_stream(self._device).wait_event(ticket[1])  # and only then is its memory free

    def _reset(self) -> None:
        # An exception may have lost tickets and what was leaving. Nothing uses their memory before its copies are done.
        compute = torch.cuda.current_stream(self._device)
        compute.wait_stream(self._back)
        compute.wait_stream(self._out)
        self._leaving.clear()
        self._out.wait_stream(self._back)  # the next step's bytes go where this step's may still be read
        self._copied.clear()
        self._torn.clear()
        self._end = 0

    def _make_room(self) -> None:
        while self._end > len(self._slabs) * SLAB:
            try:
                self._slabs.append(torch.empty(SLAB, dtype=torch.uint8, pin_memory=True))
            except RuntimeError as error:
                raise UserError(
                    f"the host has no page-locked memory left for activations after "
                    f"{format_size(len(self._slabs) * SLAB)}: take --memory.offload-to disk, or "
                    f"--memory.policy recompute ({error})"
                ) from error

    def _pieces(self, offset: int, nbytes: int) -> Iterator[tuple[Tensor, slice]]:
        """The host's memory at `offset`, slab by slab, and which rows of the `nbytes` each piece holds."""
        done = 0
        while done < nbytes:
            slab, start = divmod(offset + done, SLAB)
            taken = min(nbytes - done, SLAB - start)
            yield self._slabs[slab][start : start + taken], slice(done, done + taken)
            done += taken


def _key(tensor: Tensor, start: int, nbytes: int) -> tuple[int, ...]:
    """What tells one content from another: a storage, how often it was written to in place, and which bytes."""
    return tensor.untyped_storage()._cdata, tensor._version, start, nbytes


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte of its storage that a tensor sees, and how many there are from it to the last."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return int(tensor.storage_offset()) * tensor.itemsize, (last + 1) * tensor.itemsize


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """All of a storage, as uint8 `[nbytes]`."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _part(storage: torch.UntypedStorage, start: int, nbytes: int) -> torch.UntypedStorage:
    return _bytes(storage)[start : start + nbytes].clone().untyped_storage()


def _view(part: torch.UntypedStorage, tensor: Tensor) -> Tensor:
    """A tensor as `tensor` is, over a copy of the bytes that it sees."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(part, 0, tensor.size(), tensor.stride())


def _modified(size: torch.Size) -> RuntimeError:
    return RuntimeError(
        f"a tensor of size {list(size)} that the backward needs was modified by an in-place operation after autograd "
        "saved it; --memory.policy recompute or keep names the operation under torch.autograd.set_detect_anomaly(True)"
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
