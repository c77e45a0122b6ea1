"""Metrics against scikit-learn and brute force, and intervals that take a patient's slides together."""

import json
import math
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.stats import pearsonr
from sklearn import metrics as reference

from slidescale.engine.config import SupervisionName
from slidescale.engine.evaluation.intervals import Estimate, Estimates, by_patient, describe, estimate
from slidescale.engine.evaluation.metrics import measure
from slidescale.engine.supervision.rates import confidence_bin

# Sums of some hundred doubles in another order.
CLOSE = pytest.approx


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def classified(slides: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Targets and probabilities that know something of them, in twentieths, so that many are equal."""
    draws = np.random.default_rng(seed)
    labels = np.r_[np.arange(classes), draws.integers(0, classes, slides - classes)]
    seen = np.where(draws.random(slides) < 0.3, draws.integers(0, classes, slides), labels)
    parts = draws.multinomial(14, np.full(classes, 1 / classes), size=slides) + 6 * np.eye(classes, dtype=int)[seen]
    return labels[:, None].astype(float), parts / 20


def surviving(slides: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Times, events and risks with ties in all of them, and of the same time events and censorings."""
    draws = np.random.default_rng(seed)
    times = draws.integers(1, 12, slides)
    events = draws.random(slides) < 0.6
    return np.c_[times, events].astype(float), (draws.integers(0, 19, slides) - times)[:, None] / 2.0


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


def cohort(kind: SupervisionName, slides: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    if kind in ("classes", "ordinal"):
        return *classified(slides, 3), ["a", "b", "c"]
    if kind == "multi_label":
        labels, outputs = classified(slides, 3)
        targets = np.eye(3)[labels[:, 0].astype(int)]
        targets[np.random.default_rng(3).random((slides, 3)) < 0.1] = np.nan
        return targets, outputs, ["a", "b", "c"]
    targets, risks = surviving(slides)
    return (targets, risks, ["risk"]) if kind == "survival" else (targets[:, :1], risks, ["value"])


KINDS: list[SupervisionName] = ["classes", "ordinal", "multi_label", "regression", "survival"]


def interval_by_hand(
    metric: str, value: float, resamples: list[float], patients: int, brier: tuple[int, int]
) -> tuple[float, float]:
    """Logit intervals where a metric has two ends, percentiles elsewhere."""
    if metric in ("r2", "mae", "rmse"):
        return tuple(np.percentile(resamples, (2.5, 97.5)))
    least, most = {"pearson": (-1, 1), "quadratic_kappa": (-1, 1), "brier": brier}.get(metric, (0, 1))

    margin = patients**-2
    if metric.rpartition("/")[2] in ("accuracy", "balanced_accuracy", "recall", "specificity", "precision", "f1"):
        margin = 0.25 / patients

    def forward(number: float) -> float:
        share = min(max((number - least) / (most - least), margin), 1 - margin)
        return math.log(share / (1 - share))

    half = stats.t.ppf(0.975, patients - 1) * statistics.stdev(map(forward, resamples))
    ends = [1 / (1 + math.exp(-(forward(value) + sign * half))) for sign in (-1, 1)]
    return tuple(least + (most - least) * end for end in ends)


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_are_those_of_resampled_cohorts(kind: SupervisionName) -> None:
    """Weights stand for slides drawn so often: the metrics of cohorts that are really put together are the same."""
    targets, outputs, names = cohort(kind, 47)
    cases = [f"patient {slide // 3}" for slide in range(47)]
    found = estimate(kind, targets, outputs, cases, names, resamples=60, seed=5)
    patients, patient = np.unique(cases, return_inverse=True)
    draws = np.random.default_rng(5).multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=60)
    resampled = []
    for times in draws:
        slides = np.repeat(np.arange(47), times[patient])
        resampled.append(measure(kind, targets[slides], outputs[slides], names))
    assert [found.values[metric].value for metric in found.values] == list(
        measure(kind, targets, outputs, names).values()
    )
    wide = 0
    for metric, each in found.values.items():
        values = [each[metric] for each in resampled if each[metric] is not None]
        if metric.rpartition("/")[2] in ("support", "slides", "pairs") or len(values) < 54 or np.ptp(values) < 1e-12:
            assert each.low is None and each.high is None
        else:
            brier = (0, 2) if kind == "classes" else (0, 1)  # a sum over three classes
            by_hand = interval_by_hand(metric, each.value, values, len(patients), brier)
            assert (each.low, each.high) == CLOSE(by_hand), metric
            wide += each.low < each.high
    assert wide, "all resamples are alike"


def test_intervals_cover_the_truth_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 cohorts 95% should, with a standard error of 1.5%; two of these are allowed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import interval_coverage

    setting = interval_coverage.Setting(patients=40, positive=0.5, auroc=0.96)
    found = interval_coverage.coverage(setting, 200, 200, ["report", "percentiles"])
    auroc = interval_coverage.METRICS.index("auroc")
    assert 0.92 <= found["report"][auroc, 0] <= 0.995
    assert found["percentiles"][auroc, 0] < 0.92, "percentiles would do"


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_slides_tell_nothing_new(kind: SupervisionName) -> None:
    targets, outputs, names = cohort(kind, 41)
    cases = [f"patient {slide}" for slide in range(41)]
    once = estimate(kind, targets, outputs, cases, names, resamples=300)
    again = np.repeat(np.arange(41), 4)
    copied = estimate(kind, targets[again], outputs[again], np.repeat(cases, 4), names, resamples=300)
    one_by_one = [str(slide) for slide in range(164)]
    independent = estimate(kind, targets[again], outputs[again], one_by_one, names, resamples=300)
    for metric, each in once.values.items():
        if each.low is not None:
            other, narrow = copied.values[metric], independent.values[metric]
            assert (other.value, other.low, other.high) == CLOSE((each.value, each.low, each.high)), metric
            # The likely bug, slides drawn one by one, halves the interval. (The share of it that is drawn is random.)
            assert narrow.high - narrow.low < 0.75 * (each.high - each.low), metric


def test_a_class_of_one_patient_has_no_interval() -> None:
    targets = np.array([[1.0]] * 3 + [[0.0]] * 20)
    outputs = np.random.default_rng(4).dirichlet([2, 2], 23)
    alone = estimate("classes", targets, outputs, ["x"] * 3 + [str(slide) for slide in range(20)], ["a", "b"])
    assert alone.values["auroc"].value is not None and alone.values["auroc"].low is None
    assert alone.values["accuracy"].low is not None
    one_patient = estimate("classes", targets, outputs, ["x"] * 23, ["a", "b"])
    assert one_patient.values["accuracy"].value is not None and one_patient.values["accuracy"].low is None


def test_tiny_and_perfect_cohorts_have_no_interval() -> None:
    """Resamples of four slides that are ordered right are all ordered right: that is no certainty."""

    def auroc(slides_a_class: int, *, perfect: bool = False) -> Estimate:
        targets = np.repeat([[0.0], [1.0]], slides_a_class, axis=0)
        scores = targets[:, 0] * 0.5 + 0.25
        if not perfect:
            scores[0], scores[-1] = 0.7, 0.3
        cases = [str(slide) for slide in range(len(targets))]
        return estimate("classes", targets, np.c_[1 - scores, scores], cases, ["a", "b"]).values["auroc"]

    for slides, perfect in ((2, True), (4, False), (50, True)):
        assert (auroc(slides, perfect=perfect).low, auroc(slides, perfect=perfect).high) == (None, None)
        assert auroc(slides, perfect=perfect).value is not None
    assert auroc(5).low < auroc(5).high


@pytest.mark.parametrize(
    ("kind", "metric", "without"),
    [
        ("classes", "class/a/recall", ["class/c/recall", "auroc", "balanced_accuracy"]),
        ("multi_label", "a/auroc", ["c/auroc", "auroc"]),
    ],
)
def test_a_rare_class_costs_its_own_intervals(kind: SupervisionName, metric: str, without: list[str]) -> None:
    """Four patients are of the third class; what is of the others, or of all slides, keeps its interval."""
    _, outputs = classified(60, 3)
    labels = np.r_[np.arange(56) % 2, [2] * 4]
    targets = labels[:, None].astype(float) if kind == "classes" else np.eye(3)[labels]
    found = estimate(kind, targets, outputs, [str(slide) for slide in range(60)], ["a", "b", "c"]).values
    assert found[metric].low is not None
    assert [found[name].low for name in without] == [None] * len(without)
    assert kind != "classes" or found["accuracy"].low is not None


def test_a_class_that_few_are_not_of_has_no_interval_of_its_area() -> None:
    _, outputs = classified(60, 3)
    labels = np.r_[[0] * 56, 1, 1, 2, 2].astype(float)
    found = estimate("classes", labels[:, None], outputs, [str(slide) for slide in range(60)], ["a", "b", "c"]).values
    assert found["class/a/recall"].low is not None
    assert found["class/a/auroc"].value is not None and found["class/a/auroc"].low is None


def test_survival_of_few_events_has_no_interval() -> None:
    targets, risks = surviving(40)
    targets[:, 1] = 0
    targets[:4, 1] = 1
    cases = [str(slide) for slide in range(40)]
    assert estimate("survival", targets, risks, cases, ["risk"]).values["concordance"].low is None
    targets[4, 1] = 1
    assert estimate("survival", targets, risks, cases, ["risk"]).values["concordance"].low is not None


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
