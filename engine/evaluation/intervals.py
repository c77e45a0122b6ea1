"""Metrics with intervals that take a patient's slides together, and metrics of patients."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import expit, logit
from scipy.stats import t as student

from slidescale.engine.config import SupervisionName
from slidescale.engine.evaluation.metrics import HEADLINES, checked, measure, measure_weighted

# Of the resamples, the share that must define a metric for it to have an interval. With two patients of a class, 13% of
# resamples draw neither: an interval that leaves those out would tell of the luckier cohorts only.
DEFINED_SHARE = 0.9

# Of fewer patients of a class, resamples repeat what few there are: four slides that are ordered right would have the
# interval 1 to 1.
LEAST_PATIENTS = 5

# Metrics that count something: of the cohort at hand, so they have no interval.
_COUNTS = ("support", "slides", "pairs")

# The ends of what a metric can be, where they are not 0 and 1; None: it has none, or one only. The Brier score of more
# than two classes is a sum, up to 2.
_ENDS: dict[str, tuple[float, float] | None] = {"r2": None, "mae": None, "rmse": None, "pearson": (-1, 1)}
_ENDS_OF_SUMS = {"brier": (0, 2)}

# Metrics that count slides; others compare them in pairs, or are sums, and go in finer steps.
_COUNTING = ("accuracy", "balanced_accuracy", "recall", "specificity", "precision", "f1")

# Elements of a matrix of weights that is made at once.
_BLOCK = 2**22


@dataclass(frozen=True)
class Estimate:
    """A metric's value (None: undefined), and its 95% interval (None: the cohort tells of none, see `report`)."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Report:
    """All metrics of a cohort.

    Attributes:
        values: by metric; those of a class are `class/<name>/<metric>`, those of a label `<name>/<metric>`.
        headline: name and value of the metric that the best epoch is chosen by.
        count: rows that are measured: slides, or patients.
        positive_class: the second of two classes, which auroc and auprc are of; else None.
        patients: the same metrics of one row a patient (see `by_patient`), or why there are none; None where every
            patient has one slide.
    """

    values: dict[str, Estimate]
    headline: tuple[str, float | None]
    count: int
    positive_class: str | None
    patients: "Report | str | None"

    def as_json(self) -> dict[str, Any]:
        """What `json.dump` can write: numbers, strings and None."""
        name, value = self.headline
        written: dict[str, Any] = {} if self.positive_class is None else {"positive_class": self.positive_class}
        written |= {
            "headline": {"metric": name, "value": value},
            "values": {metric: asdict(estimate) for metric, estimate in self.values.items()},
        }
        if isinstance(self.patients, Report):
            written["patients"] = {"count": self.patients.count, **self.patients.as_json()}
        elif self.patients is not None:
            written["patients"] = {"note": self.patients}
        return written

    def __str__(self) -> str:
        """The headline metric with its interval."""
        name, value = self.headline
        low, high = self.values[name].low, self.values[name].high
        between = "" if low is None else f" ({_number(name, low)} to {_number(name, high)})"
        return f"{name} {_number(name, value)}{between}"


