"""Predictions as they are made, for whoever reads along: nothing is kept, and nothing can be gone on from."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.archive import Index
from featpipe.loader import Batch, Loader, embedded
from featpipe.model import Model
from featpipe.names import check_names
from featpipe.prediction.answers import Prediction, predictions
from featpipe.prediction.asked import Asked
from featpipe.progress import Progress, Tell, quiet
from featpipe.status import Status

__all__ = ["stream", "stream_all"]

TOLD = ("top", "sets", "workers")
Row = tuple[Prediction, ...]
"""What each of some models says of one sample."""


def stream(model: Model, index: Index, *, progress: Tell = quiet, **asked: Any) -> Generator[Prediction, None, None]:
    """The predictions of an index, in its order, as they are made.

    Parameters
    ----------
    model : Model
    index : Index
    progress : callable
    **asked
        ``top``, ``sets`` and ``workers`` of :class:`Asked`; nothing is kept, and so nothing else is of use.
    """
    check_names("setting", asked, TOLD)
    with closing(stream_all([model], index, Asked.of(asked), progress)) as rows:
        for (prediction,) in rows:
            yield prediction


def stream_all(
    models: Sequence[Model], index: Index, asked: Asked, progress: Tell = quiet
) -> Generator[Row, None, None]:
    """The same of several models on the same embeddings, by one forward pass."""
    asked.check(models)
    engine = models[0].engine(len(index))
    n, done = len(index), 0
    loader = Loader(index, np.arange(n), engine.transform, engine.batch, collect=engine.collect)
    waiting: dict[int, Row] = {}
    with (
        closing(loader),
        engine.running(),
        closing(embedded(loader, engine, asked.workers or engine.workers)) as batches,
    ):
        for batch, features in batches:
            ids = [index.ids[row] for row in batch.rows]
            status, X = _sound(batch, features.get(models[0].output))
            told = zip(*(predictions(model, ids, status, X, asked) for model in models), strict=True)
            waiting.update(zip(batch.rows, told, strict=True))
            while done in waiting:
                yield waiting.pop(done)
                done += 1
            progress(Progress("bar", "predicting", done, n))


def _sound(batch: Batch, X: NDArray[np.float32] | None) -> tuple[list[int], NDArray[np.float32]]:
    """The status of each row of a batch, and the embeddings of those that have one."""
    status = [int(code) for code in batch.status]
    if X is None:
        return status, np.zeros((0, 0), np.float32)
    finite = np.isfinite(X).all(axis=1)
    for place in np.array(batch.places)[~finite]:
        status[place] = Status.NOT_FINITE
    return status, X[finite]
