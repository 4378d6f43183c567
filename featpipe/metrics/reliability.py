"""Reliability of probabilities: confidence against accuracy in bins."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

N_BINS = 15


def compute_confidence(probabilities: Array, y: NDArray[Any]) -> tuple[Array, NDArray[np.bool_]]:
    """Confidence and correctness: two arrays of shape (m, 1), or (m, k) for multi-label rows.

    Parameters
    ----------
    probabilities : ndarray of shape (m, k)
    y : ndarray of shape (m,) or (m, k)
        Class codes, compared with the most probable class; or 0 and 1 for each label, which are compared one by one.
    """
    if y.ndim == 2:
        return probabilities, np.asarray(y, bool)
    return probabilities.max(axis=1)[:, None], (probabilities.argmax(axis=1) == y)[:, None]


def compute_bin_gaps(confidence: Array, correct: NDArray[np.bool_], n_bins: int = N_BINS) -> Array:
    """The contribution of each row to the gap between confidence and accuracy of each bin, shape (m, n_bins).

    All bins have the same width.
    """
    gaps = np.zeros((len(confidence), n_bins))
    bin_indices = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    row_indices = np.broadcast_to(np.arange(len(confidence))[:, None], bin_indices.shape)
    np.add.at(gaps, (row_indices, bin_indices), confidence - correct)
    return gaps


def calibration_error(probabilities: Array, y: NDArray[Any], n_bins: int = N_BINS) -> float:
    """Expected calibration error: the mean gap over bins of equal width, weighted by their rows.

    Parameters
    ----------
    probabilities : ndarray of shape (m, k)
    y : ndarray of shape (m,) or (m, k)
        As in `compute_confidence`.
    n_bins : int
    """
    confidence, correct = compute_confidence(probabilities, y)
    bin_indices = np.minimum((confidence * n_bins).astype(int), n_bins - 1).ravel()
    gaps = np.bincount(bin_indices, confidence.ravel(), n_bins) - np.bincount(bin_indices, correct.ravel(), n_bins)
    return float(np.abs(gaps).sum() / confidence.size)
