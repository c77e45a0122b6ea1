"""Targets and predictions of made-up cohorts."""

import numpy as np

from slidescale.engine.config import SupervisionName


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
