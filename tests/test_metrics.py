"""Metrics against scikit-learn and brute force, and intervals that take a patient's slides together."""

import json
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn import metrics as reference

from slidescale.engine.config import SupervisionName
from slidescale.engine.evaluation.intervals import Estimates, by_patient, describe, estimate
from slidescale.engine.evaluation.metrics import measure
from slidescale.engine.supervision.rates import confidence_bin

from support.cohorts import KINDS, classified, cohort, surviving

# Sums of some hundred doubles in another order.
CLOSE = pytest.approx


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pairwise(targets: np.ndarray, risks: np.ndarray, tie: float = 0.5) -> tuple[float, int]:
    """Harrell's concordance by its definition, over pairs one by one."""
    credit, pairs = 0.0, 0
    for i, (time, event) in enumerate(targets):
        for j, (other_time, other_event) in enumerate(targets):
            if event and (time < other_time or (time == other_time and not other_event)):
                pairs += 1
                credit += 1.0 if risks[i, 0] > risks[j, 0] else tie if risks[i, 0] == risks[j, 0] else 0.0
    return credit / pairs, pairs


@pytest.mark.parametrize(("slides", "classes"), [(11, 2), (131, 2), (53, 3), (129, 5)])
def test_classes_are_scikit_learns(slides: int, classes: int) -> None:
    targets, outputs = classified(slides, classes)
    labels, guesses, truth = targets[:, 0].astype(int), outputs.argmax(1), np.eye(classes)[targets[:, 0].astype(int)]
    names = [f"class {c}" for c in range(classes)]
    assert len(np.unique(outputs[:, 1])) < slides, "no ties"
    values = measure("classes", targets, outputs, names)
    precisions = [reference.average_precision_score(truth[:, c], outputs[:, c]) for c in range(classes)]
    scores = outputs[:, 1] if classes == 2 else outputs
    assert values["auroc"] == CLOSE(reference.roc_auc_score(labels, scores, multi_class="ovr"))
    assert values["auprc"] == CLOSE(precisions[1] if classes == 2 else np.mean(precisions))
    assert values["accuracy"] == CLOSE(reference.accuracy_score(labels, guesses))
    assert values["balanced_accuracy"] == CLOSE(reference.balanced_accuracy_score(labels, guesses))
    brier = ((outputs - truth) ** 2).sum(1).mean()
    assert values["brier"] == CLOSE(reference.brier_score_loss(labels, outputs[:, 1]) if classes == 2 else brier)
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        labels, guesses, labels=range(classes), zero_division=np.nan
    )
    for c, name in enumerate(names):
        assert values[f"class/{name}/recall"] == CLOSE(recall[c])
        assert values[f"class/{name}/precision"] == (None if np.isnan(precision[c]) else CLOSE(precision[c]))
        assert values[f"class/{name}/f1"] == CLOSE(f1[c])
        assert values[f"class/{name}/support"] == support[c]
        if classes > 2:
            assert values[f"class/{name}/auroc"] == CLOSE(reference.roc_auc_score(truth[:, c], outputs[:, c]))
    assert (f"class/{names[0]}/auroc" in values) == (classes > 2)


def test_calibration_error_by_its_definition() -> None:
    targets, outputs = classified(131, 3)
    confidence, correct = outputs.max(1), outputs.argmax(1) == targets[:, 0]
    expected = 0.0
    twentieths = np.rint(confidence * 20)
    for each in range(15):  # the bin (each / 15, (each + 1) / 15], in whole numbers
        mine = (15 * twentieths > 20 * each) & (15 * twentieths <= 20 * (each + 1))
        if mine.any():
            expected += mine.mean() * abs(correct[mine].mean() - confidence[mine].mean())
    assert expected > 0.02
    assert measure("classes", targets, outputs, ["a", "b", "c"])["ece"] == CLOSE(expected)


def test_a_confidence_between_two_bins_is_in_the_lower() -> None:
    assert confidence_bin(np.array([0.0, 0.05, 1 / 15, 0.2, 0.4, 12 / 20, 0.61, 1.0])).tolist() == [
        0,
        0,
        0,
        2,
        5,
        8,
        9,
        14,
    ]


def test_calibration_error_of_two_classes_is_of_the_likelier() -> None:
    # Four of five right at 80%: calibrated, whichever class it was.
    outputs = np.array([[0.8, 0.2]] * 5 + [[0.2, 0.8]] * 5)
    targets = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 0])[:, None]
    assert measure("classes", targets, outputs, ["a", "b"])["ece"] == CLOSE(0, abs=1e-12)
    assert measure("classes", 1 - targets, outputs, ["a", "b"])["ece"] == CLOSE(0.6)


