"""Resampling of imbalanced classes: oversampling, undersampling and SMOTE.

Only the rows of a fit are resampled: in each fold after the split, and after the scaler, which is fitted to the
original rows. The result is the plain head or pipeline; nothing of imbalanced-learn is saved with it.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.pipeline import Pipeline
from sklearn.utils import get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data

from featpipe.config import RESAMPLING_METHODS, check_choice, check_integer, unknown_name_error
from featpipe.errors import ConfigError

SMOTE_NEIGHBORS = 5


def draw_row_indices(y: ArrayLike, method: str, random_state: Any = None) -> NDArray[np.int64]:
    """Draw the rows of an over- or undersampled fit.

    Parameters
    ----------
    y : array-like of shape (n,)
        Classes.
    method : {"over", "under"}
    random_state : int, RandomState or None

    Returns
    -------
    ndarray of shape (m,), int64
        Row numbers, ascending; with "over" each at least once, with "under" at most once.
        ``np.bincount(rows, minlength=n)`` are sample weights of the same effect, for fits that stream.

    Notes
    -----
    These are the rows that imbalanced-learn's RandomOverSampler and RandomUnderSampler take.
    """
    if method not in ("over", "under"):
        raise ConfigError(f"method is {method!r}; give over or under")
    samplers = _import_samplers(method)
    codes = _encode_classes(y)[1]
    if len(np.unique(codes)) < 2:
        return np.arange(len(codes))
    sampler_class = samplers.RandomOverSampler if method == "over" else samplers.RandomUnderSampler
    sampler = sampler_class(random_state=random_state)
    sampler.fit_resample(np.arange(len(codes))[:, None], codes)
    return np.sort(sampler.sample_indices_).astype(np.int64)


def resample(
    X: ArrayLike, y: ArrayLike, method: str, random_state: Any = None, *, neighbors: int = SMOTE_NEIGHBORS
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Resample training rows so that all classes have the same number.

    Validation and test rows must not be resampled.

    Parameters
    ----------
    X : array-like of shape (n, d)
        Should be standardised for "smote", which finds neighbours by Euclidean distance.
    y : array-like of shape (n,)
        Classes.
    method : {"over", "under", "smote"}
        "over" repeats rows of the smaller classes, "under" omits rows of the larger classes, and "smote" interpolates
        between neighbouring rows of a smaller class.
    random_state : int, RandomState or None
    neighbors : int
        For "smote": the number of nearest neighbours to interpolate with; smaller classes use fewer.

    Returns
    -------
    X : ndarray of shape (m, d)
        In the dtype of X. With "smote" the synthetic rows follow the others.
    y : ndarray of shape (m,)

    Raises
    ------
    ConfigError
        If imbalanced-learn is not installed, y holds no classes, or a class is too small for "smote".

    Notes
    -----
    "over" and "smote" return the number of classes times the size of the largest class. On large data
    ``class_weight="balanced"`` has the effect of "over" without copies.

    References
    ----------
    Chawla, Bowyer, Hall and Kegelmeyer, "SMOTE: synthetic minority over-sampling technique", JAIR 16, 2002.

    Examples
    --------
    >>> X, y = resample(np.arange(8.0)[:, None], [0, 0, 0, 0, 0, 0, 1, 1], "smote", random_state=0)
    >>> np.bincount(y), bool(X[y == 1].min() >= 6)
    (array([6, 6]), True)
    """
    if method not in RESAMPLING_METHODS:
        raise unknown_name_error("resampling method", str(method), RESAMPLING_METHODS)
    features = np.asarray(X)
    if method != "smote":
        rows = draw_row_indices(y, method, random_state)
        return features[rows], np.asarray(y)[rows]
    check_integer("neighbors", neighbors, minimum=1)
    return _oversample_smote(features, y, check_random_state(random_state), neighbors)


