"""Logistic regression, solved to a stated gap."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped,unused-ignore]

from featpipe.heads import ranges
from featpipe.heads.classes import ScoredClassifier, Targets, class_targets, rows_to_fit
from featpipe.heads.solver import Problem, Solution, minimise

__all__ = ["SoftmaxRegression"]

ONE_THREAD_BELOW_PRODUCTS = 3e7


class SoftmaxRegression(ScoredClassifier, BaseEstimator):
    """L2-penalised logistic regression: scikit-learn's objective, minimised to a gap that is known.

    Minimises C Σ s_i loss(y_i, W x_i + b) + ½‖W‖², s_i being the sample weights times the class weights: the softmax
    loss for three classes or more, the logistic loss for two classes and for each label of a multi-label y.

    Parameters
    ----------
    C : float
        Inverse strength of the penalty, above zero.
    fit_intercept : bool
        The intercept is not penalised.
    class_weight : mapping, "balanced" or None
        Weight of each class, 1 where none is given; "balanced" is inverse to the frequencies. With several labels a row
        the keys are 0 and 1.
    tol : float
        Relative gap to the minimum, (f - min f) / f, that ends the search.
    max_iter : int
        Most steps (for each label); ending on them warns, with the gap.
    multilabel : bool or None
        Whether y is a 0/1 matrix of shape (n, k). None: whether it has two or more columns.

    Attributes
    ----------
    coef_ : ndarray of shape (k, d), float64
        Shape (1, d) for two classes.
    intercept_ : ndarray of shape (k,), float64
    classes_ : ndarray of shape (k,)
        Sorted; the column numbers for a multi-label y.
    n_iter_ : int
        Steps taken, the most of any label.
    n_features_in_ : int

    Notes
    -----
    Computed in float64 whatever X is. A label that every row has, or none, gets no weights and the log odds of
    (ones + ½) / (zeros + ½) as intercept, since its minimum lies at infinity.

    Examples
    --------
    >>> head = SoftmaxRegression().fit([[0.0], [1.0], [2.0], [3.0]], ["cat", "cat", "dog", "dog"])
    >>> head.predict([[0.5]]).tolist()
    ['cat']
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        fit_intercept: bool = True,
        class_weight: Mapping[Any, float] | str | None = None,
        tol: float = 1e-8,
        max_iter: int = 2000,
        multilabel: bool | None = None,
    ) -> None:
        self.C = C
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.multilabel = multilabel

    def check_params(self) -> None:
        """Refuse settings out of range, with a ValueError."""
        ranges.number("C", self.C, above=0)
        ranges.switch("fit_intercept", self.fit_intercept)
        ranges.number("tol", self.tol, above=0, below=1)
        ranges.whole("max_iter", self.max_iter, least=1)
        if not isinstance(self.class_weight, Mapping) and self.class_weight is not None:
            ranges.choice("class_weight", self.class_weight, ["balanced"])

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Learn W and b.

        Parameters
        ----------
        X : array-like of shape (n, d)
        y : array-like of shape (n,) or (n, k)
            Classes, or 0 and 1 for each label.
        sample_weight : array-like of shape (n,), optional
            Rows of weight zero count as absent.
        """
        self.check_params()
        X, y, weights = rows_to_fit(self, X, y, sample_weight, dtype=np.float64)
        targets = class_targets(y, weights, self.class_weight, self.multilabel)
        with _threads_for(X.size * targets.Y[0].size):
            solutions = self._solve(X, targets)
        self.coef_ = np.concatenate([solution.W for solution in solutions])
        self.intercept_ = np.concatenate([solution.b for solution in solutions])
        self.classes_, self.multilabel_ = targets.classes, targets.multilabel
        self.n_iter_ = max(solution.steps for solution in solutions)
        self._warn_if_short(max(solutions, key=lambda solution: solution.gap))
        return self

    def _solve(self, X: NDArray[np.float64], targets: Targets) -> list[Solution]:
        """One solution for all classes, or one for each label."""
        if targets.multilabel:
            return [
                self._solve_sigmoid(X, column, weights)
                for column, weights in zip(targets.Y.T, targets.weights.T, strict=True)
            ]
        if len(targets.classes) == 2:
            return [self._solve_sigmoid(X, targets.Y, targets.weights)]
        one_hot = np.zeros((len(X), len(targets.classes)))
        one_hot[np.arange(len(X)), targets.Y] = 1.0
        problem = Problem(X, one_hot, self.C * targets.weights, "softmax", self.fit_intercept)
        return [minimise(problem, tol=self.tol, max_iter=self.max_iter)]

    def _solve_sigmoid(self, X: NDArray[np.float64], y: NDArray[np.int64], weights: NDArray[np.float64]) -> Solution:
        if y.min() == y.max():
            ones = float(weights @ y)
            odds = (ones + 0.5) / (float(weights.sum()) - ones + 0.5)
            intercept = np.array([np.log(odds) if self.fit_intercept else 0.0])
            return Solution(np.zeros((1, X.shape[1])), intercept, value=0.0, gap=0.0, steps=1, converged=True)
        problem = Problem(X, y[:, None].astype(np.float64), self.C * weights, "sigmoid", self.fit_intercept)
        return minimise(problem, tol=self.tol, max_iter=self.max_iter)

    def _warn_if_short(self, worst: Solution) -> None:
        if not worst.converged:
            warnings.warn(
                f"SoftmaxRegression stopped after {worst.steps} steps at a relative gap of at most {worst.gap:.1e}, "
                f"tol is {self.tol:.1e}; raise max_iter or tol, or scale the columns of X",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _scores(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        return X @ self.coef_.T + self.intercept_


def _threads_for(products: float) -> AbstractContextManager[Any]:
    """One BLAS thread where starting more costs more than they bring."""
    return threadpool_limits(1, user_api="blas") if products < ONE_THREAD_BELOW_PRODUCTS else nullcontext()
