"""From embeddings to what a model says of each sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.model import Model
from featpipe.prediction.asked import Asked
from featpipe.status import Status

__all__ = ["Prediction", "predictions"]


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


def predictions(
    model: Model, ids: Sequence[str], status: Sequence[int], X: NDArray[np.floating], asked: Asked
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
    told = iter(_tell(model, X, asked))
    for name, code in zip(ids, status, strict=True):
        found = next(told) if code == Status.OK else {}
        yield Prediction(name, Status(code).word, **found)


def _tell(model: Model, X: NDArray[np.floating], asked: Asked) -> Iterable[dict[str, Any]]:
    if not len(X):
        return
    found = model.predict_sets_features(X, asked.sets) if asked.sets is not None else [()] * len(X)
    new = model.novelty_features(X).tolist() if model.trust.novelty is not None else [None] * len(X)
    if model.task == "regression":
        for values, bounds, novelty in zip(model.predict_features(X).reshape(len(X), -1), found, new, strict=True):
            ends = tuple((float(low), float(high)) for low, high in bounds)
            yield {"values": tuple(map(float, values)), "bounds": ends, "novelty": novelty}
        return
    for row, answers, novelty in zip(model.predict_proba_features(X), found, new, strict=True):
        order = np.argsort(-row, kind="stable")[: asked.top]
        ranked = [(model.classes[i], float(row[i])) for i in order]
        if model.task == "multilabel":
            chosen = [model.classes[i] for i in np.flatnonzero(row > 0.5)]
            told: dict[str, Any] = {"label": ";".join(chosen), "probability": None}
        else:
            told = {"label": ranked[0][0], "probability": ranked[0][1]}
        yield {**told, "top": ranked, "answers": answers, "novelty": novelty}
