"""How many tiles to encode at once, and which graphs to store, so that a step fits into memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from slidescale.engine.config import PolicyName
from slidescale.engine.errors import ConfigError
from slidescale.engine.memory.needs import Job, Need
from slidescale.engine.memory.policies import POLICIES, Policy
from slidescale.engine.units import format_size

# Tiles per chunk beyond which a larger one is hardly faster.
CHUNK_CAP = {"cpu": 16, "cuda": 128}


@dataclass(frozen=True)
class Plan:
    """How steps keep to their memory.

    Attributes:
        policy: name of the policy that was asked for.
        chunk: tiles that go through the encoder at once.
        k: tiles of the bag that it was made for, the largest.
        chunks: that the fullest rank encodes of it.
        stored: of these, the number whose graphs are stored.
        base: bytes held before the step.
        budget: bytes that a rank may take.
        need: what the step adds at its peak.
        warning: what does not fit, or "".
        acting: the policy that is carried out; auto turns into recompute where only small chunks fit.
    """

    policy: PolicyName
    chunk: int
    k: int
    chunks: int
    stored: int
    base: int
    budget: int
    need: Need
    warning: str
    job: Job
    acting: Policy

    @property
    def peak(self) -> int:
        """Bytes at the peak of the step on `k` tiles."""
        return self.base + self.need.total

    @property
    def again(self) -> int:
        """Chunks that are encoded a second time."""
        return self.chunks - self.stored

    def stored_chunks(self, k: int) -> int:
        """Number of chunks whose graphs are stored for a bag of K tiles; it follows from K, alike on every rank."""
        return self.acting.need(self.job, k, self.chunk, self.budget - self.base)[0]


def sizes_to_measure(
    k: int, chunk: int | Literal["auto"], flavour: str, *, ranks: int = 1
) -> tuple[list[int], list[int]]:
    """Numbers of tiles at which to measure the encoder and the aggregator (`footprint.measure`), at least two of each.

    Args:
        k: tiles of the largest bag, over all ranks.
        chunk: as for `choose`.
        ranks: that share a bag's tiles.
    """
    cap = max(2, min(CHUNK_CAP[flavour] if chunk == "auto" else chunk, _covering(-(-k // ranks))))
    return sorted({1, max(1, cap // 4), cap}), sorted({1, k, 1024 * ranks})


def choose(
    job: Job,
    *,
    k: int,
    budget: int,
    base: int,
    policy: PolicyName = "auto",
    chunk: int | Literal["auto"] = "auto",
) -> Plan:
    """Choose the chunk size, and how many chunks keep their graph, as the policy says (see `Policy.choose_chunk`).

    A policy that does not fit is carried out all the same, with a warning; auto is refused.

    Args:
        k: tiles of the largest bag, over all ranks.
        budget: total memory per rank, in bytes; with several ranks, the smallest budget of any.
        base: bytes it holds with parameters, gradients and optimizer state in place; with several ranks, the largest.

    Raises:
        ConfigError: not even one tile fits; says by how much. The caller adds what helps.
    """
    room, asked = budget - base, POLICIES[policy]
    least = job.need(k, 1, 0)
    if asked.must_fit and least.total > room:
        raise ConfigError(_does_not_fit(job, k, budget, base, least))
    cap = min(CHUNK_CAP[job.footprint.flavour], _covering(job.local(k)))
    best, acting = asked.choose_chunk(job, k, [chunk] if chunk != "auto" else list(_powers_down(cap)), room)
    stored, need = acting.need(job, k, best, room)
    warning = ""
    if need.total > room:
        warning = (
            f"policy {policy} with chunks of {best} tiles needs {format_size(base + need.total)} for {k} tiles, "
            f"{format_size(need.total - room)} more than the budget of {format_size(budget)}"
        )
    return Plan(policy, best, k, job.chunks(k, best), stored, base, budget, need, warning, job, acting)


def _covering(local: int) -> int:
    """The least power of two that is no less."""
    return 1 << (local - 1).bit_length()


def _powers_down(cap: int) -> Iterator[int]:
    while cap:
        yield cap
        cap //= 2


def _does_not_fit(job: Job, k: int, budget: int, base: int, least: Need) -> str:
    parts = [
        (least.pixels, "pixels"),
        (least.features, "features and aggregator"),
        (least.chunk, "activations"),
        (least.update, "gradient reduction and update"),
    ]
    listed = ", ".join(f"{format_size(size)} of {name}" for size, name in parts if size)
    return (
        f"a bag of {k} tiles does not fit: a rank holds {format_size(base)} before the step, and the step needs "
        f"{format_size(least.total)} with one tile encoded at a time ({listed}), "
        f"{format_size(base + least.total - budget)} more than the budget of {format_size(budget)}"
    )
