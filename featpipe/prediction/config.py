"""What is to be told of each sample, and how far the work may go: the one home of the defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from featpipe.config import ExtractionConfig, check_names
from featpipe.errors import ConfigError
from featpipe.model import Model

__all__ = ["PredictConfig"]


@dataclass(frozen=True)
class PredictConfig:
    """How to predict.

    Parameters
    ----------
    top : int
        How many classes to name for each sample.
    sets : float, optional
        Name a set of classes for each sample that holds the right one this often, such as 0.9; of a regression, the
        ends of an interval.
    cache : path-like, optional
        Keep the embeddings as a cache in this folder, and take from its caches what is there.
    workers : int, optional
        Threads; chosen for the machine if not given.
    max_bad : int, float or str, optional
        How many images may have no prediction before the work stops: a number, or a share such as ``"5%"``.
    time_limit : float or str, optional
        Seconds, or a time such as ``"3h"``, after which the work stops so that it can be gone on with.
    check_content : bool
        Read every image's bytes even where size and modification time say that it is unchanged.
    """

    top: int = 5
    sets: float | None = None
    cache: str | os.PathLike[str] | None = None
    workers: int | None = None
    max_bad: int | float | str | None = None
    time_limit: float | str | None = None
    check_content: bool = False

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"top is {self.top}; it must be at least 1")
        self._validated_options()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> PredictConfig:
        """From keyword arguments; an unknown one is answered with the nearest."""
        check_names("setting", settings, [f.name for f in fields(cls)])
        return cls(**settings)

    def check_models(self, models: Sequence[Model]) -> None:
        """Refuse what the models cannot tell, before any work."""
        if self.sets is not None:
            for model in models:
                model.sets_known().score_quantile(self.sets)

    def extraction_config(self, model: Model) -> ExtractionConfig:
        """How the images are embedded for a model.

        Embeddings that are not kept are not rounded: predictions are then those of ``model.predict_proba``, bit for
        bit, whatever type the caches have that the head was trained on.
        """
        extraction_settings = {
            **model.extraction(),
            **self._validated_options(),
            "storage": self.embedding_dtype(model),
        }
        return ExtractionConfig.from_settings(
            extraction_settings if self.cache is None else {**extraction_settings, "cache": self.cache}
        )

    def embedding_dtype(self, model: Model) -> str:
        """The type of the embeddings that the predictions are made of."""
        return "float32" if self.cache is None else str(model.facts["storage"])

    def get_max_bad_count(self, n: int) -> int | None:
        """How many of n images may have no prediction."""
        return ExtractionConfig(max_bad=self.max_bad).get_max_bad_count(n)

    def _validated_options(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in ("workers", "max_bad", "time_limit", "check_content")}
        ExtractionConfig.from_settings(options)  # which refuses what cannot be
        return options
