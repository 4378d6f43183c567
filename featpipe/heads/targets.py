"""Encoding of targets and decoding of scores, shared by all classifiers among the heads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse
from scipy.special import expit, softmax
from sklearn.base import ClassifierMixin
from sklearn.exceptions import DataConversionWarning
from sklearn.utils.validation import check_is_fitted, validate_data

SCORING_BLOCK_ROWS = 8192


@dataclass(frozen=True, eq=False)
class EncodedTargets:
    """The targets of n rows.

    Attributes
    ----------
    classes : ndarray of shape (k,)
        The sorted distinct values of y; the column numbers for a multi-label y.
    multilabel : bool
    Y : ndarray of shape (n,) or (n, k), int64
        Class codes, or 0 and 1 for each label.
    weights : ndarray of the shape of Y, float64
        Sample weights times class weights.
    """

    classes: NDArray[Any]
    multilabel: bool
    Y: NDArray[np.int64]
    weights: NDArray[np.float64]


def check_sample_weight(sample_weight: ArrayLike | None, n: int) -> NDArray[np.float64]:
    """Validate sample weights; returns shape (n,), float64, ones for None."""
    if sample_weight is None:
        return np.ones(n)
    weights = np.asarray(sample_weight, np.float64)
    if weights.ndim == 0:
        weights = np.full(n, weights)
    if weights.shape != (n,):
        raise ValueError(f"sample_weight has shape {weights.shape}, X has {n} rows; give one weight per row")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError("sample_weight holds negative or infinite weights, or only zeros; give weights of 0 or more")
    return weights


def validate_training_data(
    estimator: Any, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None, **validation_options: Any
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float64]]:
    """Validate X (n, d), y (n,) or (n, k) and weights (n,), and drop rows of weight zero."""
    X_checked, y_checked = validate_data(estimator, X, y, multi_output=True, **validation_options)
    weights = check_sample_weight(sample_weight, len(X_checked))
    has_weight = weights > 0
    if has_weight.all():
        return X_checked, y_checked, weights
    return X_checked[has_weight], y_checked[has_weight], weights[has_weight]


def compute_scores(estimator: Any, X: ArrayLike) -> NDArray[np.float64]:
    """The scores of a fitted estimator, shape (m, k), computed in blocks to keep copies small."""
    check_is_fitted(estimator)
    X_checked: NDArray[Any] = validate_data(estimator, X, reset=False, dtype=[np.float64, np.float32])
    starts = range(0, len(X_checked), SCORING_BLOCK_ROWS)
    return np.concatenate([estimator._scores(X_checked[start : start + SCORING_BLOCK_ROWS]) for start in starts])


def encode_targets(
    y: Any,
    weights: NDArray[np.float64],
    class_weight: Mapping[Any, float] | str | None,
    multilabel: bool | None,
) -> EncodedTargets:
    """Encode the y of a classifier.

    Parameters
    ----------
    y : ndarray or sparse matrix of shape (n,) or (n, k)
        Classes, or 0 and 1 for each label.
    weights : ndarray of shape (n,), float64
        Positive weight of each row.
    class_weight : mapping, "balanced" or None
        By class; for a multi-label y by 0 and 1, the same for every label.
    multilabel : bool or None
        Whether y is a 0/1 matrix; None means: if it has two or more columns.
    """
    y_array: NDArray[Any] = y.toarray() if issparse(y) else y
    if multilabel is None:
        multilabel = y_array.ndim == 2 and y_array.shape[1] > 1
    if multilabel:
        Y = _check_label_matrix(y_array)
        return EncodedTargets(
            np.arange(Y.shape[1]), True, Y, weights[:, None] * _compute_label_weights(Y, weights, class_weight)
        )
    if y_array.ndim == 2 and y_array.shape[1] == 1:
        warnings.warn(
            "A column-vector y was passed when a 1d array was expected; give y of shape (n,)",
            DataConversionWarning,
            stacklevel=3,
        )
        y_array = y_array.ravel()
    classes, class_codes = _encode_classes(y_array)
    class_weights = _compute_class_weights(classes, class_codes, weights, class_weight)
    return EncodedTargets(classes, False, class_codes, weights * class_weights[class_codes])


def _check_label_matrix(array: NDArray[Any]) -> NDArray[np.int64]:
    if array.ndim != 2 or not np.isin(array, (0, 1)).all():
        raise ValueError(
            f"Unknown label type: y of shape {array.shape} with several labels per row must be a matrix of 0 and 1, "
            "one column per label; for numeric targets use a regressor"
        )
    return array.astype(np.int64)


def _encode_classes(array: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    if array.ndim != 1 or (array.dtype.kind == "f" and (array != np.floor(array)).any()):
        raise ValueError(
            f"Unknown label type: y of shape {array.shape} and {array.dtype} does not hold classes; for numeric "
            "targets use a regressor"
        )
    try:
        classes, codes = np.unique(array, return_inverse=True)
    except TypeError:
        raise ValueError("y mixes types or has rows without a class; leave those rows out") from None
    if len(classes) < 2:
        raise ValueError(f"y holds only one class ({str(classes[0])!r}); a classifier needs two or more")
    return classes, codes.astype(np.int64)


def _compute_class_weights(
    classes: NDArray[Any],
    codes: NDArray[np.int64],
    weights: NDArray[np.float64],
    class_weight: Mapping[Any, float] | str | None,
) -> NDArray[np.float64]:
    if class_weight is None:
        return np.ones(len(classes))
    if isinstance(class_weight, str):
        return weights.sum() / (len(classes) * np.bincount(codes, weights, len(classes)))
    class_codes = {class_name: i for i, class_name in enumerate(classes.tolist())}
    unknown_classes = [str(name) for name in class_weight if name not in class_codes]
    if unknown_classes:
        raise ValueError(f"class_weight names {', '.join(unknown_classes)}, which y does not contain; leave them out")
    weight_by_class = np.ones(len(classes))
    for name, weight in class_weight.items():
        weight_by_class[class_codes[name]] = weight
    return weight_by_class


def _compute_label_weights(
    Y: NDArray[np.int64], weights: NDArray[np.float64], class_weight: Mapping[Any, float] | str | None
) -> NDArray[np.float64]:
    """Weight of each cell, shape (n, k)."""
    if class_weight is None:
        return np.ones(Y.shape)
    if isinstance(class_weight, str):
        positive_weight = weights @ Y
        counts = np.stack([weights.sum() - positive_weight, positive_weight])
        # A constant label cannot be balanced.
        balanced_weights = np.where(counts.all(axis=0), weights.sum() / (2 * np.maximum(counts, 1e-300)), 1.0)
        return np.where(Y == 1, balanced_weights[1], balanced_weights[0])
    if not set(class_weight) <= {0, 1}:
        raise ValueError("class_weight of a multi-label y must have the keys 0 and 1, for all labels alike")
    return np.where(Y == 1, class_weight.get(1, 1.0), class_weight.get(0, 1.0)).astype(np.float64)


class ScoredClassifier(ClassifierMixin):
    """Predictions from scores: a softmax for three or more classes, a sigmoid for two classes and for each label.

    Subclasses implement ``_scores(X)``, from (b, d) float32 or float64 to (b, k) float64 with one column for two
    classes, and set ``classes_`` and ``multilabel_`` in ``fit``.
    """

    classes_: NDArray[Any]
    multilabel_: bool

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Scores (log odds) of shape (m, k): (m,) for two classes.

        Parameters
        ----------
        X : array-like of shape (m, d)
        """
        scores = compute_scores(self, X)
        return scores if self.multilabel_ or len(self.classes_) > 2 else scores[:, 0]

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Classes of shape (m,), or 0 and 1 for each label, shape (m, k)."""
        scores = self.decision_function(X)
        if self.multilabel_:
            return (scores > 0).astype(np.int64)
        predicted_codes = scores.argmax(axis=1) if scores.ndim == 2 else (scores > 0).astype(np.intp)
        return self.classes_[predicted_codes]

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probabilities of shape (m, k): rows sum to one, except for multi-label heads."""
        scores = self.decision_function(X)
        if self.multilabel_:
            return expit(scores)
        if scores.ndim == 1:
            return np.column_stack([expit(-scores), expit(scores)])
        return softmax(scores, axis=1)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags
