"""Classes: each slide has one of two or more."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from slidescale.engine.config import Config, DataConfig, SupervisionName
from slidescale.engine.errors import ConfigError, near
from slidescale.engine.supervision.base import Question, Supervision, Target, Targets, both_answers, everyone
from slidescale.engine.supervision.cells import Problem, Record, is_missing
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.supervision.rates import CALIBRATION_BINS, Metric, areas, confidence_bin, ratio


class CrossEntropy(Objective):
    """Cross-entropy of one of several classes, times the weight of the slide's class. The target is its index `[1]`.

    Args:
        class_weights: one factor per class; empty: 1 for all. `Classes.fit` makes their mean over slides 1.
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
        """The constructor's arguments, as JSON can hold them."""
        return {"class_weights": self.class_weights.tolist(), "classes": self.outputs}


class Classes(Supervision):
    """One of two or more classes. The target is the class's index `[1]`, the output probabilities `[classes]`."""

    name: ClassVar[SupervisionName] = "classes"
    objective: ClassVar[type[Objective]] = CrossEntropy
    settings = ("data.classes", "data.label_map", "optim.class_weights")
    headline = "auroc"
    headline_title = "AUROC"
    figures: ClassVar[tuple[str, ...]] = ("roc", "precision_recall", "reliability", "confusion")

    def read(self, records: list[Record], data: DataConfig) -> Targets:
        """Index of the class."""
        cells = [(number, record[data.label_column]) for number, record in records]
        labels = [
            (number, data.label_map.get(cell, cell)) for number, cell in cells if not self.is_unlabelled(cell, data)
        ]
        train = {number for number, record in records if record[data.split_column] == "train"}
        in_train = Counter(label for number, label in labels if number in train)
        targets = Targets(data.classes or self.order(in_train))
        source = "data.classes" if data.classes else "the labels of the train split"
        for number, label in labels:
            if label in targets.names:
                targets.values[number] = (float(targets.names.index(label)),)
            else:
                problem = f"label {label!r} is not among {source}: {', '.join(targets.names)}"
                kind = "a label that is not a class"
                targets.problems.append(Problem(number, problem + near(label, targets.names), kind))
        absent = [name for name in targets.names if name not in in_train]
        if absent and in_train:
            targets.problems.append(Problem(0, f"no train slide has label {', '.join(map(repr, absent))}"))
        if len(targets.names) < 2 and in_train:
            problem = f"all train slides have one label, {targets.names[0]!r}; there is nothing to tell apart"
            targets.problems.append(Problem(0, problem))
        if not data.classes:  # with them, a label that was not renamed is reported above
            written = {record[data.label_column] for _, record in records}
            unused = [name for name in data.label_map if name not in written]
            targets.problems += [
                Problem(0, f"data.label_map renames {name!r}, which no row has{near(name, written)}") for name in unused
            ]
        return targets

    def order(self, labels: Iterable[str]) -> tuple[str, ...]:
        """The classes in the order of the logits, where the settings do not give it."""
        return tuple(sorted(labels))

    def is_unlabelled(self, cell: str, data: DataConfig) -> bool:
        """Whether a label stands for nothing; a class may be called "None" where the settings name it so."""
        return is_missing(cell) and cell not in data.classes and cell not in data.label_map

    def with_names(self, data: DataConfig, names: Sequence[str]) -> DataConfig:
        """Settings with the run's classes, in its order."""
        return replace(data, classes=tuple(names))

    def describe(self, names: Sequence[str]) -> str | None:
        """The order of the classes, which decides what probabilities and AUROC are of."""
        of = f"those of {names[1]}" if len(names) == 2 else "of each, and the mean"
        return f"classes: {', '.join(names)} (--data.classes gives another order); probabilities and AUROC are {of}"

    def fit(self, names: Sequence[str], targets: Sequence[Target], config: Config) -> Objective:
        """The kind's loss, with weights of classes whose mean over the train split's slides is 1.

        So weights say what counts more, and leave learning rate, clipping and the size of the loss as they are.
        """
        weights = checked_weights(config, names, "classes")
        if weights:
            mean = np.mean([weights[int(index)] for (index,) in targets])
            weights = [float(weight / mean) for weight in weights]
        return self.objective(weights, len(names))

    def target_columns(self, names: Sequence[str]) -> list[str]:
        """One column, label."""
        return ["label"]

    def target_cells(self, names: Sequence[str], target: Target) -> list[str]:
        """The class's name."""
        return [names[int(target[0])]]

    def target_words(self, names: Sequence[str], target: Target) -> str:
        """The class's name."""
        return names[int(target[0])]

    def output_columns(self, names: Sequence[str]) -> list[str]:
        """One column, probability_<name>, for the second of two classes, or one for each of more."""
        return [f"probability_{name}" for name in names[_shown(names)]]

    def output_cells(self, names: Sequence[str], output: np.ndarray) -> list[str]:
        """Probabilities, six digits."""
        return [format(value, ".6f") for value in output.tolist()[_shown(names)]]

    def output_words(self, names: Sequence[str], output: np.ndarray) -> str:
        """The probability of the second of two classes, or of each of more."""
        shown = _shown(names)
        return probability_words(names[shown], output.tolist()[shown])

    def group(self, names: Sequence[str], target: Target) -> str | None:
        """The class's name."""
        return names[int(target[0])]

    def widths(self, names: Sequence[str]) -> tuple[int, int]:
        """The class's index, and a probability per class."""
        return 1, len(names)

    def measure(
        self, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str], weights: np.ndarray
    ) -> dict[str, Metric]:
        """Areas, rates and calibration.

        - auroc and auprc (average precision) of the second class when there are two, else their means over classes,
          each against the rest; balanced_accuracy, accuracy (of the likeliest class).
        - ece (Guo et al. 2017: of the likeliest class's probability, which with two classes is never below 0.5).
        - brier (Brier 1950: squared errors summed over classes; halved with two, which makes it the second class's
          squared error).
        - A class's recall (its sensitivity), precision, f1, support (its slides), and with more than two classes auroc.
        """
        labels, total, all_slides = targets[:, 0].astype(int), weights.sum(1), (everyone(targets),)
        one_hot, two = np.eye(len(names)), len(names) == 2
        truth, guess = one_hot[labels], one_hot[self.guess(outputs)]  # [n, classes]
        own = [labels == c for c in range(len(names))]
        hits, support, guesses = weights @ (truth * guess), weights @ truth, weights @ guess  # [r, classes]
        recall, precision, f1 = ratio(hits, support), ratio(hits, guesses), ratio(2 * hits, support + guesses)
        rocs, precisions = (
            np.stack(each, 1)  # [r, classes]
            for each in zip(*(areas(own[c], outputs[:, c], weights) for c in range(len(names))), strict=True)
        )
        confidence, correct = outputs.max(1), (truth * guess).sum(1)
        # Of a bin, slides × (accuracy − mean confidence) is the sum of (correct − confidence).
        gaps = weights @ (np.eye(CALIBRATION_BINS)[confidence_bin(confidence)] * (correct - confidence)[:, None])
        brier = ratio(weights @ ((outputs - truth) ** 2).sum(1), total) / (2 if two else 1)
        classes = tuple(own)
        values = {
            "auroc": Metric(rocs[:, 1] if two else rocs.mean(1), classes),
            "auprc": Metric(precisions[:, 1] if two else precisions.mean(1), classes),
            "balanced_accuracy": Metric(recall.mean(1), classes, step="slide"),
            "accuracy": Metric(ratio(weights @ correct, total), all_slides, step="slide"),
            "ece": Metric(ratio(np.abs(gaps).sum(1), total), all_slides),
            "brier": Metric(brier, all_slides, (0, 1) if two else (0, 2)),  # of more classes a sum, up to 2
        }
        for c, name in enumerate(names):
            if not two:
                values[f"class/{name}/auroc"] = Metric(rocs[:, c], (own[c], ~own[c]))
            values[f"class/{name}/recall"] = Metric(recall[:, c], (own[c],), step="slide")
            values[f"class/{name}/precision"] = Metric(precision[:, c], (own[c],), step="slide")
            values[f"class/{name}/f1"] = Metric(f1[:, c], (own[c],), step="slide")
            values[f"class/{name}/support"] = Metric(support[:, c], (own[c],), step="whole")
        return values

    def guess(self, outputs: np.ndarray) -> np.ndarray:
        """Index of the likeliest class `[n]`."""
        return outputs.argmax(1)

    def positive_class(self, names: Sequence[str]) -> str | None:
        """The second of two."""
        return names[1] if len(names) == 2 else None

    def questions(self, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str]) -> list[Question]:
        """Each class against the rest; of two classes, the second."""
        shown = range(len(names))[_shown(names)]
        return both_answers([Question(names[c], targets[:, 0] == c, outputs[:, c]) for c in shown])


def _shown(names: Sequence[str]) -> slice:
    """The classes whose probabilities are shown: of two, the first one's follows from the second one's."""
    return slice(1, None) if len(names) == 2 else slice(None)


def probability_words(names: Sequence[str], probabilities: Sequence[float]) -> str:
    """Probabilities by class or label, in words."""
    shown = zip(names, probabilities, strict=True)
    return ", ".join(f"probability of {name} {value:.3f}" for name, value in shown)


def checked_weights(config: Config, names: Sequence[str], what: str) -> list[float]:
    """The weights of classes or labels; empty where there are none.

    Args:
        what: the names are: "classes".

    Raises:
        ConfigError: their number is not that of the names.
    """
    weights = config.optim.class_weights
    if weights and len(weights) != len(names):
        raise ConfigError(
            f"--optim.class-weights has {len(weights)} values for {len(names)} {what}: {', '.join(names)}"
        )
    return list(weights)
