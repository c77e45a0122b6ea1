"""Metrics of slide-level predictions, of a cohort as it is and of many weightings of it.

A metric is a function of the slides' weights, computed for many rows of weights at once: a row of ones is the cohort as
it is, and a bootstrap resample is the row of how often each slide was drawn. That keeps a thousand resamples within a
second or two, where calling scikit-learn for each of them takes minutes; the tests compare the two.

Inside this file NaN stands for "undefined"; what `measure` returns has None.
"""

from collections.abc import Sequence

import numpy as np

from slidescale.engine.config import SupervisionName

# The metric of each supervision that the best epoch is chosen by; larger is better.
HEADLINES: dict[SupervisionName, str] = {
    "classes": "auroc",
    "multi_label": "auroc",
    "regression": "r2",
    "survival": "concordance",
}

# How people write the names of metrics.
SHOWN = {"auroc": "AUROC", "r2": "R²"}

# Bins of the expected calibration error, as in Guo et al. 2017.
CALIBRATION_BINS = 15


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
    targets, outputs = checked(kind, targets, outputs, names)
    rows = measure_weighted(kind, targets, outputs, names, np.ones((1, len(targets))))
    return {metric: _known(row[0]) for metric, row in rows.items()}


def measure_weighted(
    kind: SupervisionName, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """As `measure`, under r rows of weights `[r, n]`: each metric `[r]`, NaN where it is undefined.

    Args:
        targets, outputs: as `checked` returns them.
    """
    if kind == "classes":
        return _classes(targets[:, 0].astype(int), outputs, names, weights)
    if kind == "multi_label":
        return _multi_label(targets, outputs, names, weights)
    if kind == "regression":
        return _regression(targets[:, 0], outputs[:, 0], weights)
    return _survival(targets[:, 0], targets[:, 1] == 1, outputs[:, 0], weights)


def checked(
    kind: SupervisionName, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Targets and outputs in doubles.

    Raises:
        ValueError: their shapes are not those that the kind asks for (see `measure`).
    """
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


def confidence_bin(confidence: np.ndarray) -> np.ndarray:
    """The calibration bin of each confidence, 0 to 14: bin b holds those in (b / 15, (b + 1) / 15]."""
    return np.digitize(confidence, np.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS, right=True)


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
        _spread(truth, weights),
        _spread(predicted, weights),
    )
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


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The quotient, NaN where the divisor is 0."""
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below != 0)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
