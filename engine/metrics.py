"""Metrics of slide-level predictions, with intervals that take a patient's slides together.

A metric is a function of the slides' weights, computed for many rows of weights at once: a row of ones is the cohort as
it is, and a bootstrap resample is the row of how often each slide was drawn. That keeps a thousand resamples within a
second or two, where calling scikit-learn for each of them takes minutes; the tests compare the two.

Inside this file NaN stands for "undefined"; what leaves it is None.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slidescale.engine.objective import SupervisionName

# The metric of each supervision that the best epoch is chosen by; larger is better.
HEADLINES: dict[SupervisionName, str] = {
    "classes": "auroc", "multi_label": "auroc", "regression": "r2", "survival": "concordance",
}  # fmt: skip

# Bins of the expected calibration error, as in Guo et al. 2017.
CALIBRATION_BINS = 15

# Of the resamples, the share that must define a metric for it to have an interval. With two patients of a class, 13% of
# resamples draw neither: an interval that leaves those out would tell of the luckier cohorts only.
DEFINED_SHARE = 0.9

# Of fewer patients of a class, resamples repeat what few there are: four slides that are ordered right would have the
# interval 1 to 1.
LEAST_PATIENTS = 5

# Metrics that count something: of the cohort at hand, so they have no interval.
_COUNTS = ("support", "slides", "pairs")

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


def measure(
    kind: SupervisionName, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str]
) -> dict[str, float | None]:
    """Metrics of a cohort, without intervals.

    - `classes`: auroc, auprc (average precision) of the second class when there are two, else their means over
      classes, each against the rest; balanced_accuracy, accuracy (of the likeliest class); ece (Guo et al. 2017: of the
      likeliest class's probability, which with two classes is never below 0.5); brier (Brier 1950: squared errors
      summed over classes; halved with two, which makes it the second class's squared error); a class's recall (its
      sensitivity), precision, f1, support (its slides), and with more than two classes auroc.
    - `multi_label`, over the slides that have the label's target: auroc, auprc, and at probability 0.5 recall,
      specificity, precision, f1; support (positive slides), slides (with a target). Means of auroc, auprc,
      balanced_accuracy, f1 and brier over the labels that have slides of both kinds.
    - `regression`: r2, mae, rmse, pearson.
    - `survival`: concordance (Harrell et al. 1982) and pairs, the comparable ones: the earlier time is an event; at the
      same time, an event precedes a censoring, and two events do not compare. Equal risks count half.

    A metric that needs a class that has no slide is undefined, and so is an average that needs one of those; average
    precision too is undefined without negatives, where it is 1 whatever the outputs.

    Args:
        kind: what the outputs are.
        targets: `[n, 1]` class index; `[n, labels]` 0, 1 or NaN (missing); `[n, 1]` value; or `[n, 2]` time, and
            event: 1 observed, 0 censored.
        outputs: `[n, classes]` or `[n, labels]` probabilities; `[n, 1]` value; or `[n, 1]` risk, larger means earlier.
        names: of the classes or labels.

    Returns:
        By metric, None where it is undefined.

    Raises:
        ValueError: the arrays' shapes do not fit the kind, each other or the names.
    """
    targets, outputs = _checked(kind, targets, outputs, names)
    rows = _measures(kind, targets, outputs, names, np.ones((1, len(targets))))
    return {metric: _known(row[0]) for metric, row in rows.items()}


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
    """Metrics of a cohort as in `measure`, with 95% intervals: percentiles of a bootstrap over patients.

    A resample draws as many patients as there are, with replacement, and with each all of the patient's slides (the
    cluster bootstrap, Davison & Hinkley 1997, section 3.8): slides of one patient resemble each other, and drawing them
    one by one would promise more than the cohort can tell.

    Args:
        cases: the patient of each slide.
        resamples: of the patients.
        seed: of the draws.

    Returns:
        A metric has no interval when a class that it needs has fewer than five patients (a label: with it, or without
        it; survival: patients with an event; what is of all slides alike: patients at all), when fewer than 90% of the
        resamples define it, or when it is the same in all of them, as that of a perfect order is. The interval of ece
        lies high, since slides that are drawn twice make its bins noisier: it bounds from above.

    Raises:
        ValueError: as in `measure`; or cases are not as many as slides.
    """
    values = measure(kind, targets, outputs, names)
    targets, outputs = _checked(kind, targets, outputs, names)
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
            for metric, row in _measures(kind, targets, outputs, names, weights).items():
                drawn[metric].append(row)
    fewest = _fewest_patients(kind, targets, names, patient, values)
    estimates = {
        metric: Estimate(value, *_interval(metric, value, drawn[metric] if fewest[metric] >= LEAST_PATIENTS else []))
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


def confidence_bin(confidence: np.ndarray) -> np.ndarray:
    """The calibration bin of each confidence, 0 to 14: bin b holds those in (b / 15, (b + 1) / 15]."""
    return np.digitize(confidence, np.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS, right=True)


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


def _checked(
    kind: SupervisionName, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """In doubles, of the shapes that the kind asks for."""
    targets, outputs = np.asarray(targets, dtype=float), np.asarray(outputs, dtype=float)
    width = len(names) if kind in ("classes", "multi_label") else 1
    columns = {"classes": 1, "multi_label": width, "regression": 1, "survival": 2}[kind]
    slides = len(targets)
    if targets.shape != (slides, columns) or outputs.shape != (slides, width):
        raise ValueError(
            f"{kind} of {slides} slides and {len(names)} names needs targets {(slides, columns)} and outputs "
            f"{(slides, width)}, not {targets.shape} and {outputs.shape}"
        )
    return targets, outputs


def _measures(
    kind: SupervisionName, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Each metric `[r]` under r rows of weights `[r, n]`."""
    if kind == "classes":
        return _classes(targets[:, 0].astype(int), outputs, names, weights)
    if kind == "multi_label":
        return _multi_label(targets, outputs, names, weights)
    if kind == "regression":
        return _regression(targets[:, 0], outputs[:, 0], weights)
    return _survival(targets[:, 0], targets[:, 1] == 1, outputs[:, 0], weights)


