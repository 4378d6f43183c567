"""Heads that are trained by minibatches: a linear layer and a multi-layer perceptron.

torch is needed to fit and not to predict: what is learnt is numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state

from featpipe.heads import ranges
from featpipe.heads.classes import ScoredClassifier, class_targets, rows_to_fit, scores_of
from featpipe.heads.training import Data, Loss, Plan, Trained, train

__all__ = ["LinearClassifier", "LinearRegressor", "MLPClassifier", "MLPRegressor"]


class _TorchHead(BaseEstimator):
    """What the four have in common: settings, the inner validation rows, and the network on numpy."""

    coefs_: list[NDArray[Any]]
    intercepts_: list[NDArray[Any]]
    random_state: int | np.random.RandomState | None

    def check_params(self) -> None:
        """Refuse settings out of range, with a ValueError."""
        self._plan().check()
        for width in self._hidden():
            ranges.whole("hidden", width, least=1)
        weights = getattr(self, "class_weight", None)
        if weights is not None and not isinstance(weights, Mapping):
            ranges.choice("class_weight", weights, ["balanced"])

    def _plan(self) -> Plan:
        return Plan(**{f.name: getattr(self, f.name) for f in fields(Plan) if hasattr(self, f.name)})

    def _hidden(self) -> tuple[Any, ...]:
        hidden = getattr(self, "hidden", ())
        return tuple(hidden) if isinstance(hidden, Sequence | np.ndarray) else (hidden,)

    def _train(self, data: Data, *, outputs: int, loss: Loss) -> Trained:
        plan, random = self._plan(), check_random_state(self.random_state)
        held_out = None
        if plan.early_stopping:
            chosen = _validation_rows(data.Y if loss == "softmax" else None, len(data.X), plan, random)
            data, held_out = data.take(np.flatnonzero(~chosen)), data.take(np.flatnonzero(chosen))
        seed = int(random.randint(2**31 - 1))
        return train(data, held_out, hidden=self._hidden(), outputs=outputs, loss=loss, plan=plan, seed=seed)

    def _keep(self, trained: Trained) -> None:
        self.coefs_, self.intercepts_ = trained.coefs, trained.intercepts
        self.loss_curve_, self.validation_curve_ = trained.losses, trained.validation_losses
        self.n_iter_, self.best_epoch_ = len(trained.losses), trained.best_epoch

    def _scores(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        for coef, intercept in zip(self.coefs_[:-1], self.intercepts_[:-1], strict=True):
            X = np.maximum(X @ coef + intercept, 0)
        return X @ self.coefs_[-1] + self.intercepts_[-1]


def _validation_rows(
    codes: NDArray[np.int64] | None, n: int, plan: Plan, random: np.random.RandomState
) -> NDArray[np.bool_]:
    """Which rows are held out for early stopping, shape (n,): class by class, a class's last row never."""
    chosen = np.zeros(n, bool)
    codes = np.zeros(n, np.int64) if codes is None else codes
    for code in np.unique(codes):
        rows = random.permutation(np.flatnonzero(codes == code))
        chosen[rows[: min(round(plan.validation_fraction * len(rows)), len(rows) - 1)]] = True
    if not chosen.any():
        raise ValueError(
            f"early_stopping finds no validation rows: {plan.validation_fraction:g} of n_samples={n} is less than "
            "one in every class; raise validation_fraction, give more rows or set early_stopping to false"
        )
    return chosen


