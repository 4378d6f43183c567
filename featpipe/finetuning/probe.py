"""The probe that fine-tuning starts from and is compared with: never fitted on what judges it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import heads
from featpipe.cache import FeatureCache
from featpipe.calibration import Calibration
from featpipe.errors import ConfigError
from featpipe.finetuning.sides import Splits
from featpipe.model import Model
from featpipe.progress import Progress, ProgressCallback
from featpipe.training.rows import EmbeddingDataset
from featpipe.training.verb import make_head_config, train_head

__all__ = ["make_dataset", "refit_without"]


def refit_without(
    model: Model,
    cache: FeatureCache,
    splits: Splits,
    excluded_rows: NDArray[np.int64],
    training_rows: NDArray[np.int64],
    progress: ProgressCallback,
) -> Model:
    """The model, if it was trained on none of some rows; else the same head with the same settings, on other rows.

    Parameters
    ----------
    model : Model
    cache : FeatureCache
        Of the model's backbone.
    sides : Sides
    unseen, fitted_on : ndarray of int64
        Rows that the model must not know, and those that it is fitted on again.
    progress : callable
    """
    if not model.was_trained_on(cache.digests[excluded_rows]).any():
        return model
    dataset = make_dataset(model, cache, splits.y, training_rows)
    head_name, params = _head_settings(model)
    head_config = make_head_config(
        cache,
        dataset,
        head_name,
        params,
        balance=model.history.get("balance"),
        random_state=model.history.get("random_state", 0),
    )
    recalibrate = model.calibration is not None and model.calibration.temperature != 1
    text = f"the model knows images that are to judge it: its head is fitted again on {len(dataset)} others"
    progress(Progress("note", text))
    refitted = train_head(cache, dataset, head_config, None, calibrate=recalibrate).to_model(
        cache, dataset, model.output, params
    )
    refitted.request, refitted.device = model.request, model.device
    refitted._backbone, refitted._engine = model._backbone, model._engine
    if model.calibration is not None and model.calibration.offsets:
        temperature = 1.0 if refitted.calibration is None else refitted.calibration.temperature
        refitted.calibration = Calibration(temperature, model.calibration.offsets)
    return refitted


def make_dataset(model: Model, cache: FeatureCache, y: NDArray[Any], rows: NDArray[np.int64]) -> EmbeddingDataset:
    """Some rows as heads are fitted on them, in the model's terms."""
    targets = y[rows]
    if model.task == "regression" and targets.shape[1] == 1:
        targets = targets[:, 0]
    X = np.asarray(cache.features(model.output)[rows], np.float32)
    return EmbeddingDataset(rows, X, targets, model.classes, np.ascontiguousarray(cache.digests[rows]))


def _head_settings(model: Model) -> tuple[str, Mapping[str, object]]:
    """The head by its name and settings; logistic, if it is one that cannot be built from them."""
    params = dict(model.history.get("params") or {})
    params = {key: tuple(value) if isinstance(value, list) else value for key, value in params.items()}
    search_result = model.history.get("chosen") or {}
    if model.head_name != "logistic":  # whose strength is chosen anew, from the rows that are left
        params |= search_result.get("settings", {})
    try:
        heads.build(model.head_name, model.task, params={k: v for k, v in params.items() if k != "class_weight"})
    except ConfigError:
        return ("ridge" if model.task == "regression" else "logistic"), {}
    return model.head_name, params
