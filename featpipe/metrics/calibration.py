"""Calibrated probabilities: temperature scaling, correction for another class prior, and the calibration error.

A temperature divides the scores before the softmax (Guo et al., "On calibration of modern neural networks", ICML 2017).
Offsets are added to the scores where class frequencies differ from those in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.errors import ConfigError

Array = NDArray[np.float64]

TEMPERATURE_BOUNDS = (1e-2, 1e3)
_MIN_PROBABILITY = 1e-12  # before taking the logarithm
N_BINS = 15  # of the calibration error, of equal width


@dataclass(frozen=True)
class Calibration:
    """The transformation of a head's scores before the softmax or the sigmoids.

    Attributes
    ----------
    temperature : float
        Divides the scores; 1 leaves them unchanged.
    offsets : tuple of k floats
        Added to the scaled scores, one for each class; empty for the class frequencies of training.
    """

    temperature: float = 1.0
    offsets: tuple[float, ...] = ()

    def compute_probabilities(self, logits: Array, multilabel: bool = False) -> Array:
        """Probabilities of shape (m, k) from scores of the same shape."""
        from scipy.special import expit, softmax  # lazy: a prediction that is up to date needs no scipy

        scores = logits / self.temperature
        if self.offsets:
            scores = scores + np.asarray(self.offsets)
        return np.asarray(expit(scores) if multilabel else softmax(scores, axis=1))

    def to_dict(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "offsets": list(self.offsets)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], n_classes: int) -> Calibration:
        """Restore what `to_dict` returned.

        Raises
        ------
        ValueError
            If a value is out of range or the number of offsets is neither 0 nor ``n_classes``.
        """
        temperature, offsets = float(data["temperature"]), tuple(float(value) for value in data["offsets"])
        is_finite = np.isfinite([temperature, *offsets]).all()
        if not is_finite or temperature <= 0 or len(offsets) not in (0, n_classes):
            raise ValueError(
                f"the calibration has temperature {temperature} and {len(offsets)} offsets for {n_classes} classes"
            )
        return cls(temperature, offsets)


def compute_logits(head: Any, X: NDArray[Any]) -> Array:
    """The scores of a classifier before the softmax, shape (m, k); of a multi-label head, before the sigmoids.

    The decision function if the head has one; otherwise the logarithm, or the log odds, of its probabilities.

    Raises
    ------
    ConfigError
        If the head has neither.
    """
    if hasattr(head, "decision_function"):
        scores = np.asarray(head.decision_function(X), np.float64)
        return np.column_stack([np.zeros(len(scores)), scores]) if scores.ndim == 1 else scores
    if not hasattr(head, "predict_proba"):
        head_name = type(head[-1] if hasattr(head, "steps") else head).__name__
        raise ConfigError(f"{head_name} gives neither probabilities nor scores; use another head")
    probabilities = np.clip(np.asarray(head.predict_proba(X), np.float64), _MIN_PROBABILITY, 1.0)
    if getattr(head, "multilabel_", False):
        return np.log(probabilities) - np.log(np.clip(1 - probabilities, _MIN_PROBABILITY, 1.0))
    return np.log(probabilities)


def compute_sigmoid_loss(logits: Array, y: NDArray[Any]) -> float:
    """The mean log loss with one sigmoid for each label; ``logits`` and ``y`` (0 or 1) have shape (m, k)."""
    return float(np.mean(np.logaddexp(0, logits) - y * logits))


def cross_calibrate(
    logits: Sequence[NDArray[np.float64]], targets: Sequence[NDArray[Any]], *, multilabel: bool = False
) -> list[NDArray[np.float64]]:
    """Probabilities of each part of some held-out rows, with the temperature of the other parts.

    Parameters
    ----------
    logits : sequence of ndarray of shape (m, k)
    targets : sequence of ndarray of shape (m,) or (m, k)
    multilabel : bool
    """
    probabilities = []
    for i in range(len(logits)):
        other_logits, other_targets = (
            np.concatenate([part for j, part in enumerate(parts) if j != i]) for parts in (logits, targets)
        )
        calibration = Calibration(fit_temperature(other_logits, other_targets))
        probabilities.append(calibration.compute_probabilities(logits[i], multilabel))
    return probabilities


def fit_temperature(logits: Array, y: NDArray[Any]) -> float:
    """The temperature that minimises the log loss.

    Parameters
    ----------
    logits : ndarray of shape (m, k)
        Scores of rows that the head was not fitted to.
    y : ndarray of shape (m,) or (m, k)
        Class codes; or 0 and 1 for each label.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def log_loss(log_temperature: float) -> float:
        scores = logits * np.exp(-log_temperature)
        if y.ndim == 2:
            return compute_sigmoid_loss(scores, y)
        return -float(np.mean(log_softmax(scores, axis=1)[np.arange(len(y)), y]))

    result = minimize_scalar(log_loss, bounds=np.log(TEMPERATURE_BOUNDS), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(result.x))


def compute_prior_offsets(
    training_prior: Mapping[str, float], target_prior: Mapping[str, float], classes: Sequence[str]
) -> tuple[float, ...]:
    """Offsets that correct scores for another class prior than that of training: log(target) - log(training).

    Parameters
    ----------
    training_prior, target_prior : mapping from class to a share or a count
        Classes that ``target_prior`` omits divide the remaining share in the proportions of training, if the given
        shares sum to less than 1.
    classes : sequence of str

    Raises
    ------
    ConfigError
        If a class is unknown, a share is not positive, or the shares sum to more than 1.
    """
    unknown_classes = [name for name in target_prior if name not in classes]
    if unknown_classes:
        raise ConfigError(
            f"prior names {unknown_classes[0]!r}, which is not among the {len(classes)} classes; leave it out"
        )
    if any(not np.isfinite(share) or share <= 0 for share in target_prior.values()):
        raise ConfigError("prior gives a share that is not above 0; leave the class out, or give it a small share")
    training_shares = np.array([training_prior[name] for name in classes], np.float64)
    training_shares /= training_shares.sum()
    target_shares = np.array([target_prior.get(name, np.nan) for name in classes], np.float64)
    is_unspecified = np.isnan(target_shares)
    if is_unspecified.any():
        remaining_share = 1 - np.nansum(target_shares)
        if remaining_share <= 0:
            raise ConfigError(
                f"prior gives {1 - remaining_share:g} to {len(target_prior)} of {len(classes)} classes, which leaves "
                "nothing for the others; give smaller shares"
            )
        target_shares[is_unspecified] = (
            remaining_share * training_shares[is_unspecified] / training_shares[is_unspecified].sum()
        )
    return tuple((np.log(target_shares / target_shares.sum()) - np.log(training_shares)).tolist())


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
