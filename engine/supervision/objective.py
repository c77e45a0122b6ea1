"""The loss of one slide, and what its logits mean."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn


class Objective(nn.Module, ABC):
    """The loss of one slide: a step takes slides one at a time, so nothing here compares slides with each other.

    Attributes:
        supervision: name of the kind of supervision whose loss this is.
        outputs: number of logits.
    """

    supervision: ClassVar[str]
    outputs: int

    @abstractmethod
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of a slide.

        Args:
            logits: `[outputs]`.
            target: `ManifestRow.target`, float64, on the logits' device.
        """

    @abstractmethod
    def predict(self, logits: Tensor) -> Tensor:
        """What logits `[outputs]` mean, in the terms of predictions.csv."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""

    def record(self) -> dict[str, Any]:
        """What `make_objective` makes this objective from again; JSON."""
        return {"supervision": self.supervision, **self.settings()}
