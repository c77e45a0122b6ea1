"""How often 95% intervals of metrics cover the truth, in simulated cohorts whose truth is known.

    python benchmarks/interval_coverage.py

A cohort has patients with one to four slides each. The score of a slide is the sum of a part that its patient's slides
share, with `CORRELATION` of the variance, and a part of its own. The scores of the two classes lie as far apart as the
true area under the ROC curve requires. The intervals of each cohort are those of `engine/evaluation/intervals.py`.
Beside them are the percentiles of the same resamples, and intervals from slides that are drawn one by one, as if the
slides of a patient were independent. The table is printed, and written into docs/intervals.md.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import norm

from slidescale.engine.evaluation.intervals import estimate

from common.page import table, write_section

PAGE = Path(__file__).parent.parent / "docs" / "intervals.md"
HEAD = """# Intervals

Written by `python benchmarks/interval_coverage.py`; not by hand.
"""
CORRELATION = 0.6
MOST_SLIDES = 4
NAMES = ("negative", "positive")


@dataclass(frozen=True)
class Setting:
    """A kind of cohort: number of patients, share of positive ones, and the true area under the ROC curve."""

    patients: int
    positive: float
    auroc: float

    @property
    def separation(self) -> float:
        """Distance of the classes' mean scores, in standard deviations of a score."""
        return float(np.sqrt(2) * norm.ppf(self.auroc))

    def truth(self, metric: str) -> float:
        """Value of a metric in an infinite cohort; a slide is called positive above the middle of the two means."""
        return self.auroc if metric == "auroc" else float(norm.cdf(self.separation / 2))


SETTINGS = [
    Setting(20, 0.5, 0.8),
    Setting(20, 0.5, 0.96),
    Setting(40, 0.5, 0.8),
    Setting(40, 0.5, 0.96),
    Setting(40, 0.15, 0.8),
    Setting(100, 0.3, 0.5),
    Setting(100, 0.3, 0.8),
    Setting(300, 0.3, 0.8),
]
METRICS = ("auroc", "balanced_accuracy", "accuracy", "class/positive/recall")
METHODS = ("report", "percentiles", "slides one by one")


def draw_cohort(setting: Setting, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw targets `[n, 1]`, outputs `[n, 2]` and patients `[n]` of the slides of a cohort."""
    positive = np.arange(setting.patients) < round(setting.patients * setting.positive)
    patient = np.repeat(np.arange(setting.patients), draws.integers(1, MOST_SLIDES + 1, setting.patients))
    shared = draws.normal(size=setting.patients)[patient]
    score = np.sqrt(CORRELATION) * shared + np.sqrt(1 - CORRELATION) * draws.normal(size=len(patient))
    score += setting.separation * (positive[patient] - 0.5)
    output = norm.cdf(score)
    return positive[patient].astype(float)[:, None], np.c_[1 - output, output], patient


def covers(setting: Setting, cohorts: int, resamples: int, methods: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yield for each cohort, by method, the two ends of the interval of each of the `METRICS`; NaN where undefined."""
    for seed in range(cohorts):
        targets, outputs, patient = draw_cohort(setting, np.random.default_rng(seed))
        found = {}
        for method in methods:
            cases = range(len(patient)) if method == "slides one by one" else patient
            values = estimate(
                "classes",
                targets,
                outputs,
                list(map(str, cases)),
                NAMES,
                resamples=resamples,
                percentiles=method == "percentiles",
            ).values
            found[method] = np.array(
                [(values[metric].low, values[metric].high) for metric in METRICS], dtype=float
            )  # None is NaN
        yield found


def coverage(setting: Setting, cohorts: int, resamples: int, methods: Sequence[str]) -> dict[str, np.ndarray]:
    """Return by method, for each of the `METRICS`, the share of intervals that cover the truth, and the mean width."""
    rows = list(covers(setting, cohorts, resamples, methods))
    truth = np.array([setting.truth(metric) for metric in METRICS])
    result = {}
    for method in methods:
        low, high = np.moveaxis(np.stack([row[method] for row in rows]), -1, 0)  # [cohorts, metrics]
        defined = ~np.isnan(low)
        hits = (low <= truth) & (truth <= high)
        count = np.maximum(defined.sum(0), 1)
        result[method] = np.stack([hits.sum(0) / count, np.nansum(high - low, axis=0) / count], axis=1)
    return result


def main() -> None:
    """Simulate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, default=300, help="simulated per kind")
    parser.add_argument("--resamples", type=int, default=500, help="per cohort")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown page whose section is replaced")
    args = parser.parse_args()
    header = ["patients", "positive", "true AUROC", "metric", *METHODS, "width", "of percentiles"]
    rows = []
    for setting in SETTINGS:
        found = coverage(setting, args.cohorts, args.resamples, METHODS)
        for index, metric in enumerate(METRICS):
            shares = [f"{found[method][index, 0]:.3f}" for method in METHODS]
            widths = [f"{found[method][index, 1]:.3f}" for method in METHODS[:2]]
            kind = (str(setting.patients), f"{setting.positive:.0%}", f"{setting.auroc:g}")
            rows.append([*kind, metric.rpartition("/")[2], *shares, *widths])
    text = "\n\n".join(
        [
            "## How often 95% intervals cover the truth",
            f"`python benchmarks/interval_coverage.py --cohorts {args.cohorts} --resamples {args.resamples}`: "
            f"{args.cohorts} simulated cohorts per row, so that a share of 0.95 is known to about "
            f"± {np.sqrt(0.95 * 0.05 / args.cohorts):.3f} (one standard error). *report* is what slidescale writes: "
            "logit intervals from resamples of patients. *percentiles* are those of the same resamples. *slides one by "
            "one* are logit intervals from resamples of slides, as if those of a patient were independent. Undefined "
            "intervals are not counted.",
            table(header, rows),
        ]
    )
    print(text)
    write_section(args.page, HEAD, "coverage", text)


if __name__ == "__main__":
    main()
