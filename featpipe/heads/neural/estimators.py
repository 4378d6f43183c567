"""Heads trained by minibatches: a linear layer and a multi-layer perceptron.

Fitting needs torch; prediction uses numpy alone.
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

MAX_VALIDATION_ROWS = 50_000
FEATURE_DTYPES = [np.float64, np.float32, np.float16]

ValidationData = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class _LabeledRows:
    """Rows of a source with their targets, from which a `BatchSource` is made for training or validation.

    Attributes
    ----------
    source : RowSource of shape (N, d)
    row_indices : ndarray of shape (n,)
        Rows of the source, ascending.
    Y : ndarray of shape (n,) or (n, k)
    weights : ndarray of shape (n,) or (n, k)
    sampling_weights : ndarray of shape (n,) or None
        Sampling probabilities of rows in training (up to a factor), and additional weights in validation.
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

    def to_source(self, *, training: bool, **scaling: Any) -> BatchSource:
        from featpipe.heads.neural.batches import BatchSource

        weights, sampling_weights = self.weights, self.sampling_weights
        if sampling_weights is not None and not training:
            weights, sampling_weights = weights * sampling_weights, None
        return BatchSource(
            self.source,
            self.Y,
            weights,
            row_indices=self.row_indices,
            sampling_weights=sampling_weights,
            **scaling,
        )


class _TorchHead(BaseEstimator):
    """Base of the torch heads: fits, validation rows for early stopping, and prediction with numpy."""

    def check_params(self) -> None:
        """Raise ValueError for settings out of range."""
        self.check()
        for width in self._get_hidden_widths():
            check_integer("hidden", width, minimum=1)

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        validation: ValidationData | None = None,
    ) -> Self:
        """Fit to n rows; an earlier fit is discarded.

        Parameters
        ----------
        X : array-like of shape (n, d)
            float32 and float16 are trained in float32, anything else in float64.
        y : array-like of shape (n,) or (n, k)
            Classes, or 0 and 1 for each label. For a regressor: targets in any unit, which are standardised internally.
        sample_weight : array-like of shape (n,), optional
            Rows of weight zero are ignored.
        validation : (X, y) or (X, y, sample_weight), optional
            Validation rows, used in place of held-out rows by early stopping; without it their loss and score are
            only recorded.
        """
        self.check_params()
        X, y, weights = validate_training_data(
            self, X, y, sample_weight, dtype=FEATURE_DTYPES, order="C", y_numeric=isinstance(self, RegressorMixin)
        )
        if validation is not None:
            X_validation, *targets_and_weights = _unpack_validation(validation)
            X_validation = validate_data(self, X_validation, reset=False, dtype=FEATURE_DTYPES, order="C")
            validation = (X_validation, *targets_and_weights)
        return self._fit_rows(X, y, weights, validation=validation)

    def _get_hidden_widths(self) -> tuple[Any, ...]:
        hidden = getattr(self, "hidden", ())
        return tuple(hidden) if isinstance(hidden, Sequence | np.ndarray) else (hidden,)

    def _train(
        self,
        training_rows: _LabeledRows,
        validation_rows: _LabeledRows | None,
        objective: LossFunction,
        n_outputs: int,
        scaling: Mapping[str, NDArray[Any] | None],
    ) -> None:
        # Imported here, because prediction needs no torch.
        from featpipe.heads.neural.train import train_network

        n_inputs = training_rows.source.shape[1]
        names = ("activation", "dropout", "initial_weights")
        network_settings = {name: getattr(self, name) for name in names if hasattr(self, name)}
        rng = check_random_state(self.random_state)
        if self.early_stopping and validation_rows is None:
            is_validation = self._select_validation_rows(
                training_rows.Y if objective.link == "softmax" else None, len(training_rows.Y), rng
            )
            validation_rows = training_rows.take(np.flatnonzero(is_validation))
            training_rows = training_rows.take(np.flatnonzero(~is_validation))
        result = train_network(
            training_rows.to_source(training=True, **scaling),
            None if validation_rows is None else validation_rows.to_source(training=False, **scaling),
            architecture=NetworkArchitecture((n_inputs, *self._get_hidden_widths(), n_outputs), **network_settings),
            loss_fn=objective,
            config=self,
            seed=int(rng.randint(2**31 - 1)),
        )
        self.n_features_in_ = n_inputs
        self.coefs_, self.intercepts_ = result.coefs, result.intercepts
        self.loss_curve_, self.validation_curve_ = result.losses, result.validation_losses
        self.validation_score_curve_ = result.validation_scores
        self.n_iter_, self.best_epoch_ = len(result.losses), result.best_epoch

    def _select_validation_rows(
        self, codes: NDArray[np.int64] | None, n: int, rng: np.random.RandomState
    ) -> NDArray[np.bool_]:
        """Select the rows held out for early stopping, shape (n,): stratified, and never all rows of a class."""
        is_validation = np.zeros(n, bool)
        codes = np.zeros(n, np.int64) if codes is None else codes
        fraction = min(self.validation_fraction, MAX_VALIDATION_ROWS / n)
        order = np.argsort(codes, kind="stable")
        for class_rows in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
            n_selected = min(round(fraction * len(class_rows)), len(class_rows) - 1)
            is_validation[rng.permutation(class_rows)[:n_selected]] = True
        if not is_validation.any():
            raise ValueError(
                f"early_stopping has no validation rows: {self.validation_fraction:g} of n_samples={n} is less than "
                "one row of each class; raise validation_fraction, give more rows, or turn off early_stopping"
            )
        return is_validation

    def _scores(self, X: NDArray[Any]) -> NDArray[np.float64]:
        return forward(X, self.coefs_, self.intercepts_, getattr(self, "activation", "relu")).astype(np.float64)