def report(
    kind: SupervisionName,
    targets: np.ndarray,
    outputs: np.ndarray,
    cases: Sequence[str],
    names: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Report:
    """Metrics of a cohort as in `measure`, with 95% intervals from a bootstrap over patients.

    A resample draws as many patients as there are, with replacement, and with each all of the patient's slides (the
    cluster bootstrap, Davison & Hinkley 1997, section 3.8): slides of one patient resemble each other, and drawing them
    one by one would promise more than the cohort can tell.

    The interval of a metric m between 0 and 1 is logit(m) ± t · s, transformed back, with s the standard deviation of
    the resamples' logits and t the 97.5% quantile of Student's distribution with n − 1 degrees of freedom, for n
    patients. On the logit scale an area under the curve is nearly normal, and its interval stays between 0 and 1 (Pepe
    2003, "The Statistical Evaluation of Medical Tests", section 5.2). The percentiles of the resamples, which are
    taken for metrics without two ends (r2, mae, rmse), are too narrow for small cohorts: docs/intervals.md compares
    how often each covers the truth. Pearson's correlation lies between −1 and 1, where the same is Fisher's z. A
    resample at an end itself, whose logit is infinite, counts as a quarter of a step away from it: 1 / 4n for a metric
    that counts, 1 / n² for one that compares the n / 2 patients of each class in pairs.

    Args:
        cases: the patient of each slide.
        resamples: of the patients.
        seed: of the draws.

    Returns:
        A metric has no interval when a class that it needs has fewer than five patients (a label: with it, or without
        it; survival: patients with an event; what is of all slides alike: patients at all), when fewer than 90% of the
        resamples define it, or when it is the same in all of them, as that of a perfect order is.

    Raises:
        ValueError: as in `measure`; or cases are not as many as slides.
    """
    values = measure(kind, targets, outputs, names)
    targets, outputs = checked(kind, targets, outputs, names)
    if len(cases) != len(targets):
        raise ValueError(f"{len(cases)} cases must be as many as slides, which are {len(targets)}")
    patients, patient = np.unique(np.asarray(cases, dtype=str), return_inverse=True)
    drawn: dict[str, list[np.ndarray]] = {metric: [] for metric in values}
    if len(patients) >= LEAST_PATIENTS:
        draws = np.random.default_rng(seed)
        block = max(1, _BLOCK // len(targets))
        for start in range(0, resamples, block):
            rows = min(block, resamples - start)
            times = draws.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=rows)
            weights = times[:, patient].astype(float)
            for metric, row in measure_weighted(kind, targets, outputs, names, weights).items():
                drawn[metric].append(row)
    fewest = _fewest_patients(kind, targets, names, patient, values)
    counts = [metric for metric in values if metric.rpartition("/")[2] in _COUNTS]
    resampled = drawn | {metric: [] for metric in values if metric in counts or fewest[metric] < LEAST_PATIENTS}
    estimates = {
        metric: Estimate(value, *_interval(metric, value, resampled[metric], _ends(metric, kind, names), len(patients)))
        for metric, value in values.items()
    }
    together: Report | str | None = None
    if len(patients) < len(targets):
        try:
            rows_a_patient = by_patient(targets, outputs, cases)
        except ValueError as error:
            together = f"no metrics a patient: {error}"
        else:
            together = report(kind, *rows_a_patient, names, resamples=resamples, seed=seed)
    headline = HEADLINES[kind]
    positive = names[1] if kind == "classes" and len(names) == 2 else None
    return Report(estimates, (headline, values[headline]), len(targets), positive, together)


def by_patient(
    targets: np.ndarray, outputs: np.ndarray, cases: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Targets, outputs and cases with one row a patient: the target of all slides, and the mean of their outputs.

    A label that only some of a patient's slides have is the patient's.

    Raises:
        ValueError: slides of a patient have different targets.
    """
    patients, patient = np.unique(np.asarray(cases, dtype=str), return_inverse=True)
    missing = np.isnan(targets)
    low, high = (np.full((len(patients), targets.shape[1]), end) for end in (np.inf, -np.inf))
    np.minimum.at(low, patient, np.where(missing, np.inf, targets))
    np.maximum.at(high, patient, np.where(missing, -np.inf, targets))
    if len(differing := patients[(low < high).any(1)]):
        raise ValueError(f"the slides of {differing[0]} have different targets ({len(differing)} patients in all)")
    means = np.zeros((len(patients), outputs.shape[1]))
    np.add.at(means, patient, outputs)
    means /= np.bincount(patient, minlength=len(patients))[:, None]
    return np.where(np.isinf(low), np.nan, low), means, patients.tolist()


def describe(report: Report) -> str:
    """Tables for a terminal: a line a metric, and two a class or label: values, and their intervals below."""
    overall = {metric: estimate for metric, estimate in report.values.items() if "/" not in metric}
    width = max(len("metric"), *map(len, overall))
    lines = [f"{'metric':<{width}}  {'value':>9}  95% interval"]
    for metric, estimate in overall.items():
        between = "" if estimate.low is None else f"{_number(metric, estimate.low)} to {_number(metric, estimate.high)}"
        lines.append(f"{metric:<{width}}  {_number(metric, estimate.value):>9}  {between}".rstrip())
    groups: dict[str, dict[str, Estimate]] = {}
    for metric, estimate in report.values.items():
        if metric not in overall:
            group, _, part = metric.rpartition("/")
            groups.setdefault(group.removeprefix("class/"), {})[part] = estimate
    if isinstance(report.patients, Report):
        lines += ["", f"{report.patients.count} patients, by the mean of their slides: {report.patients}"]
    elif report.patients is not None:
        lines += ["", report.patients]
    if not groups:
        return "\n".join(lines)
    columns = list(next(iter(groups.values())))
    width = max(map(len, groups))
    lines += ["", " ".join([" " * width, *(f"{column:>12}" for column in columns)])]
    for group, parts in groups.items():
        numbers = [_number(column, parts[column].value) for column in columns]
        lines.append(" ".join([f"{group:<{width}}", *(f"{number:>12}" for number in numbers)]))
        spans = [
            "" if part.low is None else f"{part.low:.2f}–{part.high:.2f}"
            for part in (parts[column] for column in columns)
        ]
        if any(spans):
            lines.append(" ".join([" " * width, *(f"{span:>12}" for span in spans)]).rstrip())
    return "\n".join(lines)


def _fewest_patients(
    kind: SupervisionName, targets: np.ndarray, names: Sequence[str], patient: np.ndarray, metrics: Iterable[str]
) -> dict[str, int]:
    """Of the classes that each metric needs, the number of patients of the smallest.

    Args:
        patient: `[n]`, whose slide it is.
    """

    def patients(slides: np.ndarray) -> int:
        return len(np.unique(patient[slides]))

    everyone = patients(np.full(len(patient), True))
    if kind == "regression":
        return dict.fromkeys(metrics, everyone)
    if kind == "survival":
        return dict.fromkeys(metrics, patients(targets[:, 1] == 1))
    if kind == "classes":
        own = {f"class/{name}": patients(targets[:, 0] == index) for index, name in enumerate(names)}
        averaged = list(own.values())
        alike = dict.fromkeys(("accuracy", "ece", "brier"), everyone)
        # A class's area needs the others, too.
        others = {f"class/{name}/auroc": patients(targets[:, 0] != index) for index, name in enumerate(names)}
        against = {metric: min(count, own[metric.rpartition("/")[0]]) for metric, count in others.items()}
    else:
        own = {
            name: min(patients(column == answer) for answer in (0, 1))
            for name, column in zip(names, targets.T, strict=True)
        }
        averaged = [count for count in own.values() if count]  # as `_multi_label` averages
        alike = {}
        against = {}
    overall = min(averaged, default=0)
    shared = alike | against
    return {metric: shared.get(metric, own.get(metric.rpartition("/")[0], overall)) for metric in metrics}


def _ends(metric: str, kind: SupervisionName, names: Sequence[str]) -> tuple[float, float] | None:
    """The least and the largest value that a metric can have."""
    own = metric.rpartition("/")[2]
    sums = _ENDS_OF_SUMS if kind == "classes" and len(names) > 2 else {}
    return (_ENDS | sums).get(own, (0, 1))


def _interval(
    metric: str, value: float | None, drawn: list[np.ndarray], ends: tuple[float, float] | None, patients: int
) -> tuple[float | None, float | None]:
    """See `report`.

    Args:
        drawn: the metric of all resamples, in blocks; NaN where it is undefined.
    """
    if value is None or not drawn:
        return None, None
    values = np.concatenate(drawn)
    defined = values[~np.isnan(values)]
    if len(defined) < DEFINED_SHARE * len(values):
        return None, None
    if np.ptp(defined) <= 1e-12 * np.abs(defined).max():  # sums in another order may round differently
        return None, None
    if ends is None:
        low, high = np.percentile(defined, (2.5, 97.5))
        return float(low), float(high)
    least, size = ends[0], ends[1] - ends[0]

    margin = 0.25 / patients if metric.rpartition("/")[2] in _COUNTING else 1 / patients**2

    def transformed(number: np.ndarray | float) -> np.ndarray:
        return logit(np.clip((np.asarray(number) - least) / size, margin, 1 - margin))

    half = student.ppf(0.975, patients - 1) * transformed(defined).std(ddof=1)
    low, high = least + size * expit(transformed(value) + np.array([-half, half]))
    return float(low), float(high)


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return "undefined"
    if metric.rpartition("/")[2] in _COUNTS:
        return f"{value:.0f}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"
