"""Logistic regression with its penalty selected by cross-validation along a path."""

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

from featpipe.config import check_bool, check_choice, check_number
from featpipe.heads.logistic.estimator import SoftmaxRegression, make_problem, solve
from featpipe.heads.logistic.lbfgs import LBFGSHistory
from featpipe.heads.logistic.objective import LogisticProblem, Point
from featpipe.heads.logistic.solver import Solution, minimize, project_to_row_space, select_search_dtype
from featpipe.heads.targets import ScoredClassifier, encode_targets, validate_training_data
from featpipe.runtime import BlasThreadPool, map_in_parallel

Array = NDArray[np.float64]

# The grid of Kornblith, Shlens and Le, Do Better ImageNet Models Transfer Better? (CVPR 2019), section A.2.
C_GRID = tuple(np.logspace(-6, 5, 45).tolist())
MISSING_CLASS_MARGIN = 50.0
# Folds of problems up to this size run in parallel, one thread each: they fit into memory together and take seconds.
MAX_THREADED_VALUES, MAX_THREADED_PRODUCTS = 1 << 24, 1e9

Fold = TypeVar("Fold")
Result = TypeVar("Result")


class SoftmaxRegressionCV(ScoredClassifier, BaseEstimator):
    """`SoftmaxRegression` with C selected by cross-validation.

    Parameters
    ----------
    Cs : sequence of float
        Candidates: inverse strengths of the penalty.
    cv : int, splitter or iterable of (train rows, test rows)
    scoring : str, callable or None
        The name of a scikit-learn scorer, or a callable (head, X, y) → number, higher is better. None is accuracy.
    one_standard_error : bool
        Select the strongest penalty whose mean score is within one standard error of the best.
    refit : bool
        Fit to all rows at the end; otherwise average the parameters of the folds.
    fit_intercept, class_weight, multilabel
        As in `SoftmaxRegression`.
    tol : float
        Estimated relative gap at which a search on a fold ends.
    max_iter : int
        Maximum number of steps for each C.
    n_jobs : int or None
        Number of processes for the folds; 1, and None outside of a joblib context, use this process, whose threads run
        small folds in parallel.
    random_state : int or None
        Seed of the shuffle before the split when ``cv`` is a number; None keeps the order of the rows.

    Attributes
    ----------
    C_ : float
    Cs_ : ndarray of shape (s,)
        Ascending.
    scores_ : ndarray of shape (folds, s)
    n_iter_ : ndarray of shape (folds, s)
        Number of steps.
    coef_, intercept_, classes_
        As in `SoftmaxRegression`.

    Notes
    -----
    On each fold penalties are solved from the strongest to the weakest. Each search starts from an extrapolation of the
    two previous solutions and reuses their L-BFGS history and preconditioner. Folds share no information.

    Examples
    --------
    >>> X, y = [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]], [0, 0, 0, 1, 1, 1]
    >>> SoftmaxRegressionCV(Cs=(0.01, 1.0), cv=3, scoring="neg_log_loss").fit(X, y).C_
    1.0
    """

    __module__ = "featpipe.heads"

    def __init__(
        self,
        Cs: Any = C_GRID,
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
        """Raise ValueError for settings out of range."""
        if np.ndim(self.Cs) != 1 or not len(self.Cs):
            raise ValueError(f"Cs is {self.Cs!r}; give a sequence of numbers above 0")
        for C in np.asarray(self.Cs).tolist():
            check_number("each of Cs", C, above=0)
        for name in ("one_standard_error", "refit"):
            check_bool(name, getattr(self, name))
        if isinstance(self.scoring, str):
            check_choice("scoring", self.scoring, get_scorer_names())
        self._make_head(1.0).check_params()

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Select C and fit W and b.

        Parameters
        ----------
        X : array-like of shape (n, d)
        y : array-like of shape (n,) or (n, k)
            Classes, or 0 and 1 for each label.
        sample_weight : array-like of shape (n,), optional
            Used by the fits, and by scorers that take weights. Rows of weight zero are ignored.
        """
        self.check_params()
        X, y, weights = validate_training_data(self, X, y, sample_weight, dtype=[np.float64, np.float32])
        targets = encode_targets(y, weights, None, self.multilabel)
        # Scorers do not accept object arrays.
        class_labels = np.asarray(targets.classes.tolist())
        y = targets.Y if targets.multilabel else class_labels[targets.Y]
        self.Cs_ = np.unique(np.asarray(self.Cs, np.float64))
        self.classes_, self.multilabel_ = targets.classes, targets.multilabel
        score_weights = None if sample_weight is None else weights
        score_fold = partial(self._score_fold, X, y, class_labels, weights, score_weights)
        fold_results = map_folds(
            score_fold, self._make_splits(X, y), shape=(*X.shape, len(targets.classes)), n_jobs=self.n_jobs
        )
        self.scores_ = np.array([scores for scores, _, _ in fold_results])
        self.n_iter_ = np.array([steps for _, steps, _ in fold_results])
        best_index = select_best_C(self.scores_, self.one_standard_error)
        self.C_ = float(self.Cs_[best_index])
        if self.refit:
            head = self._make_head(self.C_).set_params(tol=1e-8, max_iter=2000).fit(X, y, sample_weight=weights)
            self.coef_, self.intercept_ = head.coef_, head.intercept_
        else:
            theta = np.mean(
                [theta for _, _, thetas in fold_results if (theta := thetas[best_index]) is not None], axis=0
            )
            self.coef_, self.intercept_ = theta[:, :-1], theta[:, -1]
        return self

    def _make_head(self, C: float) -> SoftmaxRegression:
        return SoftmaxRegression(
            C,
            fit_intercept=self.fit_intercept,
            class_weight=self.class_weight,
            tol=self.tol,
            max_iter=self.max_iter,
            multilabel=self.multilabel,
        )

    def _make_splits(self, X: NDArray[Any], y: NDArray[Any]) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        cv = check_cv(self.cv, y, classifier=True)
        if self.random_state is not None and isinstance(self.cv, int):
            cv.shuffle, cv.random_state = True, self.random_state
        return list(cv.split(X, y))

    def _score_fold(
        self,
        X: NDArray[Any],
        y: NDArray[Any],
        classes: NDArray[Any],
        weights: Array,
        score_weights: Array | None,
        split: tuple[NDArray[np.intp], NDArray[np.intp]],
    ) -> tuple[list[float], list[int], list[Array | None]]:
        """Scores, numbers of steps and parameters for every C on one fold."""
        train, test = split
        targets = encode_targets(y[train], weights[train], self.class_weight, self.multilabel_)
        class_positions = np.searchsorted(classes, targets.classes)
        head = self._make_head(1.0)
        head.classes_, head.multilabel_, head.n_features_in_ = classes, self.multilabel_, X.shape[1]
        scorer = None if self.scoring is None else get_scorer(self.scoring)
        held_out = np.asarray(_select_rows(X, test), np.float64), y[test]
        score_kwargs = {} if score_weights is None else {"sample_weight": score_weights[test]}
        scores, steps, thetas = list[float](), list[int](), list[Array | None]()
        with BlasThreadPool(float(len(train)) * X.shape[1] * len(targets.classes)) as workers:
            problem = make_problem(
                _select_rows(X, train), targets, 1.0, fit_intercept=self.fit_intercept, workers=workers
            )
            for solution in solve_path(problem, 1 / self.Cs_, tol=self.tol, max_iter=self.max_iter):
                head.coef_, head.intercept_ = _expand_to_all_classes(
                    solution, class_positions, len(classes), targets.multilabel
                )
                scores.append(
                    head.score(*held_out, **score_kwargs) if scorer is None else scorer(head, *held_out, **score_kwargs)
                )
                steps.append(solution.steps)
                thetas.append(None if self.refit else np.column_stack([head.coef_, head.intercept_]))
        return scores, steps, thetas

    def _scores(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        return X @ self.coef_.T + self.intercept_


def map_folds(
    function: Callable[[Fold], Result], folds: Sequence[Fold], *, shape: tuple[int, int, int], n_jobs: int | None
) -> list[Result]:
    """Apply a function to each fold, in parallel, with the caller's scikit-learn configuration.

    Parameters
    ----------
    function : callable
        Must be picklable if several processes are used.
    folds : sequence
    shape : (n, d, k)
        Numbers of rows, columns and classes.
    n_jobs : int or None
        As in joblib; one job runs in this process.
    """
    if effective_n_jobs(n_jobs) > 1:
        results: list[Result] = Parallel(n_jobs=n_jobs)(delayed(function)(fold) for fold in folds)
        return results
    settings = get_config()

    def run_with_settings(fold: Fold) -> Result:
        with config_context(**settings):
            return function(fold)

    n, d, k = shape
    is_small = n * d <= MAX_THREADED_VALUES and n * d * k <= MAX_THREADED_PRODUCTS
    return map_in_parallel(run_with_settings, folds) if is_small else [run_with_settings(fold) for fold in folds]


def _select_rows(X: NDArray[Any], rows: NDArray[np.intp]) -> NDArray[Any]:
    """Rows of X; a view if they are contiguous."""
    if len(rows) and (np.diff(rows) == 1).all():
        return X[rows[0] : rows[-1] + 1]
    return X[rows]


def select_best_C(scores: Array, one_standard_error: bool) -> int:
    """The index of the best C; the strongest penalty among equals.

    Parameters
    ----------
    scores : ndarray of shape (folds, s)
        In ascending order of C.
    one_standard_error : bool
        Select the strongest penalty whose mean score is within one standard error of the best.
    """
    means = scores.mean(axis=0)
    best_index = int(means.argmax())
    if not one_standard_error or len(scores) < 2:
        return best_index
    standard_error = scores[:, best_index].std(ddof=1) / np.sqrt(len(scores))
    return int(np.flatnonzero(means >= means[best_index] - standard_error)[0])


def solve_path(problem: LogisticProblem, ridges: Array, *, tol: float, max_iter: int) -> Iterator[Solution]:
    """Minimise a problem under several penalties, from the strongest to the weakest.

    Parameters
    ----------
    problem : LogisticProblem
    ridges : ndarray of shape (s,)
        Descending.
    tol : float
        Estimated relative gap.
    max_iter : int
        Maximum number of steps for each penalty.
    """
    basis = None
    if problem.n < problem.d:
        problem, basis = project_to_row_space(problem)
    problem = problem.materialize(select_search_dtype(problem))
    memory, points, previous_ridge = LBFGSHistory(), list[Point](), ridges[0]

    def minimize_from_previous(subproblem: LogisticProblem) -> Solution:
        start = _extrapolate_start(subproblem, previous_ridge, points)
        solution = minimize(subproblem, tol=tol, max_iter=max_iter, start=start, history=memory, estimate=True)
        if solution.point is not None:
            points[:] = [*points[-1:], solution.point]
        return solution

    for ridge in ridges:
        memory.update_penalty(ridge - previous_ridge, problem.d + 1)
        solution = solve(replace(problem, ridge=float(ridge)), minimize_from_previous)
        previous_ridge = ridge
        yield solution if basis is None else replace(solution, W=solution.W @ basis.T)


def _extrapolate_start(problem: LogisticProblem, previous_ridge: float, points: list[Point]) -> Point | None:
    """Extrapolate the two previous solutions; return the last solution if it is better."""
    if not points:
        return None
    _, last_point = replace(problem, ridge=previous_ridge).with_ridge(problem.ridge, points[-1])
    if len(points) == 1:
        return last_point
    extrapolated_point = problem.evaluate(2 * last_point.theta - points[-2].theta, np.float32)
    return extrapolated_point if extrapolated_point.values.sum() < last_point.values.sum() else last_point


def _expand_to_all_classes(
    solution: Solution, class_positions: NDArray[np.intp], k: int, multilabel: bool
) -> tuple[Array, Array]:
    """Add rows to W and b for classes absent from a fold's training rows, with negligible probability."""
    if multilabel or len(class_positions) == k:
        return solution.W, solution.b
    W, b = solution.W, solution.b
    if len(class_positions) == 2:
        W, b = np.concatenate([-W, W]) / 2, np.concatenate([-b, b]) / 2
    all_W, all_b = np.zeros((k, W.shape[1])), np.full(k, b.min() - MISSING_CLASS_MARGIN)
    all_W[class_positions], all_b[class_positions] = W, b
    return all_W, all_b


__test__ = {"SoftmaxRegressionCV": SoftmaxRegressionCV}  # doctest looks for classes by their module
