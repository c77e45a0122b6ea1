"""What slides can be labelled with: objectives against their formulas, and manifests and runs of each kind."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from torch import Tensor

from slidescale.engine.commands import recipe as main
from slidescale.engine.commands.predict import PredictRequest, predict_slides
from slidescale.engine.config import Config, DataConfig, OptimConfig, RunConfig
from slidescale.engine.data.manifest import read_manifest
from slidescale.engine.errors import ConfigError, ManifestError, UserError
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.supervision.make import check_settings, fit_objective, make_objective
from slidescale.engine.supervision.multi_label import BinaryCrossEntropy
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.supervision.ordinal import CumulativeLogits
from slidescale.engine.supervision.regression import SquaredError
from slidescale.engine.supervision.survival import HazardLikelihood, survival_edges

from support.runs import make_config
from support.tables import edit_manifest, read_csv

NAN = math.nan
LOGITS = [0.3, -1.2, 2.1, 0.7, -0.4]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def cross_entropy(z: list[float], target: tuple[float, ...]) -> float:
    weights = [1.0, 2.0, 0.5, 1.0, 3.0]
    return -weights[int(target[0])] * math.log(math.exp(z[int(target[0])]) / sum(map(math.exp, z)))


GRADE_WEIGHTS = [1.0, 2.0, 0.5, 1.0, 3.0, 4.0]


def grade_probabilities(z: list[float]) -> list[float]:
    """Differences of the cumulative ones, whose logits fall by softplus of each further logit."""
    logits = [z[0] - sum(math.log1p(math.exp(each)) for each in z[1 : k + 1]) for k in range(len(z))]
    above = [1.0, *map(sigmoid, logits), 0.0]
    return [before - after for before, after in pairwise(above)]


def ordinal(z: list[float], target: tuple[float, ...]) -> float:
    return -GRADE_WEIGHTS[int(target[0])] * math.log(grade_probabilities(z)[int(target[0])])


def multi_label(z: list[float], target: tuple[float, ...]) -> float:
    weights = [1.0, 2.0, 0.5, 1.0, 4.0]
    known = [i for i, value in enumerate(target) if value in (0.0, 1.0)]
    losses = [-weights[i] * math.log(sigmoid(z[i])) if target[i] else -math.log(1 - sigmoid(z[i])) for i in known]
    return sum(losses) / len(losses)


def regression(z: list[float], target: tuple[float, ...]) -> float:
    return (z[0] - (target[0] - 40.0) / 8.0) ** 2


EDGES = [2.0, 5.0, 5.5, 11.0]


def survival(z: list[float], target: tuple[float, ...]) -> float:
    """The likelihood, as a product of hazards."""
    hazards = [sigmoid(value) for value in z]
    time, event = target
    last = sum(edge <= time for edge in EDGES)
    likelihood = hazards[last] if event else 1 - hazards[last]
    for hazard in hazards[:last]:
        likelihood *= 1 - hazard
    return -math.log(likelihood)


Formula = Callable[[list[float], tuple[float, ...]], float]
# Both sides of each edge, and each edge itself, which belongs to the bin above it.
TIMES = [0.1, 2.0, 3.0, math.nextafter(5.0, 0), 5.0, 5.2, 5.5, 11.0, 1e6]
FORMULAS: dict[str, tuple[Callable[[], Objective], Formula, list[tuple[float, ...]]]] = {
    "classes": (
        lambda: CrossEntropy([1.0, 2.0, 0.5, 1.0, 3.0], 5),
        cross_entropy,
        [(float(index),) for index in range(5)],
    ),
    "ordinal": (
        lambda: CumulativeLogits(GRADE_WEIGHTS, 6),
        ordinal,
        [(float(index),) for index in range(6)],
    ),
    "multi_label": (
        lambda: BinaryCrossEntropy([1.0, 2.0, 0.5, 1.0, 4.0], 5),
        multi_label,
        [(1.0, 0.0, 1.0, 1.0, 0.0), (NAN, 0.0, NAN, 1.0, 1.0), (NAN, NAN, NAN, NAN, 1.0), (0.0, NAN, 0.0, 0.0, NAN)],
    ),
    "regression": (lambda: SquaredError(40.0, 8.0), regression, [(40.0,), (-3.5,), (77.0,)]),
    "survival": (
        lambda: HazardLikelihood(EDGES),
        survival,
        [(time, event) for time in TIMES for event in (0.0, 1.0)],
    ),
}


def as_target(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def differences(kind: str) -> list[float]:
    """Between an objective's losses in doubles and the formula's."""
    make, formula, targets = FORMULAS[kind]
    objective = make()
    z = LOGITS[: objective.outputs]
    logits = torch.tensor(z, dtype=torch.float64)
    return [abs(objective(logits, as_target(target)).item() - formula(z, target)) for target in targets]


@pytest.mark.parametrize("kind", FORMULAS)
def test_losses_are_their_formulas(kind: str) -> None:
    """In doubles, where only rounding can differ; gradients against finite differences."""
    assert max(differences(kind)) < 1e-12
    make, _, targets = FORMULAS[kind]
    objective = make()
    logits = torch.tensor(LOGITS[: objective.outputs], dtype=torch.float64, requires_grad=True)
    for values in targets:
        loss = objective(logits, as_target(values))
        assert loss.shape == ()
        assert loss.item() != 0 or kind == "regression"
        assert torch.autograd.gradcheck(objective, (logits, as_target(values)))


@pytest.mark.parametrize("bug", ["edges belong to the bin below", "censored is observed", "missing is negative"])
def test_planted_bugs_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    searchsorted, forward = torch.searchsorted, HazardLikelihood.forward
    match bug:
        case "edges belong to the bin below":
            monkeypatch.setattr(torch, "searchsorted", lambda edges, time, right: searchsorted(edges, time))
        case "censored is observed":
            monkeypatch.setattr(
                HazardLikelihood, "forward", lambda self, logits, target: forward(self, logits, target.clamp(min=1))
            )
        case "missing is negative":
            monkeypatch.setattr(Tensor, "isnan", lambda self: torch.zeros_like(self, dtype=torch.bool))
    kind = "multi_label" if bug.startswith("missing") else "survival"
    assert max(differences(kind)) > 1e-3


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("steepness", [300.0, -300.0])
def test_large_logits_stay_finite(kind: str, steepness: float) -> None:
    """In fp32, where exp(300) is infinite and sigmoid(300) is 1."""
    make, _, targets = FORMULAS[kind]
    objective = make()
    for values in targets:
        logits = (steepness * torch.tensor(LOGITS[: objective.outputs])).requires_grad_()
        loss = objective(logits, as_target(values))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert objective.predict(logits).isfinite().all()


def test_missing_labels_do_not_count() -> None:
    objective = BinaryCrossEntropy((), 3)
    logits = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    (gradient,) = torch.autograd.grad(objective(logits, as_target((1.0, NAN, 0.0))), logits)
    assert gradient[1] == 0
    assert (gradient[[0, 2]] != 0).all()
    nothing = objective(logits, as_target((NAN, NAN, NAN)))
    assert nothing.item() == 0
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert torch.equal(gradient, torch.zeros(3)), "and there is a graph, so that every rank makes this backward"


def test_what_logits_mean() -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    assert CrossEntropy((), 5).predict(logits).sum().item() == pytest.approx(1)
    expected = torch.tensor([sigmoid(z) for z in LOGITS], dtype=torch.float64)
    torch.testing.assert_close(BinaryCrossEntropy((), 5).predict(logits), expected)
    assert SquaredError(40.0, 8.0).predict(logits[:1]).tolist() == [pytest.approx(42.4)]
    alive = np.cumprod([1 - sigmoid(z) for z in LOGITS])
    risk = HazardLikelihood(EDGES).predict(logits)
    assert risk.tolist() == [pytest.approx(-alive.sum())]
    sooner = logits + torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)
    assert HazardLikelihood(EDGES).predict(sooner).item() > risk.item(), "an earlier event is a larger risk"


@pytest.mark.parametrize("grades", [2, 3, 6])
def test_probabilities_of_grades_are_consistent(grades: int) -> None:
    """Whatever the logits, P(y > k) does not rise with k, and the grades' probabilities sum to 1."""
    objective = CumulativeLogits((), grades)
    assert objective.outputs == grades - 1
    for logits in 8 * torch.randn(200, grades - 1, generator=torch.Generator().manual_seed(0)):
        probabilities = objective.predict(logits)
        assert (probabilities >= 0).all()
        assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    z = LOGITS[: grades - 1]
    found = objective.predict(torch.tensor(z, dtype=torch.float64))
    assert found.tolist() == pytest.approx(grade_probabilities(z))


