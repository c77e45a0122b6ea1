"""Metrics of slide-level predictions, of a cohort as it is; which there are is for the kind of supervision to say."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slidescale.engine.config import SupervisionName
from slidescale.engine.supervision.make import supervision_of


class Judged(NamedTuple):
    """Predictions beside what is true of them, as `intervals.estimate` takes them.

    Attributes:
        supervision: name of the kind of supervision.
        targets: `[n, T]`, as `ManifestRow.target` has them.
        outputs: `[n, O]`, as `Objective.predict` makes them.
        cases: the patient of each slide.
        names: as `Manifest.classes`.
    """

    supervision: SupervisionName
    targets: np.ndarray
    outputs: np.ndarray
    cases: Sequence[str]
    names: Sequence[str]


def measure(
    kind: SupervisionName, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str]
) -> dict[str, float | None]:
    """Metrics of a cohort, without intervals (see `Supervision.measure` of the kind).

    Args:
        kind: of supervision.
        targets: `[n, T]`, as `ManifestRow.target` has them.
        outputs: `[n, O]`, as `Objective.predict` makes them.
        names: as `Manifest.classes`.

    Returns:
        By metric, None where it is undefined.

    Raises:
        ValueError: the arrays' shapes do not fit the kind, each other or the names.
    """
    targets, outputs = checked(kind, targets, outputs, names)
    found = supervision_of(kind).measure(targets, outputs, names, np.ones((1, len(targets))))
    return {name: known(metric.values[0]) for name, metric in found.items()}


def checked(
    kind: SupervisionName, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Targets and outputs in doubles.

    Raises:
        ValueError: their shapes are not those that the kind asks for.
    """
    targets, outputs = np.asarray(targets, dtype=float), np.asarray(outputs, dtype=float)
    columns, width = supervision_of(kind).widths(names)
    slides = len(targets)
    if targets.shape != (slides, columns) or outputs.shape != (slides, width):
        raise ValueError(
            f"{kind} of {slides} slides and {len(names)} names needs targets {(slides, columns)} and outputs "
            f"{(slides, width)}, not {targets.shape} and {outputs.shape}"
        )
    return targets, outputs


def known(value: float) -> float | None:
    """A metric's value, None instead of NaN."""
    return None if np.isnan(value) else float(value)
