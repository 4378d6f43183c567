"""Heads that are trained by minibatches: a linear layer and a multi-layer perceptron.

torch is needed to fit and not to predict: what is learnt is numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, validate_data

from featpipe.heads import ranges
from featpipe.heads.classes import ScoredClassifier, Targets, class_targets, row_weights, rows_to_fit, scores_of
from featpipe.heads.losses import CLASS_LOSSES, NUMBER_LOSSES, Link, Objective, log_prior
from featpipe.heads.network import ACTIVATIONS, INITIAL_WEIGHTS, Shape, forward
from featpipe.heads.plan import Plan

if TYPE_CHECKING:
    from featpipe.heads.batches import Rows
    from featpipe.heads.moments import RowSource

__all__ = ["LinearClassifier", "LinearRegressor", "MLPClassifier", "MLPRegressor"]

HELD_OUT_MOST = 50_000
TYPES = [np.float64, np.float32, np.float16]

Validation = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class _Examples:
    """Rows of a source with what is to be answered for them: as `Rows`, of which training and validation are made.

    Attributes
    ----------
    source : RowSource of shape (N, d)
    numbers : ndarray of shape (n,)
        Ascending row numbers of the source.
    Y : ndarray of shape (n,) or (n, k)
    weights : ndarray of shape (n,) or (n, k)
    odds : ndarray of shape (n,) or None
        In proportion to which rows are drawn in training, and weighed in validation.
    """

    source: RowSource
    numbers: NDArray[np.intp]
    Y: NDArray[Any]
    weights: NDArray[np.float64]
    odds: NDArray[np.float64] | None = None

    def take(self, chosen: NDArray[np.intp]) -> _Examples:
        odds = None if self.odds is None else self.odds[chosen]
        return _Examples(self.source, self.numbers[chosen], self.Y[chosen], self.weights[chosen], odds)

    def to_train(self, **reading: Any) -> Rows:
        from featpipe.heads.batches import Rows

        return Rows(self.source, self.Y, self.weights, numbers=self.numbers, odds=self.odds, **reading)

    def to_validate(self, **reading: Any) -> Rows:
        from featpipe.heads.batches import Rows

        weights = self.weights if self.odds is None else self.weights * self.odds
        return Rows(self.source, self.Y, weights, numbers=self.numbers, **reading)


class _TorchHead(BaseEstimator):
    """What the four have in common: the inner validation rows, and the network on numpy."""

    def check_params(self) -> None:
        """Refuse settings out of range, with a ValueError."""
        self.check()
        for width in self._hidden():
            ranges.whole("hidden", width, least=1)

    def _hidden(self) -> tuple[Any, ...]:
        hidden = getattr(self, "hidden", ())
        return tuple(hidden) if isinstance(hidden, Sequence | np.ndarray) else (hidden,)

    def _shape(self, inputs: int, outputs: int) -> Shape:
        names = ("activation", "dropout", "initial_weights")
        own = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return Shape((inputs, *self._hidden(), outputs), **own)

    def _train(
        self,
        examples: _Examples,
        validation: _Examples | None,
        objective: Objective,
        outputs: int,
        reading: Mapping[str, NDArray[Any] | None],
    ) -> None:
        # Here, so that a process that only predicts needs no torch.
        from featpipe.heads.training import train

        random = check_random_state(self.random_state)
        if self.early_stopping and validation is None:
            chosen = self._held_out(examples.Y if objective.link == "softmax" else None, len(examples.Y), random)
            examples, validation = examples.take(np.flatnonzero(~chosen)), examples.take(np.flatnonzero(chosen))
        trained = train(
            examples.to_train(**reading),
            None if validation is None else validation.to_validate(**reading),
            shape=self._shape(examples.source.shape[1], outputs),
            objective=objective,
            plan=self,
            seed=int(random.randint(2**31 - 1)),
        )
        self.n_features_in_ = examples.source.shape[1]
        self.coefs_, self.intercepts_ = trained.coefs, trained.intercepts
        self.loss_curve_, self.validation_curve_ = trained.losses, trained.validation_losses
        self.validation_score_curve_ = trained.validation_scores
        self.n_iter_, self.best_epoch_ = len(trained.losses), trained.best_epoch

    def _held_out(self, codes: NDArray[np.int64] | None, n: int, random: np.random.RandomState) -> NDArray[np.bool_]:
        """Which rows are held out for early stopping, shape (n,): class by class, a class's last row never."""
        chosen = np.zeros(n, bool)
        codes = np.zeros(n, np.int64) if codes is None else codes
        share = min(self.validation_fraction, HELD_OUT_MOST / n)
        by_class = np.argsort(codes, kind="stable")
        for rows in np.split(by_class, np.flatnonzero(np.diff(codes[by_class])) + 1):
            chosen[random.permutation(rows)[: min(round(share * len(rows)), len(rows) - 1)]] = True
        if not chosen.any():
            raise ValueError(
                f"early_stopping finds no validation rows: {self.validation_fraction:g} of n_samples={n} is less than "
                "one in every class; raise validation_fraction, give more rows or set early_stopping to false"
            )
        return chosen

    def _checked_validation(self, validation: Validation | None) -> Validation | None:
        """The features and weights of the validation rows, checked, with their y as it is."""
        if validation is None:
            return None
        X, y, weights = _parts(validation)
        X = validate_data(self, X, reset=False, dtype=TYPES, order="C")
        return X, y, weights

    def _scores(self, X: NDArray[Any]) -> NDArray[np.float64]:
        return forward(X, self.coefs_, self.intercepts_, getattr(self, "activation", "relu")).astype(np.float64)


