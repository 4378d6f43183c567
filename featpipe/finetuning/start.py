"""Where fine-tuning starts: at the model's own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

from featpipe import heads
from featpipe.finetuning.layers import Layers, layers_of
from featpipe.heads.network import forward
from featpipe.model import Model

__all__ = ["Start", "start_of"]

NEAR = 1e-4
COMPARED = 1000  # rows


@dataclass(frozen=True, eq=False)
class Start:
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

    layers: Layers
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    how: str

    def in_units(self, layers: Layers) -> Layers:
        """Trained layers with answers in the units of the targets."""
        return layers.before(self.spread, self.mean)


def start_of(model: Model, X: NDArray[np.float32], y: NDArray[Any]) -> Start:
    """The layers that give a model's own answers; if it has none, a linear head that is trained for it.

    Parameters
    ----------
    model : Model
    X : ndarray of shape (m, d)
        Embeddings of the training rows.
    y : ndarray
        Class codes of shape (m,), a 0/1 matrix, or targets.
    """
    some, d = X[:COMPARED], X.shape[1]
    found = layers_of(model.head, model.task, model.calibration, d)
    how = f"the layer starts as the {model.head_name} head of the model"
    if found is None or not _same(_said(found, model.task, some), _asked(model, some)):
        name = "ridge" if model.task == "regression" else "logistic"
        pipeline = heads.build(name, model.task).fit(X, y)
        found = layers_of(pipeline, model.task, None, d)
        assert found is not None
        how = f"the layer starts as a {name} head trained on the embeddings: {model.head_name} is no layer of a network"
    mean, spread = _targets(y) if model.task == "regression" else (np.zeros(1), np.ones(1))
    return Start(found.before(1 / spread, -mean / spread), mean, spread, how)


def _said(layers: Layers, task: str, X: NDArray[np.floating]) -> NDArray[np.float64]:
    """Probabilities of shape (m, k), or numbers of shape (m, t)."""
    scores = forward(X.astype(np.float64), [w.T for w in layers.weights], layers.biases, layers.activation)
    if task == "regression":
        return np.asarray(scores)
    return np.asarray(expit(scores) if task == "multilabel" else softmax(scores, axis=1))


def _asked(model: Model, X: NDArray[np.float32]) -> NDArray[np.float64]:
    """What the model itself says."""
    if model.task == "regression":
        return np.asarray(model.predict_features(X)).reshape(len(X), -1)
    return model.predict_proba_features(X)


def _same(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    """To 1e-4; of numbers, of their size."""
    return a.shape == b.shape and bool(np.abs(a - b).max() <= NEAR * max(1.0, float(np.abs(b).max())))


def _targets(y: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    targets = np.asarray(y, np.float64).reshape(len(y), -1)
    spread = targets.std(axis=0)
    return targets.mean(axis=0), np.where(spread > 0, spread, 1.0)
