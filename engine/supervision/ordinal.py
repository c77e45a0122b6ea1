"""Ordinal classes: each slide has one of several grades that have an order, such as ISUP grade groups."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad, softplus

from slidescale.engine.config import DataConfig
from slidescale.engine.supervision.base import Targets, everyone
from slidescale.engine.supervision.cells import Problem, Record, finite_number
from slidescale.engine.supervision.classes import Classes
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.supervision.rates import Metric, ratio


class CumulativeLogits(Objective):
    """Negative log-likelihood of a grade under cumulative logits, times the grade's weight. The target is its index.

    The model of McCullagh 1980 ("Regression Models for Ordinal Data", doi:10.1111/j.2517-6161.1980.tb01109.x):
    P(y > k) = σ(z_k) for the K − 1 thresholds k, and P(y = k) = σ(z_{k−1}) − σ(z_k). There z_k = w·x − θ_k with one
    direction w for all thresholds (proportional odds); here the distances between thresholds differ between slides:
    z_0 is the first logit, and z_k = z_{k−1} − softplus(logit k). So P(y > k) never rises with k, which separate
    binary classifiers of y > k (Frank & Hall 2001, "A Simple Approach to Ordinal Classification") do not ensure.

    Args:
        class_weights: one factor per grade; empty: 1 for all. `Classes.fit` makes their mean over slides 1.
        classes: number of grades K, two or more.
    """

    supervision = "ordinal"

    def __init__(self, class_weights: Sequence[float], classes: int) -> None:
        super().__init__()
        self.outputs = classes - 1
        self.class_weights: Tensor
        self.register_buffer("class_weights", torch.tensor(class_weights or [1.0] * classes))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of logits `[K − 1]`."""
        index = target.long()
        return -(self._log_probabilities(logits)[index] * self.class_weights[index]).squeeze(0)

    def predict(self, logits: Tensor) -> Tensor:
        """Probabilities of the grades `[K]`, which sum to 1."""
        return self._log_probabilities(logits).exp()

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        return {"class_weights": self.class_weights.tolist(), "classes": self.outputs + 1}

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        """Log P(y = k) `[K]`.

        σ(a) − σ(b) = σ(a) σ(−b) (1 − exp(b − a)), and 1 − exp(−softplus(d)) = σ(d): sums of logarithms, in which
        nothing cancels.
        """
        distances = logits[1:]
        z = logits[0] - pad(softplus(distances).cumsum(0), (1, 0))
        return pad(logsigmoid(z), (1, 0)) + pad(logsigmoid(-z), (0, 1)) + pad(logsigmoid(distances), (1, 1))


class Ordinal(Classes):
    """One of several grades, from low to high. The target is the grade's index `[1]`, the output probabilities `[K]`.

    Where one grade is needed, it is the median of the probabilities: the number of thresholds k with P(y > k) > 0.5.
    """

    name = "ordinal"
    objective = CumulativeLogits
    headline = "quadratic_kappa"
    headline_title = "quadratic kappa"
    figures = ("confusion",)

    def read(self, records: list[Record], data: DataConfig) -> Targets:
        """Index of the grade."""
        targets = super().read(records, data)
        if data.classes:
            return targets
        numbers = [finite_number(name) for name in targets.names]
        if unordered := [name for name, number in zip(targets.names, numbers, strict=True) if number is None]:
            problem = f"labels have no order, for {', '.join(map(repr, unordered))} is no number"
            targets.problems.append(Problem(0, f"{problem}; give them from low to high: --data.classes"))
        elif repeated := [number for number, count in Counter(numbers).items() if count > 1]:
            same = [name for name in targets.names if finite_number(name) in repeated]
            problem = f"labels {', '.join(map(repr, same))} are spellings of the same number; rename them"
            targets.problems.append(Problem(0, f"{problem}: --data.label-map"))
        return targets

    def order(self, labels: Iterable[str]) -> tuple[str, ...]:
        """Numbers from low to high."""
        return tuple(sorted(labels, key=lambda label: (finite_number(label) or 0.0, label)))

    def describe(self, names: Sequence[str]) -> str | None:
        """The order of the grades."""
        return f"grades from low to high: {', '.join(names)} (--data.classes gives another order)"

    def guess(self, outputs: np.ndarray) -> np.ndarray:
        """Index of the median grade `[n]`."""
        return (1 - outputs.cumsum(1)[:, :-1] > 0.5).sum(1)

    def measure(
        self, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str], weights: np.ndarray
    ) -> dict[str, Metric]:
        """Agreement of the median grade with the true one.

        quadratic_kappa (Cohen 1968: 1 − the mean squared difference in grades, over that of the same grades paired at
        random), mae in grades, accuracy; and each grade's recall and support (its slides).
        """
        labels, guesses, grades = targets[:, 0].astype(int), self.guess(outputs), np.arange(len(names))
        truth, guess = np.eye(len(names))[labels], np.eye(len(names))[guesses]  # [n, K]
        total, support = weights.sum(1), weights @ truth
        by_chance = ((support @ (grades[:, None] - grades) ** 2) * (weights @ guess)).sum(1)
        kappa = 1 - ratio(total * (weights @ (labels - guesses) ** 2), by_chance)
        recall = ratio(weights @ (truth * guess), support)
        # With all slides of one grade, there is nothing to agree on.
        fewer = labels != np.bincount(labels, minlength=1).argmax()
        all_slides = (everyone(targets),)
        values = {
            "quadratic_kappa": Metric(kappa, (fewer,), (-1, 1)),
            "mae": Metric(ratio(weights @ np.abs(labels - guesses), total), all_slides, None),
            "accuracy": Metric(ratio(weights @ (labels == guesses), total), all_slides, step="slide"),
        }
        for c, name in enumerate(names):
            values[f"class/{name}/recall"] = Metric(recall[:, c], (labels == c,), step="slide")
            values[f"class/{name}/support"] = Metric(support[:, c], (labels == c,), step="whole")
        return values

    def positive_class(self, names: Sequence[str]) -> str | None:
        """None: no metric is of one grade alone."""
        return None
