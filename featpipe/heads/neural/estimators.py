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

from featpipe.config import check_choice, check_integer, check_number
from featpipe.heads.neural.config import NetworkTrainingConfig
from featpipe.heads.neural.losses import CLASSIFICATION_LOSSES, REGRESSION_LOSSES, Link, LossFunction, compute_log_prior
from featpipe.heads.neural.train import ACTIVATIONS, WEIGHT_INITIALIZERS, NetworkArchitecture, forward
from featpipe.heads.targets import (
    EncodedTargets,
    ScoredClassifier,
    check_sample_weight,
    compute_scores,
    encode_targets,
    validate_training_data,
)

if TYPE_CHECKING:
    from featpipe.heads.closed_form.moments import RowSource
    from featpipe.heads.neural.batches import BatchSource

__all__ = ["LinearClassifier", "LinearRegressor", "MLPClassifier", "MLPRegressor"]

MAX_VALIDATION_ROWS = 50_000
FEATURE_DTYPES = [np.float64, np.float32, np.float16]

ValidationData = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class _LabeledRows:
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
    row_indices: NDArray[np.intp]
    Y: NDArray[Any]
    weights: NDArray[np.float64]
    sampling_weights: NDArray[np.float64] | None = None

    def take(self, positions: NDArray[np.intp]) -> _LabeledRows:
        sampling_weights = None if self.sampling_weights is None else self.sampling_weights[positions]
        return _LabeledRows(
            self.source, self.row_indices[positions], self.Y[positions], self.weights[positions], sampling_weights
        )

    def to_training_source(self, **scaling: Any) -> BatchSource:
        from featpipe.heads.neural.batches import BatchSource

        return BatchSource(
            self.source,
            self.Y,
            self.weights,
            row_indices=self.row_indices,
            sampling_weights=self.sampling_weights,
            **scaling,
        )

    def to_validation_source(self, **scaling: Any) -> BatchSource:
        from featpipe.heads.neural.batches import BatchSource

        weights = self.weights if self.sampling_weights is None else self.weights * self.sampling_weights
        return BatchSource(self.source, self.Y, weights, row_indices=self.row_indices, **scaling)


class _TorchHead(BaseEstimator):
    """What the four have in common: the inner validation rows, and the network on numpy."""

    def check_params(self) -> None:
        """Refuse settings out of range, with a ValueError."""
        self.check()
        for width in self._hidden_widths():
            check_integer("hidden", width, minimum=1)

    def _hidden_widths(self) -> tuple[Any, ...]:
        hidden = getattr(self, "hidden", ())
        return tuple(hidden) if isinstance(hidden, Sequence | np.ndarray) else (hidden,)

    def _network_shape(self, n_inputs: int, n_outputs: int) -> NetworkArchitecture:
        names = ("activation", "dropout", "initial_weights")
        settings = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return NetworkArchitecture((n_inputs, *self._hidden_widths(), n_outputs), **settings)

    def _train(
        self,
        training_rows: _LabeledRows,
        validation_rows: _LabeledRows | None,
        objective: LossFunction,
        n_outputs: int,
        scaling: Mapping[str, NDArray[Any] | None],
    ) -> None:
        # Here, so that a process that only predicts needs no torch.
        from featpipe.heads.neural.train import train_network

        rng = check_random_state(self.random_state)
        if self.early_stopping and validation_rows is None:
            is_validation = self._select_validation_rows(
                training_rows.Y if objective.link == "softmax" else None, len(training_rows.Y), rng
            )
            training_rows, validation_rows = (
                training_rows.take(np.flatnonzero(~is_validation)),
                training_rows.take(np.flatnonzero(is_validation)),
            )
        result = train_network(
            training_rows.to_training_source(**scaling),
            None if validation_rows is None else validation_rows.to_validation_source(**scaling),
            architecture=self._network_shape(training_rows.source.shape[1], n_outputs),
            loss_fn=objective,
            config=self,
            seed=int(rng.randint(2**31 - 1)),
        )
        self.n_features_in_ = training_rows.source.shape[1]
        self.coefs_, self.intercepts_ = result.coefs, result.intercepts
        self.loss_curve_, self.validation_curve_ = result.losses, result.validation_losses
        self.validation_score_curve_ = result.validation_scores
        self.n_iter_, self.best_epoch_ = len(result.losses), result.best_epoch

    def _select_validation_rows(
        self, codes: NDArray[np.int64] | None, n: int, rng: np.random.RandomState
    ) -> NDArray[np.bool_]:
        """Which rows are held out for early stopping, shape (n,): class by class, a class's last row never."""
        is_validation = np.zeros(n, bool)
        codes = np.zeros(n, np.int64) if codes is None else codes
        fraction = min(self.validation_fraction, MAX_VALIDATION_ROWS / n)
        order = np.argsort(codes, kind="stable")
        for class_rows in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
            is_validation[
                rng.permutation(class_rows)[: min(round(fraction * len(class_rows)), len(class_rows) - 1)]
            ] = True
        if not is_validation.any():
            raise ValueError(
                f"early_stopping finds no validation rows: {self.validation_fraction:g} of n_samples={n} is less than "
                "one in every class; raise validation_fraction, give more rows or set early_stopping to false"
            )
        return is_validation

    def _check_validation(self, validation: ValidationData | None) -> ValidationData | None:
        """The features and weights of the validation rows, checked, with their y as it is."""
        if validation is None:
            return None
        X, y, weights = _unpack_validation(validation)
        X = validate_data(self, X, reset=False, dtype=FEATURE_DTYPES, order="C")
        return X, y, weights

    def _scores(self, X: NDArray[Any]) -> NDArray[np.float64]:
        return forward(X, self.coefs_, self.intercepts_, getattr(self, "activation", "relu")).astype(np.float64)


