"""Strategies: how parameters, gradients and optimizer state are spread over the ranks.

A strategy owns the model from the moment it wraps it, and is all that the training step knows of the machinery.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from slidescale.engine.errors import TrainingError
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.strategies.state_files import load_state


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms of a step's gradient, the mean over ranks, before clipping.

    Attributes:
        total: of all parameters.
        halves: of "aggregator" and "encoder", as far as they have parameters that train.
    """

    total: float
    halves: dict[str, float]


class Strategy(ABC):
    """The interface that the training step is written against.

    Attributes:
        name: as logs call it.
        checkpoint_format: what `save` writes; only a strategy of the same format can `load` it.
        model: the slide model, ready to run on `device`.
        device: of this rank.
    """

    name: str
    checkpoint_format: str
    model: SlideModel
    device: torch.device

    @abstractmethod
    def accumulate(self, backwards: int) -> AbstractContextManager[None]:
        """Surround all backwards of a step, whose number is given; on leaving, gradients are the mean over ranks."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar to the parameters' gradients."""

    @abstractmethod
    def step(self) -> GradientNorms:
        """Clip, update the parameters, advance the schedule, clear the gradients.

        Returns:
            Of the whole gradient, before clipping.

        Raises:
            TrainingError: the norm is not finite; no parameter has changed.
        """

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, with the settings of the next step."""

    def settings(self) -> dict[str, float]:
        """Settings of the next step: `learning_rate` of the aggregator, `learning_rate_encoder` (the largest of the
        encoder, if it trains at all) and `weight_decay` (the largest).
        """
        groups = self.groups()
        found = {"learning_rate": groups[0]["lr"], "weight_decay": max(group["weight_decay"] for group in groups)}
        rates = [group["lr"] for group in groups if group.get("name", "").startswith("encoder")]
        return found | ({"learning_rate_encoder": max(rates)} if rates else {})

    def encoder_frozen(self) -> bool:
        """Whether the next step leaves the encoder as it is."""
        return any(map(is_frozen, self.groups()))

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's value, put together from all ranks, each of which calls this."""
        return parameter.detach()

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by its name, as far as this rank holds it, flat or in shape; and, where the strategy has it
        at hand, the optimizer's state.
        """
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write model, optimizer and schedule under `folder`; every rank calls it."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restore what `save` wrote; every rank calls it."""


class TorchStrategy(Strategy):
    """Steps with a PyTorch optimizer over the model's parameters, whole or sharded.

    Args:
        clip: the largest gradient norm to step with; 0 leaves gradients as they are.
    """

    def __init__(
        self,
        model: SlideModel,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        *,
        device: torch.device,
        clip: float,
    ) -> None:
        self.model = model
        self.device = device
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._clip = clip

    def step(self) -> GradientNorms:
        """Clip, step, schedule, clear."""
        norms = gradient_norms(self.model)
        check_gradient_norm(norms.total)
        if self._clip:
            clip_gradients(self.model, norms, self._clip)
        self._optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        self._optimizer.zero_grad()
        return norms

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's own."""
        return self._optimizer.param_groups

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters, or this rank's shards of them, and the optimizer's state of each."""
        for name, parameter in self.model.named_parameters():
            yield name, _local(parameter.detach())
            for kind, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"the optimizer's {kind} of {name}", _local(value)


class SingleStrategy(TorchStrategy):
    """One process, plain PyTorch."""

    name = "single"
    checkpoint_format = "single or ddp"

    @contextmanager
    def accumulate(self, backwards: int) -> Iterator[None]:
        """Nothing to reduce: the gradients add up in place."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Plain autograd."""
        loss.backward()

    def save(self, folder: Path) -> None:
        """One file, `state.pt`."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict() if self._scheduler else None,
        }
        torch.save(state, folder / "state.pt")

    def load(self, folder: Path) -> None:
        """Read `state.pt`."""
        state = load_state(folder / "state.pt", self.device)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])


def is_frozen(group: dict[str, Any]) -> bool:
    """Whether a group belongs to the encoder and does not train yet (see `GroupSchedule`): only then its rate is 0."""
    return group.get("name", "").startswith("encoder") and group["lr"] == 0


def gradient_norms(model: SlideModel) -> GradientNorms:
    """Norms of the gradients that parameters hold, whole and equal on every rank, or sharded over ranks.

    Each rank takes the norms of its own shards. One sum over all ranks, of one number per half, puts these together;
    where there are several copies of the shards, each copy gives its part.
    """
    squares: dict[str, Tensor] = {}
    copies: set[int] = set()
    for half, module in (("aggregator", model.aggregator), ("encoder", model.encoder)):
        grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        shards = [_local(grad) for grad in grads]
        if shards:
            # Summed in doubles: a sum of millions of fp32 squares is off by its first digits on a CPU, where it is
            # taken one after another, and the square of a large norm would pass for an infinite one.
            norms = torch.stack(torch._foreach_norm(shards, 2.0, dtype=torch.float64))
            squares[half] = norms.square().sum()
        copies |= {_copies(grad) for grad in grads if isinstance(grad, DTensor)}
    stacked = torch.stack(list(squares.values()))
    if copies:
        assert len(copies) == 1, f"all of the model has as many copies, not {copies}"
        stacked /= copies.pop()
        dist.all_reduce(stacked)
    halves = dict(zip(squares, stacked.sqrt().tolist(), strict=True))
    return GradientNorms(math.hypot(*halves.values()), halves)


def clip_gradients(model: SlideModel, norms: GradientNorms, clip: float) -> None:
    """Scale all gradients so that their joint norm is at most `clip`."""
    device = next(model.parameters()).device
    total = torch.tensor(norms.total, dtype=torch.float64, device=device)
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, total)


def find_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those that have a value that is NaN or infinite."""
    found = [(name, value.isfinite().all()) for name, value in tensors if value.is_floating_point()]
    return [name for name, finite in found if not finite]


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _copies(sharded: DTensor) -> int:
    """Ranks that hold each element."""
    return math.prod(
        size
        for size, placement in zip(sharded.device_mesh.shape, sharded.placements, strict=True)
        if placement.is_replicate()
    )


def check_gradient_norm(norm: float) -> None:
    """Raise TrainingError unless the norm is finite; called before anything steps."""
    if not norm < float("inf"):
        raise TrainingError(f"the gradient norm is {norm}: no optimizer step was taken")
