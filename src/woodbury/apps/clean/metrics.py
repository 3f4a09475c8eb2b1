"""How well a ranking of suspects agrees with the truth, where the truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

__all__ = ["calibration", "score"]

BINS = 15
THRESHOLD = 0.5


def calibration(
    probability: np.ndarray, wrong: np.ndarray, bins: int = BINS
) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error, ``sum_b (n_b / n) |mean wrong - mean probability|``.

    Args:
        probability: stated probability that a label is wrong, ``[n]``.
        wrong: whether it is, bool ``[n]``.
        bins: number of equal intervals of [0, 1].

    Returns:
        The error, and for each bin that is not empty ``rows``, ``stated`` and ``true`` means.

    Source:
        Guo et al. 2017, On calibration of modern neural networks, equation 5.

    Example:
        >>> import numpy as np
        >>> calibration(np.array([0.0, 1.0]), np.array([False, True]))[0]
        0.0
    """
    which = np.minimum((probability * bins).astype(int), bins - 1)
    table = []
    error = 0.0
    for b in range(bins):
        inside = which == b
        if not inside.any():
            continue
        stated, true = float(probability[inside].mean()), float(wrong[inside].mean())
        table.append({"rows": float(inside.sum()), "stated": stated, "true": true})
        error += float(inside.mean()) * abs(stated - true)
    return error, table


def score(
    probability: np.ndarray, suggested: np.ndarray, truth: np.ndarray, given: np.ndarray
) -> dict[str, Any]:
    """Compare suspects with the truth.

    Args:
        probability: stated probability that a label is wrong, ``[n]``.
        suggested: suggested labels ``[n]``.
        truth: true labels ``[n]``.
        given: the labels in the table ``[n]``, some of them wrong.

    Returns:
        ``average_precision`` and ``auc`` of the ranking; ``precision`` and ``recall`` of calling
        wrong what has a probability above 0.5; ``corrected`` (share of the wrong labels for which
        the suggestion is the truth); ``expected_calibration_error``, ``calibration`` by bin.
    """
    wrong = given != truth
    called = probability > THRESHOLD
    hits = int((called & wrong).sum())
    error, table = calibration(probability, wrong)
    return {
        "average_precision": float(average_precision_score(wrong, probability)),
        "auc": float(roc_auc_score(wrong, probability)),
        "precision": hits / max(1, int(called.sum())),
        "recall": hits / max(1, int(wrong.sum())),
        "corrected": float((suggested == truth)[wrong].mean()),
        "expected_calibration_error": error,
        "wrong_labels": int(wrong.sum()),
        "calibration": table,
    }
