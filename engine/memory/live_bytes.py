"""Bytes of the tensors that are alive, counted while operators run."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make while the mode is on, until each is freed.

    Attributes:
        now: bytes alive.
        peak: largest number of bytes alive at once.
        written: bytes of all storages made, freed or not.
        largest: bytes of the largest storage.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        """The storages of `known` tensors do not count."""
        super().__init__()
        self.now = self.peak = self.written = self.largest = 0
        # A storage's address identifies it while it lives, and is forgotten when it dies.
        self._alive = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and note the storages of what it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = size
        self.now += size
        self.written += size
        self.peak = max(self.peak, self.now)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)
