"""Convert a fitted head to layers of a network, and back.

A head with scores linear in the embedding becomes one layer, a perceptron as many as it has. Scaler, temperature, prior
correction and the scale of targets are folded into the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, softmax
from torch import nn

from featpipe import heads
from featpipe.heads import LinearClassifier, LinearRegressor, MLPClassifier, MLPRegressor, forward
from featpipe.metrics import Calibration, Note, compute_logits
from featpipe.model import Model

Array = NDArray[np.float64]

_FOLDABLE_TORCH_HEADS = (LinearClassifier, LinearRegressor, MLPClassifier, MLPRegressor)
_ACTIVATION_MODULES = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
UNIT_VECTORS_PER_BATCH = 512


@dataclass(frozen=True, eq=False)
class HeadLayers:
    """Fully connected layers, an activation after each but the last.

    Attributes
    ----------
    weights : tuple of ndarray of shape (fan_out, fan_in), float64
    biases : tuple of ndarray of shape (fan_out,), float64
    activation : str
        Its name in torch.nn.functional.
    dropout : float
        After each activation, in training.
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    activation: str = "relu"
    dropout: float = 0.0

    @classmethod
    def zeros(cls, in_features: int, out_features: int) -> HeadLayers:
        """One layer of zeros."""
        return cls((np.zeros((out_features, in_features)),), (np.zeros(out_features),))

    def fold_input_scaling(self, mean: Array, scale: Array) -> HeadLayers:
        """Layers of x from layers of (x - mean) / scale."""
        first_weight = self.weights[0] / scale
        return replace(
            self,
            weights=(first_weight, *self.weights[1:]),
            biases=(self.biases[0] - first_weight @ mean, *self.biases[1:]),
        )

    def fold_output_scaling(self, scale: Array | float, offset: Array | float) -> HeadLayers:
        """Layers whose outputs are multiplied by ``scale``, then shifted by ``offset``."""
        factor = np.broadcast_to(scale, self.biases[-1].shape)
        return replace(
            self,
            weights=(*self.weights[:-1], self.weights[-1] * factor[:, None]),
            biases=(*self.biases[:-1], self.biases[-1] * factor + offset),
        )

    def compute_scores(self, X: NDArray[np.floating]) -> Array:
        """Logits or numbers, shape (m, k), in float64."""
        weights = [weight.T for weight in self.weights]
        return np.asarray(forward(X.astype(np.float64), weights, self.biases, self.activation))

    def center_logits(self) -> HeadLayers:
        """Shift the logits to mean zero over the classes, which leaves the softmax unchanged."""
        return replace(
            self,
            weights=(*self.weights[:-1], self.weights[-1] - self.weights[-1].mean(axis=0)),
            biases=(*self.biases[:-1], self.biases[-1] - self.biases[-1].mean()),
        )

    def to_module(self) -> nn.Sequential:
        """As torch layers, in float32."""
        modules: list[nn.Module] = []
        for layer_index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer_index:
                modules.append(_ACTIVATION_MODULES[self.activation]())
                modules += [nn.Dropout(self.dropout)] if self.dropout else []
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(weight))
                layer.bias.copy_(torch.from_numpy(bias))
            modules.append(layer)
        return nn.Sequential(*modules)

    def with_trained_weights(self, module: nn.Sequential) -> HeadLayers:
        """The same layers with the weights of a trained :meth:`to_module`."""
        layers = [submodule for submodule in module if isinstance(submodule, nn.Linear)]
        return replace(
            self,
            weights=tuple(layer.weight.detach().cpu().double().numpy() for layer in layers),
            biases=tuple(layer.bias.detach().cpu().double().numpy() for layer in layers),
        )


