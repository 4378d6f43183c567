"""Closed-form heads, and the scaler before them, from sums over rows."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from featpipe.heads.evidence import strength_by_evidence
from featpipe.heads.moments import Moments

__all__ = [
    "centroid_from",
    "lda_from",
    "ridge_classifier_from",
    "ridge_from",
    "scaled_by",
    "set_scaler",
    "shrunk",
    "shrunk_apart",
    "standardised",
]

Array = NDArray[np.float64]


def set_scaler(scaler: StandardScaler, found: Moments) -> None:
    """Fit a scaler from moments."""
    mean, variance = found.mean, found.variance
    rounding = found.rows * np.finfo(np.float64).eps
    constant = (
        variance <= rounding * variance + (rounding * mean) ** 2
    )  # as scikit-learn's, so that noise is not scaled up
    scale = np.where(constant, 1.0, np.sqrt(variance))
    scaler.n_features_in_, scaler.n_samples_seen_ = len(mean), found.rows
    scaler.mean_ = mean if scaler.with_mean or scaler.with_std else None
    scaler.var_ = variance if scaler.with_std else None
    scaler.scale_ = scale if scaler.with_std else None


def standardised(scaler: StandardScaler | str, found: Moments) -> Moments:
    """The moments of what the head sees; the scaler is fitted."""
    if isinstance(scaler, StandardScaler):
        set_scaler(scaler, found)
    return found.around(*scaled_by(scaler, len(found.shift)))


def scaled_by(scaler: StandardScaler | str, d: int) -> tuple[Array, Array]:
    """What a fitted scaler takes from rows, and divides them by."""
    center, scale = np.zeros(d), np.ones(d)
    if isinstance(scaler, StandardScaler):
        return scaler.mean_ if scaler.with_mean else center, scaler.scale_ if scaler.with_std else scale
    return center, scale


def ridge_from(head: Ridge, found: Moments, single: bool) -> None:
    """Fit to targets, of which there may be a single one."""
    coef, intercept = _solve_ridge(head, found)
    head.coef_, head.intercept_ = (coef[0], float(intercept[0])) if single else (coef, intercept)
    head.n_iter_, head.solver_ = None, "cholesky"


def ridge_classifier_from(head: RidgeClassifier, found: Moments, classes: NDArray[Any]) -> None:
    """Fit to class codes, which stand for columns of 0 and 1."""
    from sklearn.preprocessing import LabelBinarizer

    if isinstance(head.alpha, str) and head.class_weight is None:
        found = _levelled(found)
    y_sums, cross = 2 * found.y - found.weight, 2 * found.cross - found.x[:, None]  # of 1 and -1 instead of 1 and 0
    if len(classes) == 2:
        y_sums, cross = y_sums[1:], cross[:, 1:]
    signed = replace(found, y=y_sums, cross=cross)
    head.coef_, head.intercept_ = _solve_ridge(head, signed)
    head._label_binarizer = LabelBinarizer(pos_label=1, neg_label=-1).fit(classes)
    with suppress(AttributeError):  # a property in some versions
        head.classes_ = classes
    head.n_iter_, head.solver_ = None, "cholesky"


def _levelled(found: Moments) -> Moments:
    """With means of classes that all weigh alike, about the scatter within classes as it is.

    Least squares gives classes of few rows too little room: of a class that came with a single image, beside 98 of four
    others, nothing was found again. Weights of rows would need the scatter of each class; of means the sums do.
    """
    means = found.cross / found.y
    weights = np.full(len(found.y), found.weight / len(found.y))
    gram = found.gram - (means * found.y) @ means.T + (means * weights) @ means.T
    return replace(found, x=means @ weights, gram=gram, y=weights, cross=means * weights)


def _solve_ridge(head: Any, found: Moments) -> tuple[Array, Array]:
    """Coefficients (t, d) and intercepts (t,)."""
    from scipy.linalg import solve

    x, y = found.x / found.weight, found.y / found.weight
    gram, cross = found.gram, found.cross
    if head.fit_intercept:
        gram, cross = gram - found.weight * np.outer(x, x), cross - found.weight * np.outer(x, y)
    alpha = head.alpha
    if isinstance(alpha, str):  # "auto", of targets 1 and -1
        total = found.weight * float((1 - y**2).sum())
        alpha = head.alpha_ = strength_by_evidence(gram, cross, total, found.weight)
    alphas = np.broadcast_to(np.asarray(alpha, np.float64), cross.shape[1:])
    coef = np.empty(cross.shape[::-1])
    for alpha in np.unique(alphas):
        chosen = alphas == alpha
        coef[chosen] = solve(gram + alpha * np.eye(len(gram)), cross[:, chosen], assume_a="pos").T
    return coef, y - coef @ x if head.fit_intercept else np.zeros(len(y))


def lda_from(
    head: LinearDiscriminantAnalysis, found: Moments, classes: NDArray[Any], covariance: Array | None = None
) -> None:
    """Fit to class codes; from a covariance that was shrunk class by class, or from that of the moments."""
    from scipy.linalg import lstsq

    priors = found.y / found.weight if head.priors is None else np.asarray(head.priors, np.float64)
    means = (found.cross / found.y).T
    if covariance is None:
        covariance = shrunk((found.gram - (means.T * found.y) @ means) / found.weight, head.shrinkage)
    coef = lstsq(covariance, means.T)[0].T
    intercept = -0.5 * np.einsum("kd,kd->k", means, coef) + np.log(priors)
    head.classes_, head.priors_, head.means_, head.covariance_ = classes, priors, means, covariance
    head._max_components = head._n_features_out = min(len(classes) - 1, len(found.shift))
    if len(classes) == 2:
        coef, intercept = np.diff(coef, axis=0), np.diff(intercept)
    head.coef_, head.intercept_ = coef, intercept


def shrunk(covariance: Array, shrinkage: float | None) -> Array:
    """With its eigenvalues drawn to their mean."""
    if not shrinkage:
        return covariance
    mixed = (1 - shrinkage) * covariance
    mixed.flat[:: len(mixed) + 1] += shrinkage * np.trace(covariance) / len(mixed)
    return mixed


def shrunk_apart(x: Array) -> tuple[Array, Array]:
    """The covariance of the rows of one class, shrunk as Ledoit and Wolf do on standardised columns.

    Parameters
    ----------
    x : ndarray of shape (n, d), float64

    Returns
    -------
    covariance : ndarray of shape (d, d)
        In the units of x, whatever they are.
    flat : ndarray of shape (d,)
        What the shrinkage gives to the variances of columns that are constant here, which have no unit: scikit-learn
        counts it in the units of the whole data, standardised.
    """
    x = x - x.mean(axis=0)
    spread = x.std(axis=0)
    constant = spread <= 1e-12 * np.abs(x).max(initial=0.0)
    spread[constant], x[:, constant] = 1.0, 0.0
    x /= spread
    amount = ledoit_wolf_shrinkage(x, assume_centered=True) if len(x) > 1 else 0.0
    covariance = shrunk(x.T @ x / len(x), amount)
    flat = np.where(constant, covariance.diagonal(), 0.0)
    covariance[constant, constant] = 0.0
    return covariance * np.outer(spread, spread), flat


def centroid_from(head: NearestCentroid, found: Moments, classes: NDArray[Any]) -> None:
    """Fit to class codes, from moments of which the diagonal is enough."""
    counts, n, k = found.y, found.rows, len(classes)
    diagonal = found.gram if found.gram.ndim == 1 else found.gram.diagonal()
    centroids = (found.cross / counts).T
    within = np.sqrt(np.maximum(diagonal - (centroids.T**2 * counts).sum(axis=1), 0) / (n - k))
    middle = found.x / n
    spread = np.sqrt(1 / counts - 1 / n)[:, None] * (within + np.median(within))
    deviations = (centroids - middle) / spread
    if head.shrink_threshold:
        deviations = np.sign(deviations) * np.clip(np.abs(deviations) - head.shrink_threshold, 0, None)
        centroids = middle + spread * deviations
    uniform = np.full(k, 1 / k)
    head.class_prior_ = (
        counts / n if head.priors == "empirical" else uniform if head.priors == "uniform" else np.asarray(head.priors)
    )
    head.classes_, head.centroids_, head.deviations_ = classes, centroids, deviations
    head.within_class_std_dev_ = within
