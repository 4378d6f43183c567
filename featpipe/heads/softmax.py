"""Logistic regression, solved to a stated gap."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning

from featpipe.heads import ranges
from featpipe.heads.classes import ScoredClassifier, Targets, class_targets, row_weights, rows_to_fit
from featpipe.heads.objective import Problem
from featpipe.heads.solver import Solution, minimise
from featpipe.heads.sparse import minimise_sparse
from featpipe.workers import Workers

__all__ = ["SoftmaxRegression", "problem_of", "solve"]

# A duality gap cannot be told from rounding much below this.
SPARSE_TOL = 1e-6


class SoftmaxRegression(ScoredClassifier, BaseEstimator):
    """Penalised logistic regression: scikit-learn's objective, minimised to a gap that is known.

    Minimises C Σ s_i loss(y_i, W x_i + b) + ½ (1 - l1_ratio) ‖W‖² + l1_ratio Σ|W|, s_i being the sample weights times
    the class weights: the softmax loss for three classes or more, the logistic loss for two classes and for each label
    of a multi-label y.

    Parameters
    ----------
    C : float
        Inverse strength of the penalty, above zero.
    l1_ratio : float
        0 for an L2 penalty, 1 for an L1 penalty, which leaves few weights that are not zero, or between.
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
    device : str or None
        A device of torch that takes the passes over the rows, which must fit into its memory: ``cuda``, or ``auto`` for
        that where it is there. None computes without torch.

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
    Passes over many rows are in float32, and the last of them, which says how far the minimum is, in float64. With an
    L1 share the gap is 1e-6 at best and a step is one of L-BFGS-B's, of which there may be ten times ``max_iter``. A
    label that every row has, or none, gets no weights and the log odds of (ones + ½) / (zeros + ½) as intercept, since
    its minimum lies at infinity.

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
        """Refuse settings out of range, with a ValueError."""
        ranges.number("C", self.C, above=0)
        ranges.number("l1_ratio", self.l1_ratio, least=0, below=np.nextafter(1, 2))
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
        X, y, weights = rows_to_fit(self, X, y, sample_weight, dtype=[np.float64, np.float32])
        return self._fit_to(X, y, weights)

    def _fit_rows(
        self,
        source: Any,
        y: NDArray[Any],
        sample_weight: ArrayLike | None = None,
        *,
        center: NDArray[np.float64] | None = None,
        scale: NDArray[np.float64] | None = None,
    ) -> Self:
        """Learn from rows that are read block by block in every pass; W and b are for (x - center) / scale."""
        self.check_params()
        weights = row_weights(sample_weight, source.shape[0])
        if not weights.all():
            raise ValueError("sample_weight holds zeros; leave those rows out of what is streamed")
        self.n_features_in_ = source.shape[1]
        return self._fit_to(source, y, weights, center=center, scale=scale)

    def _fit_to(self, X: Any, y: NDArray[Any], weights: NDArray[np.float64], **standardised: Any) -> Self:
        targets = class_targets(y, weights, self.class_weight, self.multilabel)
        with Workers(float(X.shape[0]) * X.shape[1] * len(targets.classes)) as workers:
            problem = problem_of(X, targets, self.C, fit_intercept=self.fit_intercept, workers=workers)
            problem = replace(problem, **standardised)
            solution = solve(problem if self.device is None else self._moved(problem), self._minimise)
        self.coef_, self.intercept_ = solution.W, solution.b
        self.classes_, self.multilabel_ = targets.classes, targets.multilabel
        self.n_iter_ = solution.steps
        self._warn_if_short(solution)
        return self

    def _moved(self, problem: Problem) -> Problem:
        from featpipe.heads.device import DeviceProblem, device_named

        own = {f.name: getattr(problem, f.name) for f in fields(problem)}
        return DeviceProblem(**own, device=device_named(str(self.device)))

    def _minimise(self, problem: Problem) -> Solution:
        if self.l1_ratio == 0:
            return minimise(problem, tol=self.tol, max_iter=self.max_iter)
        smooth = replace(problem, ridge=1.0 - self.l1_ratio)
        return minimise_sparse(smooth, self.l1_ratio, tol=max(self.tol, SPARSE_TOL), max_iter=10 * self.max_iter)

    def _warn_if_short(self, worst: Solution) -> None:
        if not worst.converged:
            warnings.warn(
                f"SoftmaxRegression stopped after {worst.steps} steps at a relative gap of at most {worst.gap:.1e}, "
                f"tol is {self.tol:.1e}; raise max_iter or tol, or scale the columns of X",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _scores(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        return X @ self.coef_.T + self.intercept_


def problem_of(
    X: NDArray[Any], targets: Targets, C: float, *, fit_intercept: bool, workers: Workers, ridge: float = 1.0
) -> Problem:
    """The objective of scikit-learn's LogisticRegression for encoded targets."""
    Y, weights, k = targets.Y, C * targets.weights, len(targets.classes)
    if targets.multilabel or k == 2:
        Y, weights = Y.reshape(len(Y), -1), weights.reshape(len(Y), -1)
        return Problem(X, Y, weights, "sigmoid", Y.shape[1], fit_intercept, ridge, workers=workers)
    return Problem(X, Y, weights, "softmax", k, fit_intercept, ridge, workers=workers)


def solve(problem: Problem, search: Callable[[Problem], Solution]) -> Solution:
    """Search for the labels that vary, and answer the others at once."""
    varying, settled = _without_constant_labels(problem)
    if varying is None:
        return settled
    found = search(varying)
    if varying is problem:
        return found
    rows = np.isnan(settled.b)
    settled.W[rows], settled.b[rows] = found.W, found.b
    return replace(found, W=settled.W, b=settled.b)


def _without_constant_labels(problem: Problem) -> tuple[Problem | None, Solution]:
    """The problem of the labels that vary, if any do, and the answer for the others, NaN for those that vary."""
    W, b = np.zeros((problem.k, problem.d)), np.full(problem.k, np.nan)
    settled = Solution(W, b, value=0.0, gap=0.0, steps=1, converged=True)
    if problem.link == "softmax":
        return problem, settled
    constant = problem.Y.min(axis=0) == problem.Y.max(axis=0)
    if not constant.any():
        return problem, settled
    weights = problem.weights[:, constant]
    ones = (weights * problem.Y[:, constant]).sum(axis=0)
    # Half a row, and not half of what a row weighs.
    half = 0.5 * weights.mean(axis=0)
    b[constant] = np.log((ones + half) / (weights.sum(axis=0) - ones + half)) if problem.fit_intercept else 0.0
    return (None if constant.all() else problem.only(np.flatnonzero(~constant))), settled
