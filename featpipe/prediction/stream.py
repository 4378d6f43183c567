"""Predictions as they are made, for whoever reads along: nothing is kept, and nothing can be gone on from."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from featpipe.config import check_names
from featpipe.data import Index
from featpipe.inference import DecodedBatch, Loader, embed_batches
from featpipe.model import Model
from featpipe.prediction.config import PredictConfig, StreamOptions
from featpipe.prediction.rows import Prediction, iter_predictions
from featpipe.runtime import Progress, ProgressCallback, report_warnings_only
from featpipe.status import Status

__all__ = ["stream", "stream_all"]

SamplePredictions = tuple[Prediction, ...]
"""What each of some models says of one sample."""


def stream(
    model: Model,
    index: Index,
    *,
    progress: ProgressCallback = report_warnings_only,
    **options: Unpack[StreamOptions],
) -> Generator[Prediction, None, None]:
    """The predictions of an index, in its order, as they are made.

    Parameters
    ----------
    model : Model
    index : Index
    progress : callable
    **options
        ``top``, ``sets`` and ``workers`` of
        :class:`featpipe.prediction.PredictConfig`; the others concern embeddings that are kept.
    """
    check_names("setting", options, StreamOptions.__annotations__)
    with closing(stream_all([model], index, PredictConfig.from_settings(options), progress)) as rows:
        for (prediction,) in rows:
            yield prediction


def stream_all(
    models: Sequence[Model], index: Index, config: PredictConfig, progress: ProgressCallback = report_warnings_only
) -> Generator[SamplePredictions, None, None]:
    """The same of several models on the same embeddings, by one forward pass."""
    config.check_models(models)
    engine = models[0].engine(len(index))
    n, next_row = len(index), 0
    loader = Loader(index, np.arange(n), engine.transform, engine.batch, collate=engine.collect)
    pending_rows: dict[int, SamplePredictions] = {}
    with (
        closing(loader),
        engine.running(),
        closing(embed_batches(loader, engine, config.workers or engine.workers)) as batches,
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
            progress(Progress("bar", "predicting", next_row, n))


def _mark_not_finite(batch: DecodedBatch, X: NDArray[np.float32] | None) -> tuple[list[int], NDArray[np.float32]]:
    """The status of each row of a batch, and the embeddings of those that have one."""
    status = [int(code) for code in batch.status]
    if X is None:
        return status, np.zeros((0, 0), np.float32)
    is_finite = np.isfinite(X).all(axis=1)
    for position in np.array(batch.positions)[~is_finite]:
        status[position] = Status.NOT_FINITE
    return status, X[is_finite]
