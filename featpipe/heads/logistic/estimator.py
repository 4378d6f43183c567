"""Logistic regression as a scikit-learn estimator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning

from featpipe.config import check_bool, check_choice, check_integer, check_number
from featpipe.heads.logistic.l1 import minimize_l1
from featpipe.heads.logistic.objective import DeviceProblem, LogisticProblem, get_device
from featpipe.heads.logistic.solver import Solution, minimize
from featpipe.heads.targets import (
    EncodedTargets,
    ScoredClassifier,
    check_sample_weight,
    encode_targets,
    validate_training_data,
)
from featpipe.runtime import BlasThreadPool

# Below this value rounding errors dominate the duality gap.
MIN_L1_TOL = 1e-6


class SoftmaxRegression(ScoredClassifier, BaseEstimator):
    """Penalised logistic regression: scikit-learn's objective, minimised to a guaranteed gap.

    Minimises C Σ s_i loss(y_i, W x_i + b) + ½ (1 - l1_ratio) ‖W‖² + l1_ratio Σ|W|, s_i being the sample weights times
    the class weights: the softmax loss for three classes or more, the logistic loss for two classes and for each label
    of a multi-label y.

    Parameters
    ----------
    C : float
        Inverse strength of the penalty, above zero.
    l1_ratio : float
        0 is an L2 penalty, 1 an L1 penalty, which gives sparse weights; values between are elastic net.
    fit_intercept : bool
        The intercept is not penalised.
    class_weight : mapping, "balanced" or None
        Weight of each class, by default 1; "balanced" weights are inverse to the frequencies. For a multi-label y the
        keys are 0 and 1.
    tol : float
        Relative gap to the minimum, (f - min f) / f, that ends the search.
    max_iter : int
        Maximum number of steps; a search that ends there warns with its gap.
    multilabel : bool or None
        Whether y is a 0/1 matrix of shape (n, k). None: if it has two or more columns.
    device : str or None
        A torch device for the passes over the rows, which must fit into its memory: ``cuda``, or ``auto``, which is
        ``cuda`` if available. None computes without torch.

    Attributes
    ----------
    coef_ : ndarray of shape (k, d), float64
        Shape (1, d) for two classes.
    intercept_ : ndarray of shape (k,), float64
    classes_ : ndarray of shape (k,)
        Sorted; the column numbers for a multi-label y.
    n_iter_ : int
        Number of steps, the maximum over labels.
    n_features_in_ : int

    Notes
    -----
    Large problems are searched in float32; the gap is verified in float64. With an L1 penalty ``tol`` is at least 1e-6,
    and up to ten times ``max_iter`` steps of L-BFGS-B are allowed. A label that all rows have, or none, gets zero
    weights and the intercept log((positives + ½) / (negatives + ½)), because its minimum lies at infinity.

    Examples
    --------
    >>> head = SoftmaxRegression().fit([[0.0], [1.0], [2.0], [3.0]], ["cat", "cat", "dog", "dog"])
    >>> head.predict([[0.5]]).tolist()
    ['cat']
    """

    __module__ = "featpipe.heads"

    def __init__(
        self,
        C: float = 1.0,
        *,
        l1_ratio: float = 0.0,
        fit_intercept: bool = True,
        class_weight: Mapping[Any, float] | str | None = None,
        tol: float = 1e-8,
        max_iter: int = 2000,
        multilabel: bool | None = None,
        device: str | None = None,
    ) -> None:
        self.C = C
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.multilabel = multilabel
        self.device = device

    def check_params(self) -> None:
        """Raise ValueError for settings out of range."""
        check_number("C", self.C, above=0)
        check_number("l1_ratio", self.l1_ratio, minimum=0, below=np.nextafter(1, 2))
        check_bool("fit_intercept", self.fit_intercept)
        check_number("tol", self.tol, above=0, below=1)
        check_integer("max_iter", self.max_iter, minimum=1)
        if not isinstance(self.class_weight, Mapping) and self.class_weight is not None:
            check_choice("class_weight", self.class_weight, ["balanced"])

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Fit W and b.

        Parameters
        ----------
        X : array-like of shape (n, d)
        y : array-like of shape (n,) or (n, k)
            Classes, or 0 and 1 for each label.
        sample_weight : array-like of shape (n,), optional
            Rows of weight zero are ignored.
        """
        self.check_params()
        X, y, weights = validate_training_data(self, X, y, sample_weight, dtype=[np.float64, np.float32])
        return self._fit_arrays(X, y, weights)

    def _fit_rows(
        self,
        source: Any,
        y: NDArray[Any],
        sample_weight: ArrayLike | None = None,
        *,
        center: NDArray[np.float64] | None = None,
        scale: NDArray[np.float64] | None = None,
    ) -> Self:
        """Fit to rows that every pass reads in blocks; W and b apply to (x - center) / scale."""
        self.check_params()
        weights = check_sample_weight(sample_weight, source.shape[0])
        if not weights.all():
            raise ValueError("sample_weight holds zeros; leave those rows out when streaming")
        self.n_features_in_ = source.shape[1]
        return self._fit_arrays(source, y, weights, center=center, scale=scale)

    def _fit_arrays(self, X: Any, y: NDArray[Any], weights: NDArray[np.float64], **standardization: Any) -> Self:
        targets = encode_targets(y, weights, self.class_weight, self.multilabel)
        with BlasThreadPool(float(X.shape[0]) * X.shape[1] * len(targets.classes)) as workers:
            problem = make_problem(X, targets, self.C, fit_intercept=self.fit_intercept, workers=workers)
            problem = replace(problem, **standardization)
            if self.device is not None:
                problem = DeviceProblem(**vars(problem), device=get_device(self.device))
            solution = solve(problem, self._minimize)
        self.coef_, self.intercept_ = solution.W, solution.b
        self.classes_, self.multilabel_ = targets.classes, targets.multilabel
        self.n_iter_ = solution.steps
        if not solution.converged:
            warnings.warn(
                f"SoftmaxRegression stopped after {solution.steps} steps at a relative gap of at most "
                f"{solution.gap:.1e}, tol is {self.tol:.1e}; raise max_iter or tol, or scale the columns of X",
                ConvergenceWarning,
                stacklevel=3,
            )
        return self

    def _minimize(self, problem: LogisticProblem) -> Solution:
        if self.l1_ratio == 0:
            return minimize(problem, tol=self.tol, max_iter=self.max_iter)
        l2_problem = replace(problem, ridge=1.0 - self.l1_ratio)
        return minimize_l1(l2_problem, self.l1_ratio, tol=max(self.tol, MIN_L1_TOL), max_iter=10 * self.max_iter)

    def _scores(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        return X @ self.coef_.T + self.intercept_


def make_problem(
    X: NDArray[Any],
    targets: EncodedTargets,
    C: float,
    *,
    fit_intercept: bool,
    workers: BlasThreadPool,
) -> LogisticProblem:
    """The objective of scikit-learn's LogisticRegression for encoded targets."""
    Y, weights, k = targets.Y, C * targets.weights, len(targets.classes)
    if targets.multilabel or k == 2:
        Y, weights = Y.reshape(len(Y), -1), weights.reshape(len(Y), -1)
        return LogisticProblem(X, Y, weights, "sigmoid", Y.shape[1], fit_intercept, workers=workers)
    return LogisticProblem(X, Y, weights, "softmax", k, fit_intercept, workers=workers)


def solve(problem: LogisticProblem, minimizer: Callable[[LogisticProblem], Solution]) -> Solution:
    """Run a minimiser on the labels that vary; constant labels have a closed form."""
    varying_problem, constant_solution = _separate_constant_labels(problem)
    if varying_problem is None:
        return constant_solution
    solution = minimizer(varying_problem)
    if varying_problem is problem:
        return solution
    varying_rows = np.isnan(constant_solution.b)
    constant_solution.W[varying_rows], constant_solution.b[varying_rows] = solution.W, solution.b
    return replace(solution, W=constant_solution.W, b=constant_solution.b)


def _separate_constant_labels(problem: LogisticProblem) -> tuple[LogisticProblem | None, Solution]:
    """The problem of the labels that vary, if any, and the solution of the constant ones, NaN for the others."""
    W, b = np.zeros((problem.k, problem.d)), np.full(problem.k, np.nan)
    constant_solution = Solution(W, b, value=0.0, gap=0.0, steps=1, converged=True)
    if problem.link == "softmax":
        return problem, constant_solution
    is_constant = problem.Y.min(axis=0) == problem.Y.max(axis=0)
    if not is_constant.any():
        return problem, constant_solution
    weights = problem.weights[:, is_constant]
    positive_weight = (weights * problem.Y[:, is_constant]).sum(axis=0)
    # Half a row of average weight.
    half_row_weight = 0.5 * weights.mean(axis=0)
    b[is_constant] = (
        np.log((positive_weight + half_row_weight) / (weights.sum(axis=0) - positive_weight + half_row_weight))
        if problem.fit_intercept
        else 0.0
    )
    return (None if is_constant.all() else problem.select_groups(np.flatnonzero(~is_constant))), constant_solution


__test__ = {"SoftmaxRegression": SoftmaxRegression}  # doctest looks for classes by their module