def _classes(
    labels: np.ndarray, outputs: np.ndarray, names: Sequence[str], weights: np.ndarray
) -> dict[str, np.ndarray]:
    total = weights.sum(1)
    one_hot = np.eye(len(names))
    truth, guess = one_hot[labels], one_hot[outputs.argmax(1)]  # [n, classes]
    hits, support, guesses = weights @ (truth * guess), weights @ truth, weights @ guess  # [r, classes]
    recall, precision, f1 = _ratio(hits, support), _ratio(hits, guesses), _ratio(2 * hits, support + guesses)
    areas = [_areas(truth[:, c] == 1, outputs[:, c], weights) for c in range(len(names))]
    rocs, precisions = (np.stack(each, 1) for each in zip(*areas, strict=True))  # [r, classes]
    confidence, correct = outputs.max(1), (truth * guess).sum(1)
    # Of a bin, slides × (accuracy − mean confidence) is the sum of (correct − confidence).
    gaps = weights @ (np.eye(CALIBRATION_BINS)[confidence_bin(confidence)] * (correct - confidence)[:, None])
    two = len(names) == 2
    values = {
        "auroc": rocs[:, 1] if two else rocs.mean(1),
        "auprc": precisions[:, 1] if two else precisions.mean(1),
        "balanced_accuracy": recall.mean(1),
        "accuracy": _ratio(weights @ correct, total),
        "ece": _ratio(np.abs(gaps).sum(1), total),
        "brier": _ratio(weights @ ((outputs - truth) ** 2).sum(1), total) / (2 if two else 1),
    }
    for c, name in enumerate(names):
        if not two:
            values[f"class/{name}/auroc"] = rocs[:, c]
        values[f"class/{name}/recall"] = recall[:, c]
        values[f"class/{name}/precision"] = precision[:, c]
        values[f"class/{name}/f1"] = f1[:, c]
        values[f"class/{name}/support"] = support[:, c]
    return values


def _multi_label(
    targets: np.ndarray, outputs: np.ndarray, names: Sequence[str], weights: np.ndarray
) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    averaged = []
    for label, name in enumerate(names):
        present = ~np.isnan(targets[:, label])
        truth, probability, mine = targets[present, label] == 1, outputs[present, label], weights[:, present]
        guess = probability > 0.5
        total, support, guesses = mine.sum(1), mine @ truth, mine @ guess
        hits, rejections = mine @ (truth & guess), mine @ ~(truth | guess)
        roc, precisions = _areas(truth, probability, mine)
        recall, specificity = _ratio(hits, support), _ratio(rejections, total - support)
        f1 = _ratio(2 * hits, support + guesses)
        values |= {
            f"{name}/auroc": roc,
            f"{name}/auprc": precisions,
            f"{name}/recall": recall,
            f"{name}/specificity": specificity,
            f"{name}/precision": _ratio(hits, guesses),
            f"{name}/f1": f1,
            f"{name}/support": support,
            f"{name}/slides": total,
        }
        brier = _ratio(mine @ (probability - truth) ** 2, total)
        # The same labels in every resample, so that all average the same thing.
        if truth.any() and not truth.all():
            averaged.append((roc, precisions, (recall + specificity) / 2, f1, brier))
    undefined = np.full(len(weights), np.nan)
    means = np.mean(averaged, axis=0) if averaged else [undefined] * 5
    return dict(zip(("auroc", "auprc", "balanced_accuracy", "f1", "brier"), means, strict=True)) | values