def _unpack_validation(validation: ValidationData) -> tuple[Any, Any, Any]:
    if not isinstance(validation, tuple | list) or len(validation) not in (2, 3):
        raise ValueError("validation must be a pair (X, y), or a triple with sample weights")
    X, y, *weights = validation
    return X, y, weights[0] if weights else None


def _check_targets(y: Any, n_rows: int, source_name: str) -> NDArray[Any]:
    y = check_array(y, ensure_2d=False, dtype=None, accept_sparse="csr", input_name="y")
    y = y.toarray() if hasattr(y, "toarray") else np.asarray(y)
    if len(y) != n_rows:
        raise ValueError(f"{source_name} has {n_rows} rows of X and {len(y)} of y; give as many of both")
    return y


@dataclass(kw_only=True, eq=False, repr=False)
class _TorchClassifier(ScoredClassifier, _TorchHead, NetworkTrainingConfig):
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
        check_choice("loss", self.loss, CLASSIFICATION_LOSSES)
        check_number("focal_gamma", self.focal_gamma, minimum=0)
        check_number("label_smoothing", self.label_smoothing, minimum=0, below=1)
        check_number("logit_adjustment", self.logit_adjustment, minimum=0)
        if self.sampling is not None:
            check_choice("sampling", self.sampling, ["balanced"])
        if self.class_weight is not None and not isinstance(self.class_weight, Mapping):
            check_choice("class_weight", self.class_weight, ["balanced"])

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        validation: ValidationData | None = None,
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
        X, y, weights = validate_training_data(self, X, y, sample_weight, dtype=FEATURE_DTYPES, order="C")
        return self._fit_rows(X, y, weights, validation=self._check_validation(validation))

    def _fit_rows(
        self,
        source: RowSource,
        y: Any,
        sample_weight: ArrayLike | None,
        center: NDArray[Any] | None = None,
        scale: NDArray[Any] | None = None,
        validation: ValidationData | None = None,
    ) -> Self:
        """Learn from rows that need not be in memory, read as (x - center) / scale; see `Rows` for their order."""
        weights = check_sample_weight(sample_weight, source.shape[0])
        row_indices = np.flatnonzero(weights > 0)
        y = _check_targets(y, source.shape[0], "the training data")
        targets = encode_targets(y[row_indices], weights[row_indices], self.class_weight, self.multilabel)
        training_rows = _LabeledRows(
            source, row_indices, targets.Y, targets.weights, self._compute_sampling_weights(targets, targets.Y)
        )
        validation_rows = None
        if validation is not None:
            validation_rows = self._make_validation_rows(*_unpack_validation(validation), targets, weights[row_indices])
        objective = self._make_objective(training_rows, targets)
        self._train(training_rows, validation_rows, objective, len(targets.classes), {"center": center, "scale": scale})
        self.classes_, self.multilabel_ = targets.classes, targets.multilabel
        if len(self.classes_) == 2 and not self.multilabel_:
            self.coefs_[-1] = np.diff(self.coefs_[-1], axis=1)
            self.intercepts_[-1] = np.diff(self.intercepts_[-1])
        return self

    def _make_objective(self, training_rows: _LabeledRows, targets: EncodedTargets) -> LossFunction:
        link: Link = "sigmoid" if targets.multilabel else "softmax"
        adjustment = None
        if self.logit_adjustment:
            weights = (
                training_rows.weights
                if training_rows.sampling_weights is None
                else training_rows.weights * training_rows.sampling_weights
            )
            adjustment = self.logit_adjustment * compute_log_prior(link, targets.Y, weights, len(targets.classes))
        return LossFunction(link, self.loss, self.focal_gamma, self.label_smoothing, adjustment)

    def _compute_sampling_weights(self, targets: EncodedTargets, Y: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """How often rows with these answers are drawn."""
        if self.sampling is None:
            return None
        if targets.multilabel:
            raise ValueError("sampling is by class, and y has several labels a row; give class_weight='balanced'")
        return (1 / np.bincount(targets.Y))[Y]

    def _make_validation_rows(
        self,
        X: RowSource,
        y: Any,
        sample_weight: ArrayLike | None,
        targets: EncodedTargets,
        training_weights: NDArray[np.float64],
    ) -> _LabeledRows:
        """Validation rows, their classes weighed as those of the training rows."""
        weights = check_sample_weight(sample_weight, X.shape[0])
        row_indices = np.flatnonzero(weights > 0)
        y, weights = _check_targets(y, X.shape[0], "validation")[row_indices], weights[row_indices]
        if targets.multilabel:
            validation_targets = encode_targets(y, weights, self.class_weight, True)
            if len(validation_targets.classes) != len(targets.classes):
                raise ValueError(
                    f"validation has {len(validation_targets.classes)} labels a row, "
                    f"the training data {len(targets.classes)}"
                )
            return _LabeledRows(X, row_indices, validation_targets.Y, validation_targets.weights)
        codes = np.searchsorted(targets.classes, y).clip(max=len(targets.classes) - 1)
        is_unknown = targets.classes[codes] != y
        if is_unknown.any():
            raise ValueError(f"validation has the class {y[is_unknown][0]!s}, which no training row has")
        first_rows = np.unique(targets.Y, return_index=True)[1]
        class_weights = targets.weights[first_rows] / training_weights[first_rows]
        return _LabeledRows(
            X, row_indices, codes, weights * class_weights[codes], self._compute_sampling_weights(targets, codes)
        )


@dataclass(kw_only=True, eq=False, repr=False)
class _TorchRegressor(RegressorMixin, _TorchHead, NetworkTrainingConfig):
    loss: str = "squares"
    huber_delta: float = 1.0
    random_state: int | np.random.RandomState | None = None

    def check(self) -> None:
        super().check()
        check_choice("loss", self.loss, REGRESSION_LOSSES)
        check_number("huber_delta", self.huber_delta, above=0)

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        validation: ValidationData | None = None,
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
        X, y, weights = validate_training_data(
            self, X, y, sample_weight, dtype=FEATURE_DTYPES, order="C", y_numeric=True
        )
        return self._fit_rows(X, y, weights, validation=self._check_validation(validation))

    def _fit_rows(
        self,
        source: RowSource,
        y: Any,
        sample_weight: ArrayLike | None,
        center: NDArray[Any] | None = None,
        scale: NDArray[Any] | None = None,
        validation: ValidationData | None = None,
    ) -> Self:
        """Learn from rows that need not be in memory, read as (x - center) / scale; see `Rows` for their order."""
        y = _check_targets(y, source.shape[0], "the training data")
        weights = check_sample_weight(sample_weight, source.shape[0])
        row_indices = np.flatnonzero(weights > 0)
        self._single = y.ndim == 1
        targets, weights = y.reshape(len(y), -1)[row_indices].astype(np.float64), weights[row_indices]
        mean = np.average(targets, axis=0, weights=weights)
        std = np.sqrt(np.average((targets - mean) ** 2, axis=0, weights=weights))
        std[std == 0] = 1.0
        training_rows = _LabeledRows(source, row_indices, (targets - mean) / std, weights)
        validation_rows = None
        if validation is not None:
            X_validation, y_validation, validation_weights = _unpack_validation(validation)
            y_validation = _check_targets(y_validation, X_validation.shape[0], "validation").reshape(
                X_validation.shape[0], -1
            )
            if y_validation.shape[1] != len(mean):
                raise ValueError(f"validation has {y_validation.shape[1]} targets a row, the training data {len(mean)}")
            validation_weights = check_sample_weight(validation_weights, len(y_validation))
            validation_indices = np.flatnonzero(validation_weights > 0)
            validation_rows = _LabeledRows(
                X_validation,
                validation_indices,
                (y_validation[validation_indices] - mean) / std,
                validation_weights[validation_indices],
            )
        objective = LossFunction("identity", self.loss, huber_delta=self.huber_delta)
        self._train(training_rows, validation_rows, objective, len(mean), {"center": center, "scale": scale})
        # In float64: a target's mean can be large beside its spread.
        self.coefs_[-1] = self.coefs_[-1] * std
        self.intercepts_[-1] = self.intercepts_[-1] * std + mean
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Numbers of shape (m,) or (m, t), as y was.

        Parameters
        ----------
        X : array-like of shape (m, d)
        """
        predictions = compute_scores(self, X)
        return predictions[:, 0] if self._single else predictions

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class _LinearAttributes:
    """The names that scikit-learn gives to what a linear estimator learnt."""

    @property
    def coef_(self) -> NDArray[Any]:
        """Weights of shape (k, d), (1, d) for two classes."""
        return self.coefs_[0].T  # type: ignore[attr-defined]

    @property
    def intercept_(self) -> NDArray[Any]:
        return self.intercepts_[0]  # type: ignore[attr-defined]


@dataclass(kw_only=True, eq=False, repr=False)
class _MLPParams(NetworkTrainingConfig):
    hidden: int | Sequence[int] = field(default=(512,), kw_only=False)
    activation: str = "relu"
    dropout: float = 0.0
    initial_weights: str = "he"

    def check(self) -> None:
        super().check()
        check_choice("activation", self.activation, ACTIVATIONS)
        check_number("dropout", self.dropout, minimum=0, below=1)
        check_choice("initial_weights", self.initial_weights, WEIGHT_INITIALIZERS)


@dataclass(kw_only=True, eq=False, repr=False)
class LinearClassifier(_LinearAttributes, _TorchClassifier):
    """One linear layer on a softmax, or a sigmoid for each label, trained by minibatches.

    Parameters
    ----------
    optimizer, learning_rate, …, patience :
        As in `featpipe.heads.neural.config.Plan`, whose defaults these are.
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

    __module__ = "featpipe.heads"


@dataclass(kw_only=True, eq=False, repr=False)
class LinearRegressor(_LinearAttributes, _TorchRegressor):
    """One linear layer, trained by minibatches.

    Parameters
    ----------
    optimizer, learning_rate, …, patience :
        As in `featpipe.heads.neural.config.Plan`, whose defaults these are.
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

    __module__ = "featpipe.heads"


@dataclass(kw_only=True, eq=False, repr=False)
class MLPClassifier(_TorchClassifier, _MLPParams):
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

    __module__ = "featpipe.heads"


@dataclass(kw_only=True, eq=False, repr=False)
class MLPRegressor(_TorchRegressor, _MLPParams):
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

    __module__ = "featpipe.heads"


__test__ = {"MLPClassifier": MLPClassifier}  # doctest looks for classes by their module