def test_a_number_far_from_zero_keeps_its_digits() -> None:
    """In fp32, 1e8 + 1 and 1e8 + 3 are both 1e8 or the next number; the standardised ones are far apart."""
    objective = SquaredError(1e8, 2.0)
    logits = torch.tensor([0.5])
    assert objective(logits, as_target((1e8 + 1,))).item() == 0
    assert objective(logits, as_target((1e8 + 3,))).item() == 1
    assert objective.predict(logits).tolist() == [1e8 + 1]


@pytest.mark.parametrize("kind", FORMULAS)
def test_an_objective_is_made_again_of_its_record(kind: str) -> None:
    make, _, targets = FORMULAS[kind]
    objective = make()
    again = make_objective(json.loads(json.dumps(objective.record())))
    assert type(again) is type(objective)
    assert again.outputs == objective.outputs
    logits = torch.tensor(LOGITS[: objective.outputs])
    assert torch.equal(again.predict(logits), objective.predict(logits))
    for values in targets:
        assert torch.equal(again(logits, as_target(values)), objective(logits, as_target(values)))


def fitted(
    names: list[str], targets: list[tuple[float, ...]], weights: tuple[float, ...] = (), **data: Any
) -> Objective:
    config = Config(run=RunConfig(name="t"), data=DataConfig(**data), optim=OptimConfig(class_weights=weights))
    return fit_objective(names, targets, config)


