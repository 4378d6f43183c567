"""Predictions as a stream: nothing is stored, and an interrupted stream cannot be resumed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Unpack

import numpy as np
from numpy.typing import NDArray

from featpipe import inference
from featpipe.config import check_names
from featpipe.data import Index
from featpipe.prediction.config import PredictConfig, StreamOptions
from featpipe.prediction.rows import Prediction, iter_predictions
from featpipe.runtime import Progress, ProgressCallback, ignore_progress
from featpipe.status import Status

if TYPE_CHECKING:
    from featpipe.inference import DecodedBatch
    from featpipe.model import Model

SamplePredictions = tuple[Prediction, ...]
"""The predictions of several models for one sample."""


def stream(
    model: Model,
    index: Index,
    *,
    progress: ProgressCallback = ignore_progress,
    **options: Unpack[StreamOptions],
) -> Generator[Prediction, None, None]:
    """Yield the predictions of an index, in its order.

    Parameters
    ----------
    model : Model
    index : Index
    progress : callable
    **options
        ``top``, ``sets`` and ``workers`` of :class:`PredictConfig`. Its other fields concern stored work.
    """
    check_names("setting", options, StreamOptions.__annotations__)
    with closing(stream_all([model], index, PredictConfig.from_settings(options), progress)) as rows:
        for (prediction,) in rows:
            yield prediction


def stream_all(
    models: Sequence[Model], index: Index, config: PredictConfig, progress: ProgressCallback = ignore_progress
) -> Generator[SamplePredictions, None, None]:
    """Yield the predictions of several models that share embeddings, with one forward pass."""
    config.check_models(models)
    engine = models[0].engine(len(index))
    n, next_row = len(index), 0
    loader = inference.Loader(index, np.arange(n), engine.transform, engine.batch, collate=engine.collate)
    pending_rows: dict[int, SamplePredictions] = {}
    with (
        closing(loader),
        engine.session(),
        closing(inference.embed_batches(loader, engine, config.workers or engine.workers)) as batches,
    ):
        for batch, features in batches:
            ids = [index.ids[row] for row in batch.rows]
            status, X = _mark_not_finite(batch, features.get(models[0].output))
            sample_predictions = zip(
                *(iter_predictions(model, ids, status, X, config) for model in models), strict=True
            )
            pending_rows.update(zip(batch.rows, sample_predictions, strict=True))
            while next_row in pending_rows:
                yield pending_rows.pop(next_row)
                next_row += 1
            progress(Progress("predicting", next_row, n))


def _mark_not_finite(batch: DecodedBatch, X: NDArray[np.float32] | None) -> tuple[list[int], NDArray[np.float32]]:
    """Return the status code of each row of a batch, and the finite embeddings."""
    status = [int(code) for code in batch.status]
    if X is None:
        return status, np.zeros((0, 0), np.float32)
    is_finite = np.isfinite(X).all(axis=1)
    for position in np.array(batch.positions)[~is_finite]:
        status[position] = Status.NOT_FINITE
    return status, X[is_finite]
