"""Fit a head to rows that do not fit into memory: in one pass if it has a closed form, otherwise in several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from featpipe.errors import ConfigError
from featpipe.heads.closed_form.moments import RowSource, compute_moments
from featpipe.heads.closed_form.solve import (
    BayesianRidgeClassifier,
    compute_ledoit_wolf_covariance,
    fit_centroid_from_moments,
    fit_lda_from_moments,
    fit_ridge_classifier,
    fit_ridge_from_moments,
    fit_scaler,
    get_center_and_scale,
    shrink_covariance,
    standardize_moments,
)
from featpipe.heads.targets import check_sample_weight

Array = NDArray[np.float64]


def can_stream(pipeline: Pipeline) -> bool:
    """Whether `fit_streamed` supports the head of a pipeline."""
    head = pipeline.named_steps["head"]
    return type(head) in _CLOSED_FORM_FITTERS or hasattr(head, "_fit_rows")


def fit_streamed(
    pipeline: Pipeline, source: RowSource, y: NDArray[Any], sample_weight: ArrayLike | None = None
) -> Pipeline:
    """Fit a pipeline from `featpipe.heads.build`, reading rows in blocks.

    Parameters
    ----------
    pipeline : Pipeline
        With the steps "scale" and "head"; fitted in place.
    source : RowSource of shape (n, d)
    y : ndarray of shape (n,), (n, k) or (n, t)
    sample_weight : array-like of shape (n,), optional

    Returns
    -------
    Pipeline
        Equal to the result of ``pipeline.fit`` up to rounding: ridge, lda and centroid take one pass, logistic one
        pass per solver step. Only mlp and linear use the rows in another order.

    Raises
    ------
    ConfigError
        If the head needs all rows in memory.
    """
    head, scaler = pipeline.named_steps["head"], pipeline.named_steps["scale"]
    if not can_stream(pipeline):
        raise ConfigError(
            f"{type(head).__name__} needs all {source.shape[0]:,} rows in memory; use logistic, linear, mlp, ridge, "
            "lda or centroid, or a subset of the rows"
        )
    if not isinstance(scaler, StandardScaler) and scaler != "passthrough":
        raise ConfigError(
            f"scale is {type(scaler).__name__}; a streamed fit supports StandardScaler and passthrough only"
        )
    weights = None if sample_weight is None else check_sample_weight(sample_weight, source.shape[0])
    fit_closed_form = _CLOSED_FORM_FITTERS.get(type(head))
    if fit_closed_form is not None:
        fit_closed_form(head, scaler, source, np.asarray(y), weights)
        head.n_features_in_ = source.shape[1]
    else:
        center = scale = None
        if isinstance(scaler, StandardScaler):
            scaler_moments = compute_moments(source, np.zeros((len(y), 0)), full_gram=False)
            fit_scaler(scaler, scaler_moments)
            center, scale = get_center_and_scale(scaler, source.shape[1])
        head._fit_rows(source, y, sample_weight, center=center, scale=scale)
    return pipeline


def _reject_sample_weight(head: Any, weights: Array | None) -> None:
    if weights is not None:
        raise ConfigError(f"{type(head).__name__} does not support sample weights; leave them out")


def _fit_ridge(head: Ridge, scaler: Any, source: RowSource, y: NDArray[Any], weights: Array | None) -> None:
    standardized_moments = standardize_moments(scaler, compute_moments(source, y.reshape(len(y), -1), weights))
    fit_ridge_from_moments(head, standardized_moments, single_target=y.ndim == 1)


def _fit_lda(
    head: LinearDiscriminantAnalysis, scaler: Any, source: RowSource, y: NDArray[Any], weights: Array | None
) -> None:
    _reject_sample_weight(head, weights)
    if head.solver != "lsqr" or head.covariance_estimator is not None:
        raise ConfigError(
            "a streamed fit of lda needs solver=lsqr and no covariance_estimator; change them, or fit in memory"
        )
    classes, codes = np.unique(y, return_inverse=True)
    standardized_moments = standardize_moments(scaler, compute_moments(source, codes, n_classes=len(classes)))
    covariance = None
    if head.shrinkage == "auto" or head.priors is not None:
        center, scale = get_center_and_scale(scaler, source.shape[1])
        priors = (
            standardized_moments.y / standardized_moments.weight
            if head.priors is None
            else np.asarray(head.priors, np.float64)
        )
        covariance = sum(
            prior * _compute_class_covariance(head.shrinkage, source, np.flatnonzero(codes == code), center, scale)
            for code, prior in enumerate(priors)
        )
    fit_lda_from_moments(head, standardized_moments, classes, covariance)


def _compute_class_covariance(
    shrinkage: Any, source: Any, rows: NDArray[np.intp], center: Array, scale: Array
) -> Array:
    """The covariance of one class, whose rows must fit into memory."""
    class_rows = np.asarray(source[rows], np.float64)
    if shrinkage == "auto":
        covariance, constant_variances = compute_ledoit_wolf_covariance(class_rows)
        return covariance / scale / scale[:, None] + np.diag(constant_variances)
    class_rows = (class_rows - center) / scale
    class_rows -= class_rows.mean(axis=0)
    return shrink_covariance(class_rows.T @ class_rows / len(class_rows), shrinkage)


def _fit_nearest_centroid(
    head: NearestCentroid, scaler: Any, source: RowSource, y: NDArray[Any], weights: Array | None
) -> None:
    _reject_sample_weight(head, weights)
    if head.metric != "euclidean":
        raise ConfigError(f"a streamed fit of centroid needs metric=euclidean, not {head.metric!r}")
    classes, codes = np.unique(y, return_inverse=True)
    fit_centroid_from_moments(
        head,
        standardize_moments(scaler, compute_moments(source, codes, full_gram=False, n_classes=len(classes))),
        classes,
    )


_CLOSED_FORM_FITTERS: dict[type, Callable[..., None]] = {
    Ridge: _fit_ridge,
    RidgeClassifier: fit_ridge_classifier,
    BayesianRidgeClassifier: fit_ridge_classifier,
    LinearDiscriminantAnalysis: _fit_lda,
    NearestCentroid: _fit_nearest_centroid,
}
