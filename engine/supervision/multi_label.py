"""Labels: each slide has several, each yes, no or not known."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from slidescale.engine.config import Config, DataConfig
from slidescale.engine.supervision.base import Question, Supervision, Target, Targets, both_answers
from slidescale.engine.supervision.cells import BINARY, Problem, Record, is_missing
from slidescale.engine.supervision.classes import checked_weights, probability_words
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.supervision.rates import Metric, areas, ratio


class BinaryCrossEntropy(Objective):
    """Binary cross-entropy, averaged over the labels that the slide has. The target is 1, 0 or NaN (missing) `[L]`.

    A missing label has neither loss nor gradient. A slide without any label, which a manifest cannot have, has a loss
    of zero that still depends on the logits, so that every rank makes the same backward.

    Args:
        positive_weights: one factor per label, on the loss of slides that have it; empty: 1 for all.
        scales: one factor per label, on the loss of all slides; empty: 1 for all. `MultiLabel.fit` makes the mean of
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
        """The constructor's arguments, as JSON can hold them."""
        return {
            "positive_weights": self.positive_weights.tolist(),
            "labels": self.outputs,
            "scales": self.scales.tolist(),
        }


class MultiLabel(Supervision):
    """Several labels. The target is 1, 0 or NaN (missing) per label `[L]`, the output a probability per label `[L]`."""

    name = "multi_label"
    objective = BinaryCrossEntropy
    column_settings = ("label_columns",)
    settings = ("optim.class_weights",)
    headline = "auroc"
    headline_title = "AUROC"
    figures = ("roc", "precision_recall")
    may_lack = True

    def read(self, records: list[Record], data: DataConfig) -> Targets:
        """0, 1 or NaN for each label."""
        columns = data.label_columns
        targets = Targets(columns)
        for number, record in records:
            values, wrong = [], []
            for column in columns:
                cell = record[column]
                if cell in BINARY:
                    values.append(BINARY[cell])
                elif is_missing(cell):
                    values.append(math.nan)
                else:
                    wrong.append(f"{column} {cell!r} is not 0 or 1; leave the cell empty where it is not known")
            if not wrong and all(map(math.isnan, values)):
                wrong.append(f"none of {', '.join(columns)} is known; leave the row out")
            targets.problems += [Problem(number, problem, "labels that are not 0, 1 or missing") for problem in wrong]
            if not wrong:
                targets.values[number] = tuple(values)
        train = targets.of_train(records, data)
        for index, column in enumerate(columns):
            seen = {values[index] for values in train}
            if train and not {0.0, 1.0} <= seen:
                absent = " or ".join(f"{value:.0f}" for value in (0.0, 1.0) if value not in seen)
                problem = f"no train slide has {column} {absent}; there is nothing to tell apart"
                targets.problems.append(Problem(0, problem))
        return targets

    def fit(self, names: Sequence[str], targets: Sequence[Target], config: Config) -> Objective:
        """Binary cross-entropy, in which the weights of each label have a mean of 1 over the slides that have it."""
        weights = checked_weights(config, names, "labels")
        return BinaryCrossEntropy(weights, len(names), _label_scales(weights, targets))

    def target_columns(self, names: Sequence[str]) -> list[str]:
        """One column per label, label_<name>."""
        return [f"label_{name}" for name in names]

    def target_cells(self, names: Sequence[str], target: Target) -> list[str]:
        """1, 0, or nothing where a label is missing."""
        return ["" if math.isnan(value) else f"{value:.0f}" for value in target]

    def target_words(self, names: Sequence[str], target: Target) -> str:
        """The labels that the slide has."""
        return ", ".join(name for name, value in zip(names, target, strict=True) if value == 1) or "no label"

    def output_columns(self, names: Sequence[str]) -> list[str]:
        """One column per label, probability_<name>."""
        return [f"probability_{name}" for name in names]

    def output_cells(self, names: Sequence[str], output: np.ndarray) -> list[str]:
        """Probabilities, six digits."""
        return [format(value, ".6f") for value in output.tolist()]

    def output_words(self, names: Sequence[str], output: np.ndarray) -> str:
        """The probability of each label."""
        return probability_words(names, output.tolist())

    def widths(self, names: Sequence[str]) -> tuple[int, int]:
        """An answer and a probability per label."""
        return len(names), len(names)

    def measure(
        self, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str], weights: np.ndarray
    ) -> dict[str, Metric]:
        """Areas and rates of each label over the slides that have its target, and their means.

        auroc, auprc, and at probability 0.5 recall, specificity, precision, f1; support (positive slides), slides (with
        a target). Means of auroc, auprc, balanced_accuracy, f1 and brier over the labels with slides of both answers.
        """
        values: dict[str, Metric] = {}
        averaged: list[tuple[np.ndarray, ...]] = []
        needed: list[np.ndarray] = []
        for label, name in enumerate(names):
            present = ~np.isnan(targets[:, label])
            answers = tuple(targets[:, label] == answer for answer in (0, 1))
            truth, probability, mine = answers[1][present], outputs[present, label], weights[:, present]
            guess = probability > 0.5
            total, support, guesses = mine.sum(1), mine @ truth, mine @ guess
            hits, rejections = mine @ (truth & guess), mine @ ~(truth | guess)
            roc, precisions = areas(truth, probability, mine)
            recall, specificity = ratio(hits, support), ratio(rejections, total - support)
            f1 = ratio(2 * hits, support + guesses)
            values |= {
                f"{name}/auroc": Metric(roc, answers),
                f"{name}/auprc": Metric(precisions, answers),
                f"{name}/recall": Metric(recall, answers, step="slide"),
                f"{name}/specificity": Metric(specificity, answers, step="slide"),
                f"{name}/precision": Metric(ratio(hits, guesses), answers, step="slide"),
                f"{name}/f1": Metric(f1, answers, step="slide"),
                f"{name}/support": Metric(support, answers, step="whole"),
                f"{name}/slides": Metric(total, answers, step="whole"),
            }
            brier = ratio(mine @ (probability - truth) ** 2, total)
            # The same labels in every resample, so that all average the same thing.
            if truth.any() and not truth.all():
                averaged.append((roc, precisions, (recall + specificity) / 2, f1, brier))
                needed += answers
        undefined = np.full(len(weights), np.nan)
        roc, precisions, balanced, f1, brier = np.mean(averaged, axis=0) if averaged else [undefined] * 5
        means = {
            "auroc": Metric(roc, tuple(needed)),
            "auprc": Metric(precisions, tuple(needed)),
            "balanced_accuracy": Metric(balanced, tuple(needed), step="slide"),
            "f1": Metric(f1, tuple(needed), step="slide"),
            "brier": Metric(brier, tuple(needed)),
        }
        return means | values

    def questions(self, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str]) -> list[Question]:
        """Each label, of the slides that have its target."""
        known = ~np.isnan(targets)
        return both_answers(
            [
                Question(name, targets[known[:, label], label] == 1, outputs[known[:, label], label])
                for label, name in enumerate(names)
            ]
        )


def _label_scales(weights: Sequence[float], targets: Sequence[Target]) -> list[float]:
    """Of each label, 1 over the mean over its slides of the weight where they have it, and 1 where not."""
    if not weights:
        return []
    columns = zip(*targets, strict=True)
    means = [
        np.mean([weight if value else 1.0 for value in column if not math.isnan(value)])
        for weight, column in zip(weights, columns, strict=True)
    ]
    return [float(1 / mean) for mean in means]