def _parts(validation: Validation) -> tuple[Any, Any, Any]:
    if not isinstance(validation, tuple | list) or len(validation) not in (2, 3):
        raise ValueError("validation must be a pair (X, y), or a triple with sample weights")
    X, y, *weights = validation
    return X, y, weights[0] if weights else None


def _answers(y: Any, rows: int, of: str) -> NDArray[Any]:
    y = check_array(y, ensure_2d=False, dtype=None, accept_sparse="csr", input_name="y")
    y = y.toarray() if hasattr(y, "toarray") else np.asarray(y)
    if len(y) != rows:
        raise ValueError(f"{of} has {rows} rows of X and {len(y)} of y; give as many of both")
    return y


@dataclass(kw_only=True, eq=False, repr=False)
class _TorchClassifier(ScoredClassifier, _TorchHead, Plan):
    loss: str = "cross_entropy"
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    logit_adjustment: float = 0.0
    sampling: str | None = None
    class_weight: Mapping[Any, float] | str | None = None
    multilabel: bool | None = None
    random_state: int | np.random.RandomState | None = None

    def check(self) -> None:
        super().check()
        ranges.choice("loss", self.loss, CLASS_LOSSES)
        ranges.number("focal_gamma", self.focal_gamma, least=0)
        ranges.number("label_smoothing", self.label_smoothing, least=0, below=1)
        ranges.number("logit_adjustment", self.logit_adjustment, least=0)
        if self.sampling is not None:
            ranges.choice("sampling", self.sampling, ["balanced"])
        if self.class_weight is not None and not isinstance(self.class_weight, Mapping):
            ranges.choice("class_weight", self.class_weight, ["balanced"])

    def fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None, validation: Validation | None = None
    ) -> Self:
        """Learn from n rows; nothing of an earlier fit remains.

        Parameters
        ----------
        X : array-like of shape (n, d)
            float32 and float16 are trained in float32, anything else in float64.
        y : array-like of shape (n,) or (n, k)
            Classes, or 0 and 1 for each label.
        sample_weight : array-like of shape (n,), optional
            Rows of weight zero count as absent.
        validation : (X, y) or (X, y, sample_weight), optional
            Rows that are not trained on, in the place of those that early stopping holds out; without early stopping
            their loss and score are recorded.
        """
        self.check_params()
        X, y, weights = rows_to_fit(self, X, y, sample_weight, dtype=TYPES, order="C")
        return self._fit_rows(X, y, weights, validation=self._checked_validation(validation))

    def _fit_rows(
        self,
        source: RowSource,
        y: Any,
        sample_weight: ArrayLike | None,
        center: NDArray[Any] | None = None,
        scale: NDArray[Any] | None = None,
        validation: Validation | None = None,
    ) -> Self:
        """Learn from rows that need not be in memory, read as (x - center) / scale; see `Rows` for their order."""
        weights = row_weights(sample_weight, source.shape[0])
        numbers = np.flatnonzero(weights > 0)
        y = _answers(y, source.shape[0], "the training data")
        targets = class_targets(y[numbers], weights[numbers], self.class_weight, self.multilabel)
        examples = _Examples(source, numbers, targets.Y, targets.weights, self._odds(targets, targets.Y))
        watched = None
        if validation is not None:
            watched = self._examples_to_watch(*_parts(validation), targets, weights[numbers])
        objective = self._objective(examples, targets)
        self._train(examples, watched, objective, len(targets.classes), {"center": center, "scale": scale})
        self.classes_, self.multilabel_ = targets.classes, targets.multilabel
        if len(self.classes_) == 2 and not self.multilabel_:
            self.coefs_[-1] = np.diff(self.coefs_[-1], axis=1)
            self.intercepts_[-1] = np.diff(self.intercepts_[-1])
        return self

    def _objective(self, examples: _Examples, targets: Targets) -> Objective:
        link: Link = "sigmoid" if targets.multilabel else "softmax"
        adjustment = None
        if self.logit_adjustment:
            weights = examples.weights if examples.odds is None else examples.weights * examples.odds
            adjustment = self.logit_adjustment * log_prior(link, targets.Y, weights, len(targets.classes))
        return Objective(link, self.loss, self.focal_gamma, self.label_smoothing, adjustment)

    def _odds(self, targets: Targets, Y: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """How often rows with these answers are drawn."""
        if self.sampling is None:
            return None
        if targets.multilabel:
            raise ValueError("sampling is by class, and y has several labels a row; give class_weight='balanced'")
        return (1 / np.bincount(targets.Y))[Y]

    def _examples_to_watch(
        self, X: RowSource, y: Any, sample_weight: ArrayLike | None, targets: Targets, trained: NDArray[np.float64]
    ) -> _Examples:
        """Validation rows, their classes weighed as those of the training rows."""
        weights = row_weights(sample_weight, X.shape[0])
        numbers = np.flatnonzero(weights > 0)
        y, weights = _answers(y, X.shape[0], "validation")[numbers], weights[numbers]
        if targets.multilabel:
            own = class_targets(y, weights, self.class_weight, True)
            if len(own.classes) != len(targets.classes):
                raise ValueError(
                    f"validation has {len(own.classes)} labels a row, the training data {len(targets.classes)}"
                )
            return _Examples(X, numbers, own.Y, own.weights)
        codes = np.searchsorted(targets.classes, y).clip(max=len(targets.classes) - 1)
        strange = targets.classes[codes] != y
        if strange.any():
            raise ValueError(f"validation has the class {y[strange][0]!s}, which no training row has")
        first = np.unique(targets.Y, return_index=True)[1]
        by_class = targets.weights[first] / trained[first]
        return _Examples(X, numbers, codes, weights * by_class[codes], self._odds(targets, codes))


@dataclass(kw_only=True, eq=False, repr=False)
class _TorchRegressor(RegressorMixin, _TorchHead, Plan):
    loss: str = "squares"
    huber_delta: float = 1.0
    random_state: int | np.random.RandomState | None = None

    def check(self) -> None:
        super().check()
        ranges.choice("loss", self.loss, NUMBER_LOSSES)
        ranges.number("huber_delta", self.huber_delta, above=0)

    def fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None, validation: Validation | None = None
    ) -> Self:
        """Learn from n rows; nothing of an earlier fit remains.

        Parameters
        ----------
        X : array-like of shape (n, d)
            float32 and float16 are trained in float32, anything else in float64.
        y : array-like of shape (n,) or (n, t)
            Numbers of any size and unit: each target is standardised inside.
        sample_weight : array-like of shape (n,), optional
            Rows of weight zero count as absent.
        validation : (X, y) or (X, y, sample_weight), optional
            Rows that are not trained on, in the place of those that early stopping holds out; without early stopping
            their loss and score are recorded.
        """
        self.check_params()
        X, y, weights = rows_to_fit(self, X, y, sample_weight, dtype=TYPES, order="C", y_numeric=True)
        return self._fit_rows(X, y, weights, validation=self._checked_validation(validation))

    def _fit_rows(
        self,
        source: RowSource,
        y: Any,
        sample_weight: ArrayLike | None,
        center: NDArray[Any] | None = None,
        scale: NDArray[Any] | None = None,
        validation: Validation | None = None,
    ) -> Self:
        """Learn from rows that need not be in memory, read as (x - center) / scale; see `Rows` for their order."""
        y = _answers(y, source.shape[0], "the training data")
        weights = row_weights(sample_weight, source.shape[0])
        numbers = np.flatnonzero(weights > 0)
        self._single = y.ndim == 1
        targets, weights = y.reshape(len(y), -1)[numbers].astype(np.float64), weights[numbers]
        mean = np.average(targets, axis=0, weights=weights)
        spread = np.sqrt(np.average((targets - mean) ** 2, axis=0, weights=weights))
        spread[spread == 0] = 1.0
        examples = _Examples(source, numbers, (targets - mean) / spread, weights)
        watched = None
        if validation is not None:
            X_watched, y_watched, w_watched = _parts(validation)
            y_watched = _answers(y_watched, X_watched.shape[0], "validation").reshape(X_watched.shape[0], -1)
            if y_watched.shape[1] != len(mean):
                raise ValueError(f"validation has {y_watched.shape[1]} targets a row, the training data {len(mean)}")
            w_watched = row_weights(w_watched, len(y_watched))
            every = np.flatnonzero(w_watched > 0)
            watched = _Examples(X_watched, every, (y_watched[every] - mean) / spread, w_watched[every])
        objective = Objective("identity", self.loss, huber_delta=self.huber_delta)
        self._train(examples, watched, objective, len(mean), {"center": center, "scale": scale})
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