def test_scale_and_bins_come_from_the_train_split() -> None:
    found = fitted(["age"], [(1.0,), (4.0,), (7.0,)], supervision="regression")
    assert isinstance(found, SquaredError)
    assert (found.mean, found.sd) == (4.0, pytest.approx(math.sqrt(6)))
    train = [(float(time), float(time % 3 > 0)) for time in range(1, 32)]
    found = fitted(["risk"], train, supervision="survival", survival_bins=3)
    assert isinstance(found, HazardLikelihood)
    events = [time for time, event in train if event]
    counts = np.histogram(events, [0, *found.edges.tolist(), 99])[0]
    assert counts.tolist() == [7, 7, 7], "of the observed events alone"


def test_weights_do_not_change_the_size_of_the_loss() -> None:
    """Their mean over the train split's slides is 1, of each label where it is known."""
    train = [(0.0,)] * 7 + [(1.0,)] * 2 + [(2.0,)]
    found = fitted(["a", "b", "c"], train, (1.0, 2.0, 8.0))
    weights = found.settings()["class_weights"]
    assert weights == pytest.approx([1 / 1.9, 2 / 1.9, 8 / 1.9])
    assert sum(weights[int(index)] for (index,) in train) == pytest.approx(len(train))
    labels = [(1.0, NAN), (0.0, 1.0), (0.0, 1.0), (NAN, 0.0), (0.0, NAN)]
    found = fitted(["ER", "PR"], labels, (5.0, 0.5), supervision="multi_label", label_columns=("ER", "PR"))
    plain = fitted(["ER", "PR"], labels, supervision="multi_label", label_columns=("ER", "PR"))
    assert plain.settings()["scales"] == [1.0, 1.0]
    # Logits of 0 cost log 2 with each label, whatever it is.
    even = torch.zeros(2, dtype=torch.float64)
    first = sum(found(even, as_target((label, NAN))).item() for label, _ in labels if not math.isnan(label))
    second = sum(found(even, as_target((NAN, label))).item() for _, label in labels if not math.isnan(label))
    assert (first, second) == pytest.approx((4 * math.log(2), 3 * math.log(2)))


