"""The inputs of one fine-tuning run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
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
from featpipe.finetuning.distributed import DistributedContext, resolve_process_device
from featpipe.finetuning.loss_terms import LossTerm
from featpipe.finetuning.split import Splits
from featpipe.finetuning.trainer import EpochRecord
from featpipe.model import Model
from featpipe.runtime import ProgressCallback
from featpipe.storage import compute_fingerprint

NON_TRAINING_SETTINGS = ("device", "workers", "keep_worse")  # settings that do not influence the training
NO_ROWS = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class FineTuneContext:
    """The inputs of one fine-tuning run: the model, its images, the settings, and the caller's loss terms and monitors.

    Attributes
    ----------
    model : Model
        The model to fine-tune; its head gives the classes or targets.
    index : Index
    base_cache : FeatureCache
        Embeddings of all images of ``index`` by the model's own backbone.
    splits : Splits
    tuning : FineTuneConfig
    cache_folder : path-like
        Where caches are kept.
    out : path-like or None
        Where the model will be saved; the checkpoint is next to it. If None, there is no checkpoint.
    progress : callable
    distributed : DistributedContext
    epoch_callback : callable or None
        Called with each :class:`featpipe.finetuning.trainer.EpochRecord`.
    loss_terms : sequence of LossTerm
        Added to the loss.
    monitors : mapping from name to ndarray of int64
        Rows whose loss and score are recorded after each epoch; they do not influence training.
    sample_weights : ndarray of shape (n,) or None
        Weight of each row of ``index`` in the loss; 1 on average over the training rows.
    logit_adjustment : ndarray of shape (k,) or None
        Added to the logits in the loss alone.
    extra_config : mapping
        Everything else that determines the training, as JSON data; a checkpoint with other values is refused.
    """

    model: Model
    index: Index
    base_cache: FeatureCache
    splits: Splits
    tuning: FineTuneConfig
    cache_folder: str | os.PathLike[str]
    out: str | os.PathLike[str] | None
    progress: ProgressCallback
    distributed: DistributedContext = field(default_factory=DistributedContext)
    epoch_callback: Callable[[EpochRecord], None] | None = None
    loss_terms: Sequence[LossTerm] = ()
    monitors: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    sample_weights: NDArray[np.float64] | None = None
    logit_adjustment: NDArray[np.float64] | None = None
    extra_config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def device(self) -> torch.device:
        return resolve_process_device(self.tuning.device)

    @property
    def evaluation_rows(self) -> NDArray[np.int64]:
        """The validation rows, then those of all monitors: evaluated after each epoch, without augmentation."""
        return np.concatenate([self.splits.validation, np.unique(np.concatenate([NO_ROWS, *self.monitors.values()]))])

    @property
    def checkpoint_path(self) -> Path | None:
        return None if self.out is None else checkpoint_path_for(self.out)

    @property
    def run_config(self) -> dict[str, Any]:
        """Everything that determines the result of the training, as JSON data."""
        settings = {name: value for name, value in asdict(self.tuning).items() if name not in NON_TRAINING_SETTINGS}
        rows_digest = hashlib.sha256()
        for split_rows in (self.splits.train, self.splits.validation, self.splits.test):
            rows_digest.update(
                self.base_cache.digests[split_rows].tobytes()
                + np.ascontiguousarray(self.splits.y[split_rows]).tobytes()
                + b"|"
            )
        return {
            **self.extra_config,
            "settings": settings,
            "model": self.model.identity,
            "backbone": compute_fingerprint(self.base_cache.facts["backbone"]),
            "images": rows_digest.hexdigest(),
        }

    @property
    def run_digest(self) -> str:
        return compute_fingerprint([self.run_config, self.tuning.keep_worse])

    def extract_embeddings(self, backbone: Backbone) -> FeatureCache:
        """Embed all images with a backbone."""
        return extract_for_model(self.index, self.model, backbone, self.cache_folder, self.progress)


def checkpoint_path_for(out: str | os.PathLike[str]) -> Path:
    """The checkpoint file of a model that will be saved at ``out``."""
    return Path(f"{os.fspath(out)}.checkpoint")


def extract_for_model(
    index: Index, model: Model, backbone: Backbone, cache_folder: Any, progress: ProgressCallback
) -> FeatureCache:
    """Embed an archive with the extraction settings that a model was trained with."""
    settings = {**model.extraction(), "backbone": backbone, "cache": cache_folder}
    return extract_index(index, backbone, ExtractionConfig.from_settings(settings), progress)
