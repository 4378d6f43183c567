"""Fit a head on rows that do not fit into memory: with one pass, where there is a closed form, else pass after pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import compute_class_weight

from featpipe.errors import ConfigError
from featpipe.heads.classes import row_weights
from featpipe.heads.moments import Moments, RowSource, moments

__all__ = ["can_stream", "fit_streamed"]

Array = NDArray[np.float64]


def can_stream(pipeline: Pipeline) -> bool:
    """Whether `fit_streamed` knows the head of a pipeline."""
    head = pipeline.named_steps["head"]
    return type(head) in _CLOSED or hasattr(head, "_fit_rows")


def fit_streamed(
    pipeline: Pipeline, source: RowSource, y: NDArray[Any], sample_weight: ArrayLike | None = None
) -> Pipeline:
    """Fit a pipeline that `featpipe.heads.build` made, reading rows block by block.

    Parameters
    ----------
    pipeline : Pipeline
        Of the steps "scale" and "head"; it is fitted in place.
    source : RowSource of shape (n, d)
    y : ndarray of shape (n,), (n, k) or (n, t)
    sample_weight : array-like of shape (n,), optional

    Returns
    -------
    Pipeline
        What ``pipeline.fit`` would have made of the rows in memory, to rounding: ridge, lda and centroid from sums
        over one pass, logistic from as many passes as its solver takes steps. Only mlp and linear see the
        rows in another order.

    Raises
    ------
    ConfigError
        If the head needs all rows at once.
    """
    head, scaler = pipeline.named_steps["head"], pipeline.named_steps["scale"]
    if not can_stream(pipeline):
        raise ConfigError(
            f"{type(head).__name__} needs all {source.shape[0]:,} rows in memory; take logistic, linear, mlp, ridge, "
            "lda or centroid, or a subset of the rows"
        )
    if not isinstance(scaler, StandardScaler) and scaler != "passthrough":
        raise ConfigError(
            f"scale is {type(scaler).__name__}; rows that are streamed are standardised, or passed through"
        )
    weights = None if sample_weight is None else row_weights(sample_weight, source.shape[0])
    closed = _CLOSED.get(type(head))
    if closed is not None:
        closed(head, scaler, source, np.asarray(y), weights)
        head.n_features_in_ = source.shape[1]
    else:
        center = scale = None
        if isinstance(scaler, StandardScaler):
            found = moments(source, np.zeros((len(y), 0)), outer=False)
            _set_scaler(scaler, found)
            center, scale = _center_and_scale(scaler, source.shape[1])
        head._fit_rows(source, y, sample_weight, center=center, scale=scale)
    return pipeline


def _set_scaler(scaler: StandardScaler, found: Moments) -> None:
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


def _standardised(scaler: StandardScaler | str, found: Moments) -> Moments:
    """The moments of what the head sees."""
    if isinstance(scaler, StandardScaler):
        _set_scaler(scaler, found)
    return found.around(*_center_and_scale(scaler, len(found.shift)))


def _center_and_scale(scaler: StandardScaler | str, d: int) -> tuple[Array, Array]:
    """What a fitted scaler takes from rows, and divides them by."""
    center, scale = np.zeros(d), np.ones(d)
    if isinstance(scaler, StandardScaler):
        return scaler.mean_ if scaler.with_mean else center, scaler.scale_ if scaler.with_std else scale
    return center, scale


def _refuse_weights(head: Any, weights: Array | None) -> None:
    if weights is not None:
        raise ConfigError(f"{type(head).__name__} takes no sample weights")


# ------------------------------------------------------------------------------------------------- ridge
def _ridge(head: Ridge, scaler: Any, source: RowSource, y: NDArray[Any], weights: Array | None) -> None:
    found = _standardised(scaler, moments(source, y.reshape(len(y), -1), weights))
    coef, intercept = _solve_ridge(head, found)
    head.coef_, head.intercept_ = (coef, intercept) if y.ndim == 2 else (coef[0], float(intercept[0]))
    head.n_iter_, head.solver_ = None, "cholesky"


def _ridge_classifier(
    head: RidgeClassifier, scaler: Any, source: RowSource, y: NDArray[Any], weights: Array | None
) -> None:
    from sklearn.preprocessing import LabelBinarizer

    classes, codes = np.unique(y, return_inverse=True)
    if head.class_weight is not None:
        by_class = compute_class_weight(head.class_weight, classes=classes, y=y)
        weights = by_class[codes] * (1.0 if weights is None else weights)
    found = _standardised(scaler, moments(source, codes, weights, k=len(classes)))
    y_sums, cross = 2 * found.y - found.weight, 2 * found.cross - found.x[:, None]  # of 1 and -1 instead of 1 and 0
    if len(classes) == 2:
        y_sums, cross = y_sums[1:], cross[:, 1:]
    signed = replace(found, y=y_sums, cross=cross)
    head.coef_, head.intercept_ = _solve_ridge(head, signed)
    head._label_binarizer = LabelBinarizer(pos_label=1, neg_label=-1).fit(y)
    with suppress(AttributeError):  # a property in some versions
        head.classes_ = classes
    head.n_iter_, head.solver_ = None, "cholesky"


def _solve_ridge(head: Any, found: Moments) -> tuple[Array, Array]:
    """Coefficients (t, d) and intercepts (t,)."""
    from scipy.linalg import solve

    x, y = found.x / found.weight, found.y / found.weight
    gram, cross = found.gram, found.cross
    if head.fit_intercept:
        gram, cross = gram - found.weight * np.outer(x, x), cross - found.weight * np.outer(x, y)
    alphas = np.broadcast_to(np.asarray(head.alpha, np.float64), cross.shape[1:])
    coef = np.empty(cross.shape[::-1])
    for alpha in np.unique(alphas):
        chosen = alphas == alpha
        coef[chosen] = solve(gram + alpha * np.eye(len(gram)), cross[:, chosen], assume_a="pos").T
    return coef, y - coef @ x if head.fit_intercept else np.zeros(len(y))


# ------------------------------------------------------------------------------------------------- classes
def _lda(
    head: LinearDiscriminantAnalysis, scaler: Any, source: RowSource, y: NDArray[Any], weights: Array | None
) -> None:
    from scipy.linalg import lstsq

    _refuse_weights(head, weights)
    if head.solver != "lsqr" or head.covariance_estimator is not None:
        raise ConfigError("lda is streamed with its solver lsqr and no covariance_estimator")
    classes, codes = np.unique(y, return_inverse=True)
    found = _standardised(scaler, moments(source, codes, k=len(classes)))
    priors = found.y / found.weight if head.priors is None else np.asarray(head.priors, np.float64)
    means = (found.cross / found.y).T
    if head.shrinkage == "auto" or head.priors is not None:
        center, scale = _center_and_scale(scaler, source.shape[1])
        covariance = sum(
            prior * _class_covariance(head.shrinkage, source, np.flatnonzero(codes == code), center, scale)
            for code, prior in enumerate(priors)
        )
    else:
        covariance = _shrunk((found.gram - (means.T * found.y) @ means) / found.weight, head.shrinkage)
    coef = lstsq(covariance, means.T)[0].T
    intercept = -0.5 * np.einsum("kd,kd->k", means, coef) + np.log(priors)
    head.classes_, head.priors_, head.means_, head.covariance_ = classes, priors, means, covariance
    head._max_components = head._n_features_out = min(len(classes) - 1, source.shape[1])
    if len(classes) == 2:
        coef, intercept = np.diff(coef, axis=0), np.diff(intercept)
    head.coef_, head.intercept_ = coef, intercept


def _class_covariance(shrinkage: Any, source: Any, rows: NDArray[np.intp], center: Array, scale: Array) -> Array:
    """The covariance of one class, whose rows are few enough for memory."""
    x = (np.asarray(source[rows], np.float64) - center) / scale
    x -= x.mean(axis=0)
    if shrinkage != "auto":
        return _shrunk(x.T @ x / len(x), shrinkage)
    spread = x.std(axis=0)
    spread[spread == 0] = 1.0
    x /= spread
    shrunk = _shrunk(x.T @ x / len(x), ledoit_wolf_shrinkage(x, assume_centered=True))
    return shrunk * spread * spread[:, None]


def _shrunk(covariance: Array, shrinkage: float | None) -> Array:
    """With its eigenvalues drawn to their mean."""
    if not shrinkage:
        return covariance
    mixed = (1 - shrinkage) * covariance
    mixed.flat[:: len(mixed) + 1] += shrinkage * np.trace(covariance) / len(mixed)
    return mixed


def _centroid(head: NearestCentroid, scaler: Any, source: RowSource, y: NDArray[Any], weights: Array | None) -> None:
    _refuse_weights(head, weights)
    if head.metric != "euclidean":
        raise ConfigError(f"centroid is streamed with metric=euclidean, not {head.metric!r}")
    classes, codes = np.unique(y, return_inverse=True)
    found = _standardised(scaler, moments(source, codes, outer=False, k=len(classes)))
    counts, n, k = found.y, found.rows, len(classes)
    centroids = (found.cross / counts).T
    within = np.sqrt(np.maximum(found.gram - (centroids.T**2 * counts).sum(axis=1), 0) / (n - k))
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


_CLOSED: dict[type, Callable[..., None]] = {
    Ridge: _ridge,
    RidgeClassifier: _ridge_classifier,
    LinearDiscriminantAnalysis: _lda,
    NearestCentroid: _centroid,
}