def test_censored_patients_may_count_less() -> None:
    """MCAT's formula: (1 − α) of the loss of all, and α of that of the observed."""
    alpha, targets = 0.4, [(3.0, 1.0), (3.0, 0.0), (11.0, 0.0), (5.0, 1.0)]
    z = LOGITS[: len(EDGES) + 1]
    everyone = sum(survival(z, target) for target in targets)
    observed = sum(survival(z, target) for target in targets if target[1])
    objective = HazardLikelihood(EDGES, censored_alpha=alpha)
    logits = torch.tensor(z, dtype=torch.float64)
    found = sum(objective(logits, as_target(target)).item() for target in targets)
    assert found == pytest.approx((1 - alpha) * everyone + alpha * observed, abs=1e-12)
    assert make_objective(objective.record()).settings() == objective.settings()
    old = {name: value for name, value in objective.record().items() if name != "censored_alpha"}
    assert make_objective(old).settings()["censored_alpha"] == 0.0


@pytest.mark.parametrize("times", [[1.0, 2.0], [3.0, 3.0, 3.0, 3.0, 9.0], []])
def test_bins_that_cannot_be_filled(times: list[float]) -> None:
    targets = [(time, 1.0) for time in times] + [(4.0, 0.0)] * 9
    with pytest.raises(ValueError, match=rf"{len(times)} observed events .* do not fill 3 bins"):
        survival_edges(targets, 3)


def write(folder: Path, columns: str, *rows: str) -> Path:
    """A manifest whose rows give the target's cells and the split."""
    manifest = folder / "m.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        file.write(f"slide_id,case_id,path,{columns},split\n")
        for index, row in enumerate(rows):
            (folder / f"{index}.svs").touch()
            file.write(f"s{index},p{index},{index}.svs,{row}\n")
    return manifest


def problems(manifest: Path, config: DataConfig) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        read_manifest(manifest, config)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


LABELS = DataConfig(supervision="multi_label", label_columns=("ER", "PR"))


def test_manifest_of_labels(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, "ER,PR", "1,0,train", "0.0,1.0,train", "NA,1,val", ",0,test"), LABELS)
    assert (manifest.classes, manifest.supervision) == (("ER", "PR"), "multi_label")
    targets = np.array([row.target for row in manifest.rows])
    np.testing.assert_array_equal(targets, [[1, 0], [0, 1], [NAN, 1], [NAN, 0]])


def test_faulty_manifest_of_labels(tmp_path: Path) -> None:
    path = write(tmp_path, "ER,PR", "1,0,train", "1,,train", ",nan,val", "yes,2,test")
    assert problems(path, LABELS) == [
        "no train slide has ER 0; there is nothing to tell apart",
        "no train slide has PR 1; there is nothing to tell apart",
        "row 4: none of ER, PR is known; leave the row out",
        "row 5: ER 'yes' is not 0 or 1; leave the cell empty where it is not known",
        "row 5: PR '2' is not 0 or 1; leave the cell empty where it is not known",
    ]
    other = DataConfig(supervision="multi_label", label_columns=("ER", "PgR"))
    with pytest.raises(ManifestError, match=r"no column 'PgR' \(--data.label-columns\), did you mean 'PR'"):
        read_manifest(path, other)


