"""Whether probabilities mean what they say: confidence beside how often it is right, bin by bin."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BINS", "bin_gaps", "calibration_error", "judged"]

Array = NDArray[np.float64]

BINS = 15


def judged(probabilities: Array, y: NDArray[Any]) -> tuple[Array, NDArray[np.bool_]]:
    """What is claimed, and whether it is so: two arrays of shape (m, 1), or (m, k) of several labels a row.

    Parameters
    ----------
    probabilities : ndarray of shape (m, k)
    y : ndarray of shape (m,) or (m, k)
        Class codes, judged by the most probable class; or 0 and 1 for each label, each of which is judged.
    """
    if y.ndim == 2:
        return probabilities, np.asarray(y, bool)
    return probabilities.max(axis=1)[:, None], (probabilities.argmax(axis=1) == y)[:, None]


def bin_gaps(confidence: Array, right: NDArray[np.bool_], bins: int = BINS) -> Array:
    """What each row adds to the gap between confidence and accuracy of each bin of equal width, shape (m, bins)."""
    gaps = np.zeros((len(confidence), bins))
    where = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = np.broadcast_to(np.arange(len(confidence))[:, None], where.shape)
    np.add.at(gaps, (rows, where), confidence - right)
    return gaps


def calibration_error(probabilities: Array, y: NDArray[Any], bins: int = BINS) -> float:
    """How far confidence is from accuracy: the mean gap over bins of equal width, weighted by their rows.

    Parameters
    ----------
    probabilities : ndarray of shape (m, k)
    y : ndarray of shape (m,) or (m, k)
        As `judged` takes them.
    bins : int
    """
    confidence, right = judged(probabilities, y)
    where = np.minimum((confidence * bins).astype(int), bins - 1).ravel()
    gaps = np.bincount(where, confidence.ravel(), bins) - np.bincount(where, right.ravel(), bins)
    return float(np.abs(gaps).sum() / confidence.size)