def _regression(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    total, error = weights.sum(1), predicted - truth
    (spread_true, from_mean_true), (spread_predicted, from_mean_predicted) = (
        _spread(truth, weights), _spread(predicted, weights),
    )  # fmt: skip
    squares = weights @ error**2
    covariance = (weights * from_mean_true * from_mean_predicted).sum(1)
    return {
        "r2": 1 - _ratio(squares, spread_true),
        "mae": _ratio(weights @ np.abs(error), total),
        "rmse": np.sqrt(_ratio(squares, total)),
        "pearson": _ratio(covariance, np.sqrt(spread_true) * np.sqrt(spread_predicted)),
    }


def _spread(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squares about the mean, summed `[r]`, 0 where all drawn values are equal; differences from it `[r, n]`."""
    mean = _ratio(weights @ values, weights.sum(1))
    differences = values - mean[:, None]
    drawn = weights > 0
    low = np.where(drawn, values, np.inf).min(1, initial=np.inf)
    high = np.where(drawn, values, -np.inf).max(1, initial=-np.inf)
    return np.where(low < high, (weights * differences**2).sum(1), 0.0), differences


def _survival(times: np.ndarray, events: np.ndarray, risks: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    time, risk = times[events, None], risks[events, None]
    # Row: the slide whose event comes first; column: the one known to outlive it. Halves are exact in float32, and so
    # are their sums up to 2**23 drawn slides.
    comparable = ((time < times) | ((time == times) & ~events)).astype(np.float32)
    credit = comparable * (np.float32(0.5) * (risk > risks) + np.float32(0.5) * (risk >= risks))
    first, drawn = weights[:, events], weights.astype(np.float32)
    pairs = (first * (drawn @ comparable.T)).sum(1)
    return {"concordance": _ratio((first * (drawn @ credit.T)).sum(1), pairs), "pairs": pairs}


def _areas(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas `[r]` under the ROC curve, and under the steps of precision over recall (average precision).

    Args:
        positive: bool `[n]`.
        scores: `[n]`, larger for positive slides.
        weights: `[r, n]`.
    """
    order = np.argsort(-scores, kind="stable")
    # Slides of equal score pass a threshold together.
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
    ordered = weights[:, order]
    positives = np.add.reduceat(ordered * positive[order], starts, axis=1)  # [r, thresholds]
    negatives = np.add.reduceat(ordered * ~positive[order], starts, axis=1)
    hits, alarms = positives.cumsum(1), negatives.cumsum(1)
    all_hits, all_alarms = weights @ positive, weights @ ~positive
    both = all_hits * all_alarms
    # A positive beats every negative of a lower score, and half of those of its own.
    roc = _ratio((negatives * (hits - positives / 2)).sum(1), both)
    # Thresholds that nothing drawn has passed yet have no precision, and no positive to count it for.
    precision = np.nan_to_num(_ratio(hits, hits + alarms))
    return roc, np.where(both > 0, _ratio((positives * precision).sum(1), all_hits), np.nan)


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
    else:
        own = {
            name: min(patients(column == answer) for answer in (0, 1))
            for name, column in zip(names, targets.T, strict=True)
        }
        averaged = [count for count in own.values() if count]  # as `_multi_label` averages
        alike = {}
    overall = min(averaged, default=0)
    return {metric: own.get(metric.rpartition("/")[0], alike.get(metric, overall)) for metric in metrics}


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The quotient, NaN where the divisor is 0."""
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below != 0)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _interval(metric: str, value: float | None, drawn: list[np.ndarray]) -> tuple[float | None, float | None]:
    if value is None or not drawn or metric.rpartition("/")[2] in _COUNTS:
        return None, None
    values = np.concatenate(drawn)
    defined = values[~np.isnan(values)]
    if len(defined) < DEFINED_SHARE * len(values):
        return None, None
    if np.ptp(defined) <= 1e-12 * np.abs(defined).max():  # sums in another order may round differently
        return None, None
    low, high = np.percentile(defined, (2.5, 97.5))
    return float(low), float(high)


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return "undefined"
    if metric.rpartition("/")[2] in _COUNTS:
        return f"{value:.0f}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"