def head_to_layers(pipeline: Any, task: str, calibration: Calibration | None, in_features: int) -> HeadLayers | None:
    """Layers with the predictions of a head: its logits, or its numbers.

    Parameters
    ----------
    pipeline : Pipeline
        A fitted head with its scaler.
    task : {"classification", "regression", "multilabel"}
    calibration : Calibration or None
    in_features : int
        Width of the embedding.

    Returns
    -------
    HeadLayers or None
        None if the head has neither layers nor scores. Scores are assumed to be linear: the caller must compare
        predictions.
    """
    scaler, head = pipeline[0], pipeline[-1]
    can_fold_scaler = len(pipeline) == 2 and (scaler == "passthrough" or hasattr(scaler, "scale_"))
    estimator, layers = head if can_fold_scaler else pipeline, None
    if isinstance(head, _FOLDABLE_TORCH_HEADS) and can_fold_scaler:
        layers = _convert_torch_head(head)
    elif task == "regression":
        layers = _evaluate_linear_layer(lambda X: np.reshape(estimator.predict(X), (len(X), -1)), in_features)
    elif hasattr(head, "decision_function"):
        layers = _evaluate_linear_layer(lambda X: compute_logits(estimator, X), in_features)
    if layers is None:
        return None
    if can_fold_scaler and scaler != "passthrough":
        layers = layers.fold_input_scaling(*_get_scaler_parameters(scaler, in_features))
    if calibration is not None:
        offsets = np.asarray(calibration.offsets) if calibration.offsets else 0.0
        layers = layers.fold_output_scaling(1 / calibration.temperature, offsets)
    return layers.center_logits() if task == "classification" else layers


def _convert_torch_head(head: Any) -> HeadLayers:
    weights = [np.asarray(coef.T, np.float64) for coef in head.coefs_]
    biases = [np.asarray(intercept, np.float64) for intercept in head.intercepts_]
    if hasattr(head, "classes_") and not head.multilabel_ and len(head.classes_) == 2:
        weights[-1] = np.vstack([np.zeros_like(weights[-1]), weights[-1]])
        biases[-1] = np.concatenate([[0.0], biases[-1]])
    activation, dropout = getattr(head, "activation", "relu"), float(getattr(head, "dropout", 0.0))
    return HeadLayers(tuple(weights), tuple(biases), activation, dropout)


def _evaluate_linear_layer(score_function: Callable[[Array], Array], in_features: int) -> HeadLayers:
    """The linear layer that agrees with a function at zero and at each unit vector."""
    bias = np.asarray(score_function(np.zeros((1, in_features))), np.float64)[0]
    weight_blocks = []
    for start in range(0, in_features, UNIT_VECTORS_PER_BATCH):
        unit_vectors = np.eye(min(UNIT_VECTORS_PER_BATCH, in_features - start), in_features, start)
        weight_blocks.append(np.asarray(score_function(unit_vectors), np.float64) - bias)
    return HeadLayers((np.concatenate(weight_blocks).T.copy(),), (bias,))


def _get_scaler_parameters(scaler: Any, in_features: int) -> tuple[Array, Array]:
    mean = scaler.mean_ if getattr(scaler, "with_mean", False) else None
    scale = scaler.scale_
    return np.zeros(in_features) if mean is None else mean, np.ones(in_features) if scale is None else scale


def layers_to_head(layers: HeadLayers, task: str) -> tuple[str, Any]:
    """A fitted head of the registry with the predictions of some layers.

    Returns
    -------
    name : {"linear", "mlp"}
    pipeline : Pipeline
        Without a scaler, in float32.
    """
    name = "linear" if len(layers.weights) == 1 else "mlp"
    params: dict[str, Any] = {"scale": "passthrough"}
    if name == "mlp":
        hidden = tuple(weight.shape[0] for weight, _ in pairwise(layers.weights))
        params |= {"hidden": hidden, "activation": layers.activation, "dropout": layers.dropout}
    pipeline = heads.build(name, task, params=params)
    head, k = pipeline[-1], len(layers.biases[-1])
    weights, biases = list(layers.weights), list(layers.biases)
    if task == "classification" and k == 2:
        weights[-1], biases[-1] = np.diff(weights[-1], axis=0), np.diff(biases[-1])
    dtype = np.float64 if task == "regression" else np.float32
    head.coefs_ = [np.ascontiguousarray(weight.T, dtype) for weight in weights]
    head.intercepts_ = [bias.astype(dtype) for bias in biases]
    head.n_features_in_ = weights[0].shape[1]
    head.loss_curve_, head.validation_curve_, head.validation_score_curve_ = [], [], []
    head.n_iter_ = head.best_epoch_ = 0
    if task == "regression":
        head._single = k == 1
    else:
        head.classes_, head.multilabel_ = np.arange(k), task == "multilabel"
    return name, pipeline


