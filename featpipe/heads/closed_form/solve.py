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
from sklearn.preprocessing import LabelBinarizer, StandardScaler
from sklearn.utils import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from featpipe.heads.closed_form.moments import Moments, RowSource, compute_moments
from featpipe.heads.targets import check_sample_weight

__all__ = [
    "BayesianRidgeClassifier",
    "compute_ledoit_wolf_covariance",
    "fit_centroid_from_moments",
    "fit_lda_from_moments",
    "fit_ridge_classifier",
    "fit_ridge_classifier_from_moments",
    "fit_ridge_from_moments",
    "fit_scaler",
    "get_center_and_scale",
    "select_alpha_by_evidence",
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


ALPHA_EXPONENTS = np.arange(20, -41, -1) / 10  # strengths that are tried, the strongest first, by the mean eigenvalue
MIN_EVIDENCE_GAIN_PER_ROW = 1e-3  # evidence a row, in logarithms: without errors it tells weak strengths not apart


def select_alpha_by_evidence(gram: Array, cross: Array, target_sum_of_squares: float, n_rows: float) -> float:
    """The strength of a ridge under which the targets are most probable.

    Parameters
    ----------
    gram : ndarray of shape (d, d)
        Of centred rows.
    cross : ndarray of shape (d, t)
        Of centred rows and targets; of classes one column each, or a single one of two classes.
    total : float
        The sum of squares of the centred targets.
    n : float
        Rows.

    Notes
    -----
    The evidence of MacKay, "Bayesian interpolation", Neural Computation 1992: coefficients are normal of variance
    s² / alpha, errors of variance s², which has its best value for each alpha. It needs the sums alone, and no row
    left out. Generalized cross-validation needs no more, but divides what is left over by the degrees of freedom that
    are: with as many features as rows that is nothing by nothing, and on 490 tiles of width 1,280 it took the weakest
    strength of all, where accuracy was .77 instead of .89.
    """
    eigenvalues, eigenvectors = np.linalg.eigh(gram)
    eigenvalues = np.maximum(eigenvalues, 0.0)
    squared_projections = ((eigenvectors.T @ cross) ** 2).sum(axis=1)
    n_targets = max(1, cross.shape[1] - 1)  # of classes the last column follows from the others
    best_evidence, best_alpha = -np.inf, 1.0
    for alpha in max(float(eigenvalues.mean()), np.finfo(np.float64).tiny) * 10.0**ALPHA_EXPONENTS:
        residual_sum_of_squares = max(
            target_sum_of_squares - float((squared_projections / (eigenvalues + alpha)).sum()),
            np.finfo(np.float64).eps * target_sum_of_squares,
        )
        evidence = -np.log1p(eigenvalues / alpha).sum() - (n_rows - 1) * np.log(residual_sum_of_squares / n_targets)
        if evidence > best_evidence + MIN_EVIDENCE_GAIN_PER_ROW * n_rows:
            best_evidence, best_alpha = evidence, float(alpha)
    return best_alpha


class BayesianRidgeClassifier(RidgeClassifier):
    """scikit-learn's, and with ``alpha="auto"`` of the strength that has most evidence, with classes that weigh alike.

    Parameters
    ----------
    alpha : float or "auto"
    class_weight : mapping or "balanced", optional
        As there; without, all classes weigh alike under ``"auto"``.
    fit_intercept, copy_X, max_iter, tol, solver, positive, random_state
        As there.

    Attributes
    ----------
    alpha_ : float
        The strength that was taken, of ``"auto"``.
    """

    __module__ = "featpipe.heads"

    def __init__(
        self,
        alpha: float | str = "auto",
        *,
        fit_intercept: bool = True,
        copy_X: bool = True,
        max_iter: int | None = None,
        tol: float = 1e-4,
        class_weight: Any = None,
        solver: str = "auto",
        positive: bool = False,
        random_state: Any = None,
    ) -> None:
        super().__init__(
            alpha=alpha,
            fit_intercept=fit_intercept,
            copy_X=copy_X,
            max_iter=max_iter,
            tol=tol,
            class_weight=class_weight,
            solver=solver,
            positive=positive,
            random_state=random_state,
        )

    def check_params(self) -> None:
        """Refuse what no fit takes, with a ValueError."""
        if isinstance(self.alpha, str) and (self.alpha != "auto" or self.positive or not self.fit_intercept):
            raise ValueError(f"alpha is {self.alpha!r}; give a number, or auto, with an intercept and not positive")

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Fit to classes.

        Parameters
        ----------
        X : array-like of shape (n, d)
        y : array-like of shape (n,)
        sample_weight : array-like of shape (n,), optional
        """
        if not isinstance(self.alpha, str):
            return super().fit(X, y, sample_weight)
        self.check_params()
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        has_weight = check_sample_weight(sample_weight, len(y)) > 0
        X, y, weights = (
            X[has_weight],
            y[has_weight],
            None if sample_weight is None else np.asarray(sample_weight)[has_weight],
        )
        if (y == y[0]).all():
            raise ValueError(f"y holds one class only ({str(y[0])!r}); a classifier needs two or more")
        fit_ridge_classifier(self, "passthrough", X, y, weights)
        self.n_iter_ = 1
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        if isinstance(self.alpha, str):
            tags.input_tags.sparse = tags.classifier_tags.multi_label = False
        return tags


def fit_ridge_classifier(
    head: RidgeClassifier, scaler: StandardScaler | str, source: RowSource, y: NDArray[Any], sample_weight: Any
) -> None:
    """Fit a scaler and a ridge classifier to rows that need not fit into memory, in one pass over them."""
    classes, codes = np.unique(y, return_inverse=True)
    weights = None if sample_weight is None else check_sample_weight(sample_weight, len(y))
    if head.class_weight is not None:
        class_weights = compute_class_weight(head.class_weight, classes=classes, y=y)[codes]
        weights = np.asarray(class_weights if weights is None else class_weights * weights)
    moments = compute_moments(source, codes, weights, n_classes=len(classes))
    fit_ridge_classifier_from_moments(head, standardize_moments(scaler, moments), classes)