def test_manifest_of_numbers(tmp_path: Path) -> None:
    config = DataConfig(supervision="regression", label_column="age")
    manifest = read_manifest(write(tmp_path, "age", "61,train", "7e1,train", "-3.5,val"), config)
    assert manifest.classes == ("age",)
    assert [row.target for row in manifest.rows] == [(61.0,), (70.0,), (-3.5,)]
    faulty = write(tmp_path, "age", "61,train", "61.0,train", ",val", '"3,5",val', "inf,test", "nan,test")
    assert problems(faulty, config) == [
        "age of the train split: all are 61, up to a standard deviation of 0; there is nothing to predict",
        "row 4: age is empty",
        "row 5: age '3,5' is not a finite number",
        "row 6: age 'inf' is not a finite number",
        "row 7: age is missing: 'nan'",
    ]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            ["0.3", repr(0.1 + 0.2), "0.3"],
            "all are 0.3, up to a standard deviation of ",
        ),
        (["1e308", "-1e308"], "numbers are too large for a standard deviation; use another unit"),
    ],
)
def test_numbers_without_a_scale(tmp_path: Path, values: list[str], problem: str) -> None:
    """Errors are divided by the standard deviation: by 5e-17, a loss would be of 1e30."""
    config = DataConfig(supervision="regression", label_column="age")
    path = write(tmp_path, "age", *[f"{value},train" for value in values])
    (found,) = problems(path, config)
    assert found.startswith(f"age of the train split: {problem}")
    near = write(tmp_path, "age", "1000.00001,train", "1000,train")
    assert len(read_manifest(near, config).rows) == 2


def test_manifest_of_survival(tmp_path: Path) -> None:
    config = DataConfig(supervision="survival", label_column="months", event_column="dead", survival_bins=2)
    path = write(tmp_path, "months,dead", "3.5,1,train", "20,1.0,train", "7,0,val")
    manifest = read_manifest(path, config)
    assert manifest.classes == ("risk",)
    assert [row.target for row in manifest.rows] == [(3.5, 1.0), (20.0, 1.0), (7.0, 0.0)]
    faulty = write(tmp_path, "months,dead", "3,1,train", "0,0,train", "5,,val", "soon,yes,val", "-1,0,test")
    assert problems(faulty, config) == [
        "train split: 1 observed events at 1 different times do not fill 2 bins; use fewer --data.survival-bins",
        "row 3: months '0' is not a time above 0; leave the row out, or give half a unit",
        "row 4: dead is empty",
        "row 5: dead 'yes' is not 1 (observed) or 0 (censored)",
        "row 5: months 'soon' is not a time above 0; leave the row out",
        "row 6: months '-1' is not a time above 0; leave the row out",
    ]
    with pytest.raises(ManifestError, match=r"no column 'event' \(--data.event-column\)"):
        read_manifest(path, replace(config, event_column="event"))


GRADES = DataConfig(supervision="ordinal")


def test_manifest_of_grades(tmp_path: Path) -> None:
    path = write(tmp_path, "label", "10,train", "2,train", "1.5,train", "2,val")
    manifest = read_manifest(path, GRADES)
    assert manifest.classes == ("1.5", "2", "10"), "as numbers"
    assert [row.target for row in manifest.rows] == [(2.0,), (1.0,), (0.0,), (1.0,)]
    words = write(tmp_path, "label", "low,train", "high,train", "none,train")
    assert problems(words, GRADES) == [
        "labels have no order, for 'high', 'low' is no number; give them from low to high: --data.classes",
        "row 4: label is missing: 'none'",
    ]
    manifest = read_manifest(words, replace(GRADES, classes=("none", "low", "high")))
    assert [row.target for row in manifest.rows] == [(1.0,), (2.0,), (0.0,)]
    twice = write(tmp_path, "label", "1,train", "1.0,train", "2,train")
    assert problems(twice, GRADES) == [
        "labels '1', '1.0' are spellings of the same number; rename them: --data.label-map"
    ]
    assert read_manifest(twice, replace(GRADES, label_map={"1.0": "1"})).classes == ("1", "2")


def test_labels_are_renamed(tmp_path: Path) -> None:
    path = write(tmp_path, "label", "negative,train", "itc,train", "macro,val")
    config = DataConfig(classes=("negative", "tumor"), label_map={"itc": "tumor", "macro": "tumor", "micro": "tumor"})
    assert [row.target for row in read_manifest(path, config).rows] == [(0.0,), (1.0,), (1.0,)]
    assert problems(path, DataConfig(label_map={"itc": "tumor", "marco": "tumor"})) == [
        "data.label_map renames 'marco', which no row has, did you mean 'macro'?",
        "row 4: label 'macro' is not among the labels of the train split: negative, tumor",
    ]


