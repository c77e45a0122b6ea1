"""Metrics of slides under many weightings at once: what several kinds of supervision compute alike.

A metric is a function of the slides' weights, computed for many rows of weights at once: a row of ones is the cohort as
it is, and a bootstrap resample is the row of how often each slide was drawn. That keeps a thousand resamples within a
second or two, where calling scikit-learn for each of them takes minutes; the tests compare the two.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

# Bins of the expected calibration error, as in Guo et al. 2017.
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Metric:
    """One metric under r rows of weights, and what its interval depends on.

    Attributes:
        values: `[r]`, NaN where the metric is undefined.
        needs: groups of slides, bool `[n]` each, without which the metric is undefined or rests on chance.
        ends: the least and the largest possible value; None where one of them is infinite.
        step: what its values are steps of. "slide": shares of slides that are counted; "fine": sums, or slides that
            are compared in pairs; "whole": the metric is a number of slides or pairs of this very cohort, which has no
            interval.
    """

    values: np.ndarray
    needs: tuple[np.ndarray, ...]
    ends: tuple[float, float] | None = (0.0, 1.0)
    step: Literal["slide", "fine", "whole"] = "fine"


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The quotient, NaN where the divisor is 0."""
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below != 0)


def areas(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas `[r]` under the ROC curve, and under the steps of precision over recall (average precision).

    Average precision is undefined without negatives, where it would be 1 whatever the scores.

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
    roc = ratio((negatives * (hits - positives / 2)).sum(1), both)
    # Thresholds that nothing drawn has passed yet have no precision, and no positive to count it for.
    precision = np.nan_to_num(ratio(hits, hits + alarms))
    return roc, np.where(both > 0, ratio((positives * precision).sum(1), all_hits), np.nan)


def confidence_bin(confidence: np.ndarray) -> np.ndarray:
    """The calibration bin of each confidence, 0 to 14: bin b holds those in (b / 15, (b + 1) / 15]."""
    return np.digitize(confidence, np.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS, right=True)
