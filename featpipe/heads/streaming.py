"""Fit a head on rows that do not fit into memory: with one pass, where there is a closed form, else pass after pass."""

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
from featpipe.heads.classes import row_weights
from featpipe.heads.closed import (
    centroid_from,
    lda_from,
    ridge_classifier_from,
    ridge_from,
    scaled_by,
    set_scaler,
    shrunk,
    shrunk_apart,
    standardised,
)
from featpipe.heads.evidence import EvidenceRidgeClassifier, weights_of
from featpipe.heads.moments import RowSource, moments

__all__ = ["can_stream", "fit_ridge_classifier", "fit_streamed"]

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
            set_scaler(scaler, found)
            center, scale = scaled_by(scaler, source.shape[1])
        head._fit_rows(source, y, sample_weight, center=center, scale=scale)
    return pipeline


def _refuse_weights(head: Any, weights: Array | None) -> None:
    if weights is not None:
        raise ConfigError(f"{type(head).__name__} takes no sample weights")


def _ridge(head: Ridge, scaler: Any, source: RowSource, y: NDArray[Any], weights: Array | None) -> None:
    found = standardised(scaler, moments(source, y.reshape(len(y), -1), weights))
    ridge_from(head, found, single=y.ndim == 1)


def fit_ridge_classifier(
    head: RidgeClassifier, scaler: Any, source: RowSource, y: NDArray[Any], weights: Array | None
) -> None:
    """Fit from sums over the rows, which are gathered block by block."""
    classes, codes = np.unique(y, return_inverse=True)
    weights = weights_of(head, y, classes, codes, weights)
    ridge_classifier_from(head, standardised(scaler, moments(source, codes, weights, k=len(classes))), classes)


def _lda(
    head: LinearDiscriminantAnalysis, scaler: Any, source: RowSource, y: NDArray[Any], weights: Array | None
) -> None:
    _refuse_weights(head, weights)
    if head.solver != "lsqr" or head.covariance_estimator is not None:
        raise ConfigError("lda is streamed with its solver lsqr and no covariance_estimator")
    classes, codes = np.unique(y, return_inverse=True)
    found, covariance = standardised(scaler, moments(source, codes, k=len(classes))), None
    if head.shrinkage == "auto" or head.priors is not None:
        center, scale = scaled_by(scaler, source.shape[1])
        priors = found.y / found.weight if head.priors is None else np.asarray(head.priors, np.float64)
        covariance = sum(
            prior * _class_covariance(head.shrinkage, source, np.flatnonzero(codes == code), center, scale)
            for code, prior in enumerate(priors)
        )
    lda_from(head, found, classes, covariance)


def _class_covariance(shrinkage: Any, source: Any, rows: NDArray[np.intp], center: Array, scale: Array) -> Array:
    """The covariance of one class, whose rows are few enough for memory."""
    x = np.asarray(source[rows], np.float64)
    if shrinkage == "auto":
        covariance, flat = shrunk_apart(x)
        return covariance / scale / scale[:, None] + np.diag(flat)
    x = (x - center) / scale
    x -= x.mean(axis=0)
    return shrunk(x.T @ x / len(x), shrinkage)


def _centroid(head: NearestCentroid, scaler: Any, source: RowSource, y: NDArray[Any], weights: Array | None) -> None:
    _refuse_weights(head, weights)
    if head.metric != "euclidean":
        raise ConfigError(f"centroid is streamed with metric=euclidean, not {head.metric!r}")
    classes, codes = np.unique(y, return_inverse=True)
    centroid_from(head, standardised(scaler, moments(source, codes, outer=False, k=len(classes))), classes)


_CLOSED: dict[type, Callable[..., None]] = {
    Ridge: _ridge,
    RidgeClassifier: fit_ridge_classifier,
    EvidenceRidgeClassifier: fit_ridge_classifier,
    LinearDiscriminantAnalysis: _lda,
    NearestCentroid: _centroid,
}
