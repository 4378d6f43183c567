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

from featpipe.heads.evidence import select_alpha_by_evidence
from featpipe.heads.moments import Moments

__all__ = [
    "compute_ledoit_wolf_covariance",
    "fit_centroid_from_moments",
    "fit_lda_from_moments",
    "fit_ridge_classifier_from_moments",
    "fit_ridge_from_moments",
    "fit_scaler",
    "get_center_and_scale",
    "shrink_covariance",
    "standardize_moments",
]

Array = NDArray[np.float64]


def fit_scaler(scaler: StandardScaler, moments: Moments) -> None:
    """Fit a scaler from moments."""
    mean, variance = moments.mean, moments.variance
    rounding_error = moments.rows * np.finfo(np.float64).eps
    is_constant = (
        variance <= rounding_error * variance + (rounding_error * mean) ** 2
    )  # as scikit-learn's, so that noise is not scaled up
    scale = np.where(is_constant, 1.0, np.sqrt(variance))
    scaler.n_features_in_, scaler.n_samples_seen_ = len(mean), moments.rows
    scaler.mean_ = mean if scaler.with_mean or scaler.with_std else None
    scaler.var_ = variance if scaler.with_std else None
    scaler.scale_ = scale if scaler.with_std else None


def standardize_moments(scaler: StandardScaler | str, moments: Moments) -> Moments:
    """The moments of what the head sees; the scaler is fitted."""
    if isinstance(scaler, StandardScaler):
        fit_scaler(scaler, moments)
    return moments.standardize(*get_center_and_scale(scaler, len(moments.shift)))


def get_center_and_scale(scaler: StandardScaler | str, n_features: int) -> tuple[Array, Array]:
    """What a fitted scaler takes from rows, and divides them by."""
    center, scale = np.zeros(n_features), np.ones(n_features)
    if isinstance(scaler, StandardScaler):
        return scaler.mean_ if scaler.with_mean else center, scaler.scale_ if scaler.with_std else scale
    return center, scale


def fit_ridge_from_moments(head: Ridge, moments: Moments, single_target: bool) -> None:
    """Fit to targets, of which there may be a single one."""
    coef, intercept = _solve_ridge(head, moments)
    head.coef_, head.intercept_ = (coef[0], float(intercept[0])) if single_target else (coef, intercept)
    head.n_iter_, head.solver_ = None, "cholesky"


def fit_ridge_classifier_from_moments(head: RidgeClassifier, moments: Moments, classes: NDArray[Any]) -> None:
    """Fit to class codes, which stand for columns of 0 and 1."""
    from sklearn.preprocessing import LabelBinarizer

    if isinstance(head.alpha, str) and head.class_weight is None:
        moments = _balance_classes(moments)
    target_sums, cross = (
        2 * moments.y - moments.weight,
        2 * moments.cross - moments.x[:, None],
    )  # of 1 and -1 instead of 1 and 0
    if len(classes) == 2:
        target_sums, cross = target_sums[1:], cross[:, 1:]
    signed = replace(moments, y=target_sums, cross=cross)
    head.coef_, head.intercept_ = _solve_ridge(head, signed)
    head._label_binarizer = LabelBinarizer(pos_label=1, neg_label=-1).fit(classes)
    with suppress(AttributeError):  # a property in some versions
        head.classes_ = classes
    head.n_iter_, head.solver_ = None, "cholesky"


def _balance_classes(moments: Moments) -> Moments:
    """With means of classes that all weigh alike, about the scatter within classes as it is.

    Least squares gives classes of few rows too little room: of a class that came with a single image, beside 98 of four
    others, nothing was found again. Weights of rows would need the scatter of each class; of means the sums do.
    """
    class_means = moments.cross / moments.y
    class_weights = np.full(len(moments.y), moments.weight / len(moments.y))
    gram = moments.gram - (class_means * moments.y) @ class_means.T + (class_means * class_weights) @ class_means.T
    return replace(
        moments, x=class_means @ class_weights, gram=gram, y=class_weights, cross=class_means * class_weights
    )


