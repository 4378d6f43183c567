"""The trained network and its new layer as what everything else of the house works with: a backbone, and a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featpipe.backbone import Backbone
from featpipe.backbone.weights import digest_state
from featpipe.cache import FeatureCache
from featpipe.calibration import Calibration, fit_temperature, logits_of
from featpipe.finetuning.layers import Layers, estimator_of
from featpipe.finetuning.probe import rows_of
from featpipe.finetuning.sides import Sides
from featpipe.finetuning.state import State
from featpipe.kept import Keep, Kept, keep_of
from featpipe.model import KEPT_DIGEST_BYTES, Model
from featpipe.training.novelty import novelty_of
from featpipe.training.rows import Rows
from featpipe.trust import Conformal, Trust

__all__ = ["answers_of", "model_of", "tuned_backbone"]


def tuned_backbone(before: Backbone, network: nn.Module, weights: str | None) -> Backbone:
    """Just another backbone: the same network with other weights; the one before, if nothing of it was trained.

    Parameters
    ----------
    before : Backbone
    network : Module
        A trained copy of its network.
    weights : str or None
        Where the weights are going to be found.
    """
    network = network.cpu().to(memory_format=torch.contiguous_format)
    network = network.eval().requires_grad_(False)
    digest = digest_state(network)
    if digest == before.digest:
        return before
    request = {**before.request, "weights": weights}
    return replace(before, network=network, digest=digest, origin=f"fine-tuned from {before.origin}", request=request)


def model_of(
    model: Model,
    start: Model,
    backbone: Backbone,
    cache: FeatureCache,
    sides: Sides,
    layers: Layers,
    state: State,
    history: Mapping[str, Any],
) -> Model:
    """A model like any other.

    Parameters
    ----------
    model : Model
        The one before, which says what is asked of a model.
    start : Model
        The one that it started from.
    backbone : Backbone
    cache : FeatureCache
        Of that backbone.
    sides : Sides
    layers : Layers
        Trained, with answers in the units of the targets.
    state : State
    history : mapping
    """
    name, pipeline = estimator_of(layers, model.task)
    train, watched = (rows_of(model, cache, sides.y, rows) for rows in (sides.train, sides.validation))
    changed = backbone is not model.backbone
    digests = np.concatenate([start.trained_on, cache.digests[sides.seen][:, :KEPT_DIGEST_BYTES]])
    tuned = Model(
        head=pipeline,
        head_name=name,
        task=model.task,
        classes=model.classes,
        output=model.output,
        facts=cache.facts,
        request=dict(backbone.request),
        trained_on=np.unique(digests, axis=0),
        history={**_history(model, state), **history},
        calibration=_calibration(model, pipeline, watched),
        kept=_kept(model.kept, pipeline, train),
        device=model.device,
        _carries_weights=changed or model._carries_weights,
        _backbone=backbone,
    )
    tuned.trust = _trust(model, tuned, train, watched)
    return tuned


def answers_of(model: Model, cache: FeatureCache, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Probabilities or numbers of shape (m, k), from the embeddings of a cache."""
    X = np.asarray(cache.features(model.output)[rows], np.float32)
    if model.task == "regression":
        return np.asarray(model.predict_features(X), np.float64).reshape(len(rows), -1)
    return model.predict_proba_features(X)


def _calibration(model: Model, pipeline: Any, watched: Rows) -> Calibration | None:
    """A temperature from the validation rows, of a model that had one; offsets are in the new layer already."""
    if model.calibration is None or model.calibration.temperature == 1:
        return None
    return Calibration(fit_temperature(logits_of(pipeline, np.asarray(watched.X)), watched.y))


def _kept(before: Kept | None, pipeline: Any, rows: Rows) -> Kept | None:
    """As much as the model before kept of its training data, of the new embeddings."""
    if before is None:
        return None
    keep = Keep(before.statistics is not None, before.importances is not None, before.facts()["rows_a_class"])
    return keep_of(keep, pipeline, rows.X, rows.y, len(rows.classes))


def _trust(model: Model, tuned: Model, train: Rows, watched: Rows) -> Trust:
    """How new an image looks, and sets of answers from the validation rows; where the model before knew."""
    novelty = novelty_of(train, model.task) if model.trust.novelty is not None else None
    if model.trust.conformal is None:
        return Trust(novelty, None)
    X = np.asarray(watched.X)
    answers = tuned.predict_features(X) if model.task == "regression" else tuned.predict_proba_features(X)
    return Trust(novelty, Conformal.of(answers, watched.y))


def _history(model: Model, state: State) -> dict[str, Any]:
    curve = [epoch.facts() for epoch in state.curve]
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "trained_on": model.history.get("trained_on"),
        "params": {},
        "curves": {
            "loss_curve": [epoch["loss"] for epoch in curve[1:]],
            "validation_curve": [epoch["validation_loss"] for epoch in curve],
            "validation_score_curve": [epoch["validation_score"] for epoch in curve],
        },
        "versions": {name: version(name) for name in ("featpipe", "scikit-learn", "numpy", "torch")},
    }
