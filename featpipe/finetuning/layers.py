"""A fitted head as layers of a network, and back.

Heads whose scores are linear in the embedding become one layer, perceptrons as many as they have; the scaler, the
temperature, corrections of priors and the spread of targets are folded into the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featpipe import heads
from featpipe.calibration import Calibration, logits_of
from featpipe.heads.torch_heads import LinearClassifier, LinearRegressor, MLPClassifier, MLPRegressor

__all__ = ["Layers", "estimator_of", "layers_of"]

Array = NDArray[np.float64]

_TORCH = (LinearClassifier, LinearRegressor, MLPClassifier, MLPRegressor)
_MODULES = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
ROWS_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class Layers:
    """Fully connected layers, an activation after each but the last.

    Attributes
    ----------
    weights : tuple of ndarray of shape (fan_out, fan_in), float64
    biases : tuple of ndarray of shape (fan_out,), float64
    activation : str
        By the name that torch.nn.functional gives it.
    dropout : float
        After each activation, in training.
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    activation: str = "relu"
    dropout: float = 0.0

    @classmethod
    def untrained(cls, inputs: int, outputs: int) -> Layers:
        """One layer of zeros: no opinion."""
        return cls((np.zeros((outputs, inputs)),), (np.zeros(outputs),))

    def after(self, mean: Array, scale: Array) -> Layers:
        """For inputs that were (x - mean) / scale before: of x."""
        first = self.weights[0] / scale
        return replace(
            self,
            weights=(first, *self.weights[1:]),
            biases=(self.biases[0] - first @ mean, *self.biases[1:]),
        )

    def before(self, scale: Array | float, offset: Array | float) -> Layers:
        """With answers that are multiplied, and to which something is added."""
        factor = np.broadcast_to(scale, self.biases[-1].shape)
        return replace(
            self,
            weights=(*self.weights[:-1], self.weights[-1] * factor[:, None]),
            biases=(*self.biases[:-1], self.biases[-1] * factor + offset),
        )

    def centred(self) -> Layers:
        """With scores whose mean over the classes is zero: the softmax is the same."""
        return replace(
            self,
            weights=(*self.weights[:-1], self.weights[-1] - self.weights[-1].mean(axis=0)),
            biases=(*self.biases[:-1], self.biases[-1] - self.biases[-1].mean()),
        )

    def module(self) -> nn.Sequential:
        """As torch layers, in float32."""
        parts: list[nn.Module] = []
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if number:
                parts.append(_MODULES[self.activation]())
                parts += [nn.Dropout(self.dropout)] if self.dropout else []
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(weight))
                layer.bias.copy_(torch.from_numpy(bias))
            parts.append(layer)
        return nn.Sequential(*parts)

    def learnt(self, module: nn.Sequential) -> Layers:
        """The same with the weights of a trained :meth:`module`."""
        layers = [part for part in module if isinstance(part, nn.Linear)]
        return replace(
            self,
            weights=tuple(layer.weight.detach().cpu().double().numpy() for layer in layers),
            biases=tuple(layer.bias.detach().cpu().double().numpy() for layer in layers),
        )


def layers_of(pipeline: Any, task: str, calibration: Calibration | None, inputs: int) -> Layers | None:
    """The layers that give a head's own answers, its probabilities after a softmax or sigmoid.

    Parameters
    ----------
    pipeline : Pipeline
        A fitted head with its scaler.
    task : {"classification", "regression", "multilabel"}
    calibration : Calibration or None
    inputs : int
        Width of the embedding.

    Returns
    -------
    Layers or None
        None of a head that has no such form, as far as that shows at once: that scores are linear is for the caller to
        compare.
    """
    scaler, head = pipeline[0], pipeline[-1]
    folds = len(pipeline) == 2 and (scaler == "passthrough" or hasattr(scaler, "scale_"))
    answers, found = head if folds else pipeline, None
    if isinstance(head, _TORCH) and folds:
        found = _perceptron(head)
    elif task == "regression":
        found = _linear(lambda X: np.reshape(answers.predict(X), (len(X), -1)), inputs)
    elif hasattr(head, "decision_function"):
        found = _linear(lambda X: logits_of(answers, X), inputs)
    if found is None:
        return None
    if folds and scaler != "passthrough":
        found = found.after(*_scaling(scaler, inputs))
    if calibration is not None:
        offsets = np.asarray(calibration.offsets) if calibration.offsets else 0.0
        found = found.before(1 / calibration.temperature, offsets)
    return found.centred() if task == "classification" else found


def _perceptron(head: Any) -> Layers:
    weights = [np.asarray(coef.T, np.float64) for coef in head.coefs_]
    biases = [np.asarray(intercept, np.float64) for intercept in head.intercepts_]
    if hasattr(head, "classes_") and not head.multilabel_ and len(head.classes_) == 2:
        weights[-1] = np.vstack([np.zeros_like(weights[-1]), weights[-1]])
        biases[-1] = np.concatenate([[0.0], biases[-1]])
    activation, dropout = getattr(head, "activation", "relu"), float(getattr(head, "dropout", 0.0))
    return Layers(tuple(weights), tuple(biases), activation, dropout)


def _linear(answers: Callable[[Array], Array], inputs: int) -> Layers:
    """The layer that agrees with the answers at zero and at each unit vector."""
    origin = np.asarray(answers(np.zeros((1, inputs))), np.float64)[0]
    columns = []
    for start in range(0, inputs, ROWS_AT_ONCE):
        units = np.eye(min(ROWS_AT_ONCE, inputs - start), inputs, start)
        columns.append(np.asarray(answers(units), np.float64) - origin)
    return Layers((np.concatenate(columns).T.copy(),), (origin,))


def _scaling(scaler: Any, inputs: int) -> tuple[Array, Array]:
    mean = scaler.mean_ if getattr(scaler, "with_mean", False) else None
    scale = scaler.scale_
    return np.zeros(inputs) if mean is None else mean, np.ones(inputs) if scale is None else scale


def estimator_of(layers: Layers, task: str) -> tuple[str, Any]:
    """A fitted head of the table, and its name, that answers as some layers do.

    Returns
    -------
    name : {"linear", "mlp"}
    pipeline : Pipeline
        Without a scaler; what its estimator answers is what the layers do, in float32.
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
