"""The training step: exact gradients over every tile of a slide, and one update."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from slidescale.engine.errors import TrainingError
from slidescale.engine.memory.offload import Offload
from slidescale.engine.memory.two_pass import Chunks, Saving, aggregate, backpropagate, encode, inject_zeros
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.strategies.strategy import Strategy
from slidescale.engine.training.stopwatch import Stopwatch

# Scalar loss of one slide, from its logits `[C]` and its target.
Loss = Callable[[Tensor, Tensor], Tensor]


class Planned(Protocol):
    """How steps keep to their memory, as `memory.planner.Plan` says."""

    @property
    def chunk(self) -> int:
        """Tiles that go through the encoder at once."""

    def stored_chunks(self, k: int) -> int:
        """Number of chunks per rank whose graphs are stored, for a bag of K tiles; the same on every rank."""


@dataclass(frozen=True)
class Share:
    """A rank's part in one slot of a step: its tiles of the slide that its tile group works on.

    Attributes:
        name: of the slide, for messages.
        tiles: this rank's share of the bag, `[K_local, …]` as the encoder takes them: uint8 `[K_local, H, W, 3]`, or
            features `[K_local, D]` of a frozen encoder.
        target: as the loss takes it.
        places: fp32 `[K, 2]`, where each of the bag's tiles lies on the slide, counted in tiles.
        seed: of everything random that happens to the bag, the same on every rank.
        weight: factor on the slide's loss; 0 for a stand-in, which keeps a tile group without a slide in step.
    """

    name: str
    tiles: Tensor
    target: Tensor
    places: Tensor
    seed: int
    weight: float = 1.0

    @property
    def k(self) -> int:
        """Number of tiles in the bag, over all ranks."""
        return len(self.places)


@dataclass
class Step:
    """The slides of one optimizer step.

    Attributes:
        names: of its slides, S × A of them or, at the end of an epoch, fewer.
        k: tiles in all their bags.
        slots: for each slot, which every rank works on, the tiles of its largest bag.
        shares: this rank's, one per slot; only one at a time is in memory, beside those that are read ahead.
        waited_s: time spent waiting for tiles, so far.
    """

    names: tuple[str, ...]
    k: int
    slots: list[int]
    shares: Iterator[Share] = field(default_factory=lambda: iter(()))
    waited_s: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """The result of one training step.

    Attributes:
        loss: mean over its slides.
        gradient_norms: of the mean gradient, before clipping: of the whole ("total"), and of each half that has trained
            ("aggregator", "encoder"). An encoder that hears nothing from the aggregator shows here, and one whose
            gradient is so much larger that clipping both together leaves the aggregator none.
        attention_entropy: Shannon's, of the weights of the tiles, as a share of the largest possible, log K: 1 where
            all tiles weigh the same (so also where there is only one), 0 where one has it all; mean over the slides.
            An attention that collapses onto few tiles, as gated attention does when it overfits (Zhang et al. 2024,
            arXiv:2311.07125), shows here. NaN where the aggregator gives no weights.
        effective_tiles: the number of equally weighted tiles that would have this entropy, exp of it; geometric mean
            over the slides.
        seconds: of each of the `stopwatch.PHASES`, on this rank. Under fsdp the reduction is part of pass 2.
    """

    loss: float
    gradient_norms: dict[str, float]
    attention_entropy: float
    effective_tiles: float
    seconds: dict[str, float]


class TrainStep:
    """Steps a strategy's model.

    Args:
        loss: of one slide.
        offload: where tensors of stored graphs go; None leaves them on the device.
    """

    def __init__(
        self, strategy: Strategy, loss: Loss, mesh: Mesh, plan: Planned, offload: Offload | None = None
    ) -> None:
        self.strategy = strategy
        self.loss = loss
        self.mesh = mesh
        self.plan = plan
        self.offload = offload
        self.stopwatch = Stopwatch(strategy.device)

    def __call__(self, step: Step) -> StepResult:
        """One optimizer step, in memory for the chunks that the plan stores and one more.

        Raises:
            TrainingError: loss or gradient is not finite; names the slide, and no optimizer step was taken.
        """
        losses: dict[str, float] = {}
        entropies = torch.zeros(2, dtype=torch.float64, device=self.strategy.device)
        frozen = self.strategy.encoder_frozen()
        # In each slot that of the aggregator, and those of an encoder, unless its features are given.
        given = not any(parameter.requires_grad for parameter in self.strategy.model.encoder.parameters())
        slots, chunks = len(step.slots), sum(map(self._chunk_count, step.slots))
        self.stopwatch.start()
        with self.strategy.accumulate(slots + (0 if given else slots if frozen else chunks)):
            for share, largest in zip(step.shares, step.slots, strict=True):
                self.stopwatch.lap("reading")
                losses |= self._add(share, largest, entropies, frozen=frozen)
        self.stopwatch.lap("reduction")
        try:
            norms = self.strategy.step()
        except TrainingError as error:
            raise TrainingError(f"slide {', '.join(losses)}: {error}") from None
        relative, entropy = (self.mesh.world.sum(entropies) / len(losses)).tolist()
        self.stopwatch.lap("optimizer")
        trained = {half: norm for half, norm in norms.halves.items() if not (frozen and half == "encoder")}
        seconds = self.stopwatch.seconds() | {"reading": step.waited_s}  # for the first slot the feed has waited before
        loss = sum(losses.values()) / len(losses)
        return StepResult(loss, {"total": norms.total} | trained, relative, math.exp(entropy), seconds)

    def _add(self, share: Share, largest: int, entropies: Tensor, *, frozen: bool) -> dict[str, float]:
        """Add the gradients of one slot, and leave nothing else of it behind; return the losses of its slides.

        Args:
            largest: tiles of the slot's largest bag.
            entropies: fp64 `[2]`, to which this rank's part of the attention's entropy is added, relative and in nats.
            frozen: the encoder gets zeros, and no pass 2.
        """
        strategy, model, group, lap = self.strategy, self.strategy.model, self.mesh.tiles, self.stopwatch.lap
        tiles = share.tiles.to(strategy.device, non_blocking=True)
        offset = group.share(share.k).start
        chunks = Chunks(tiles, self.plan.chunk, self._chunk_count(largest), share.seed, offset)
        with self._offloading() as saving:
            encoded = encode(model, chunks, 0 if frozen else self.plan.stored_chunks(largest), saving)
            lap("pass 1")
            logits, weights = aggregate(model, chunks, encoded, share.places, group)
            loss = self.loss(logits, share.target.to(logits.device))
            losses = self._check_losses(share, loss.item())
            if share.weight:
                entropies += math.nan if weights is None else _entropy(weights, share.k)
            strategy.backward(loss * share.weight)
            lap("aggregate")
            if frozen:
                inject_zeros(model, chunks, strategy.backward)
            else:
                backpropagate(model, chunks, encoded, strategy.backward)
            lap("pass 2")
        return losses

    def _chunk_count(self, largest: int) -> int:
        """Number of chunks that every rank of the world encodes in a slot."""
        return self.mesh.tiles.chunk_count(largest, self.plan.chunk)

    @contextmanager
    def _offloading(self) -> Iterator[Saving]:
        """Where tensors of stored graphs go; nothing of a slot stays there, whatever ends it."""
        if self.offload is None:
            yield nullcontext
            return
        try:
            yield self.offload.saving
        finally:
            self.offload.clear()

    def _check_losses(self, share: Share, loss: float) -> dict[str, float]:
        """The losses of the slides side by side, on every rank.

        Raises:
            TrainingError: one is not finite; on every rank alike, so that none waits for another.
        """
        mine = (share.name, loss) if share.weight else None
        everyones = [mine] if self.mesh.slides == 1 else self.mesh.world.gather_objects(mine)
        losses = dict(item for item in everyones if item is not None)
        for name, value in losses.items():
            if not math.isfinite(value):
                raise TrainingError(f"slide {name}: the loss is {value}; no optimizer step was taken")
        return losses


def _entropy(weights: Tensor, k: int) -> Tensor:
    """fp64 `[2]`, what this rank's tiles `[K_local]` add to the entropy of all K weights: as a share of log K, in nats.

    Sums over ranks and slides, and so needs no exchange until a step has ended.
    """
    weights = weights.detach()
    entropy = torch.special.entr(weights).sum(dtype=torch.float64)
    # Of one tile, whose weight is 1, it is 0 of 0: all tiles that there are weigh the same.
    relative = entropy / math.log(k) if k > 1 else weights.sum(dtype=torch.float64)
    return torch.stack([relative, entropy])