class _TorchClassifier(ScoredClassifier, _TorchHead):
    class_weight: Mapping[Any, float] | str | None
    multilabel: bool | None

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Learn from n rows; nothing of an earlier fit remains.

        Parameters
        ----------
        X : array-like of shape (n, d)
            float32 is trained in float32, anything else in float64.
        y : array-like of shape (n,) or (n, k)
            Classes, or 0 and 1 for each label.
        sample_weight : array-like of shape (n,), optional
            Rows of weight zero count as absent.
        """
        self.check_params()
        X, y, weights = rows_to_fit(self, X, y, sample_weight, dtype=[np.float64, np.float32])
        targets = class_targets(y, weights, self.class_weight, self.multilabel)
        trained = self._train(
            Data(X, targets.Y, targets.weights),
            outputs=len(targets.classes),
            loss="sigmoid" if targets.multilabel else "softmax",
        )
        self._keep(trained)
        self.classes_, self.multilabel_ = targets.classes, targets.multilabel
        if len(self.classes_) == 2 and not self.multilabel_:
            self.coefs_[-1] = np.diff(self.coefs_[-1], axis=1)
            self.intercepts_[-1] = np.diff(self.intercepts_[-1])
        return self


class _TorchRegressor(RegressorMixin, _TorchHead):
    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Learn from n rows; nothing of an earlier fit remains.

        Parameters
        ----------
        X : array-like of shape (n, d)
            float32 is trained in float32, anything else in float64.
        y : array-like of shape (n,) or (n, t)
            Numbers of any size and unit: each target is standardised inside.
        sample_weight : array-like of shape (n,), optional
            Rows of weight zero count as absent.
        """
        self.check_params()
        X, y, weights = rows_to_fit(self, X, y, sample_weight, dtype=[np.float64, np.float32], y_numeric=True)
        self._single = y.ndim == 1
        targets = y.reshape(len(y), -1).astype(np.float64)
        mean = np.average(targets, axis=0, weights=weights)
        spread = np.sqrt(np.average((targets - mean) ** 2, axis=0, weights=weights))
        spread[spread == 0] = 1.0
        trained = self._train(Data(X, (targets - mean) / spread, weights), outputs=targets.shape[1], loss="squares")
        self._keep(trained)
        # In float64: a target's mean can be large beside its spread.
        self.coefs_[-1] = self.coefs_[-1] * spread
        self.intercepts_[-1] = self.intercepts_[-1] * spread + mean
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Numbers of shape (m,) or (m, t), as y was.

        Parameters
        ----------
        X : array-like of shape (m, d)
        """
        answers = scores_of(self, X)
        return answers[:, 0] if self._single else answers

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class LinearClassifier(_TorchClassifier):
    """One linear layer on a softmax, or a sigmoid for each label, trained by minibatches.

    Parameters
    ----------
    optimizer, learning_rate, …, patience :
        As in `featpipe.heads.training.Plan`, whose defaults these are.
    class_weight : mapping, "balanced" or None
        Weight of each class, 1 where none is given; "balanced" is inverse to the frequencies. With several labels a row
        the keys are 0 and 1.
    multilabel : bool or None
        Whether y is a 0/1 matrix of shape (n, k). None: whether it has two or more columns.
    random_state : int, RandomState or None
        With an int, two fits on one machine agree exactly.

    Attributes
    ----------
    coefs_ : list of ndarray of shape (fan_in, fan_out)
        The weights of each layer, the last of one column for two classes.
    intercepts_ : list of ndarray of shape (fan_out,)
    classes_ : ndarray of shape (k,)
    loss_curve_ : list of float
        Mean training loss of each epoch.
    validation_curve_ : list of float
        Loss on the held-out rows after each epoch; empty without early stopping.
    best_epoch_ : int
        From 1; the epoch whose weights are kept.
    n_iter_ : int
        Epochs run.
    n_features_in_ : int
    """

    def __init__(
        self,
        *,
        optimizer: str = Plan.optimizer,
        learning_rate: float = Plan.learning_rate,
        weight_decay: float = Plan.weight_decay,
        momentum: float = Plan.momentum,
        schedule: str = Plan.schedule,
        batch_size: int = Plan.batch_size,
        epochs: int = Plan.epochs,
        label_smoothing: float = Plan.label_smoothing,
        early_stopping: bool = Plan.early_stopping,
        validation_fraction: float = Plan.validation_fraction,
        patience: int = Plan.patience,
        class_weight: Mapping[Any, float] | str | None = None,
        multilabel: bool | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.schedule = schedule
        self.batch_size = batch_size
        self.epochs = epochs
        self.label_smoothing = label_smoothing
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.class_weight = class_weight
        self.multilabel = multilabel
        self.random_state = random_state

    @property
    def coef_(self) -> NDArray[Any]:
        """Weights of shape (k, d), (1, d) for two classes."""
        return self.coefs_[0].T

    @property
    def intercept_(self) -> NDArray[Any]:
        return self.intercepts_[0]


class LinearRegressor(_TorchRegressor):
    """One linear layer, trained by minibatches on squared errors.

    Parameters
    ----------
    optimizer, learning_rate, …, patience :
        As in `featpipe.heads.training.Plan`, whose defaults these are.
    random_state : int, RandomState or None
        With an int, two fits on one machine agree exactly.

    Attributes
    ----------
    coefs_ : list of ndarray of shape (fan_in, fan_out)
        The weights of each layer, the last in the units of y.
    intercepts_ : list of ndarray of shape (fan_out,)
    loss_curve_ : list of float
        Mean training loss of each epoch.
    validation_curve_ : list of float
        Loss on the held-out rows after each epoch; empty without early stopping.
    best_epoch_ : int
        From 1; the epoch whose weights are kept.
    n_iter_ : int
        Epochs run.
    n_features_in_ : int
    """

    def __init__(
        self,
        *,
        optimizer: str = Plan.optimizer,
        learning_rate: float = Plan.learning_rate,
        weight_decay: float = Plan.weight_decay,
        momentum: float = Plan.momentum,
        schedule: str = Plan.schedule,
        batch_size: int = Plan.batch_size,
        epochs: int = Plan.epochs,
        early_stopping: bool = Plan.early_stopping,
        validation_fraction: float = Plan.validation_fraction,
        patience: int = Plan.patience,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.schedule = schedule
        self.batch_size = batch_size
        self.epochs = epochs
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.random_state = random_state

    @property
    def coef_(self) -> NDArray[Any]:
        """Weights of shape (t, d)."""
        return self.coefs_[0].T

    @property
    def intercept_(self) -> NDArray[Any]:
        return self.intercepts_[0]


class MLPClassifier(_TorchClassifier):
    """A perceptron with rectified hidden layers, on a softmax or a sigmoid for each label.

    Parameters
    ----------
    hidden : int or sequence of int
        Widths of the hidden layers.
    optimizer, learning_rate, …, patience :
        As in `featpipe.heads.training.Plan`, whose defaults these are.
    class_weight : mapping, "balanced" or None
        Weight of each class, 1 where none is given; "balanced" is inverse to the frequencies. With several labels a row
        the keys are 0 and 1.
    multilabel : bool or None
        Whether y is a 0/1 matrix of shape (n, k). None: whether it has two or more columns.
    random_state : int, RandomState or None
        With an int, two fits on one machine agree exactly.

    Attributes
    ----------
    coefs_ : list of ndarray of shape (fan_in, fan_out)
        The weights of each layer, the last of one column for two classes.
    intercepts_ : list of ndarray of shape (fan_out,)
    classes_ : ndarray of shape (k,)
    loss_curve_ : list of float
        Mean training loss of each epoch.
    validation_curve_ : list of float
        Loss on the held-out rows after each epoch; empty without early stopping.
    best_epoch_ : int
        From 1; the epoch whose weights are kept.
    n_iter_ : int
        Epochs run.
    n_features_in_ : int
    """

    def __init__(
        self,
        hidden: int | Sequence[int] = (512,),
        *,
        optimizer: str = Plan.optimizer,
        learning_rate: float = Plan.learning_rate,
        weight_decay: float = Plan.weight_decay,
        momentum: float = Plan.momentum,
        schedule: str = Plan.schedule,
        batch_size: int = Plan.batch_size,
        epochs: int = Plan.epochs,
        dropout: float = Plan.dropout,
        label_smoothing: float = Plan.label_smoothing,
        early_stopping: bool = Plan.early_stopping,
        validation_fraction: float = Plan.validation_fraction,
        patience: int = Plan.patience,
        class_weight: Mapping[Any, float] | str | None = None,
        multilabel: bool | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.hidden = hidden
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.schedule = schedule
        self.batch_size = batch_size
        self.epochs = epochs
        self.dropout = dropout
        self.label_smoothing = label_smoothing
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.class_weight = class_weight
        self.multilabel = multilabel
        self.random_state = random_state


class MLPRegressor(_TorchRegressor):
    """A perceptron with rectified hidden layers, trained on squared errors.

    Parameters
    ----------
    hidden : int or sequence of int
        Widths of the hidden layers.
    optimizer, learning_rate, …, patience :
        As in `featpipe.heads.training.Plan`, whose defaults these are.
    random_state : int, RandomState or None
        With an int, two fits on one machine agree exactly.

    Attributes
    ----------
    coefs_ : list of ndarray of shape (fan_in, fan_out)
        The weights of each layer, the last in the units of y.
    intercepts_ : list of ndarray of shape (fan_out,)
    loss_curve_ : list of float
        Mean training loss of each epoch.
    validation_curve_ : list of float
        Loss on the held-out rows after each epoch; empty without early stopping.
    best_epoch_ : int
        From 1; the epoch whose weights are kept.
    n_iter_ : int
        Epochs run.
    n_features_in_ : int
    """

    def __init__(
        self,
        hidden: int | Sequence[int] = (512,),
        *,
        optimizer: str = Plan.optimizer,
        learning_rate: float = Plan.learning_rate,
        weight_decay: float = Plan.weight_decay,
        momentum: float = Plan.momentum,
        schedule: str = Plan.schedule,
        batch_size: int = Plan.batch_size,
        epochs: int = Plan.epochs,
        dropout: float = Plan.dropout,
        early_stopping: bool = Plan.early_stopping,
        validation_fraction: float = Plan.validation_fraction,
        patience: int = Plan.patience,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.hidden = hidden
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.schedule = schedule
        self.batch_size = batch_size
        self.epochs = epochs
        self.dropout = dropout
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.random_state = random_state