def test_labels_are_measured_where_they_are_known() -> None:
    draws = np.random.default_rng(1)
    targets = (draws.random((89, 3)) < 0.4).astype(float)
    outputs = np.round((targets + draws.random((89, 3))) / 2, 1)
    targets[draws.random((89, 3)) < 0.2] = np.nan
    targets[:, 2] = np.where(np.isnan(targets[:, 2]), np.nan, 0)  # a label that nobody has
    values = measure("multi_label", targets, outputs, ["EGFR", "KRAS", "none"])
    sums = np.zeros(3)
    for label, name in enumerate(["EGFR", "KRAS"]):
        known = ~np.isnan(targets[:, label])
        truth, probability = targets[known, label], outputs[known, label]
        guess = probability > 0.5
        expected = {
            "auroc": reference.roc_auc_score(truth, probability),
            "auprc": reference.average_precision_score(truth, probability),
            "recall": reference.recall_score(truth, guess),
            "specificity": reference.recall_score(truth, guess, pos_label=0),
            "precision": reference.precision_score(truth, guess),
            "f1": reference.f1_score(truth, guess),
            "support": truth.sum(),
            "slides": known.sum(),
        }
        for metric, value in expected.items():
            assert values[f"{name}/{metric}"] == CLOSE(value), metric
        balanced = reference.balanced_accuracy_score(truth, guess)
        sums += [expected["auroc"], balanced, reference.brier_score_loss(truth, probability)]
    assert values["none/auroc"] is None and values["none/recall"] is None and values["none/support"] == 0
    assert [values[metric] for metric in ("auroc", "balanced_accuracy", "brier")] == CLOSE(list(sums / 2))


def test_regression_is_scikit_learns() -> None:
    draws = np.random.default_rng(2)
    truth = 1000 + draws.normal(size=(61, 1))
    predicted = truth + draws.normal(size=(61, 1)) / 2
    assert measure("regression", truth, predicted, ["value"]) == {
        "r2": CLOSE(reference.r2_score(truth, predicted)),
        "mae": CLOSE(reference.mean_absolute_error(truth, predicted)),
        "rmse": CLOSE(reference.root_mean_squared_error(truth, predicted)),
        "pearson": CLOSE(pearsonr(truth[:, 0], predicted[:, 0]).statistic),
    }


@pytest.mark.parametrize(("slides", "grades"), [(11, 2), (53, 3), (129, 6)])
def test_grades_are_scikit_learns(slides: int, grades: int) -> None:
    targets, outputs = classified(slides, grades)
    outputs = (20 * outputs + np.eye(grades)[0]) / 21  # no sum of these is exactly half
    labels, names = targets[:, 0].astype(int), [str(grade) for grade in range(grades)]
    median = [next(k for k in range(grades) if row[: k + 1].sum() > 0.5) for row in outputs]
    values = measure("ordinal", targets, outputs, names)
    assert values["quadratic_kappa"] == CLOSE(reference.cohen_kappa_score(labels, median, weights="quadratic"))
    assert values["quadratic_kappa"] != CLOSE(reference.cohen_kappa_score(labels, median, weights="linear")) or (
        grades == 2
    )
    assert values["mae"] == CLOSE(reference.mean_absolute_error(labels, median))
    assert values["accuracy"] == CLOSE(reference.accuracy_score(labels, median))
    recall, support = reference.precision_recall_fscore_support(labels, median, zero_division=np.nan)[1::2]
    assert [values[f"class/{name}/recall"] for name in names] == CLOSE(list(recall))
    assert [values[f"class/{name}/support"] for name in names] == list(support)


@pytest.mark.parametrize("slides", [13, 41, 131])
def test_concordance_by_its_definition(slides: int) -> None:
    targets, risks = surviving(slides)
    expected, pairs = pairwise(targets, risks)
    values = measure("survival", targets, risks, ["risk"])
    assert (values["concordance"], values["pairs"]) == (CLOSE(expected), pairs)
    # The likely bug: ties counted as one.
    assert values["concordance"] != CLOSE(pairwise(targets, risks, tie=1.0)[0])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((2, 1), (2, 0), 1.0),  # an event, and a censoring at its time: the censored slide lived longer
        ((2, 1), (2, 1), None),  # two events at a time: no order
        ((2, 0), (3, 1), None),  # censored before the event: no order known
        ((2, 1), (3, 0), 1.0),
    ],
)
def test_which_pairs_compare(first: tuple, second: tuple, expected: float | None) -> None:
    values = measure("survival", np.array([first, second]), np.array([[2.0], [1.0]]), ["risk"])
    assert values == {"concordance": expected, "pairs": 0 if expected is None else 1}


# ---- patients


