"""Metrics with intervals that take a patient's slides together, and metrics of patients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, logit
from scipy.stats import t as student

from slidescale.engine.config import SupervisionName
from slidescale.engine.evaluation.metrics import checked, known
from slidescale.engine.supervision.make import supervision_of
from slidescale.engine.supervision.rates import Metric

# The share of resamples that must define a metric for it to have an interval. With two patients of a class, 13% of
# resamples draw neither: an interval that leaves those out would be of the luckier cohorts only.
DEFINED_SHARE = 0.9

# With fewer patients of a class, resamples repeat what few there are: four slides that are ordered right would have
# the interval 1 to 1.
LEAST_PATIENTS = 5

# Elements of a matrix of weights that is made at once.
_BLOCK = 2**22


@dataclass(frozen=True)
class Estimate:
    """A metric's value (None: undefined), and its 95% interval (None: the cohort is too small for one; see `estimate`).

    Attributes:
        whole: whether it is a number of slides or pairs, written without decimals.
    """

    value: float | None
    low: float | None
    high: float | None
    whole: bool = False

    def __str__(self) -> str:
        return self.written(self.value)

    def written(self, value: float | None) -> str:
        """The value, or an end of the interval, in digits."""
        if value is None:
            return "undefined"
        if self.whole:
            return f"{value:.0f}"
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Estimates:
    """All metrics of a cohort, with intervals.

    Attributes:
        values: by metric; those of a class are `class/<name>/<metric>`, those of a label `<name>/<metric>`.
        headline: name and value of the metric that the best epoch is chosen by.
        count: rows that are measured: slides, or patients.
        positive_class: the second of two classes, which auroc and auprc are of; else None.
        patients: the same metrics of one row per patient (see `by_patient`), or why there are none; None where every
            patient has one slide.
    """

    values: dict[str, Estimate]
    headline: tuple[str, float | None]
    count: int
    positive_class: str | None
    patients: "Estimates | str | None"

    def as_json(self) -> dict[str, Any]:
        """What `json.dump` can write: numbers, strings and None."""
        name, value = self.headline
        written: dict[str, Any] = {} if self.positive_class is None else {"positive_class": self.positive_class}
        written |= {
            "headline": {"metric": name, "value": value},
            "values": {
                metric: {"value": found.value, "low": found.low, "high": found.high}
                for metric, found in self.values.items()
            },
        }
        if isinstance(self.patients, Estimates):
            written["patients"] = {"count": self.patients.count, **self.patients.as_json()}
        elif self.patients is not None:
            written["patients"] = {"note": self.patients}
        return written

    def __str__(self) -> str:
        """The headline metric with its interval."""
        name, _ = self.headline
        found = self.values[name]
        between = "" if found.low is None else f" ({found.written(found.low)} to {found.written(found.high)})"
        return f"{name} {found}{between}"


def estimate(
    kind: SupervisionName,
    targets: np.ndarray,
    outputs: np.ndarray,
    cases: Sequence[str],
    names: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
    percentiles: bool = False,
) -> Estimates:
    """Metrics of a cohort as in `measure`, with 95% intervals from a bootstrap over patients.

    A resample draws as many patients as there are, with replacement, and with each all of the patient's slides (the
    cluster bootstrap, Davison & Hinkley 1997, section 3.8): slides of one patient resemble each other, and drawing them
    one by one would promise more than the cohort can show.

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
        percentiles: whether the intervals of all metrics are percentiles of the resamples, to compare with.

    Returns:
        A metric has no interval when a class that it needs has fewer than five patients (a label: with it, or without
        it; survival: patients with an event; what is of all slides alike: patients at all), when fewer than 90% of the
        resamples define it, or when it is the same in all of them, as that of a perfect order is.

    Raises:
        ValueError: as in `measure`; or cases are not as many as slides.
    """
    supervision = supervision_of(kind)
    targets, outputs = checked(kind, targets, outputs, names)
    if len(cases) != len(targets):
        raise ValueError(f"{len(cases)} cases must be as many as slides, which are {len(targets)}")
    patients, patient = np.unique(np.asarray(cases, dtype=str), return_inverse=True)
    found = supervision.measure(targets, outputs, names, np.ones((1, len(targets))))
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in found}
    if len(patients) >= LEAST_PATIENTS:
        draws = np.random.default_rng(seed)
        block = max(1, _BLOCK // len(targets))
        for start in range(0, resamples, block):
            rows = min(block, resamples - start)
            times = draws.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=rows)
            weights = times[:, patient].astype(float)
            for name, resampled in supervision.measure(targets, outputs, names, weights).items():
                drawn[name].append(resampled.values)
    estimates = {}
    for name, metric in found.items():
        value, whole = known(metric.values[0]), metric.step == "whole"
        fewest = min((len(np.unique(patient[group])) for group in metric.needs), default=0)
        has_interval = value is not None and not whole and fewest >= LEAST_PATIENTS
        low, high = (
            _interval(metric, drawn[name], len(patients), percentiles=percentiles) if has_interval else (None, None)
        )
        estimates[name] = Estimate(value, low, high, whole)
    together: Estimates | str | None = None
    if len(patients) < len(targets):
        try:
            of_patients = by_patient(targets, outputs, cases)
        except ValueError as error:
            together = f"no metrics per patient: {error}"
        else:
            together = estimate(kind, *of_patients, names, resamples=resamples, seed=seed, percentiles=percentiles)
    headline = supervision.headline
    return Estimates(
        estimates,
        (headline, estimates[headline].value),
        len(targets),
        supervision.positive_class(names),
        together,
    )


def by_patient(
    targets: np.ndarray, outputs: np.ndarray, cases: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Targets, outputs and cases with one row per patient: the target of all slides, and the mean of their outputs.

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


def describe(found: Estimates) -> str:
    """Tables for a terminal: one line per metric, and two per class or label: values, and their intervals below."""
    overall = {name: metric for name, metric in found.values.items() if "/" not in name}
    width = max(len("metric"), *map(len, overall))
    lines = [f"{'metric':<{width}}  {'value':>9}  95% interval"]
    for name, metric in overall.items():
        between = "" if metric.low is None else f"{metric.written(metric.low)} to {metric.written(metric.high)}"
        lines.append(f"{name:<{width}}  {metric!s:>9}  {between}".rstrip())
    groups: dict[str, dict[str, Estimate]] = {}
    for name, metric in found.values.items():
        if name not in overall:
            group, _, part = name.rpartition("/")
            groups.setdefault(group.removeprefix("class/"), {})[part] = metric
    if isinstance(found.patients, Estimates):
        lines += ["", f"{found.patients.count} patients, by the mean of their slides: {found.patients}"]
    elif found.patients is not None:
        lines += ["", found.patients]
    if not groups:
        return "\n".join(lines)
    columns = list(next(iter(groups.values())))
    width = max(map(len, groups))
    lines += ["", " ".join([" " * width, *(f"{column:>12}" for column in columns)])]
    for group, parts in groups.items():
        lines.append(" ".join([f"{group:<{width}}", *(f"{parts[column]!s:>12}" for column in columns)]))
        spans = [
            "" if part.low is None else f"{part.low:.2f}–{part.high:.2f}"
            for part in (parts[column] for column in columns)
        ]
        if any(spans):
            lines.append(" ".join([" " * width, *(f"{span:>12}" for span in spans)]).rstrip())
    return "\n".join(lines)


def _interval(
    metric: Metric, drawn: list[np.ndarray], patients: int, *, percentiles: bool
) -> tuple[float | None, float | None]:
    """The interval of a defined metric; see `estimate`.

    Args:
        drawn: the metric of all resamples, in blocks; NaN where it is undefined.
    """
    values = np.concatenate(drawn)
    defined = values[~np.isnan(values)]
    if len(defined) < DEFINED_SHARE * len(values):
        return None, None
    if np.ptp(defined) <= 1e-12 * np.abs(defined).max():  # sums in another order may round differently
        return None, None
    if metric.ends is None or percentiles:
        low, high = np.percentile(defined, (2.5, 97.5))
        return float(low), float(high)
    least, size = metric.ends[0], metric.ends[1] - metric.ends[0]
    margin = 0.25 / patients if metric.step == "slide" else 1 / patients**2

    def transformed(number: np.ndarray | float) -> np.ndarray:
        return logit(np.clip((np.asarray(number) - least) / size, margin, 1 - margin))

    half = student.ppf(0.975, patients - 1) * transformed(defined).std(ddof=1)
    low, high = least + size * expit(transformed(float(metric.values[0])) + np.array([-half, half]))
    return float(low), float(high)
