"""Policy `offload` from an accelerator to page-locked memory of its host, beside the computation."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.memory.offload import Away, Note, Offload, Stayed, modified
from slidescale.engine.units import MIB, format_size

HOST_AHEAD = 256 * MIB
"""Bytes of device memory, beyond one storage, that copies to the host may hold, and as many for copies back. The
largest storage of a chunk has about this size, so that two are under way at a time."""
SLAB = 256 * MIB
"""Bytes of a block of page-locked memory; PyTorch rounds each up to a power of two."""


@dataclass(eq=False)
class _Leaving:
    """A tensor whose bytes are being copied to the host; it is held until the compute stream waits for that."""

    tensor: Tensor
    version: int
    index: int
    nbytes: int
    copied: torch.cuda.Event


class HostOffload(Offload["tuple[Tensor, torch.cuda.Event]"]):
    """Offloads to page-locked memory of the host, on streams of its own beside the computation. For GPUs.

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
                f"--memory.offload-to host needs a GPU, and this run computes on {device.type}, in the host's memory: "
                "use --memory.offload-to disk"
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

    def _pack(self, tensor: Tensor) -> Tensor | Note | Stayed:
        if not tensor.is_cuda and not isinstance(tensor, nn.Parameter):
            return Stayed(tensor.detach(), tensor._version)
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

    def _fetch(self, away: Away) -> "tuple[Tensor, torch.cuda.Event]":
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

    def _receive(self, away: Away, ticket: "tuple[Tensor, torch.cuda.Event]") -> torch.UntypedStorage:
        content, arrived = ticket
        torch.cuda.current_stream(self._device).wait_event(arrived)
        if away.index in self._torn:
            raise modified(content.size())
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
        """Pieces of the host's memory from `offset` on, slab by slab, and the rows of the `nbytes` that each holds."""
        done = 0
        while done < nbytes:
            slab, start = divmod(offset + done, SLAB)
            taken = min(nbytes - done, SLAB - start)
            yield self._slabs[slab][start : start + taken], slice(done, done + taken)
            done += taken