def _oversample_smote(
    X: NDArray[Any], y: ArrayLike, random_state: np.random.RandomState, neighbors: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """SMOTE class by class, each with at most as many neighbours as it has."""
    smote_class = _import_samplers("smote").SMOTE
    classes, codes = _encode_classes(y)
    class_sizes = np.bincount(codes)
    largest = int(class_sizes.max())
    if class_sizes.min() == 1 < largest:
        raise ConfigError(
            f"class {str(classes[class_sizes.argmin()])!r} has one training row, and smote needs two to interpolate; "
            "add images, leave the class out, use fewer folds, or use over or class_weight=balanced"
        )
    X_resampled = np.empty((largest * len(classes), *X.shape[1:]), X.dtype)
    X_resampled[: len(X)] = X
    stop = len(X)
    other_class_rows = X[codes == class_sizes.argmax()][:2]  # imbalanced-learn requires a second class
    for code in np.flatnonzero(class_sizes < largest):
        class_rows = X[codes == code]
        sampler = smote_class(
            sampling_strategy={1: largest}, k_neighbors=min(neighbors, len(class_rows) - 1), random_state=random_state
        )
        is_class = np.repeat([1, 0], [len(class_rows), len(other_class_rows)])
        synthetic = sampler.fit_resample(np.concatenate([class_rows, other_class_rows]), is_class)[0][len(is_class) :]
        X_resampled[stop : stop + len(synthetic)] = synthetic
        stop += len(synthetic)
    return X_resampled, np.concatenate([np.asarray(y), np.repeat(classes, largest - class_sizes)])


def fit_balanced(
    estimator: Any,
    X: ArrayLike,
    y: ArrayLike,
    method: str,
    random_state: Any = None,
    *,
    neighbors: int = SMOTE_NEIGHBORS,
    **fit_params: Any,
) -> Any:
    """Fit a head or a pipeline in place to rows with balanced classes.

    Parameters
    ----------
    estimator : estimator
        The transformers of a pipeline are fitted to the original rows; their output is resampled for the last step.
    X : array-like of shape (n, d)
    y : array-like of shape (n,)
    method, random_state, neighbors
        As for `resample`.
    **fit_params
        Passed to the fit of the head. ``validation`` must be transformed by the scaler; it is not resampled.

    Returns
    -------
    estimator
    """
    is_pipeline = isinstance(estimator, Pipeline)
    head = estimator.steps[-1][1] if is_pipeline else estimator
    if getattr(head, "early_stopping", False) is True and fit_params.get("validation") is None:
        raise ConfigError(
            f"with balance {method} early_stopping would validate on copies of training rows; turn it off, or "
            "use class_weight=balanced instead"
        )
    if is_pipeline and len(estimator.steps) > 1:
        transformers = estimator[:-1]
        X = transformers.fit_transform(X, y)
        estimator.steps[:-1] = transformers.steps
    head.fit(*resample(X, y, method, random_state, neighbors=neighbors), **fit_params)
    return estimator


def _available_if_estimator_has(name: str) -> Any:
    def check(self: BalancedClassifier) -> bool:
        return hasattr(getattr(self, "estimator_", self.estimator), name)

    return available_if(check)


class BalancedClassifier(ClassifierMixin, MetaEstimatorMixin, BaseEstimator):
    """A classifier that resamples its training rows to balanced classes.

    For scikit-learn's searches and cross-validation, which must resample the training rows of each fold. Save
    ``estimator_``, which is a plain head or pipeline.

    Parameters
    ----------
    estimator : estimator
        A head, or a pipeline that ends in one; only the rows of the last step are resampled.
    how : {"over", "under", "smote"}
        As for `resample`.
    random_state : int, RandomState or None
    neighbors : int

    Attributes
    ----------
    estimator_ : estimator
        Fitted.
    classes_ : ndarray of shape (k,)
    prior_ : ndarray of shape (k,)
        The class frequencies before resampling, for the correction of probabilities; the head was fitted to equal
        frequencies.
    n_features_in_ : int

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> X, y = np.arange(-2.0, 8)[:, None], np.repeat([0, 1], [2, 8])
    >>> balanced = BalancedClassifier(LogisticRegression(), "over", random_state=0).fit(X, y)
    >>> balanced.prior_
    array([0.2, 0.8])
    """

    def __init__(
        self, estimator: Any, how: str = "over", random_state: Any = None, *, neighbors: int = SMOTE_NEIGHBORS
    ) -> None:
        self.estimator = estimator
        self.how = how
        self.random_state = random_state
        self.neighbors = neighbors

    def check_params(self) -> None:
        """Raise ValueError for settings out of range."""
        check_choice("how", self.how, RESAMPLING_METHODS)
        check_integer("neighbors", self.neighbors, minimum=1)
        if hasattr(self.estimator, "check_params"):
            self.estimator.check_params()

    def fit(self, X: ArrayLike, y: ArrayLike, **fit_params: Any) -> Self:
        """Fit to n rows after resampling; an earlier fit is discarded.

        Parameters
        ----------
        X : array-like of shape (n, d)
        y : array-like of shape (n,)
        **fit_params
            As for `fit_balanced`.
        """
        self.check_params()
        X, y = validate_data(self, X, y, dtype=[np.float32, np.float64])
        self.estimator_ = fit_balanced(
            clone(self.estimator), X, y, self.how, self.random_state, neighbors=self.neighbors, **fit_params
        )
        codes = _encode_classes(y)[1]
        self.prior_ = np.bincount(codes) / len(codes)
        return self

    @property
    def classes_(self) -> NDArray[Any]:
        return self._get_fitted_estimator().classes_

    def _get_fitted_estimator(self) -> Any:
        check_is_fitted(self, "estimator_")
        return self.estimator_

    def _call_estimator(self, X: ArrayLike, method: str) -> NDArray[Any]:
        estimator = self._get_fitted_estimator()
        X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        return getattr(estimator, method)(X)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Classes of shape (m,)."""
        return self._call_estimator(X, "predict")

    @_available_if_estimator_has("predict_proba")
    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:
        """Probabilities of shape (m, k) under equal class frequencies."""
        return self._call_estimator(X, "predict_proba")

    @_available_if_estimator_has("decision_function")
    def decision_function(self, X: ArrayLike) -> NDArray[Any]:
        """Scores of shape (m, k) or (m,)."""
        return self._call_estimator(X, "decision_function")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        estimator_tags = get_tags(self.estimator)
        tags.classifier_tags.multi_class = (
            estimator_tags.classifier_tags is None or estimator_tags.classifier_tags.multi_class
        )
        return tags


def _encode_classes(y: ArrayLike) -> tuple[NDArray[Any], NDArray[np.int64]]:
    array = np.asarray(y)
    if array.ndim != 1 or (array.dtype.kind == "f" and (array != np.floor(array)).any()):
        raise ConfigError(
            f"Unknown label type: y of shape {array.shape} and {array.dtype} cannot be resampled; expected one "
            "class per row"
        )
    classes, codes = np.unique(array, return_inverse=True)
    return classes, codes.astype(np.int64)


def _import_samplers(method: str) -> Any:
    try:
        from imblearn import over_sampling, under_sampling
    except ImportError as error:
        raise ConfigError(
            f"balancing classes by {method} needs imbalanced-learn, which is not installed ({error}); "
            "pip install 'featpipe[balance]', or use class_weight=balanced"
        ) from error
    return under_sampling if method == "under" else over_sampling
