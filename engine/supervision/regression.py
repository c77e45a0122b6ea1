"""Regression: each slide has a number."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from slidescale.engine.config import Config, DataConfig
from slidescale.engine.supervision.base import Supervision, Target, Targets, everyone
from slidescale.engine.supervision.cells import Problem, Record, finite_number, is_missing
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.supervision.rates import Metric, ratio

# Relative to the largest of some numbers: differences that only come from how they were written or computed.
ROUNDING = 1e-9


class SquaredError(Objective):
    """Squared error of a number, in standard deviations of the train split. The target is the number `[1]`.

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
        """The constructor's arguments, as JSON can hold them."""
        return {"mean": self.mean, "sd": self.sd}


class Regression(Supervision):
    """A number. The target and the output are the number `[1]`, in the manifest's unit."""

    name = "regression"
    objective = SquaredError
    headline = "r2"
    headline_title = "R²"
    figures = ("scatter",)

    def read(self, records: list[Record], data: DataConfig) -> Targets:
        """The number."""
        column = data.label_column
        targets = Targets((column,))
        for number, record in records:
            if (value := finite_number(record[column])) is not None:
                targets.values[number] = (value,)
            elif not is_missing(record[column]):
                problem = f"{column} {record[column]!r} is not a finite number"
                targets.problems.append(Problem(number, problem, f"{column} is not a finite number"))
        if train := targets.of_train(records, data):
            try:
                regression_scale(train)
            except ValueError as error:
                targets.problems.append(Problem(0, f"{column} of the train split: {error}"))
        return targets

    def fit(self, names: Sequence[str], targets: Sequence[Target], config: Config) -> Objective:
        """Squared error in standard deviations of the train split."""
        return SquaredError(*regression_scale(targets))

    def target_columns(self, names: Sequence[str]) -> list[str]:
        """One column, target."""
        return ["target"]

    def target_cells(self, names: Sequence[str], target: Target) -> list[str]:
        """The number with all its digits."""
        return [repr(target[0])]

    def target_words(self, names: Sequence[str], target: Target) -> str:
        """The number."""
        return f"{target[0]:g}"

    def output_columns(self, names: Sequence[str]) -> list[str]:
        """One column, prediction, in the manifest's unit."""
        return ["prediction"]

    def output_cells(self, names: Sequence[str], output: np.ndarray) -> list[str]:
        """The number, seven digits."""
        return [format(value, ".7g") for value in output.tolist()]

    def output_words(self, names: Sequence[str], output: np.ndarray) -> str:
        """The number."""
        return f"predicted {output[0]:.4g}"

    def widths(self, names: Sequence[str]) -> tuple[int, int]:
        """One number, and another."""
        return 1, 1

    def measure(
        self, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str], weights: np.ndarray
    ) -> dict[str, Metric]:
        """Coefficient of determination r2, mean absolute and root mean squared error, and Pearson's correlation."""
        truth, predicted, all_slides = targets[:, 0], outputs[:, 0], (everyone(targets),)
        total, error = weights.sum(1), predicted - truth
        spread_true, from_mean_true = _spread(truth, weights)
        spread_predicted, from_mean_predicted = _spread(predicted, weights)
        squares = weights @ error**2
        covariance = (weights * from_mean_true * from_mean_predicted).sum(1)
        pearson = ratio(covariance, np.sqrt(spread_true) * np.sqrt(spread_predicted))
        return {
            "r2": Metric(1 - ratio(squares, spread_true), all_slides, None),
            "mae": Metric(ratio(weights @ np.abs(error), total), all_slides, None),
            "rmse": Metric(np.sqrt(ratio(squares, total)), all_slides, None),
            "pearson": Metric(pearson, all_slides, (-1, 1)),
        }


def regression_scale(targets: Sequence[Target]) -> tuple[float, float]:
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


def _spread(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squares about the mean, summed `[r]`, 0 where all drawn values are equal; differences from it `[r, n]`."""
    mean = ratio(weights @ values, weights.sum(1))
    differences = values - mean[:, None]
    drawn = weights > 0
    low = np.where(drawn, values, np.inf).min(1, initial=np.inf)
    high = np.where(drawn, values, -np.inf).max(1, initial=-np.inf)
    return np.where(low < high, (weights * differences**2).sum(1), 0.0), differences
