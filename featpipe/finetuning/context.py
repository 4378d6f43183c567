"""One model, the images that it is trained on further, and what is asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featpipe.backbones import Backbone
from featpipe.cache import FeatureCache
from featpipe.config import ExtractionConfig, FineTuneConfig
from featpipe.data import Index
from featpipe.extraction import extract_index
from featpipe.finetuning.distributed import DistributedContext
from featpipe.finetuning.regularizers import Regularizers
from featpipe.finetuning.split import Splits
from featpipe.finetuning.trainer import EpochRecord
from featpipe.model import Model
from featpipe.runtime import ProgressCallback
from featpipe.storage import compute_fingerprint

__all__ = ["NON_TRAINING_SETTINGS", "FineTuneContext", "checkpoint_path_for", "extract_for_model"]

NON_TRAINING_SETTINGS = ("device", "workers", "keep_worse")  # settings that decide nothing in the training


@dataclass(frozen=True, eq=False)
class FineTuneContext:
    """One model, the images that it is trained on further, and what is asked for.

    Attributes
    ----------
    model : Model
    index : Index
    before : FeatureCache
        The embeddings of all images by the model's own backbone.
    sides : Sides
    tuning : FineTuning
    device : torch.device
    world : World
    cache : path-like
        The folder of all caches.
    out : path-like or None
    tell : callable
    board : callable or None
        Told each epoch.
    past : Past or None
        Where classes have come to those that the model knew: the held-out rows are then watched after each epoch too.
    """

    model: Model
    index: Index
    base_cache: FeatureCache
    splits: Splits
    tuning: FineTuneConfig
    device: torch.device
    distributed: DistributedContext
    cache_folder: str | os.PathLike[str]
    out: str | os.PathLike[str] | None
    progress: ProgressCallback
    epoch_callback: Callable[[EpochRecord], None] | None = None
    regularizers: Regularizers | None = None

    @property
    def monitor_rows(self) -> NDArray[np.int64]:
        """Rows that are looked at after each epoch and decide nothing."""
        return self.splits.test[:0] if self.regularizers is None else self.splits.test

    @property
    def checkpoint_path(self) -> Path | None:
        return None if self.out is None else checkpoint_path_for(self.out)

    @property
    def run_config(self) -> dict[str, Any]:
        """All that decides what comes of the training; JSON can hold it."""
        settings = {name: value for name, value in asdict(self.tuning).items() if name not in NON_TRAINING_SETTINGS}
        rows_digest = hashlib.sha256()
        for split_rows in (self.splits.train, self.splits.validation, self.splits.test):
            rows_digest.update(
                self.base_cache.digests[split_rows].tobytes()
                + np.ascontiguousarray(self.splits.y[split_rows]).tobytes()
                + b"|"
            )
        regularizer_entry = {} if self.regularizers is None else {"past": dict(self.regularizers.provenance or {})}
        return {
            **regularizer_entry,
            "settings": settings,
            "model": self.model.identity,
            "backbone": compute_fingerprint(self.base_cache.facts["backbone"]),
            "images": rows_digest.hexdigest(),
        }

    @property
    def run_digest(self) -> str:
        return compute_fingerprint([self.run_config, self.tuning.keep_worse])

    def extract_embeddings(self, backbone: Backbone) -> FeatureCache:
        """The embeddings of all images by a backbone."""
        return extract_for_model(self.index, self.model, backbone, self.cache_folder, self.progress)


def checkpoint_path_for(out: str | os.PathLike[str]) -> Path:
    """Beside the model that is going to be."""
    return Path(f"{os.fspath(out)}.checkpoint")


def extract_for_model(
    index: Index, model: Model, backbone: Backbone, cache_folder: Any, progress: ProgressCallback
) -> FeatureCache:
    """The embeddings of an archive, made as those that a model was trained on."""
    settings = {**model.extraction(), "backbone": backbone, "cache": cache_folder}
    return extract_index(index, backbone, ExtractionConfig.from_settings(settings), progress)