def test_renaming_on_the_command_line() -> None:
    default = Config(run=RunConfig(name="t"))
    words = ["--data.label-map", "itc", "tumor", "micro", "tumor", "--data.tile-px", "64"]
    config = tyro.cli(Config, default=default, args=words)
    assert config.data.label_map == {"itc": "tumor", "micro": "tumor"}
    assert config.flat()["data.label_map"] == config.data.label_map
    assert default.flat()["data.label_map"] == {}, "what is compared before a resume has it in any case"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"supervision": "multi_label"}, "--data.label-columns is .*must name a column"),
        ({"supervision": "multi_label", "label_columns": ("a", "a")}, "--data.label-columns is .*distinct"),
        ({"label_columns": ("a",)}, "--data.label-columns is .*is for --data.supervision multi_label"),
        ({"supervision": "multi_label", "label_columns": ("a",), "label_column": "b"}, "--data.label-column is"),
        ({"supervision": "survival", "classes": ("a", "b")}, "--data.classes is .* for --data.supervision classes"),
        ({"supervision": "regression", "label_map": {"a": "b"}}, "--data.label-map is"),
        ({"event_column": "dead"}, "--data.event-column is .*is for --data.supervision survival"),
        ({"supervision": "regression", "survival_bins": 3}, "--data.survival-bins is"),
        ({"supervision": "survival", "survival_bins": 1}, "--data.survival-bins is 1: must be at least 2"),
    ],
)
def test_settings_of_another_supervision_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(DataConfig(**settings))