def _unpack_validation(validation: ValidationData) -> tuple[Any, Any, Any]:
    if not isinstance(validation, tuple | list) or len(validation) not in (2, 3):
        raise ValueError("validation must be a pair (X, y), or a triple (X, y, sample_weight)")
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

    def _fit_rows(
        self,
        source: RowSource,
        y: Any,
        sample_weight: ArrayLike | None,
        center: NDArray[Any] | None = None,
        scale: NDArray[Any] | None = None,
        validation: ValidationData | None = None,
    ) -> Self:
        """Fit to rows that need not be in memory, transformed to (x - center) / scale; see `BatchSource`."""
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
        """Sampling weights of rows with targets Y, so that all classes are drawn equally often."""
        if self.sampling is None:
            return None
        if targets.multilabel:
            raise ValueError(
                "sampling draws rows by class, but y has several labels per row; use class_weight='balanced'"
            )
        return (1 / np.bincount(targets.Y))[Y]

    def _make_validation_rows(
        self,
        X: RowSource,
        y: Any,
        sample_weight: ArrayLike | None,
        targets: EncodedTargets,
        training_weights: NDArray[np.float64],
    ) -> _LabeledRows:
        """Validation rows, with the class weights of the training rows."""
        weights = check_sample_weight(sample_weight, X.shape[0])
        row_indices = np.flatnonzero(weights > 0)
        y, weights = _check_targets(y, X.shape[0], "validation")[row_indices], weights[row_indices]
        if targets.multilabel:
            validation_targets = encode_targets(y, weights, self.class_weight, True)
            if len(validation_targets.classes) != len(targets.classes):
                raise ValueError(
                    f"validation has {len(validation_targets.classes)} labels per row, "
                    f"the training data {len(targets.classes)}; give the same labels"
                )
            return _LabeledRows(X, row_indices, validation_targets.Y, validation_targets.weights)
        codes = np.searchsorted(targets.classes, y).clip(max=len(targets.classes) - 1)
        is_unknown = targets.classes[codes] != y
        if is_unknown.any():
            raise ValueError(
                f"validation has class {y[is_unknown][0]!s}, which no training row has; leave its rows out"
            )
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

    def _fit_rows(
        self,
        source: RowSource,
        y: Any,
        sample_weight: ArrayLike | None,
        center: NDArray[Any] | None = None,
        scale: NDArray[Any] | None = None,
        validation: ValidationData | None = None,
    ) -> Self:
        """Fit to rows that need not be in memory, transformed to (x - center) / scale; see `BatchSource`."""
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
                raise ValueError(
                    f"validation has {y_validation.shape[1]} targets per row, the training data {len(mean)}; "
                    "give the same targets"
                )
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
        # In float64: the mean of a target can be much larger than its standard deviation.
        self.coefs_[-1] = self.coefs_[-1] * std
        self.intercepts_[-1] = self.intercepts_[-1] * std + mean
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Predictions of shape (m,) or (m, t), like the y of the fit.

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
    """scikit-learn's names for the parameters of a linear estimator."""

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
    """One linear layer with a softmax, or a sigmoid for each label, trained by minibatches.

    Parameters
    ----------
    optimizer, learning_rate, …, patience :
        As in `featpipe.heads.neural.config.NetworkTrainingConfig`.
    loss : {"cross_entropy", "focal"}
        Focal: the cross-entropy times (1 - p)^focal_gamma, where p is the probability of the true class (Lin et al.
        2017).
    focal_gamma : float
    label_smoothing : float
        Fraction of the target that is spread over all classes.
    logit_adjustment : float
        Tau of logit adjustment (Menon et al. 2021): training and validation add tau log(class frequency) to each
        score, so that with tau = 1 predictions treat all classes as equally frequent. Labels use their log odds.
    sampling : "balanced" or None
        Each epoch draws n rows with replacement, all classes equally often.
    class_weight : mapping, "balanced" or None
        Weight of each class, by default 1; "balanced" weights are inverse to the frequencies. For a multi-label y the
        keys are 0 and 1.
    multilabel : bool or None
        Whether y is a 0/1 matrix of shape (n, k). None: if it has two or more columns.
    random_state : int, RandomState or None
        With an int, fits on the same machine are reproducible.

    Attributes
    ----------
    coefs_ : list of ndarray of shape (fan_in, fan_out)
        The weights of each layer; the last has one column for two classes.
    intercepts_ : list of ndarray of shape (fan_out,)
    classes_ : ndarray of shape (k,)
    loss_curve_ : list of float
        Mean training loss of each epoch, without the penalties.
    validation_curve_ : list of float
        Validation loss after each epoch, without label smoothing and noise; empty without validation rows.
    validation_score_curve_ : list of float
        Accuracy on the validation rows, weighted as the loss.
    best_epoch_ : int
        Counted from 1; the epoch whose weights are kept.
    n_iter_ : int
        Number of epochs.
    n_features_in_ : int
    """

    __module__ = "featpipe.heads"


