"""A kind of supervision: everything that depends on what slides are labelled with, in one class per kind."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np

from slidescale.engine.config import Config, DataConfig, SupervisionName
from slidescale.engine.errors import flag
from slidescale.engine.supervision.cells import Problem, Record, is_missing
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.supervision.rates import Metric

Target = tuple[float, ...]


@dataclass
class Targets:
    """The targets of a manifest's rows, as far as they could be read.

    Attributes:
        names: of what is predicted (see `Manifest.classes`).
        values: by row number; a row with a problem has none.
    """

    names: tuple[str, ...]
    values: dict[int, Target] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def of_train(self, records: list[Record], data: DataConfig) -> list[Target]:
        """The values of the train split."""
        train = [number for number, record in records if record[data.split_column] == "train"]
        return [self.values[number] for number in train if number in self.values]


class Question(NamedTuple):
    """A yes-or-no question about slides, for curves: its name, the true answers, bool `[m]`, and the scores `[m]`."""

    name: str
    truth: np.ndarray
    scores: np.ndarray


class Supervision(ABC):
    """A kind of supervision. It has no state: `names`, what a model predicts of a slide, come with each call.

    `names` are those of `Manifest.classes`. `targets` are `[n, T]` and `outputs` `[n, O]`, float64: of each slide the
    target as the manifest gives it, and what `Objective.predict` makes of the model's logits.

    Attributes:
        name: as --data.supervision takes it.
        objective: class of the objective that `fit` makes.
        column_settings: settings of `DataConfig` that name the manifest's columns of the target.
        settings: other settings that this kind reads, by dotted name.
        headline: metric that the best epoch is chosen by; larger is better.
        headline_title: how people write that metric's name.
        figures: names of figures that are drawn of predictions (see `evaluation.figures`).
        may_lack: whether a slide may lack a part of its target.
    """

    name: ClassVar[SupervisionName]
    objective: ClassVar[type[Objective]]
    column_settings: ClassVar[tuple[str, ...]] = ("label_column",)
    settings: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[str]
    headline_title: ClassVar[str]
    figures: ClassVar[tuple[str, ...]] = ()
    may_lack: ClassVar[bool] = False

    # ---- the manifest

    def columns(self, data: DataConfig) -> list[tuple[str, str]]:
        """(setting, column) of each column of the target."""
        named = [(flag(f"data.{name}"), getattr(data, name)) for name in self.column_settings]
        return [
            (setting, column)
            for setting, value in named
            for column in ((value,) if isinstance(value, str) else tuple(value))
        ]

    @abstractmethod
    def read(self, records: list[Record], data: DataConfig) -> Targets:
        """Read and check the targets; the manifest reports empty cells of columns that must be full."""

    def is_unlabelled(self, cell: str, data: DataConfig) -> bool:
        """Whether a cell of the target stands for nothing."""
        return is_missing(cell)

    def with_names(self, data: DataConfig, names: Sequence[str]) -> DataConfig:
        """Settings that read targets of a trained run, which predicts `names`."""
        return data

    def describe(self, names: Sequence[str]) -> str | None:
        """What is predicted, in a line for the log, where the manifest alone does not say it."""
        return None

    # ---- the loss

    @abstractmethod
    def fit(self, names: Sequence[str], targets: Sequence[Target], config: Config) -> Objective:
        """The objective for a manifest.

        Args:
            targets: of the train split's slides, which give scales, bins and mean weights.

        Raises:
            ConfigError: settings do not fit the names.
            ValueError: the targets have no scale or cannot be cut into bins, which `read` has reported before.
        """

    # ---- predictions in tables and words

    @abstractmethod
    def target_columns(self, names: Sequence[str]) -> list[str]:
        """The columns of predictions.csv for the target."""

    @abstractmethod
    def target_cells(self, names: Sequence[str], target: Target) -> list[str]:
        """The cells of `target_columns`; "" where a part is missing."""

    @abstractmethod
    def target_words(self, names: Sequence[str], target: Target) -> str:
        """The target in words, below a picture."""

    @abstractmethod
    def output_columns(self, names: Sequence[str]) -> list[str]:
        """The columns of a prediction."""

    @abstractmethod
    def output_cells(self, names: Sequence[str], output: np.ndarray) -> list[str]:
        """The cells of `output_columns` for one slide's output `[O]`."""

    @abstractmethod
    def output_words(self, names: Sequence[str], output: np.ndarray) -> str:
        """One slide's output `[O]` in words."""

    def group(self, names: Sequence[str], target: Target) -> str | None:
        """The class that a slide's heatmap is named after, where slides have one each."""
        return None

    # ---- metrics

    @abstractmethod
    def widths(self, names: Sequence[str]) -> tuple[int, int]:
        """Numbers of columns: T of targets, O of outputs."""

    @abstractmethod
    def measure(
        self, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str], weights: np.ndarray
    ) -> dict[str, Metric]:
        """Metrics of a cohort under r rows of weights `[r, n]`.

        A metric that needs a class that has no slide is undefined, and so is an average that needs one of those. A
        class's metrics are called `class/<name>/<metric>`, and those of a label `<name>/<metric>`.
        """

    def positive_class(self, names: Sequence[str]) -> str | None:
        """The class that auroc and auprc are of, where there is one."""
        return None

    def guess(self, outputs: np.ndarray) -> np.ndarray:
        """Index of the class that probabilities `[n, O]` amount to `[n]`; of kinds with one class per slide.

        Raises:
            TypeError: slides of this kind have no class.
        """
        raise TypeError(f"slides of {self.name} have no class")

    def questions(self, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str]) -> list[Question]:
        """The yes-or-no questions that ROC and precision-recall curves show; those with slides of both answers."""
        return []


def everyone(targets: np.ndarray) -> np.ndarray:
    """All slides, as a metric's `needs` has them: bool `[n]`."""
    return np.full(len(targets), True)


def both_answers(questions: Sequence[Question]) -> list[Question]:
    """The questions that have slides of both answers."""
    return [question for question in questions if question.truth.any() and not question.truth.all()]