def put_targets(manifest: Path) -> None:
    """Targets of every kind, in columns of their own, that go with the class and the row."""

    def change(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        for index, row in enumerate(rows):
            mutant = row["label"] == "mutant"
            row["grade"] = str(1 + 2 * mutant + index % 3)
            row["ER"] = "" if index % 5 == 0 else str(int(mutant))
            row["PR"] = str(index % 2)
            row["age"] = str(1000 + 10 * mutant + index % 4)
            row["months"], row["dead"] = str(3 + 7 * index % 11 + (0 if mutant else 9)), str(int(index % 4 > 0))
        return rows

    edit_manifest(manifest, change)


def config_of(kind: str, manifest: Path, out: Path, **changes: Any) -> Config:
    config = make_config(manifest, out, **({"epochs": 1, "heatmaps": 1} | changes))
    settings: dict[str, Any] = {
        "ordinal": {"label_column": "grade"},
        "multi_label": {"label_columns": ("ER", "PR")},
        "regression": {"label_column": "age"},
        "survival": {"label_column": "months", "event_column": "dead", "survival_bins": 2},
    }[kind]
    return replace(config, data=replace(config.data, supervision=kind, classes=(), **settings))


@pytest.mark.parametrize(
    ("kind", "targets", "outputs", "headline"),
    [
        ("ordinal", ["label"], [f"probability_{grade}" for grade in range(1, 6)], "quadratic_kappa"),
        ("multi_label", ["label_ER", "label_PR"], ["probability_ER", "probability_PR"], "auroc"),
        ("regression", ["target"], ["prediction"], "r2"),
        ("survival", ["time", "event"], ["risk"], "concordance"),
    ],
)
def test_runs(
    cohort_copy: Path, tmp_path: Path, kind: str, targets: list[str], outputs: list[str], headline: str
) -> None:
    put_targets(cohort_copy)
    folder = main.run(config_of(kind, cohort_copy, tmp_path / "runs"))
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["slide_id", "case_id", *targets, *outputs, "k"]
    rows = read_csv(folder / "predictions.csv")
    val = [row for row in read_csv(cohort_copy) if row["split"] == "val"]
    assert [row["slide_id"] for row in rows] == [row["slide_id"] for row in val]
    columns = {"label_ER": "ER", "label_PR": "PR", "label": "grade", "target": "age", "time": "months", "event": "dead"}
    for row, manifest_row in zip(rows, val, strict=True):
        assert [row[name] and float(row[name]) for name in targets] == [
            manifest_row[columns[name]] and float(manifest_row[columns[name]]) for name in targets
        ]
        assert all(math.isfinite(float(row[name])) for name in outputs)
    record = json.loads((folder / "config.json").read_text())
    assert record["objective"]["supervision"] == kind
    train = [row for row in read_csv(cohort_copy) if row["split"] == "train"]
    if kind == "regression":
        ages = [float(row["age"]) for row in train]
        assert record["objective"]["mean"] == pytest.approx(np.mean(ages))
        assert all(abs(float(row["prediction"]) - np.mean(ages)) < 50 for row in rows), "in years"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["headline"]["metric"] == headline
    assert metrics["values"][headline]["value"] == metrics["headline"]["value"]
    assert list((folder / "figures").glob("*.png"))
    edit_manifest(cohort_copy, lambda rows: [row for row in rows if row["split"] == "val"])
    predict_slides(PredictRequest(run=folder, manifest=cohort_copy, out=tmp_path / "p.csv"))
    again = json.loads((tmp_path / "p_metrics.json").read_text())
    assert again["headline"]["value"] == pytest.approx(metrics["headline"]["value"], abs=1e-4)
    first = min(val, key=lambda row: row["grade"]) if kind == "ordinal" else val[0]
    stem = f"{first['slide_id']}_{first['grade']}" if kind == "ordinal" else first["slide_id"]
    assert [path.stem for path in (folder / "heatmaps").glob("*.png")] == [stem]


def test_a_resumed_run_keeps_its_scale_and_its_classes(cohort_copy: Path, tmp_path: Path) -> None:
    """Where nothing shows that the manifest has changed, the logits must go on meaning the same."""
    put_targets(cohort_copy)
    folder = main.run(config_of("regression", cohort_copy, tmp_path / "runs"))
    (folder / "slides.json").unlink()  # as an earlier version left it
    before = json.loads((folder / "config.json").read_text())["objective"]
    edit_manifest(cohort_copy, lambda rows: [row | {"age": str(2 * float(row["age"]))} for row in rows])
    config = config_of("regression", cohort_copy, tmp_path / "runs", epochs=2, resume=True)
    assert main.run(config) == folder
    assert json.loads((folder / "config.json").read_text())["objective"] == before

    inferred = make_config(cohort_copy, tmp_path / "classes", epochs=1, classes=())
    main.run(inferred)
    edit_manifest(
        cohort_copy, lambda rows: [row | {"label": row["label"].replace("mutant", "changed")} for row in rows]
    )
    with pytest.raises(UserError, match="was begun to predict mutant, wild_type, and the manifest has changed, wild_t"):
        main.run(replace(inferred, resume=True))


def test_what_a_supervision_cannot_have(cohort_copy: Path, tmp_path: Path) -> None:
    put_targets(cohort_copy)
    weights = OptimConfig(class_weights=(1.0, 2.0))
    with pytest.raises(ConfigError, match="class-weights .*classes, ordinal and multi_label, and that is survival"):
        main.run(config_of("survival", cohort_copy, tmp_path, optim=weights))
    with pytest.raises(ConfigError, match="censored-alpha is 0.4: is for --data.supervision survival"):
        main.run(config_of("multi_label", cohort_copy, tmp_path, optim=OptimConfig(censored_alpha=0.4)))
    three = OptimConfig(class_weights=(1.0, 2.0, 3.0))
    with pytest.raises(ConfigError, match="3 values for 2 labels"):
        main.run(config_of("multi_label", cohort_copy, tmp_path, optim=three))
    demo = config_of("regression", cohort_copy, tmp_path)
    with pytest.raises(ConfigError, match="regression needs --data.manifest"):
        main.run(replace(demo, data=replace(demo.data, manifest=None)))
