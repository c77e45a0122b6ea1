"""The training step: exact gradients over every tile of a slide, and one update."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from slidescale.engine.errors import TrainingError
from slidescale.engine.memory.offload import Offload
from slidescale.engine.memory.two_pass import Chunks, Saving, backpropagate, encode, inject_zeros
from slidescale.engine.models.dropout import Draw, drawing_for
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.strategies.strategy import Strategy
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.training.feed import Share, Step
from slidescale.engine.training.stopwatch import Stopwatch


@dataclass(frozen=True)
class StepResult:
    """Of one training step.

    Attributes:
        loss: the mean of its slides'.
        gradient_norms: of the mean gradient, before clipping: of the whole ("total"), and of each half that has trained
            ("aggregator", "encoder"). An encoder that hears nothing from the aggregator shows here, and one whose
            gradient is so much larger that clipping both together leaves the aggregator none.
        attention_entropy: Shannon's, of the tiles' weights, as a share of what it can be, log K: 1 where all tiles
            weigh the same (so also where there is only one), 0 where one has it all; the mean of its slides'. An
            attention that collapses onto few tiles, as gated attention does when it overfits (Zhang et al. 2024,
            arXiv:2311.07125), shows here.
        effective_tiles: the number of equally weighted tiles that would have this entropy, exp of it; the geometric
            mean of its slides'.
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
        chunk: tiles that go through the encoder at once.
        offload: where stored graphs' tensors go; None leaves them on the device.
    """

    def __init__(
        self,
        strategy: Strategy,
        objective: Objective,
        mesh: Mesh,
        *,
        chunk: int,
        offload: Offload | None = None,
    ) -> None:
        self.strategy = strategy
        self.objective = objective
        self.mesh = mesh
        self.chunk = chunk
        self.offload = offload
        self.stopwatch = Stopwatch(strategy.device)

    def __call__(self, step: Step) -> StepResult:
        """One optimizer step, in memory for the chunks that the shares say to store and one more.

        Raises:
            TrainingError: loss or gradient is not finite; names the slide, and no optimizer step was taken.
        """
        losses: dict[str, float] = {}
        entropies = torch.zeros(2, dtype=torch.float64, device=self.strategy.device)
        frozen = self.strategy.encoder_frozen()
        # In each slot the aggregator's, and those of an encoder, unless its features are given (`GivenFeatures`).
        given = not any(parameter.requires_grad for parameter in self.strategy.model.encoder.parameters())
        backwards = step.slots + (0 if given else step.slots if frozen else step.chunks)
        self.stopwatch.start()
        with self.strategy.accumulate(backwards):
            for share in step.shares:
                self.stopwatch.lap("reading")
                losses |= self._add(share, entropies, frozen=frozen)
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

    def _add(self, share: Share, entropies: Tensor, *, frozen: bool) -> dict[str, float]:
        """Add the gradients of one slot, and leave nothing else of it behind; the losses of its slides.

        Args:
            entropies: fp64 `[2]`, to which this rank's part of the attention's entropy is added, relative and in nats.
            frozen: the encoder gets zeros, and no pass 2.
        """
        strategy, model, group, lap = self.strategy, self.strategy.model, self.mesh.tiles, self.stopwatch.lap
        bag, offset = share.bag, group.share(share.bag.k).start
        tiles = share.tiles.to(strategy.device, non_blocking=True)
        chunks = Chunks(tiles, self.chunk, share.count, bag.seed, offset)
        with self._offloading() as saving:
            encoded = encode(model, chunks, 0 if frozen else share.stored, saving)
            lap("pass 1")
            with drawing_for(Draw(bag.seed, offset, len(tiles))):
                logits, weights = model.aggregate(encoded.features, bag.places.to(strategy.device), group)
            target = torch.tensor(bag.row.target, dtype=torch.float64, device=logits.device)
            loss = self.objective(logits, target)
            losses = self._check_losses(share, loss.item())
            if share.weight:
                entropies += _entropy(weights, bag.k)
            strategy.backward(loss * share.weight)
            lap("aggregate")
            if frozen:
                inject_zeros(model, chunks, strategy.backward)
            else:
                backpropagate(model, chunks, encoded, strategy.backward)
            lap("pass 2")
        return losses

    @contextmanager
    def _offloading(self) -> Iterator[Saving]:
        """Where stored graphs' tensors go; nothing of a slot stays there, whatever ends it."""
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
        mine = (share.bag.row.slide_id, loss) if share.weight else None
        everyones = [mine] if self.mesh.slides == 1 else self.mesh.world.gather_objects(mine)
        losses = dict(item for item in everyones if item is not None)
        for slide_id, value in losses.items():
            if not math.isfinite(value):
                raise TrainingError(f"slide {slide_id}: the loss is {value}; no optimizer step was taken")
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
