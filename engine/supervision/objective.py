"""What a slide's logits are trained to say: the loss of one slide, and what its logits mean."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid

from slidescale.engine.config import SupervisionName

# Of the largest of some numbers: differences that are nothing but how they were written or computed.
ROUNDING = 1e-9


class Objective(nn.Module, ABC):
    """The loss of one slide: a step takes slides one at a time, so nothing here compares slides with each other.

    Attributes:
        supervision: what the manifest says of a slide.
        outputs: number of logits.
    """

    supervision: ClassVar[SupervisionName]
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
        """What logits `[outputs]` say of a slide, in the terms of predictions.csv."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""

    def record(self) -> dict[str, Any]:
        """What `make_objective` makes this objective of again; JSON."""
        return {"supervision": self.supervision, **self.settings()}


class CrossEntropy(Objective):
    """Cross-entropy of one of several classes, times the weight of the slide's class. The target is its index `[1]`.

    Args:
        class_weights: one factor per class; empty: 1 for all. `fit_objective` makes their mean over slides 1.
    """

    supervision = "classes"

    def __init__(self, class_weights: Sequence[float], classes: int) -> None:
        super().__init__()
        self.outputs = classes
        self.class_weights: Tensor
        self.register_buffer("class_weights", torch.tensor(class_weights or [1.0] * classes))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of logits `[classes]`, two or more."""
        index = target.long()
        # PyTorch's own `weight` would cancel: its mean divides by the weights, and a step has one slide.
        return cross_entropy(logits.unsqueeze(0), index) * self.class_weights[index].squeeze(0)

    def predict(self, logits: Tensor) -> Tensor:
        """Probabilities `[classes]` that sum to 1."""
        return logits.softmax(dim=-1)

    def settings(self) -> dict[str, Any]:
        """As the constructor takes them."""
        return {"class_weights": self.class_weights.tolist(), "classes": self.outputs}


class MultiLabel(Objective):
    """Binary cross-entropy, averaged over the labels that the slide has. The target is 1, 0 or NaN (missing) `[L]`.

    A missing label has neither loss nor gradient. A slide without any label, which a manifest cannot have, has a loss
    of zero that still depends on the logits, so that every rank makes the same backward.

    Args:
        positive_weights: one factor per label, on the loss of slides that have it; empty: 1 for all.
        scales: one factor per label, on the loss of all slides; empty: 1 for all. `fit_objective` makes the mean of
            both factors' product over slides 1.
    """

    supervision = "multi_label"

    def __init__(self, positive_weights: Sequence[float], labels: int, scales: Sequence[float] = ()) -> None:
        super().__init__()
        self.outputs = labels
        self.positive_weights: Tensor
        self.scales: Tensor
        self.register_buffer("scales", torch.tensor(scales or [1.0] * labels))
        self.register_buffer("positive_weights", torch.tensor(positive_weights or [1.0] * labels))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of logits `[L]`."""
        present = ~target.isnan()
        wanted = target.nan_to_num(0.0).to(logits.dtype)
        losses = binary_cross_entropy_with_logits(
            logits, wanted, pos_weight=self.positive_weights.to(logits.dtype), reduction="none"
        )
        return (losses * self.scales.to(logits.dtype) * present).sum() / present.sum().clamp(min=1)

    def predict(self, logits: Tensor) -> Tensor:
        """Probability of each label `[L]`."""
        return logits.sigmoid()

    def settings(self) -> dict[str, Any]:
        """As the constructor takes them."""
        return {
            "positive_weights": self.positive_weights.tolist(),
            "labels": self.outputs,
            "scales": self.scales.tolist(),
        }


class Regression(Objective):
    """Squared error of a number, in standard deviations of the train split's. The target is the number `[1]`.

    So the logit of an untrained model is near the mean, and learning rates do not depend on the number's unit.

    Args:
        mean, sd: of the train split's targets; sd > 0.
    """

    supervision = "regression"
    outputs = 1

    def __init__(self, mean: float, sd: float) -> None:
        super().__init__()
        self.mean = mean
        self.sd = sd

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of logits `[1]`."""
        # In the target's float64 until it is standardised: a number far from zero may differ little between slides.
        wanted = ((target - self.mean) / self.sd).to(logits.dtype)
        return (logits - wanted).square().sum()

    def predict(self, logits: Tensor) -> Tensor:
        """The number `[1]`, in the manifest's unit, float64."""
        return logits.double() * self.sd + self.mean

    def settings(self) -> dict[str, Any]:
        """As the constructor takes them."""
        return {"mean": self.mean, "sd": self.sd}