PREDICTION_TOLERANCE = 1e-4
MAX_COMPARED_ROWS = 1000


@dataclass(frozen=True, eq=False)
class InitialHead:
    """The head layers before the first step.

    Attributes
    ----------
    layers : HeadLayers
        Their outputs are logits; in regression, (target - ``target_mean``) / ``target_std``.
    target_mean, target_std : ndarray of shape (t,), float64
        0 and 1 in classification.
    note : mapping
        Where the layers come from, see :func:`featpipe.metrics.format_note`.
    """

    layers: HeadLayers
    target_mean: NDArray[np.float64]
    target_std: NDArray[np.float64]
    note: Note

    def to_target_units(self, layers: HeadLayers) -> HeadLayers:
        """Trained layers with outputs in the units of the targets."""
        return layers.fold_output_scaling(self.target_std, self.target_mean)


def initialize_head(model: Model, X: NDArray[np.float32], y: NDArray[Any]) -> InitialHead:
    """Layers with the predictions of a model's head; if it cannot be converted, a linear head is fitted instead.

    Parameters
    ----------
    model : Model
    X : ndarray of shape (m, d)
        Embeddings of the training rows.
    y : ndarray
        Class codes of shape (m,), a 0/1 matrix, or targets.
    """
    compared_rows, d = X[:MAX_COMPARED_ROWS], X.shape[1]
    layers = head_to_layers(model.head, model.task, model.calibration, d)
    note: Note = {"kind": "start_head", "head": model.head_name}
    if layers is None or not _do_predictions_agree(
        _predict_with_layers(layers, model.task, compared_rows), predict_with_model(model, compared_rows)
    ):
        name = "ridge" if model.task == "regression" else "logistic"
        pipeline = heads.build(name, model.task).fit(X, y)
        layers = head_to_layers(pipeline, model.task, None, d)
        assert layers is not None
        note = {"kind": "start_fitted_head", "head": name, "old_head": model.head_name}
    target_mean, target_std = _compute_target_statistics(y) if model.task == "regression" else (np.zeros(1), np.ones(1))
    return InitialHead(
        layers.fold_output_scaling(1 / target_std, -target_mean / target_std), target_mean, target_std, note
    )


def _predict_with_layers(layers: HeadLayers, task: str, X: NDArray[np.floating]) -> NDArray[np.float64]:
    """Probabilities of shape (m, k), or numbers of shape (m, t)."""
    scores = layers.compute_scores(X)
    if task == "regression":
        return scores
    return np.asarray(expit(scores) if task == "multilabel" else softmax(scores, axis=1))


def predict_with_model(model: Model, X: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities of shape (m, k), or numbers of shape (m, t)."""
    if model.task == "regression":
        return np.asarray(model.predict_features(X), np.float64).reshape(len(X), -1)
    return model.predict_proba_features(X)


def _do_predictions_agree(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    """Whether predictions agree to `PREDICTION_TOLERANCE`, relative to values above 1."""
    return a.shape == b.shape and bool(np.abs(a - b).max() <= PREDICTION_TOLERANCE * max(1.0, float(np.abs(b).max())))


def _compute_target_statistics(y: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    targets = np.asarray(y, np.float64).reshape(len(y), -1)
    std = targets.std(axis=0)
    return targets.mean(axis=0), np.where(std > 0, std, 1.0)
