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
from featpipe.finetuning.sides import Sides
from featpipe.model import Model
from featpipe.progress import Progress, Tell
from featpipe.training.rows import Rows
from featpipe.training.verb import plan_of, train_on

__all__ = ["fitted_without", "rows_of"]


def fitted_without(
    model: Model,
    cache: FeatureCache,
    sides: Sides,
    unseen: NDArray[np.int64],
    fitted_on: NDArray[np.int64],
    progress: Tell,
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
    if not model.was_trained_on(cache.digests[unseen]).any():
        return model
    rows = rows_of(model, cache, sides.y, fitted_on)
    head, params = _settings(model)
    plan = plan_of(
        cache,
        rows,
        head,
        params,
        balance=model.history.get("balance"),
        random_state=model.history.get("random_state", 0),
    )
    calibrates = model.calibration is not None and model.calibration.temperature != 1
    text = f"the model knows images that are to judge it: its head is fitted again on {len(rows)} others"
    progress(Progress("note", text))
    again = train_on(cache, rows, plan, None, calibrate=calibrates).model(cache, rows, model.output, params)
    again.request, again.device = model.request, model.device
    again._backbone, again._engine = model._backbone, model._engine
    if model.calibration is not None and model.calibration.offsets:
        temperature = 1.0 if again.calibration is None else again.calibration.temperature
        again.calibration = Calibration(temperature, model.calibration.offsets)
    return again


def rows_of(model: Model, cache: FeatureCache, y: NDArray[Any], rows: NDArray[np.int64]) -> Rows:
    """Some rows as heads are fitted on them, in the model's terms."""
    targets = y[rows]
    if model.task == "regression" and targets.shape[1] == 1:
        targets = targets[:, 0]
    X = np.asarray(cache.features(model.output)[rows], np.float32)
    return Rows(rows, X, targets, model.classes, np.ascontiguousarray(cache.digests[rows]))


def _settings(model: Model) -> tuple[str, Mapping[str, object]]:
    """The head by its name and settings; logistic, if it is one that cannot be built from them."""
    params = dict(model.history.get("params") or {})
    params = {key: tuple(value) if isinstance(value, list) else value for key, value in params.items()}
    chosen = model.history.get("chosen") or {}
    if model.head_name != "logistic":  # whose strength is chosen anew, from the rows that are left
        params |= chosen.get("settings", {})
    try:
        heads.build(model.head_name, model.task, params={k: v for k, v in params.items() if k != "class_weight"})
    except ConfigError:
        return ("ridge" if model.task == "regression" else "logistic"), {}
    return model.head_name, params
