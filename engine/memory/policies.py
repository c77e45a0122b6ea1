"""Memory policies: what becomes of the encoder's activations between forward and backward.

A policy is a class here and a line in `POLICIES`; its name stands in `config.PolicyName`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from slidescale.engine.config import MemoryConfig, PolicyName
from slidescale.engine.errors import ConfigError
from slidescale.engine.memory.needs import Job, Need
from slidescale.engine.memory.offload import Offload
from slidescale.engine.memory.offload_disk import DiskOffload
from slidescale.engine.memory.offload_host import HostOffload

# Of the chunk sizes, the smallest share of the largest that still counts as fast: below it, auto stores nothing.
FAST_SHARE = 4


class Policy(ABC):
    """Says which chunks of a bag keep their graph, and where these graphs wait for the backward.

    Attributes:
        name: in settings.
        away: stored graphs leave the device.
        must_fit: a bag that does not fit is refused; otherwise the policy is carried out, with a warning.
    """

    name: ClassVar[PolicyName]
    away: ClassVar[bool] = False
    must_fit: ClassVar[bool] = False

    @abstractmethod
    def stored(self, chunks: int, fits: Callable[[int], bool]) -> int:
        """Number of a bag's chunks that keep their graph, the last ones of pass 1; the others are encoded again.

        Args:
            chunks: that the fullest rank encodes.
            fits: whether a step fits into memory in which so many keep their graph.
        """

    def need(self, job: Job, k: int, chunk: int, room: int) -> tuple[int, Need]:
        """The number of stored chunks of a bag of K tiles, and what the step then needs.

        Args:
            room: bytes beyond the base.
        """

        def needed(stored: int) -> Need:
            return job.need(k, chunk, stored, away=self.away)

        stored = self.stored(job.chunks(k, chunk), lambda number: needed(number).total <= room)
        return stored, needed(stored)

    def choose_chunk(self, job: Job, k: int, sizes: Sequence[int], room: int) -> tuple[int, "Policy"]:
        """A chunk size, and the policy to carry out with it.

        The largest of some sizes with which a step fits; where none does, the one that needs the least.

        Args:
            sizes: descending.
            room: bytes beyond the base.
        """
        totals = {size: self.need(job, k, size, room)[1].total for size in sizes}
        fitting = (size for size in sizes if totals[size] <= room)
        return next(fitting, None) or min(sizes, key=totals.__getitem__), self

    def open(self, memory: MemoryConfig, *, device: torch.device, rank: int) -> Offload | None:
        """Where stored graphs wait, if not on the device.

        Args:
            rank: in the world, which names a file.
        """
        return None


class Recompute(Policy):
    """Store none, and encode every chunk twice."""

    name = "recompute"

    def stored(self, chunks: int, fits: Callable[[int], bool]) -> int:
        """None."""
        return 0


class Keep(Policy):
    """Store all on the device, and encode every chunk once."""

    name = "keep"

    def stored(self, chunks: int, fits: Callable[[int], bool]) -> int:
        """All."""
        return chunks


class OffloadGraphs(Policy):
    """Store all away from the device, in the host's memory or in files, and encode every chunk once."""

    name = "offload"
    away = True

    def stored(self, chunks: int, fits: Callable[[int], bool]) -> int:
        """All."""
        return chunks

    def open(self, memory: MemoryConfig, *, device: torch.device, rank: int) -> Offload:
        """The host's memory beside a GPU, or files.

        Raises:
            ConfigError: files, and no folder for them.
        """
        if memory.offload_to == "host" or (memory.offload_to == "auto" and device.type == "cuda"):
            return HostOffload(device)
        if memory.offload_folder is None:
            raise ConfigError("policy offload writes files: name a folder for them, on a fast local disk")
        return DiskOffload(memory.offload_folder, rank)


class Auto(Policy):
    """Store as many as fit."""

    name = "auto"
    must_fit = True

    def stored(self, chunks: int, fits: Callable[[int], bool]) -> int:
        """The largest number that fits, by bisection: need grows with it."""
        low, high = 0, chunks
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def choose_chunk(self, job: Job, k: int, sizes: Sequence[int], room: int) -> tuple[int, Policy]:
        """Of the fast sizes, the one with which most tiles are stored, the larger of two that store as many.

        With room for one chunk, that is the last one of pass 1, whose graph takes the room that pass 2 needs for each
        chunk anyway. Where no fast size fits, the largest that does, and then nothing is stored.
        """
        fitting = [size for size in sizes if job.need(k, size, 0).total <= room]
        fast = [size for size in fitting if size * FAST_SHARE >= sizes[0]]
        if not fast:
            return fitting[0] if fitting else sizes[-1], POLICIES["recompute"]

        def stored_tiles(size: int) -> int:
            return min(job.local(k), self.need(job, k, size, room)[0] * size)

        return max(fast, key=lambda size: (stored_tiles(size), size)), self


POLICIES: dict[PolicyName, Policy] = {policy.name: policy for policy in (Recompute(), Keep(), OffloadGraphs(), Auto())}
