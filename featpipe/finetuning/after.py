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
from featpipe.calibration import Calibration, compute_logits, fit_temperature
from featpipe.finetuning.layers import HeadLayers, layers_to_head
from featpipe.finetuning.probe import make_dataset
from featpipe.finetuning.sides import Splits
from featpipe.finetuning.state import TrainingState
from featpipe.kept import ReplayMemory, RetentionPolicy, collect_replay_memory
from featpipe.model import STORED_DIGEST_BYTES, Model
from featpipe.training.novelty import fit_novelty
from featpipe.training.rows import EmbeddingDataset
from featpipe.trust import ConformalPredictor, Uncertainty

__all__ = ["make_finetuned_backbone", "make_finetuned_model", "predict_rows"]


def make_finetuned_backbone(base: Backbone, network: nn.Module, weights: str | None) -> Backbone:
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
    if digest == base.digest:
        return base
    request = {**base.request, "weights": weights}
    return replace(base, network=network, digest=digest, origin=f"fine-tuned from {base.origin}", request=request)


def make_finetuned_model(
    model: Model,
    start_model: Model,
    backbone: Backbone,
    cache: FeatureCache,
    splits: Splits,
    layers: HeadLayers,
    state: TrainingState,
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
    name, pipeline = layers_to_head(layers, model.task)
    train_set, validation_set = (
        make_dataset(model, cache, splits.y, rows) for rows in (splits.train, splits.validation)
    )
    backbone_changed = backbone is not model.backbone
    digests = np.concatenate(
        [start_model.trained_on, cache.digests[splits.train_and_validation][:, :STORED_DIGEST_BYTES]]
    )
    finetuned = Model(
        head=pipeline,
        head_name=name,
        task=model.task,
        classes=model.classes,
        output=model.output,
        facts=cache.facts,
        request=dict(backbone.request),
        trained_on=np.unique(digests, axis=0),
        history={**_make_history(model, state), **history},
        calibration=_make_calibration(model, pipeline, validation_set),
        kept=_make_replay_memory(model.kept, pipeline, train_set),
        device=model.device,
        _carries_weights=backbone_changed or model._carries_weights,
        _backbone=backbone,
    )
    finetuned.trust = _make_uncertainty(model, finetuned, train_set, validation_set)
    return finetuned


def predict_rows(model: Model, cache: FeatureCache, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Probabilities or numbers of shape (m, k), from the embeddings of a cache."""
    X = np.asarray(cache.features(model.output)[rows], np.float32)
    if model.task == "regression":
        return np.asarray(model.predict_features(X), np.float64).reshape(len(rows), -1)
    return model.predict_proba_features(X)


def _make_calibration(model: Model, pipeline: Any, validation_set: EmbeddingDataset) -> Calibration | None:
    """A temperature from the validation rows, of a model that had one; offsets are in the new layer already."""
    if model.calibration is None or model.calibration.temperature == 1:
        return None
    return Calibration(fit_temperature(compute_logits(pipeline, np.asarray(validation_set.X)), validation_set.y))


def _make_replay_memory(previous: ReplayMemory | None, pipeline: Any, rows: EmbeddingDataset) -> ReplayMemory | None:
    """As much as the model before kept of its training data, of the new embeddings."""
    if previous is None:
        return None
    policy = RetentionPolicy(
        previous.statistics is not None, previous.importances is not None, previous.to_summary()["rows_a_class"]
    )
    return collect_replay_memory(policy, pipeline, rows.X, rows.y, len(rows.classes))


def _make_uncertainty(
    model: Model, finetuned: Model, train_set: EmbeddingDataset, validation_set: EmbeddingDataset
) -> Uncertainty:
    """How new an image looks, and sets of answers from the validation rows; where the model before knew."""
    novelty = fit_novelty(train_set, model.task) if model.trust.novelty is not None else None
    if model.trust.conformal is None:
        return Uncertainty(novelty, None)
    X = np.asarray(validation_set.X)
    predictions = finetuned.predict_features(X) if model.task == "regression" else finetuned.predict_proba_features(X)
    return Uncertainty(novelty, ConformalPredictor.from_predictions(predictions, validation_set.y))


def _make_history(model: Model, state: TrainingState) -> dict[str, Any]:
    curve = [epoch.to_dict() for epoch in state.curve]
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
