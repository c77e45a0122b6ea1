"""Metrics of slide-level predictions."""

import numpy as np
from sklearn.metrics import roc_auc_score


def auroc(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Area under the ROC curve: of the second class when there are two, else the mean of one-against-rest.

    Args:
        labels: int `[n]`.
        probabilities: `[n, classes]`, rows summing to 1.

    Returns:
        None when a class has no slide, for which the area is not defined.
    """
    classes = probabilities.shape[1]
    if len(np.unique(labels)) < classes:
        return None
    if classes == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    return float(roc_auc_score(labels, probabilities, multi_class="ovr"))
