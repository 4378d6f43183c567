"""Where fine-tuning starts: at the model's own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

from featpipe import heads
from featpipe.finetuning.layers import HeadLayers, head_to_layers
from featpipe.heads.network import forward
from featpipe.model import Model

__all__ = ["InitialHead", "initialize_head"]

PREDICTION_TOLERANCE = 1e-4
MAX_COMPARED_ROWS = 1000  # rows


@dataclass(frozen=True, eq=False)
class InitialHead:
    """The new layers before the first step.

    Attributes
    ----------
    layers : Layers
        Their answers are logits; of a regression the targets less ``mean``, divided by ``spread``.
    mean, spread : ndarray of shape (t,), float64
        Of the targets; 0 and 1 of classes.
    how : str
        For people.
    """

    layers: HeadLayers
    target_mean: NDArray[np.float64]
    target_std: NDArray[np.float64]
    description: str

    def to_target_units(self, layers: HeadLayers) -> HeadLayers:
        """Trained layers with answers in the units of the targets."""
        return layers.fold_output_scaling(self.target_std, self.target_mean)


def initialize_head(model: Model, X: NDArray[np.float32], y: NDArray[Any]) -> InitialHead:
    """The layers that give a model's own answers; if it has none, a linear head that is trained for it.

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
    description = f"the layer starts as the {model.head_name} head of the model"
    if layers is None or not _predictions_agree(
        _predict_with_layers(layers, model.task, compared_rows), _predict_with_model(model, compared_rows)
    ):
        name = "ridge" if model.task == "regression" else "logistic"
        pipeline = heads.build(name, model.task).fit(X, y)
        layers = head_to_layers(pipeline, model.task, None, d)
        assert layers is not None
        description = (
            f"the layer starts as a {name} head trained on the embeddings: {model.head_name} is no layer of a network"
        )
    target_mean, target_std = _target_statistics(y) if model.task == "regression" else (np.zeros(1), np.ones(1))
    return InitialHead(
        layers.fold_output_scaling(1 / target_std, -target_mean / target_std), target_mean, target_std, description
    )


def _predict_with_layers(layers: HeadLayers, task: str, X: NDArray[np.floating]) -> NDArray[np.float64]:
    """Probabilities of shape (m, k), or numbers of shape (m, t)."""
    scores = forward(X.astype(np.float64), [w.T for w in layers.weights], layers.biases, layers.activation)
    if task == "regression":
        return np.asarray(scores)
    return np.asarray(expit(scores) if task == "multilabel" else softmax(scores, axis=1))


def _predict_with_model(model: Model, X: NDArray[np.float32]) -> NDArray[np.float64]:
    """What the model itself says."""
    if model.task == "regression":
        return np.asarray(model.predict_features(X)).reshape(len(X), -1)
    return model.predict_proba_features(X)


def _predictions_agree(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    """To 1e-4; of numbers, of their size."""
    return a.shape == b.shape and bool(np.abs(a - b).max() <= PREDICTION_TOLERANCE * max(1.0, float(np.abs(b).max())))


def _target_statistics(y: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    targets = np.asarray(y, np.float64).reshape(len(y), -1)
    std = targets.std(axis=0)
    return targets.mean(axis=0), np.where(std > 0, std, 1.0)
