"""Logistic regression at the strength of the penalty that cross-validation chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self, TypeVar

import numpy as np
from joblib import effective_n_jobs
from numpy.typing import ArrayLike, NDArray
from sklearn import config_context, get_config
from sklearn.base import BaseEstimator
from sklearn.metrics import get_scorer, get_scorer_names
from sklearn.model_selection import check_cv
from sklearn.utils.parallel import Parallel, delayed

from featpipe.heads import ranges
from featpipe.heads.classes import ScoredClassifier, class_targets, rows_to_fit
from featpipe.heads.objective import Point, Problem
from featpipe.heads.quasi_newton import Memory
from featpipe.heads.softmax import SoftmaxRegression, problem_of, solve
from featpipe.heads.solver import Solution, dtype_of, into_row_space, minimise
from featpipe.workers import Workers, side_by_side

__all__ = ["STRENGTHS", "SoftmaxRegressionCV", "best_strength", "of_folds", "solutions"]

Array = NDArray[np.float64]

# Of Kornblith, Shlens and Le, Do Better ImageNet Models Transfer Better? (CVPR 2019), section A.2.
STRENGTHS = tuple(np.logspace(-6, 5, 45).tolist())
ABSENT = 50.0
# Folds of rows that are no more numbers, and take no more products a pass, are searched side by side, a thread each:
# two of them fit into memory, and take seconds.
SMALL_NUMBERS, SMALL_PRODUCTS = 1 << 24, 1e9

Fold = TypeVar("Fold")
Found = TypeVar("Found")


class SoftmaxRegressionCV(ScoredClassifier, BaseEstimator):
    """`SoftmaxRegression` at the best of many strengths, each scored on rows that it was not fitted to.

    Parameters
    ----------
    Cs : sequence of float
        Inverse strengths of the penalty to choose from.
    cv : int, splitter or iterable of (train rows, test rows)
    scoring : str, callable or None
        A name of scikit-learn's scorers, or a callable (head, X, y) → number, higher being better. None is accuracy.
    one_standard_error : bool
        Take the strongest penalty whose mean score is within one standard error of the best.
    refit : bool
        Fit on all rows at the end; or else average the folds.
    fit_intercept, class_weight, multilabel
        As in `SoftmaxRegression`.
    tol : float
        Estimated relative gap at which a strength on a fold counts as solved.
    max_iter : int
        Most steps for each.
    n_jobs : int or None
        Folds at a time, in processes; with 1, and with None unless joblib's context says otherwise, in this process:
        small ones go side by side on its threads.
    random_state : int or None
        Of the shuffle that makes folds when ``cv`` is a number; None keeps the order of the rows.

    Attributes
    ----------
    C_ : float
    Cs_ : ndarray of shape (s,)
        Ascending.
    scores_ : ndarray of shape (folds, s)
    n_iter_ : ndarray of shape (folds, s)
        Steps taken.
    coef_, intercept_, classes_
        As in `SoftmaxRegression`.

    Notes
    -----
    On each fold the strengths are solved from the strongest penalty to the weakest, each starting from the two before,
    with what they taught about the curvature. Nothing goes from one fold to another: no score knows its own rows.

    Examples
    --------
    >>> X, y = [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]], [0, 0, 0, 1, 1, 1]
    >>> SoftmaxRegressionCV(Cs=(0.01, 1.0), cv=3, scoring="neg_log_loss").fit(X, y).C_
    1.0
    """

    def __init__(
        self,
        Cs: Any = STRENGTHS,
        *,
        cv: Any = 5,
        scoring: Any = None,
        one_standard_error: bool = False,
        refit: bool = True,
        fit_intercept: bool = True,
        class_weight: Mapping[Any, float] | str | None = None,
        multilabel: bool | None = None,
        tol: float = 1e-4,
        max_iter: int = 200,
        n_jobs: int | None = None,
        random_state: int | None = None,
    ) -> None:
        self.Cs = Cs
        self.cv = cv
        self.scoring = scoring
        self.one_standard_error = one_standard_error
        self.refit = refit
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.multilabel = multilabel
        self.tol = tol
        self.max_iter = max_iter
        self.n_jobs = n_jobs
        self.random_state = random_state

    def check_params(self) -> None:
        """Refuse settings out of range, with a ValueError."""
        if np.ndim(self.Cs) != 1 or not len(self.Cs):
            raise ValueError(f"Cs is {self.Cs!r}; give a sequence of numbers above 0")
        for C in np.asarray(self.Cs).tolist():
            ranges.number("each of Cs", C, above=0)
        for name in ("one_standard_error", "refit"):
            ranges.switch(name, getattr(self, name))
        if isinstance(self.scoring, str):
            ranges.choice("scoring", self.scoring, get_scorer_names())
        self._head(1.0).check_params()

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Choose C and learn W and b.

        Parameters
        ----------
        X : array-like of shape (n, d)
        y : array-like of shape (n,) or (n, k)
            Classes, or 0 and 1 for each label.
        sample_weight : array-like of shape (n,), optional
            For the fits, and for the scores if the scorer takes weights. Rows of weight zero count as absent.
        """
        self.check_params()
        X, y, weights = rows_to_fit(self, X, y, sample_weight, dtype=[np.float64, np.float32])
        targets = class_targets(y, weights, None, self.multilabel)
        # Scorers take no objects.
        plain = np.asarray(targets.classes.tolist())
        y = targets.Y if targets.multilabel else plain[targets.Y]
        self.Cs_ = np.unique(np.asarray(self.Cs, np.float64))
        self.classes_, self.multilabel_ = targets.classes, targets.multilabel
        given = None if sample_weight is None else weights
        on_fold = partial(self._fold, X, y, plain, weights, given)
        folds = of_folds(on_fold, self._splits(X, y), shape=(*X.shape, len(targets.classes)), jobs=self.n_jobs)
        self.scores_ = np.array([scores for scores, _, _ in folds])
        self.n_iter_ = np.array([steps for _, steps, _ in folds])
        chosen = best_strength(self.scores_, self.one_standard_error)
        self.C_ = float(self.Cs_[chosen])
        if self.refit:
            head = self._head(self.C_).set_params(tol=1e-8, max_iter=2000).fit(X, y, sample_weight=weights)
            self.coef_, self.intercept_ = head.coef_, head.intercept_
        else:
            theta = np.mean([theta for _, _, thetas in folds if (theta := thetas[chosen]) is not None], axis=0)
            self.coef_, self.intercept_ = theta[:, :-1], theta[:, -1]
        return self

    def _head(self, C: float) -> SoftmaxRegression:
        return SoftmaxRegression(
            C,
            fit_intercept=self.fit_intercept,
            class_weight=self.class_weight,
            tol=self.tol,
            max_iter=self.max_iter,
            multilabel=self.multilabel,
        )

    def _splits(self, X: NDArray[Any], y: NDArray[Any]) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        cv = check_cv(self.cv, y, classifier=True)
        if self.random_state is not None and isinstance(self.cv, int):
            cv.shuffle, cv.random_state = True, self.random_state
        return list(cv.split(X, y))

    def _fold(
        self,
        X: NDArray[Any],
        y: NDArray[Any],
        classes: NDArray[Any],
        weights: Array,
        given: Array | None,
        split: tuple[NDArray[np.intp], NDArray[np.intp]],
    ) -> tuple[list[float], list[int], list[Array | None]]:
        """Scores, steps and thetas of every strength on one fold."""
        train, test = split
        targets = class_targets(y[train], weights[train], self.class_weight, self.multilabel_)
        rows = np.searchsorted(classes, targets.classes)
        head = self._head(1.0)
        head.classes_, head.multilabel_, head.n_features_in_ = classes, self.multilabel_, X.shape[1]
        scorer = None if self.scoring is None else get_scorer(self.scoring)
        held_out = np.asarray(_rows(X, test), np.float64), y[test]
        more = {} if given is None else {"sample_weight": given[test]}
        scores, steps, thetas = list[float](), list[int](), list[Array | None]()
        with Workers(float(len(train)) * X.shape[1] * len(targets.classes)) as workers:
            problem = problem_of(_rows(X, train), targets, 1.0, fit_intercept=self.fit_intercept, workers=workers)
            for found in solutions(problem, 1 / self.Cs_, tol=self.tol, max_iter=self.max_iter):
                head.coef_, head.intercept_ = _of_all(found, rows, len(classes), targets.multilabel)
                scores.append(head.score(*held_out, **more) if scorer is None else scorer(head, *held_out, **more))
                steps.append(found.steps)
                thetas.append(None if self.refit else np.column_stack([head.coef_, head.intercept_]))
        return scores, steps, thetas

    def _scores(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        return X @ self.coef_.T + self.intercept_


def of_folds(
    work: Callable[[Fold], Found], folds: Sequence[Fold], *, shape: tuple[int, int, int], jobs: int | None
) -> list[Found]:
    """``work`` of each fold, with scikit-learn's settings as they are here.

    Parameters
    ----------
    work : callable
        To be pickled, if there are to be processes.
    folds : sequence
    shape : (n, d, k)
        How many rows, columns and classes there are in all.
    jobs : int or None
        As joblib takes them; where that is one, it is this process.
    """
    if effective_n_jobs(jobs) > 1:
        found: list[Found] = Parallel(n_jobs=jobs)(delayed(work)(fold) for fold in folds)
        return found
    settings = get_config()

    def one(fold: Fold) -> Found:
        with config_context(**settings):
            return work(fold)

    n, d, k = shape
    small = n * d <= SMALL_NUMBERS and n * d * k <= SMALL_PRODUCTS
    return side_by_side(one, folds) if small else [one(fold) for fold in folds]


def _rows(X: NDArray[Any], which: NDArray[np.intp]) -> NDArray[Any]:
    """Some rows; a view where they are neighbours in their order."""
    if len(which) and (np.diff(which) == 1).all():
        return X[which[0] : which[-1] + 1]
    return X[which]


def best_strength(scores: Array, one_standard_error: bool) -> int:
    """The place of the best strength; the strongest penalty among equals.

    Parameters
    ----------
    scores : ndarray of shape (folds, s)
        Of strengths in ascending order.
    one_standard_error : bool
        The strongest penalty whose mean score is within one standard error of the best.
    """
    means = scores.mean(axis=0)
    best = int(means.argmax())
    if not one_standard_error or len(scores) < 2:
        return best
    error = scores[:, best].std(ddof=1) / np.sqrt(len(scores))
    return int(np.flatnonzero(means >= means[best] - error)[0])


def solutions(problem: Problem, ridges: Array, *, tol: float, max_iter: int) -> Iterator[Solution]:
    """The minimum of one problem under each of several penalties, from the strongest to the weakest.

    Parameters
    ----------
    problem : Problem
    ridges : ndarray of shape (s,)
        Descending.
    tol : float
        Estimated relative gap.
    max_iter : int
        Most steps for each.
    """
    basis = None
    if problem.n < problem.d:
        problem, basis = into_row_space(problem)
    problem = problem.ready_in(dtype_of(problem))
    memory, points, before = Memory(), list[Point](), ridges[0]

    def search(varying: Problem) -> Solution:
        start = _start(varying, before, points)
        found = minimise(varying, tol=tol, max_iter=max_iter, start=start, memory=memory, estimate=True)
        if found.point is not None:
            points[:] = [*points[-1:], found.point]
        return found

    for ridge in ridges:
        memory.repenalise(ridge - before, problem.d + 1)
        found = solve(replace(problem, ridge=float(ridge)), search)
        before = ridge
        yield found if basis is None else replace(found, W=found.W @ basis.T)


def _start(problem: Problem, before: float, points: list[Point]) -> Point | None:
    """What the two strengths before point to, if that is better than the last."""
    if not points:
        return None
    _, here = replace(problem, ridge=before).under(problem.ridge, points[-1])
    if len(points) == 1:
        return here
    ahead = problem.at(2 * here.theta - points[-2].theta, np.float32)
    return ahead if ahead.values.sum() < here.values.sum() else here


def _of_all(found: Solution, rows: NDArray[np.intp], k: int, multilabel: bool) -> tuple[Array, Array]:
    """W and b with rows for the classes that a fold's training rows lack; those are as good as impossible."""
    if multilabel or len(rows) == k:
        return found.W, found.b
    W, b = found.W, found.b
    if len(rows) == 2:
        W, b = np.concatenate([-W, W]) / 2, np.concatenate([-b, b]) / 2
    all_W, all_b = np.zeros((k, W.shape[1])), np.full(k, b.min() - ABSENT)
    all_W[rows], all_b[rows] = W, b
    return all_W, all_b
