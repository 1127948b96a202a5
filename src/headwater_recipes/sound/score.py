"""Measures of a classifier of sounds, by scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from headwater_recipes.common.scores import equal_error_rate as error_rate_of

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]


def scores(told: Ints, labels: Ints, log_probabilities: Floats | None = None) -> dict[str, float]:
    """``accuracy``, ``macro_f1`` (labels count alike, however many sounds they have) and, of (N, C)
    ``log_probabilities``, ``eer``.

    Args:
        told: (N,) which label is told.
        labels: (N,) the right ones.
    """
    from sklearn.metrics import accuracy_score, f1_score

    found = {
        "accuracy": float(accuracy_score(labels, told)),
        "macro_f1": float(f1_score(labels, told, labels=np.unique(labels), average="macro", zero_division=0)),
    }
    if log_probabilities is not None:
        found["eer"] = equal_error_rate(log_probabilities, labels)
    return found


def equal_error_rate(log_probabilities: Floats, labels: Ints) -> float:
    """Every sound is tried for every label: the share of false alarms where it equals that of misses, with one
    threshold on the log odds for all (as in NIST's language recognition evaluations). 0 is perfect, 0.5 chance.
    """
    from sklearn.metrics import roc_curve

    p = np.asarray(log_probabilities, dtype=np.float64)
    odds = p - np.log(np.maximum(-np.expm1(np.minimum(p, -1e-12)), 1e-300))
    target = np.arange(p.shape[1])[None] == np.asarray(labels)[:, None]
    false_alarms, hits, _ = roc_curve(target.ravel(), odds.ravel(), drop_intermediate=False)
    return error_rate_of(false_alarms, hits)