def test_a_patient_is_the_mean_of_its_slides() -> None:
    targets = np.array([[1, np.nan], [0, 1], [1, 0]])
    outputs = np.array([[0.2, 0.3], [0.5, 0.6], [0.6, 0.9]])
    rows, means, patients = by_patient(targets, outputs, ["y", "x", "y"])
    assert patients == ["x", "y"]
    assert rows.tolist() == [[0, 1], [1, 0]], "a label that one slide lacks is known of the other"
    assert means == CLOSE(np.array([[0.5, 0.6], [0.4, 0.6]]))
    with pytest.raises(ValueError, match=r"slides of y have different targets \(1 patients in all\)"):
        by_patient(np.array([[1.0], [1.0], [0.0]]), outputs, ["y", "x", "y"])


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_of_patients(kind: SupervisionName) -> None:
    """One that has many slides counts once; and there is nothing to add where each has one."""
    targets, outputs, names = cohort(kind, 41)
    again = np.repeat(np.arange(41), np.arange(41) % 4 + 1)
    noise = np.random.default_rng(5).normal(size=(len(again), 1)) * 0.01
    cases = [f"patient {slide:02}" for slide in again]
    found = estimate(kind, targets[again], outputs[again] + noise, cases, names, resamples=20)
    means = np.array([(outputs[again] + noise)[again == patient].mean(0) for patient in range(41)])
    assert isinstance(found.patients, Estimates) and found.patients.count == 41 and found.count == len(again)
    expected = measure(kind, targets, means, names)
    assert {metric: each.value for metric, each in found.patients.values.items()} == {
        metric: None if value is None else CLOSE(value) for metric, value in expected.items()
    }
    assert found.patients.headline[1] != found.headline[1], "or this proves nothing"
    assert found.as_json()["patients"]["count"] == 41
    assert f"41 patients, by the mean of their slides: {found.headline[0]}" in describe(found)
    assert found.patients.patients is None
    alone = estimate(kind, targets, outputs, [str(slide) for slide in range(41)], names, resamples=20)
    assert alone.patients is None and "patients" not in alone.as_json()


def test_patients_whose_slides_differ_are_not_measured() -> None:
    targets, outputs = classified(20, 2)
    found = estimate("classes", targets, outputs, [str(slide // 2) for slide in range(20)], ["a", "b"], resamples=20)
    assert "have different targets" in found.as_json()["patients"]["note"]
    assert "no metrics per patient" in describe(found)


# ---- what is written


def test_what_is_undefined_is_none() -> None:
    same = measure("ordinal", np.ones((3, 1)), np.array([[0.1, 0.9]] * 3), ["1", "2"])
    assert (same["quadratic_kappa"], same["mae"], same["class/1/recall"]) == (None, 0, None)
    two = np.array([[0.7, 0.3], [0.4, 0.6], [0.2, 0.8]])
    values = measure("classes", np.ones((3, 1)), two, ["a", "b"])
    assert [values[metric] for metric in ("auroc", "auprc", "balanced_accuracy", "class/a/recall")] == [None] * 4
    assert values["accuracy"] == CLOSE(2 / 3) and values["class/a/precision"] == 0
    constant = measure("regression", np.full((3, 1), 0.1), two[:, :1], ["value"])
    assert constant["r2"] is None and constant["pearson"] is None and constant["mae"] is not None
    assert measure("survival", np.array([[1, 0], [2, 0]]), two[:2, :1], ["risk"]) == {"concordance": None, "pairs": 0}
    missing = measure("multi_label", np.full((3, 2), np.nan), two, ["a", "b"])
    assert missing["auroc"] is None and missing["a/f1"] is None and missing["a/slides"] == 0
    for kind in KINDS:
        targets, outputs, names = cohort(kind, 7)
        found = estimate(kind, targets[:0], outputs[:0], [], names)
        assert {each.value for each in found.values.values()} <= {None, 0.0}
        assert found.headline[1] is None


def test_a_resample_of_equal_values_has_no_r2() -> None:
    """The mean of equal numbers is not always exactly theirs: no quotient by what rounding left."""
    targets = np.array([[0.1]] * 6 + [[0.3]])
    found = estimate("regression", targets, targets + 0.01, list("abcdefg"), ["value"], resamples=400)
    assert found.values["r2"].value is not None and found.values["r2"].low is None


def test_a_report_as_json_and_text() -> None:
    targets, outputs, names = cohort("classes", 41)
    found = estimate("classes", targets, outputs, [str(slide) for slide in range(41)], names, resamples=50)
    assert found.headline == ("auroc", found.values["auroc"].value)
    written = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert written["headline"] == {"metric": "auroc", "value": found.values["auroc"].value}
    assert written["values"]["ece"]["high"] == found.values["ece"].high
    assert "positive_class" not in written
    two = estimate("classes", *classified(41, 2), [str(slide) for slide in range(41)], ["a", "b"], resamples=50)
    assert two.as_json()["positive_class"] == "b"
    lines = describe(found).splitlines()
    assert lines[1].split()[:2] == ["auroc", f"{found.values['auroc'].value:.3f}"]
    assert lines[1].endswith(f"{found.values['auroc'].low:.3f} to {found.values['auroc'].high:.3f}")
    row = next(line for line in lines if line.startswith("b "))
    assert row.split()[-1] == f"{found.values['class/b/support'].value:.0f}"
    nothing = estimate("classes", targets[:0], outputs[:0], [], names)
    assert "undefined" in describe(nothing) and "nan" not in describe(nothing).lower()
    assert isinstance(nothing, Estimates)


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"targets \(4, 1\) and outputs \(4, 2\), not \(4, 1\) and \(4, 3\)"):
        measure("classes", np.zeros((4, 1)), np.ones((4, 3)) / 3, ["a", "b"])
    with pytest.raises(ValueError, match="3 cases must be as many as slides, which are 4"):
        estimate("regression", np.zeros((4, 1)), np.ones((4, 1)), ["x"] * 3, ["value"])
