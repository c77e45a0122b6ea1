"""A kind of supervision that the engine does not have: one class and an entry in the registry, and all else works."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from slidescale.engine.config import Config, DataConfig, OptimConfig, RunConfig, SupervisionName
from slidescale.engine.data.labels import Labels, read_labels
from slidescale.engine.data.manifest import read_manifest
from slidescale.engine.errors import ConfigError, ManifestError
from slidescale.engine.evaluation.figures import FIGURES
from slidescale.engine.evaluation.intervals import describe, estimate
from slidescale.engine.evaluation.predictions import Evaluation, Prediction
from slidescale.engine.evaluation.results import draw_figures, write_metrics, write_predictions
from slidescale.engine.supervision.base import Supervision, Target, Targets, everyone
from slidescale.engine.supervision.cells import Problem, Record
from slidescale.engine.supervision.make import KINDS, check_settings, fit_objective, headline_title, make_objective
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.supervision.rates import Metric, ratio


class PoissonLikelihood(Objective):
    """Of a count, whose logarithm of the rate is the logit, plus that of the mean."""

    supervision = "counts"
    outputs = 1

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return (self.predict(logits) - target * (logits + math.log(self.mean))).sum()

    def predict(self, logits: Tensor) -> Tensor:
        return self.mean * logits.exp()

    def settings(self) -> dict[str, Any]:
        return {"mean": self.mean}


class Counts(Supervision):
    """How many of something a slide has, such as mitoses."""

    name = "counts"  # type: ignore[assignment]  # the command line's names are those that are kept
    objective = PoissonLikelihood
    headline = "minus_deviation"
    headline_title = "minus deviation"

    def read(self, records: list[Record], data: DataConfig) -> Targets:
        targets = Targets(("count",))
        for number, record in records:
            cell = record[data.label_column]
            if cell.isdecimal():
                targets.values[number] = (float(cell),)
            elif cell:
                targets.problems.append(Problem(number, f"{cell!r} is no count"))
        return targets

    def fit(self, names: Sequence[str], targets: Sequence[Target], config: Config) -> Objective:
        return PoissonLikelihood(float(np.mean(targets)))

    def target_columns(self, names: Sequence[str]) -> list[str]:
        return ["count"]

    def target_cells(self, names: Sequence[str], target: Target) -> list[str]:
        return [f"{target[0]:.0f}"]

    def target_words(self, names: Sequence[str], target: Target) -> str:
        return f"{target[0]:.0f}"

    def output_columns(self, names: Sequence[str]) -> list[str]:
        return ["expected"]

    def output_cells(self, names: Sequence[str], output: np.ndarray) -> list[str]:
        return [f"{output[0]:.3f}"]

    def output_words(self, names: Sequence[str], output: np.ndarray) -> str:
        return f"expected {output[0]:.3f}"

    def widths(self, names: Sequence[str]) -> tuple[int, int]:
        return 1, 1

    def measure(
        self, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str], weights: np.ndarray
    ) -> dict[str, Metric]:
        error = np.abs(targets[:, 0] - outputs[:, 0])
        return {
            "minus_deviation": Metric(-ratio(weights @ error, weights.sum(1)), (everyone(targets),), None),
            "accuracy": Metric(ratio(weights @ (error < 0.5), weights.sum(1)), (everyone(targets),), step="slide"),
        }


def manifest_of(folder: Path, counts: Sequence[str]) -> Path:
    path = folder / "m.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write("slide_id,case_id,path,mitoses,split\n")
        for index, count in enumerate(counts):
            (folder / f"{index}.svs").touch()
            file.write(f"s{index},p{index},{index}.svs,{count},{'train' if index % 2 else 'val'}\n")
    return path


def test_a_new_kind_goes_from_the_manifest_to_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "counts", Counts())
    data = DataConfig(supervision="counts", label_column="mitoses")  # type: ignore[arg-type]
    config = Config(run=RunConfig(name="t"), data=data)
    path = manifest_of(tmp_path, [str(index % 7) for index in range(24)])
    manifest = read_manifest(path, data)
    assert manifest.classes == ("count",)
    assert [row.target for row in manifest.rows[:3]] == [(0.0,), (1.0,), (2.0,)]

    objective = fit_objective(manifest.classes, [row.target for row in manifest.split("train")], config)
    again = make_objective(json.loads(json.dumps(objective.record())))
    assert isinstance(again, PoissonLikelihood) and again.settings() == objective.settings()
    logit = torch.zeros(1, requires_grad=True)
    (gradient,) = torch.autograd.grad(objective(logit, torch.tensor([objective.mean])), logit)
    assert gradient.item() == pytest.approx(0, abs=1e-6), "the mean is the likeliest"

    predictions = []
    for row in manifest.split("val"):
        with torch.no_grad():
            output = objective.predict(torch.tensor([0.1 * row.target[0] - 0.3])).numpy()
        predictions.append(Prediction(row, output, 1.0, 5, None))
    evaluation = Evaluation(manifest.supervision, manifest.classes, predictions)
    assert evaluation.score[0] < 0
    assert str(evaluation).startswith("loss 1.000 minus deviation -")
    write_predictions(tmp_path / "p.csv", evaluation)
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["slide_id", "case_id", "count", "expected", "k"]
    assert rows[2][:3] == ["s2", "p2", "2"] and rows[2][4] == "5"

    found = estimate(*evaluation.judged, resamples=50)
    write_metrics(tmp_path / "metrics.json", found, "val")
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["headline"] == {"metric": "minus_deviation", "value": evaluation.metrics["minus_deviation"]}
    assert written["values"]["minus_deviation"]["low"] < written["headline"]["value"]
    assert "minus_deviation" in describe(found)
    assert headline_title("minus_deviation") == "minus deviation"
    assert set(draw_figures(tmp_path / "figures", evaluation.judged, "val", found)) == set(), "it names none"

    labels = read_labels(path, data, manifest.classes)
    assert isinstance(labels, Labels) and labels.targets["s2"] == (2.0,)


def test_a_new_kinds_problems_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "counts", Counts())
    data = DataConfig(supervision="counts", label_column="mitoses")  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match=r"row 3: 'many' is no count\n  row 4: mitoses is empty"):
        read_manifest(manifest_of(tmp_path, ["1", "many", ""]), data)
    with pytest.raises(ConfigError, match="censored-alpha is 0.5: is for --data.supervision survival, and that is cou"):
        check_settings(data, OptimConfig(censored_alpha=0.5))


def test_kinds_are_those_of_the_command_line() -> None:
    assert tuple(KINDS) == get_args(SupervisionName)
    for name, kind in KINDS.items():
        assert (kind.name, kind.objective.supervision) == (name, name)
        assert set(kind.figures) <= set(FIGURES)
