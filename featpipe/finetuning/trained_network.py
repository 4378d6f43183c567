"""The network and head layers after training, and the model that they make."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import nn

from featpipe.backbones import Backbone, digest_state
from featpipe.cache import FeatureCache
from featpipe.finetuning.context import FineTuneContext
from featpipe.finetuning.head_layers import HeadLayers, layers_to_head
from featpipe.finetuning.split import make_dataset
from featpipe.finetuning.trainer import EpochRecord
from featpipe.metrics import Calibration, compute_logits, fit_temperature
from featpipe.model import (
    STORED_DIGEST_BYTES,
    ConformalPredictor,
    Model,
    ReplayMemory,
    RetentionPolicy,
    Uncertainty,
    collect_replay_memory,
)
from featpipe.training import EmbeddingDataset, fit_novelty


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A network and its head layers after the best epoch.

    Attributes
    ----------
    context : FineTuneContext
    network : Module
        The trained copy of the backbone's network.
    layers : HeadLayers
        In the units of the targets.
    curve : tuple of EpochRecord
        Number 0 is before the first step.
    best_epoch : EpochRecord
    """

    context: FineTuneContext
    network: nn.Module
    layers: HeadLayers
    curve: tuple[EpochRecord, ...]
    best_epoch: EpochRecord

    @cached_property
    def backbone(self) -> Backbone:
        """The trained network as a backbone like any other; the model's own backbone if no weight changed."""
        base, out = self.context.model.backbone, self.context.out
        network = self.network.cpu().to(memory_format=torch.contiguous_format)
        network = network.eval().requires_grad_(False)
        digest = digest_state(network)
        if digest == base.digest:
            return base
        request = {**base.request, "weights": None if out is None else os.path.abspath(out)}
        return replace(base, network=network, digest=digest, origin=f"fine-tuned from {base.origin}", request=request)

    @cached_property
    def cache(self) -> FeatureCache:
        """The embeddings of all images by :attr:`backbone`."""
        return self.context.extract_embeddings(self.backbone)

    def to_model(
        self,
        *,
        layers: HeadLayers | None = None,
        start_model: Model | None = None,
        history: Mapping[str, Any] | None = None,
        calibrate: bool = True,
    ) -> Model:
        """Make the model of the trained network.

        Parameters
        ----------
        layers : HeadLayers, optional
            The head; :attr:`layers` if not given.
        start_model : Model, optional
            The model that training started from; the context's if not given.
        history : mapping, optional
            Added to the model's history.
        calibrate : bool
            Fit a temperature on the validation rows if the context's model has one.
        """
        model, splits = self.context.model, self.context.splits
        name, pipeline = layers_to_head(layers or self.layers, model.task)
        train_set, validation_set = (
            make_dataset(model, self.cache, splits.y, rows) for rows in (splits.train, splits.validation)
        )
        trained_on = (start_model or model).trained_on
        new_digests = self.cache.digests[splits.train_and_validation][:, :STORED_DIGEST_BYTES]
        finetuned = Model(
            head=pipeline,
            head_name=name,
            task=model.task,
            classes=model.classes,
            output=model.output,
            facts=self.cache.facts,
            request=dict(self.backbone.request),
            trained_on=np.unique(np.concatenate([trained_on, new_digests]), axis=0),
            history={**_make_history(model, self.curve), **(history or {})},
            calibration=_make_calibration(model, pipeline, validation_set) if calibrate else None,
            kept=_make_replay_memory(model.kept, pipeline, train_set),
            device=model.device,
            _carries_weights=self.backbone is not model.backbone or model._carries_weights,
            _backbone=self.backbone,
        )
        finetuned.trust = _make_uncertainty(model, finetuned, train_set, validation_set)
        return finetuned


def _make_calibration(model: Model, pipeline: Any, validation_set: EmbeddingDataset) -> Calibration | None:
    """A temperature from the validation rows if the model has one; prior corrections are in the new layer already."""
    if model.calibration is None or model.calibration.temperature == 1:
        return None
    return Calibration(fit_temperature(compute_logits(pipeline, np.asarray(validation_set.X)), validation_set.y))


def _make_replay_memory(previous: ReplayMemory | None, pipeline: Any, rows: EmbeddingDataset) -> ReplayMemory | None:
    """Retained data of the new embeddings, by the retention policy of the old model."""
    if previous is None:
        return None
    policy = RetentionPolicy(
        previous.statistics is not None, previous.importances is not None, previous.to_summary()["rows_a_class"]
    )
    return collect_replay_memory(policy, pipeline, rows.X, rows.y, len(rows.classes))


def _make_uncertainty(
    model: Model, finetuned: Model, train_set: EmbeddingDataset, validation_set: EmbeddingDataset
) -> Uncertainty:
    """The out-of-distribution score and prediction sets, if the old model has them."""
    novelty = fit_novelty(train_set, model.task) if model.trust.novelty is not None else None
    if model.trust.conformal is None:
        return Uncertainty(novelty, None)
    X = np.asarray(validation_set.X)
    predictions = finetuned.predict_features(X) if model.task == "regression" else finetuned.predict_proba_features(X)
    return Uncertainty(novelty, ConformalPredictor.from_predictions(predictions, validation_set.y))


def _make_history(model: Model, curve_records: Sequence[EpochRecord]) -> dict[str, Any]:
    curve = [epoch.to_dict() for epoch in curve_records]
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
