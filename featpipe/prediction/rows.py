"""From embeddings to what a model says of each sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.model import Model
from featpipe.prediction.config import PredictConfig
from featpipe.status import Status

__all__ = ["Prediction", "iter_predictions"]


@dataclass(frozen=True)
class Prediction:
    """What a model says of one sample.

    Attributes
    ----------
    id : str
    status : str
        ``"ok"``, or why there is no prediction.
    label : str or None
        The most probable class; the classes above 0.5, joined by ``;``, of a multi-label model.
    probability : float or None
    top : list of (class, probability)
        The most probable classes.
    values : tuple of float
        The targets that a regression model predicts.
    novelty : float or None
        The share of training-like images that look less new.
    answers : tuple of str
        The set that holds the right class as often as was asked for.
    bounds : tuple of (low, high)
        The interval of each target, likewise.
    """

    id: str
    status: str
    label: str | None = None
    probability: float | None = None
    top: Sequence[tuple[str, float]] = ()
    values: Sequence[float] = ()
    novelty: float | None = None
    answers: Sequence[str] = ()
    bounds: Sequence[tuple[float, float]] = ()


def iter_predictions(
    model: Model, ids: Sequence[str], status: Sequence[int], X: NDArray[np.floating], config: PredictConfig
) -> Iterator[Prediction]:
    """The predictions of some samples, in their order.

    Parameters
    ----------
    model : Model
    ids : sequence of m str
    status : sequence of m codes of :class:`featpipe.status.Status`
    X : ndarray of shape (a, d)
        The embeddings of those samples whose status is ``OK``.
    asked : Asked
    """
    model_outputs = iter(_iter_model_outputs(model, X, config))
    for sample_id, status_code in zip(ids, status, strict=True):
        fields = next(model_outputs) if status_code == Status.OK else {}
        yield Prediction(sample_id, Status(status_code).word, **fields)


def _iter_model_outputs(model: Model, X: NDArray[np.floating], config: PredictConfig) -> Iterable[dict[str, Any]]:
    if not len(X):
        return
    prediction_sets = model.predict_sets_features(X, config.sets) if config.sets is not None else [()] * len(X)
    novelty_scores = model.novelty_features(X).tolist() if model.trust.novelty is not None else [None] * len(X)
    if model.task == "regression":
        for values, bounds, novelty in zip(
            model.predict_features(X).reshape(len(X), -1), prediction_sets, novelty_scores, strict=True
        ):
            intervals = tuple((float(low), float(high)) for low, high in bounds)
            yield {"values": tuple(map(float, values)), "bounds": intervals, "novelty": novelty}
        return
    for probabilities, prediction_set, novelty in zip(
        model.predict_proba_features(X), prediction_sets, novelty_scores, strict=True
    ):
        top_indices = np.argsort(-probabilities, kind="stable")[: config.top]
        ranked_classes = [(model.classes[i], float(probabilities[i])) for i in top_indices]
        if model.task == "multilabel":
            predicted_labels = [model.classes[i] for i in np.flatnonzero(probabilities > 0.5)]
            decision: dict[str, Any] = {"label": ";".join(predicted_labels), "probability": None}
        else:
            decision = {"label": ranked_classes[0][0], "probability": ranked_classes[0][1]}
        yield {**decision, "top": ranked_classes, "answers": prediction_set, "novelty": novelty}