def _solve_ridge(head: Any, moments: Moments) -> tuple[Array, Array]:
    """Coefficients (t, d) and intercepts (t,)."""
    from scipy.linalg import solve

    x_mean, y_mean = moments.x / moments.weight, moments.y / moments.weight
    gram, cross = moments.gram, moments.cross
    if head.fit_intercept:
        gram, cross = (
            gram - moments.weight * np.outer(x_mean, x_mean),
            cross - moments.weight * np.outer(x_mean, y_mean),
        )
    alpha = head.alpha
    if isinstance(alpha, str):  # "auto", of targets 1 and -1
        target_sum_of_squares = moments.weight * float((1 - y_mean**2).sum())
        alpha = head.alpha_ = select_alpha_by_evidence(gram, cross, target_sum_of_squares, moments.weight)
    alphas = np.broadcast_to(np.asarray(alpha, np.float64), cross.shape[1:])
    coef = np.empty(cross.shape[::-1])
    for alpha in np.unique(alphas):
        has_alpha = alphas == alpha
        coef[has_alpha] = solve(gram + alpha * np.eye(len(gram)), cross[:, has_alpha], assume_a="pos").T
    return coef, y_mean - coef @ x_mean if head.fit_intercept else np.zeros(len(y_mean))


def fit_lda_from_moments(
    head: LinearDiscriminantAnalysis, moments: Moments, classes: NDArray[Any], covariance: Array | None = None
) -> None:
    """Fit to class codes; from a covariance that was shrunk class by class, or from that of the moments."""
    from scipy.linalg import lstsq

    priors = moments.y / moments.weight if head.priors is None else np.asarray(head.priors, np.float64)
    class_means = (moments.cross / moments.y).T
    if covariance is None:
        covariance = shrink_covariance(
            (moments.gram - (class_means.T * moments.y) @ class_means) / moments.weight, head.shrinkage
        )
    coef = lstsq(covariance, class_means.T)[0].T
    intercept = -0.5 * np.einsum("kd,kd->k", class_means, coef) + np.log(priors)
    head.classes_, head.priors_, head.means_, head.covariance_ = classes, priors, class_means, covariance
    head._max_components = head._n_features_out = min(len(classes) - 1, len(moments.shift))
    if len(classes) == 2:
        coef, intercept = np.diff(coef, axis=0), np.diff(intercept)
    head.coef_, head.intercept_ = coef, intercept


def shrink_covariance(covariance: Array, shrinkage: float | None) -> Array:
    """With its eigenvalues drawn to their mean."""
    if not shrinkage:
        return covariance
    shrunk_covariance = (1 - shrinkage) * covariance
    shrunk_covariance.flat[:: len(shrunk_covariance) + 1] += shrinkage * np.trace(covariance) / len(shrunk_covariance)
    return shrunk_covariance


def compute_ledoit_wolf_covariance(x: Array) -> tuple[Array, Array]:
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
    std = x.std(axis=0)
    is_constant = std <= 1e-12 * np.abs(x).max(initial=0.0)
    std[is_constant], x[:, is_constant] = 1.0, 0.0
    x /= std
    shrinkage = ledoit_wolf_shrinkage(x, assume_centered=True) if len(x) > 1 else 0.0
    covariance = shrink_covariance(x.T @ x / len(x), shrinkage)
    constant_variances = np.where(is_constant, covariance.diagonal(), 0.0)
    covariance[is_constant, is_constant] = 0.0
    return covariance * np.outer(std, std), constant_variances


def fit_centroid_from_moments(head: NearestCentroid, moments: Moments, classes: NDArray[Any]) -> None:
    """Fit to class codes, from moments of which the diagonal is enough."""
    class_counts, n_rows, n_classes = moments.y, moments.rows, len(classes)
    gram_diagonal = moments.gram if moments.gram.ndim == 1 else moments.gram.diagonal()
    centroids = (moments.cross / class_counts).T
    within_class_std = np.sqrt(
        np.maximum(gram_diagonal - (centroids.T**2 * class_counts).sum(axis=1), 0) / (n_rows - n_classes)
    )
    overall_centroid = moments.x / n_rows
    shrinkage_scale = np.sqrt(1 / class_counts - 1 / n_rows)[:, None] * (within_class_std + np.median(within_class_std))
    deviations = (centroids - overall_centroid) / shrinkage_scale
    if head.shrink_threshold:
        deviations = np.sign(deviations) * np.clip(np.abs(deviations) - head.shrink_threshold, 0, None)
        centroids = overall_centroid + shrinkage_scale * deviations
    uniform_prior = np.full(n_classes, 1 / n_classes)
    head.class_prior_ = (
        class_counts / n_rows
        if head.priors == "empirical"
        else uniform_prior
        if head.priors == "uniform"
        else np.asarray(head.priors)
    )
    head.classes_, head.centroids_, head.deviations_ = classes, centroids, deviations
    head.within_class_std_dev_ = within_class_std