@dataclass(kw_only=True, eq=False, repr=False)
class LinearRegressor(_LinearAttributes, _TorchRegressor):
    """One linear layer, trained by minibatches.

    Parameters
    ----------
    loss : {"squares", "absolute", "huber"}
        Loss of the errors, in standard deviations of the target.
    huber_delta : float
        The error beyond which "huber" is linear.
    optimizer, …, patience, random_state :
        As in `LinearClassifier`.

    Attributes
    ----------
    coefs_, intercepts_, loss_curve_, …, n_features_in_ :
        As in `LinearClassifier`; the last layer is in the units of y, and the validation scores are R².
    """

    __module__ = "featpipe.heads"


@dataclass(kw_only=True, eq=False, repr=False)
class MLPClassifier(_TorchClassifier, _MLPParams):
    """A multi-layer perceptron with a softmax, or a sigmoid for each label.

    Parameters
    ----------
    hidden : int or sequence of int
        Widths of the hidden layers.
    activation : {"relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid"}
        Activation of the hidden layers.
    dropout : float
        Fraction of hidden units that a step sets to zero.
    initial_weights : {"he", "glorot"}
        Uniform: He et al. 2015 for hidden layers and zeros for the last; or Glorot and Bengio 2010 for all.
    optimizer, …, random_state :
        As in `LinearClassifier`.

    Attributes
    ----------
    coefs_, intercepts_, classes_, loss_curve_, …, n_features_in_ :
        As in `LinearClassifier`.

    Examples
    --------
    The head of Keras tutorials: dense 1024 with ReLU, dense softmax, Adam, cross-entropy.

    >>> adam = {"optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 0, "schedule": "constant"}
    >>> head = MLPClassifier(1024, initial_weights="glorot", batch_size=32, epochs=10, **adam)
    """

    __module__ = "featpipe.heads"


@dataclass(kw_only=True, eq=False, repr=False)
class MLPRegressor(_TorchRegressor, _MLPParams):
    """A multi-layer perceptron for regression.

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
