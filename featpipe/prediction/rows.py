"""Predictions of a model for the embeddings of samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe.prediction.config import PredictConfig
from featpipe.status import Status

if TYPE_CHECKING:
    from featpipe.model import Model


@dataclass(frozen=True)
class Prediction:
    """The prediction of a model for one sample.

    Attributes
    ----------
    id : str
    status : str
        ``"ok"``, or the reason why there is no prediction.
    label : str or None
        The most probable class. For a multi-label model, the classes with a probability above 0.5, joined by ``;``.
    probability : float or None
        Probability of ``label``; None for a multi-label or a regression model.
    top : sequence of (class, probability)
        The most probable classes, in descending order.
    values : sequence of float
        The predicted targets of a regression model.
    novelty : float or None
        Out-of-distribution score: percentile among held-out training images.
    answers : sequence of str
        Prediction set: it contains the true class with the requested coverage.
    bounds : sequence of (low, high)
        Prediction interval of each target, with the requested coverage.
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
    """Yield the predictions of a batch of samples, in order.

    Parameters
    ----------
    model : Model
    ids : sequence of m str
    status : sequence of m codes of :class:`featpipe.status.Status`
    X : ndarray of shape (a, d)
        Embeddings of the samples whose status is ``OK``.
    config : PredictConfig
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
