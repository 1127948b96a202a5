"""Measures of classifiers that recipes share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Shares = npt.NDArray[np.floating[Any]]


def confusion_matrix(truth: npt.NDArray[Any], said: npt.NDArray[Any], classes: int) -> npt.NDArray[np.int64]:
    """Counts of shape (classes, classes), by scikit-learn: row the true class, column what was said."""
    from sklearn import metrics

    found: npt.NDArray[np.int64] = metrics.confusion_matrix(truth, said, labels=np.arange(classes))
    return found


def equal_error_rate(false_positives: Shares, true_positives: Shares) -> float:
    """Where a ROC curve, between its points, has as many false alarms as misses. 0 is perfect, 0.5 chance.

    Args:
        false_positives: (P,) shares, as scikit-learn's ``roc_curve`` gives them: from 0 up to 1.
        true_positives: (P,) those that belong to them.
    """
    gap = false_positives - (1 - true_positives)  # rises from -1 to 1
    after = int(np.argmax(gap >= 0))
    weight = -gap[after - 1] / (gap[after] - gap[after - 1])
    return float(false_positives[after - 1] + weight * (false_positives[after] - false_positives[after - 1]))