class _Linear:
    """The names that scikit-learn gives to what a linear estimator learnt."""

    @property
    def coef_(self) -> NDArray[Any]:
        """Weights of shape (k, d), (1, d) for two classes."""
        return self.coefs_[0].T  # type: ignore[attr-defined]

    @property
    def intercept_(self) -> NDArray[Any]:
        return self.intercepts_[0]  # type: ignore[attr-defined]


@dataclass(kw_only=True, eq=False, repr=False)
class _Perceptron(Plan):
    hidden: int | Sequence[int] = field(default=(512,), kw_only=False)
    activation: str = "relu"
    dropout: float = 0.0
    initial_weights: str = "he"

    def check(self) -> None:
        super().check()
        ranges.choice("activation", self.activation, ACTIVATIONS)
        ranges.number("dropout", self.dropout, least=0, below=1)
        ranges.choice("initial_weights", self.initial_weights, INITIAL_WEIGHTS)


@dataclass(kw_only=True, eq=False, repr=False)
class LinearClassifier(_Linear, _TorchClassifier):
    """One linear layer on a softmax, or a sigmoid for each label, trained by minibatches.

    Parameters
    ----------
    optimizer, learning_rate, …, patience :
        As in `featpipe.heads.plan.Plan`, whose defaults these are.
    loss : {"cross_entropy", "focal"}
        Focal: the cross-entropy times (1 - p)^focal_gamma, p being the probability of the true answer (Lin et al.
        2017).
    focal_gamma : float
    label_smoothing : float
        Share of the target that is spread over all classes.
    logit_adjustment : float
        Tau of Menon et al. 2021: in training, and in validation, tau log(share of the class) is added to its score, so
        that at prediction, with tau 1, all classes count as equally frequent. For labels it is the log odds.
    sampling : "balanced" or None
        Each epoch draws as many rows as there are, with replacement, all classes equally often.
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
        Mean training loss of each epoch, without the penalties.
    validation_curve_ : list of float
        The same loss on the validation rows after each epoch, without smoothing and noise; empty without such rows.
    validation_score_curve_ : list of float
        The share of right answers there, rows weighted as in the loss.
    best_epoch_ : int
        From 1; the epoch whose weights are kept.
    n_iter_ : int
        Epochs run.
    n_features_in_ : int
    """


