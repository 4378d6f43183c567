"""Settings of batch prediction, with their defaults."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from featpipe.config import (
    BadImageLimit,
    ExtractionConfig,
    PositiveInt,
    Settings,
    TimeLimit,
    compute_bad_image_limit,
)

if TYPE_CHECKING:
    from featpipe.model import Model


class StreamOptions(TypedDict, total=False):
    """Keywords of :func:`featpipe.prediction.stream`."""

    top: PositiveInt
    sets: float | None
    workers: PositiveInt | None


class PredictOptions(StreamOptions, total=False):
    """Keywords for the fields of :class:`PredictConfig`."""

    cache: str | os.PathLike[str] | None
    max_bad: BadImageLimit | None
    time_limit: TimeLimit | None
    check_content: bool


@dataclass(frozen=True)
class PredictConfig(Settings):
    """Settings of batch prediction.

    Parameters
    ----------
    top : int
        Number of classes listed for each sample.
    sets : float, optional
        Coverage of prediction sets, such as 0.9: each sample gets a set of classes; in regression, an interval.
    cache : path-like, optional
        Cache the embeddings in this folder, and reuse those of its caches.
    workers : int, optional
        Threads; chosen for the machine if not given.
    max_bad : int, float or str, optional
        How many images may fail before the prediction stops: a number, or a share such as ``"5%"``.
    time_limit : float or str, optional
        Seconds, or a time such as ``"3h"``, after which the prediction stops; the same call resumes it.
    check_content : bool
        Read every image's bytes, even if size and modification time are unchanged.
    """

    top: PositiveInt = 5
    sets: float | None = None
    cache: str | os.PathLike[str] | None = None
    workers: PositiveInt | None = None
    max_bad: BadImageLimit | None = None
    time_limit: TimeLimit | None = None
    check_content: bool = False

    def check_models(self, models: Sequence[Model]) -> None:
        """Check that the models support the requested outputs.

        Raises
        ------
        ConfigError
            If prediction sets are requested and a model has none.
        """
        if self.sets is not None:
            for model in models:
                model.sets_known().score_quantile(self.sets)

    def extraction_config(self, model: Model, backbone: str | None = None) -> ExtractionConfig:
        """Make the extraction settings for a model; see :meth:`Model.extraction` for ``backbone``.

        Embeddings that are not cached are not rounded. Predictions then equal those of ``model.predict_proba`` bit for
        bit, whatever the dtype of the embeddings that the head was trained on.
        """
        settings = {
            **model.extraction(backbone),
            **{name: getattr(self, name) for name in ("workers", "max_bad", "time_limit", "check_content")},
            "storage": self.embedding_dtype(model),
        }
        return ExtractionConfig.from_settings(settings if self.cache is None else {**settings, "cache": self.cache})

    def embedding_dtype(self, model: Model) -> str:
        """The dtype of the embeddings from which the predictions are computed."""
        return "float32" if self.cache is None else str(model.facts["storage"])

    def get_max_bad_count(self, n: int) -> int | None:
        """How many of n images may fail; None means no limit."""
        return compute_bad_image_limit(self.max_bad, n)
