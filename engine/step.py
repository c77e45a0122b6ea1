"""The training step: exact gradients over every tile of a slide, and one update."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from slidescale.engine.errors import TrainingError
from slidescale.engine.feed import Share, Step
from slidescale.engine.memory.offload import Offload
from slidescale.engine.memory.two_pass import Chunks, Saving, backpropagate, encode
from slidescale.engine.models.dropout import Draw, drawing_for
from slidescale.engine.objective import Objective
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.parallel.strategy import Strategy
from slidescale.engine.stopwatch import Stopwatch


@dataclass(frozen=True)
class StepResult:
    """Of one training step.

    Attributes:
        loss: the mean of its slides'.
        gradient_norm: before clipping.
        seconds: of each of the `stopwatch.PHASES`, on this rank. Under fsdp the reduction is part of pass 2.
    """

    loss: float
    gradient_norm: float
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
        self.stopwatch.start()
        with self.strategy.accumulate(step.backwards):
            for share in step.shares:
                self.stopwatch.lap("reading")
                losses |= self._add(share)
        self.stopwatch.lap("reduction")
        try:
            gradient_norm = self.strategy.step()
        except TrainingError as error:
            raise TrainingError(f"slide {', '.join(losses)}: {error}") from None
        self.stopwatch.lap("optimizer")
        seconds = self.stopwatch.seconds() | {"reading": step.waited_s}  # for the first slot the feed has waited before
        return StepResult(sum(losses.values()) / len(losses), gradient_norm, seconds)

    def _add(self, share: Share) -> dict[str, float]:
        """Add the gradients of one slot, and leave nothing else of it behind; the losses of its slides."""
        strategy, model, group, lap = self.strategy, self.strategy.model, self.mesh.tiles, self.stopwatch.lap
        bag, offset = share.bag, group.share(share.bag.k).start
        tiles = share.tiles.to(strategy.device, non_blocking=True)
        chunks = Chunks(tiles, self.chunk, share.count, bag.seed, offset)
        with self._offloading() as saving:
            encoded = encode(model, chunks, share.stored, saving)
            lap("pass 1")
            with drawing_for(Draw(bag.seed, offset, len(tiles))):
                logits, _ = model.aggregate(encoded.features, bag.places.to(strategy.device), group)
            target = torch.tensor(bag.row.target, dtype=torch.float64, device=logits.device)
            loss = self.objective(logits, target)
            losses = self._check_losses(share, loss.item())
            strategy.backward(loss * share.weight)
            lap("aggregate")
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
