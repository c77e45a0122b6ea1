"""Policy `offload`: what autograd saves for the encoder's backward waits away from the device, and comes back for it.

Hooks on saved tensors (`torch.autograd.graph.saved_tensors_hooks`) see each tensor that a stored graph keeps. Its
storage is copied out once, however many tensors view it, and autograd is left with a note of where it went. In the
backward the first tensor wanted brings its storage back, and those saved before it are fetched ahead of their use;
autograd drops its notes node by node as it goes, and a storage is freed with the last note of it.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST = 64 * 1024
"""Bytes below which a storage stays: a transfer's fixed cost (10 to 100 µs) would exceed that of its bytes, and what
stays is little: per-channel statistics, and the activations of a tile or two at the last layers."""
PART = 4
"""A view that spans less than 1/PART of its storage is taken by itself, so that a slice does not bring the whole along.
More than the three views q, k, v of one projection: those share one copy of it."""

Ticket = TypeVar("Ticket")


@dataclass(eq=False)
class Away:
    """Bytes of one storage that left the device. Only autograd's notes (`Note`) hold it, so it goes with the last."""

    index: int  # in the order of saving
    offset: int  # where its bytes are, in the file or in the host's memory
    nbytes: int
    device: torch.device
    origin: StorageWeakRef  # while this lives, no other storage can appear at the same address and be mistaken for it
    back: torch.UntypedStorage | None = None  # its bytes, once they are back on the device


@dataclass(frozen=True)
class Note:
    """What autograd holds in a tensor's place: a view of bytes that are away. `offset` counts elements from them."""

    away: Away
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Stayed:
    """What autograd holds in a small tensor's place, with its `version` then: autograd no longer checks it itself."""

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
        bytes_out: bytes that have left the device since the start.
        bytes_back: bytes that have come back to it since the start.
    """

    def __init__(self, ahead: int) -> None:
        self.bytes_out = 0
        self.bytes_back = 0
        self._limit = ahead  # bytes that may be fetched before they are used; the last storage may exceed it
        self._order: list[ref[Away]] = []
        self._known: WeakValueDictionary[tuple[int, ...], Away] = WeakValueDictionary()
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
        """Copy uint8 `[nbytes]` out of the device and return where to; `tensor` is the one saved in these bytes."""

    @abstractmethod
    def _fetch(self, away: Away) -> Ticket:
        """Begin to bring bytes back, without waiting for them."""

    @abstractmethod
    def _receive(self, away: Away, ticket: Ticket) -> torch.UntypedStorage:
        """The bytes that `_fetch` began to bring, on the device and safe to use there."""

    @abstractmethod
    def _abandon(self, ticket: Ticket) -> None:
        """Do without bytes that `_fetch` began to bring."""

    @abstractmethod
    def _reset(self) -> None:
        """Give up all bytes that are away."""

    def _pack(self, tensor: Tensor) -> Tensor | Note | Stayed:
        if isinstance(tensor, nn.Parameter):
            return tensor  # itself: sharding exchanges a parameter's data between forward and backward
        if isinstance(tensor._base, nn.Parameter):
            return tensor.detach()
        # A node must not hold its own output, which holds the node: hence detached.
        if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
            return Stayed(tensor.detach(), tensor._version)
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
                return Stayed(kept, kept._version)
            away = self._known.get(_key(tensor, start, nbytes))
        if away is None:
            away = self._take(tensor, start, nbytes)
        offset = int(tensor.storage_offset()) - start // tensor.itemsize
        return Note(away, tensor.dtype, tensor.size(), tensor.stride(), offset)

    def _take(self, tensor: Tensor, start: int, nbytes: int) -> Away:
        storage = tensor.untyped_storage()
        place = self._send(_bytes(storage)[start : start + nbytes], tensor)
        away = Away(len(self._order), place, nbytes, tensor.device, StorageWeakRef(storage))
        self._order.append(ref(away))
        self._known[_key(tensor, start, nbytes)] = away
        self.bytes_out += nbytes
        return away

    def _unpack(self, packed: Tensor | Note | Stayed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed, Stayed):
            if packed.tensor._version != packed.version:
                raise modified(packed.tensor.size())
            return packed.tensor
        away = packed.away
        if away.back is None:
            away.back = self._bring(away)
        return torch.empty(0, dtype=packed.dtype, device=away.device).set_(
            away.back, packed.offset, packed.size, packed.stride
        )

    def _bring(self, away: Away) -> torch.UntypedStorage:
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


def _key(tensor: Tensor, start: int, nbytes: int) -> tuple[int, ...]:
    """What identifies a content: a storage, how often it was written to in place, and which bytes."""
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


def modified(size: torch.Size) -> RuntimeError:
    """The error to raise, as autograd would have, when a saved tensor has been written to."""
    return RuntimeError(
        f"a tensor of size {list(size)} that the backward needs was modified by an in-place operation after autograd "
        "saved it; --memory.policy recompute or keep names the operation under torch.autograd.set_detect_anomaly(True)"
    )
