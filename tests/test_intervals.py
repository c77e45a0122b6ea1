"""Intervals of metrics: how far a cohort of other patients would be from this one."""

import math
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from slidescale.engine.config import SupervisionName
from slidescale.engine.evaluation.intervals import Estimate, estimate
from slidescale.engine.evaluation.metrics import measure

from support.cohorts import KINDS, classified, cohort, surviving

# Sums of some hundred doubles in another order.
CLOSE = pytest.approx


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


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