class Survival(Objective):
    """Negative log-likelihood of a time until an event, in bins of time. The target is (time, event) `[2]`.

    Logit j is that of the hazard h_j: the probability that the event comes in bin j when it has not come before. With
    the slide's time in bin b, an observed event (1) has likelihood h_b Π_{j<b} (1 − h_j), and a patient who was last
    seen without it (0, censored) Π_{j≤b} (1 − h_j), as if seen to the end of that bin (Zadeh & Schmid 2020,
    doi:10.1109/TPAMI.2020.2979450; for slides: Chen et al. 2021, MCAT). Cox's partial likelihood would need the slides
    still at risk at each event, and a step has one slide.

    Args:
        edges: `[bins − 1]`, increasing, in the manifest's unit of time; bin j holds edges[j−1] ≤ time < edges[j].
        censored_alpha: MCAT's α, 0 to 1: a censored patient's loss counts 1 − α times as much as an observed one's.
            There the loss is (1 − α) times that of all patients, plus α times that of the observed ones.
    """

    supervision = "survival"

    def __init__(self, edges: Sequence[float], censored_alpha: float = 0.0) -> None:
        super().__init__()
        self.outputs = len(edges) + 1
        self.censored_alpha = censored_alpha
        self.edges: Tensor
        self.register_buffer("edges", torch.tensor(edges, dtype=torch.float64))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of logits `[bins]`."""
        time, event = target.unbind()
        last = torch.searchsorted(self.edges, time, right=True)
        bins = torch.arange(self.outputs, device=logits.device)
        # log h = logsigmoid(z) and log(1 − h) = logsigmoid(−z): each bin up to the last has a yes or a no.
        happens = (bins == last) & (event == 1)
        logs = torch.where(happens, logsigmoid(logits), logsigmoid(-logits))
        share = (1 - self.censored_alpha * (1 - event)).to(logits.dtype)
        return -share * (logs * (bins <= last)).sum()

    def predict(self, logits: Tensor) -> Tensor:
        """Risk `[1]`, larger for an earlier event: minus the sum over bins of the probability to outlast them."""
        return -logsigmoid(-logits).cumsum(dim=-1).exp().sum(dim=-1, keepdim=True)

    def settings(self) -> dict[str, Any]:
        """As the constructor takes them."""
        return {"edges": self.edges.tolist(), "censored_alpha": self.censored_alpha}


def fit_objective(
    supervision: SupervisionName,
    outputs: int,
    train_targets: Sequence[tuple[float, ...]],
    *,
    class_weights: Sequence[float],
    survival_bins: int,
    censored_alpha: float = 0.0,
) -> Objective:
    """The objective for a manifest.

    Weights of classes or labels are divided by their mean over the train split's slides: they say what counts more,
    and leave learning rate, clipping and the size of the loss as they are.

    Args:
        outputs: number of classes or labels.
        train_targets: of the train split's slides, which give regression its scale and survival its bins.
        class_weights: of classes, or of positive labels; empty: 1 for all.
        survival_bins: number of bins.
        censored_alpha: see `Survival`.

    Raises:
        ValueError: the targets have no scale (see `regression_scale`), or cannot be cut into as many bins (see
            `survival_edges`).
    """
    match supervision:
        case "classes":
            return CrossEntropy(_with_mean_1(class_weights, train_targets), outputs)
        case "multi_label":
            return MultiLabel(class_weights, outputs, _label_scales(class_weights, train_targets))
        case "regression":
            return Regression(*regression_scale(train_targets))
        case "survival":
            return Survival(survival_edges(train_targets, survival_bins), censored_alpha)


def make_objective(record: dict[str, Any]) -> Objective:
    """The objective that `Objective.record` describes, for a model that is already trained."""
    kinds: dict[str, type[Objective]] = {
        kind.supervision: kind for kind in (CrossEntropy, MultiLabel, Regression, Survival)
    }
    settings = {name: value for name, value in record.items() if name != "supervision"}
    return kinds[record["supervision"]](**settings)


def _with_mean_1(weights: Sequence[float], targets: Sequence[tuple[float, ...]]) -> list[float]:
    """Weights of classes, whose mean over the slides of `targets` is 1."""
    if not weights:
        return []
    mean = np.mean([weights[int(index)] for (index,) in targets])
    return [float(weight / mean) for weight in weights]


def _label_scales(weights: Sequence[float], targets: Sequence[tuple[float, ...]]) -> list[float]:
    """Of each label, 1 over the mean over its slides of the weight where they have it, and 1 where not."""
    if not weights:
        return []
    columns = zip(*targets, strict=True)
    means = [
        np.mean([weight if value else 1.0 for value in column if not math.isnan(value)])
        for weight, column in zip(weights, columns, strict=True)
    ]
    return [float(1 / mean) for mean in means]


def regression_scale(targets: Sequence[tuple[float, ...]]) -> tuple[float, float]:
    """Mean and standard deviation of numbers.

    Raises:
        ValueError: they differ by no more than rounding, which errors would be divided by; or overflow.
    """
    values = np.array(targets, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        mean, sd = float(values.mean()), float(values.std())
    if not math.isfinite(sd):
        raise ValueError("numbers are too large for a standard deviation; use another unit")
    if sd <= ROUNDING * np.abs(values).max():
        raise ValueError(f"all are {mean:g}, up to a standard deviation of {sd:.1g}; there is nothing to predict")
    return mean, sd


def survival_edges(targets: Sequence[tuple[float, ...]], bins: int) -> list[float]:
    """Times `[bins − 1]` that cut the observed events into bins of about equally many.

    Args:
        targets: (time, event) of each slide of the train split.

    Raises:
        ValueError: a bin would have no event, from which its hazard could be learnt.
    """
    times = np.array([time for time, event in targets if event])
    if len(times) >= bins:
        edges = np.quantile(times, np.arange(1, bins) / bins)
        if len(np.unique(np.searchsorted(edges, times, side="right"))) == bins:
            return edges.tolist()
    raise ValueError(f"{len(times)} observed events at {len(np.unique(times))} different times do not fill {bins} bins")
