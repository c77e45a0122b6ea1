"""What a slide's logits are trained to say."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class CrossEntropy(nn.Module):
    """Cross-entropy of one slide, times the weight of its class.

    Args:
        class_weights: one factor a class; empty: 1 for all.
    """

    def __init__(self, class_weights: Sequence[float], classes: int) -> None:
        super().__init__()
        self.class_weights: Tensor
        self.register_buffer("class_weights", torch.tensor(class_weights or [1.0] * classes))

    def forward(self, logits: Tensor, label: int) -> Tensor:
        """Scalar loss of logits `[classes]`, two or more."""
        target = torch.tensor([label], device=logits.device)
        # PyTorch's own `weight` would cancel: its mean divides by the weights, and a step has one slide.
        return cross_entropy(logits.unsqueeze(0), target) * self.class_weights[label]

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        """`[classes]` that sum to 1."""
        return logits.softmax(dim=-1)