@dataclass(kw_only=True, eq=False, repr=False)
class LinearRegressor(_Linear, _TorchRegressor):
    """One linear layer, trained by minibatches.

    Parameters
    ----------
    optimizer, learning_rate, …, patience :
        As in `featpipe.heads.plan.Plan`, whose defaults these are.
    loss : {"squares", "absolute", "huber"}
        Of errors in standard deviations of the target.
    huber_delta : float
        The error from which "huber" grows along a line.
    random_state : int, RandomState or None
        With an int, two fits on one machine agree exactly.

    Attributes
    ----------
    coefs_ : list of ndarray of shape (fan_in, fan_out)
        The weights of each layer, the last in the units of y.
    intercepts_ : list of ndarray of shape (fan_out,)
    loss_curve_ : list of float
        Mean training loss of each epoch, without the penalties.
    validation_curve_ : list of float
        The same loss on the validation rows after each epoch, without noise; empty without such rows.
    validation_score_curve_ : list of float
        R² there.
    best_epoch_ : int
        From 1; the epoch whose weights are kept.
    n_iter_ : int
        Epochs run.
    n_features_in_ : int
    """


@dataclass(kw_only=True, eq=False, repr=False)
class MLPClassifier(_TorchClassifier, _Perceptron):
    """A perceptron with hidden layers, on a softmax or a sigmoid for each label.

    Parameters
    ----------
    hidden : int or sequence of int
        Widths of the hidden layers.
    activation : {"relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid"}
        Of the hidden layers.
    dropout : float
        Share of hidden units that are silenced in a step.
    initial_weights : {"he", "glorot"}
        Uniform, of He et al. 2015 for hidden layers and zeros for the last; or of Glorot and Bengio 2010 for all.
    optimizer, …, random_state :
        As in `LinearClassifier`.

    Attributes
    ----------
    coefs_, intercepts_, classes_, loss_curve_, …, n_features_in_ :
        As in `LinearClassifier`.

    Examples
    --------
    What tutorials of Keras put on a frozen network: dense 1024 with ReLU, dense softmax, Adam, cross-entropy.

    >>> adam = {"optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 0, "schedule": "constant"}
    >>> head = MLPClassifier(1024, initial_weights="glorot", batch_size=32, epochs=10, **adam)
    """


@dataclass(kw_only=True, eq=False, repr=False)
class MLPRegressor(_TorchRegressor, _Perceptron):
    """A perceptron with hidden layers that answers with numbers.

    Parameters
    ----------
    hidden, activation, dropout, initial_weights :
        As in `MLPClassifier`.
    optimizer, …, random_state :
        As in `LinearRegressor`.

    Attributes
    ----------
    coefs_, intercepts_, loss_curve_, …, n_features_in_ :
        As in `LinearRegressor`.
    """
