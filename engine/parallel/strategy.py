"""Strategies: how parameters, gradients and optimizer state are spread over the ranks.

A strategy owns the model from the moment it wraps it, and is all that the training step knows of the machinery.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from slidescale.engine.errors import TrainingError
from slidescale.engine.models.slide_model import SlideModel


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
        """Surround all of a step's backwards, so many of them; on leaving, gradients are the mean over ranks."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar to the parameters' gradients."""

    @abstractmethod
    def step(self) -> float:
        """Clip, update the parameters, advance the schedule, clear the gradients.

        Returns:
            The global gradient norm before clipping.

        Raises:
            TrainingError: the norm is not finite; no parameter has changed.
        """

    @abstractmethod
    def learning_rate(self) -> float:
        """The learning rate of the next step (of the first parameter group)."""

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's value, put together from all ranks, each of which calls this."""
        return parameter.detach()

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

    def step(self) -> float:
        """Clip, step, schedule, clear."""
        parameters = list(self.model.parameters())
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        check_gradient_norm(float(norm))
        if self._clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
        self._optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        self._optimizer.zero_grad()
        return float(norm)

    def learning_rate(self) -> float:
        """Of the first parameter group."""
        return self._optimizer.param_groups[0]["lr"]


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
        state = torch.load(folder / "state.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])


def check_gradient_norm(norm: float) -> None:
    """Raise TrainingError unless the norm is finite; called before anything steps."""
    if not norm < float("inf"):
        raise TrainingError(f"the gradient norm is {norm}: no optimizer step was taken")
