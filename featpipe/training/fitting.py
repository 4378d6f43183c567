"""One head, fitted on some rows: with its settings chosen, its rows balanced and its features streamed where asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import heads, split
from featpipe.calibration import Calibration, logits_of
from featpipe.errors import ConfigError
from featpipe.heads.balance import drawn_rows, fit_balanced, resample
from featpipe.training.rows import Rows
from featpipe.training.selection import Choice, choose_strength, scorer_of, search, subset

__all__ = ["Fitted", "Plan"]

ROWS_AT_ONCE = 1 << 16
TUNING_ROWS = 20_000  # the most that settings are tried on where features stay in the file
WATCHED_SEED = 2  # other rows than those of the folds
LOWEST_LOGIT = -30.0  # beside the others, of a class that a fold was not fitted on


@dataclass(frozen=True)
class Plan:
    """How a head is to be fitted.

    Attributes
    ----------
    head : str
    task : {"classification", "regression", "multilabel"}
    params : mapping
        Settings of the head; weights of classes by class number.
    grid : mapping from setting to values
        What is tried; the head's own grid where ``tune`` is true and this is empty.
    tune : bool or None
        None tunes the strength of ``logistic`` alone, where it was not set.
    metric : str or None
        What settings are chosen by.
    one_standard_error : bool
        The strongest penalty whose score is within one standard error of the best.
    balance : str or None
        How rows are resampled before the fit, see :func:`featpipe.heads.balance.resample`.
    random_state : int or None
    jobs : int or None
        Processes for the search.
    """

    head: str
    task: str
    params: Mapping[str, object] = field(default_factory=dict)
    grid: Mapping[str, Sequence[object]] = field(default_factory=dict)
    tune: bool | None = None
    metric: str | None = None
    one_standard_error: bool = False
    balance: str | None = None
    random_state: int | None = 0
    jobs: int | None = None

    def check(self) -> None:
        """Refuse what cannot be, before any work."""
        heads.build(self.head, self.task, params=self.params, random_state=self.random_state)
        scorer_of(self.task, self.metric)
        if self.one_standard_error and not self.tunes_strength:
            raise ConfigError("one_standard_error is for the strength C of logistic, where C is not set")
        if self.balance and self.task != "classification":
            raise ConfigError(f"balance={self.balance} is for classification, not for {self.task}")
        for key, values in self._grid().items():
            for value in values:
                heads.build(self.head, self.task, params={**self.params, key: value}, random_state=self.random_state)

    @property
    def tunes_strength(self) -> bool:
        """Whether the strength of ``logistic`` is chosen along its whole path."""
        path = self.head == "logistic" and not self.grid and self.tune is not False
        return path and not {"C", "head__C"} & set(self.params) and self.params.get("penalty") in (None, "l2")

    def _grid(self) -> Mapping[str, Sequence[object]]:
        if self.grid or not self.tune or self.tunes_strength:
            return self.grid
        own = heads.spec_of(self.head).grid
        grid = {key: values for key, values in own.items() if not {key, f"head__{key}"} & set(self.params)}
        if not grid:
            raise ConfigError(f"there is nothing to tune of head {self.head!r}; say what to try: --grid SETTING=A,B")
        return grid

    def fit(self, rows: Rows) -> Fitted:
        """Fit on all of some rows.

        Raises
        ------
        ConfigError
            If the head cannot be fitted on them.
        """
        started = perf_counter()
        choice = self._choose(rows)
        params = {**self.params, **(choice.settings if choice else {})}
        estimator = heads.build(self.head, self.task, params=params, random_state=self.random_state)
        tuned = perf_counter()
        self._fit(estimator, rows)
        done = perf_counter()
        return Fitted(estimator, self.task, rows.classes, choice, tuned - started, done - tuned)

    def _fit(self, estimator: Any, rows: Rows) -> None:
        head = estimator[-1]
        if rows.streamed:
            rows, weights = self._drawn(rows)
            heads.fit_streamed(estimator, rows.X, rows.y, weights)
        elif getattr(head, "early_stopping", False) is True:
            _fit_watched(estimator, rows, self)
        elif self.balance:
            fit_balanced(estimator, np.asarray(rows.X), rows.y, self.balance, self.random_state)
        else:
            estimator.fit(np.asarray(rows.X), rows.y)

    def _drawn(self, rows: Rows) -> tuple[Rows, NDArray[np.int64] | None]:
        """The rows of a balanced fit, and how often each is drawn, which as a weight has the same effect."""
        if not self.balance:
            return rows, None
        if self.balance == "smote":
            raise ConfigError("balance=smote needs all rows in memory; take over or class_weight=balanced")
        drawn, times = np.unique(drawn_rows(rows.y, self.balance, self.random_state), return_counts=True)
        return rows.take(drawn), times if times.max() > 1 else None

    def _choose(self, rows: Rows) -> Choice | None:
        grid = self._grid()
        if not grid and not self.tunes_strength:
            return None
        some = subset(rows, TUNING_ROWS) if rows.streamed else rows
        if self.tunes_strength:
            return choose_strength(self, some, len(rows))
        return search(self, some, grid)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted head.

    Attributes
    ----------
    estimator : Pipeline
    task : str
    classes : tuple of str
    choice : Choice or None
    seconds_to_tune, seconds_to_fit : float
    """

    estimator: Any
    task: str
    classes: tuple[str, ...]
    choice: Choice | None
    seconds_to_tune: float
    seconds_to_fit: float

    @property
    def gives_probabilities(self) -> bool:
        return hasattr(self.estimator, "predict_proba")

    def answers(self, X: Any, calibration: Calibration | None = None) -> NDArray[np.float64]:
        """Probabilities of shape (m, k), or numbers; a few rows at a time."""
        if self.task == "regression":
            return _in_blocks(self.estimator.predict, X)
        if calibration is not None:
            return calibration.probabilities(self.logits(X), self.task == "multilabel")
        return self._in_all_classes(_in_blocks(self.estimator.predict_proba, X), 0.0)

    def logits(self, X: Any) -> NDArray[np.float64]:
        """Scores before the softmax or the sigmoids, shape (m, k)."""
        found = _in_blocks(lambda block: logits_of(self.estimator, block), X)
        return self._in_all_classes(found, float(found.min(initial=0)) + LOWEST_LOGIT)

    def _in_all_classes(self, found: NDArray[np.float64], absent: float) -> NDArray[np.float64]:
        if self.task == "multilabel" or found.shape[1] == len(self.classes):
            return found
        full = np.full((len(found), len(self.classes)), absent)
        full[:, self.estimator.classes_] = found
        return full


def _fit_watched(estimator: Any, rows: Rows, plan: Plan) -> None:
    """Fit with rows held out for early stopping that share no image and no group with the others."""
    head, scaler = estimator[-1], estimator[0]
    y, names = (rows.y, rows.classes) if plan.task == "classification" else (None, None)
    fit, held = split.holdout(
        rows.digests,
        y,
        test=head.validation_fraction,
        seed=WATCHED_SEED,
        groups=rows.groups,
        times=rows.times,
        names=names,
    )
    X, y_fit, watched = rows.X[fit], rows.y[fit], rows.X[held]
    if scaler != "passthrough":
        X, watched = scaler.fit_transform(X), scaler.transform(watched)
    if plan.balance:
        X, y_fit = resample(X, y_fit, plan.balance, plan.random_state)
    head.fit(X, y_fit, validation=(watched, rows.y[held]))


def _in_blocks(answer: Any, X: Any) -> NDArray[np.float64]:
    if isinstance(X, np.ndarray):
        return np.asarray(answer(X), np.float64)
    starts = range(0, len(X), ROWS_AT_ONCE)
    blocks = [answer(np.asarray(X[start : start + ROWS_AT_ONCE], np.float32)) for start in starts]
    return np.concatenate(blocks).astype(np.float64)
