"""All that there is of an expansion through the network before the first step."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.backbones import Backbone
from featpipe.cache import FeatureCache
from featpipe.config import FineTuneConfig
from featpipe.errors import ConfigError
from featpipe.finetuning import (
    DistributedContext,
    FineTuneContext,
    InitialHead,
    Splits,
    initialize_head,
    resolve_process_device,
    select_unfrozen,
)
from featpipe.incremental.context import ExpansionContext
from featpipe.incremental.deep.ewc import (
    ParameterImportances,
    compute_importances,
    list_trained_parameters,
    make_ewc_penalty,
    make_old_layers,
)
from featpipe.incremental.deep.images import ExpansionImages
from featpipe.incremental.deep.methods import DEEP_METHODS, UNSUPPORTED_METHODS, ReplayDataset, make_replay_dataset
from featpipe.incremental.problem import ExpansionConfig, IncrementalStep
from featpipe.metrics import Calibration
from featpipe.model import Model, Uncertainty

__all__ = ["DeepTrainingConfig", "TrainingSetup"]

logger = logging.getLogger(__name__)

UNSUPPORTED_FINETUNE_FIELDS = ("weights", "test", "keep_worse", "class_weight", "sampling")  # fields of FineTuning


@dataclass(frozen=True, eq=False)
class DeepTrainingConfig:
    """How the network is trained, and on which pictures.

    Attributes
    ----------
    tuning : FineTuning
    archives : list of path-like
        Of all images, those to judge by among them.
    labels, cache
        As `expand` takes them.
    resume : bool
    out : path-like or None
        Where the model is going to be; a checkpoint lies beside it until then.
    """

    finetune_config: FineTuneConfig
    archives: list[Any]
    labels: Any
    cache_folder: str | os.PathLike[str]
    resume: bool
    out: str | os.PathLike[str] | None = None

    @classmethod
    def from_params(
        cls,
        method: str | None,
        archives: list[Any],
        params: Mapping[str, Any],
        unfreeze: Any,
        labels: Any,
        cache_folder: str | os.PathLike[str],
        resume: bool,
    ) -> tuple[DeepTrainingConfig, dict[str, Any]]:
        """The way, and what is left of the settings for the methods on features.

        Raises
        ------
        ConfigError
            If the method cannot go into the network, or a setting is unknown or has no place in an expansion.
        """
        if method in UNSUPPORTED_METHODS:
            raise ConfigError(
                f"{method} {UNSUPPORTED_METHODS[method]}. What works with --unfreeze: {', '.join(DEEP_METHODS)}"
            )
        for name in UNSUPPORTED_FINETUNE_FIELDS:
            if name in params:
                raise ConfigError(f"setting {name} is for `featpipe finetune`, and not for an expansion; leave it out")
        expansion_fields = {field.name for field in fields(ExpansionConfig)} - {"epochs"}
        finetune_params = {name: value for name, value in params.items() if name not in expansion_fields}
        finetune_config = FineTuneConfig.from_settings({**finetune_params, "unfreeze": unfreeze})
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("expand --unfreeze runs in one process, and torchrun started several; start it by itself")
        return cls(finetune_config, archives, labels, cache_folder, resume), {
            n: v for n, v in params.items() if n in expansion_fields
        }


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """All that is there before the first step.

    Attributes
    ----------
    case : Case
        Of `expand`.
    method : str
    whole : Step
        With all images but those that it is judged by.
    lesson : Lesson
    backbone : Backbone
        Before, with the one output that the head is on.
    rows : ndarray of shape (m,), int64
        Where the lesson's pool is among the pictures.
    tested : ndarray of shape (t,), int64
        Where the test images are.
    tuned_by : featpipe.finetuning.context.Case
    start : Start
    known : mapping or None
        Importances of the weights for the old classes, by parameter; those of the last layer of shape (k, …).
    """

    context: ExpansionContext
    method: str
    full_step: IncrementalStep
    replay_dataset: ReplayDataset
    backbone: Backbone
    pool_rows: NDArray[np.int64]
    test_rows: NDArray[np.int64]
    finetune_context: FineTuneContext
    initial_head: InitialHead
    importances: ParameterImportances | None = None

    @classmethod
    def create(
        cls, context: ExpansionContext, method: str, deep_config: DeepTrainingConfig, full_step: IncrementalStep
    ) -> TrainingSetup:
        """Where the method on features ends, and what holds the network to the old classes from there."""
        backbone = _select_output(context.model)
        select_unfrozen(backbone, str(deep_config.finetune_config.unfreeze))  # a mistake is told before there is work
        replay_dataset = make_replay_dataset(full_step, method, deep_config.finetune_config.validation)
        images = ExpansionImages.from_archives(
            context.model, deep_config.archives, deep_config.labels, deep_config.cache_folder, context.progress
        )
        pool_rows, test_rows = images.find_rows(replay_dataset.pool), images.find_rows(context.data.test)
        splits = _make_splits(context, replay_dataset, pool_rows, test_rows, len(images.index))
        expanded_model, device = (
            _make_expanded_model(context, method, replay_dataset),
            resolve_process_device(deep_config.finetune_config.device),
        )
        initial_head = initialize_head(
            expanded_model,
            replay_dataset.pool.X[replay_dataset.is_train],
            replay_dataset.pool.y[replay_dataset.is_train],
        )
        for text in (splits.description, initial_head.description):
            logger.info(text)
        finetune_context = FineTuneContext(
            expanded_model,
            images.index,
            images.embedding_cache,
            splits,
            deep_config.finetune_config,
            device,
            DistributedContext(),
            deep_config.cache_folder,
            deep_config.out,
            context.progress,
        )
        setup = cls(
            context, method, full_step, replay_dataset, backbone, pool_rows, test_rows, finetune_context, initial_head
        )
        return setup._with_regularizers(images)

    def _with_regularizers(self, images: ExpansionImages) -> TrainingSetup:
        settings, full_step, finetune_context, importances = (
            self.context.settings,
            self.full_step,
            self.finetune_context,
            None,
        )
        strength = settings.strength
        distill_strength = DEEP_METHODS[self.method].distill_strength
        regularizers = self.replay_dataset.make_regularizers(
            self.pool_rows,
            len(images.index),
            strength if self.method == "distill" and strength is not None else distill_strength,
        )
        if self.method == "ewc":
            importances = compute_importances(finetune_context, self.backbone, full_step, images)
            penalty_weight = (
                int(full_step.counts.sum())
                * (1.0 if strength is None else strength)
                / len(finetune_context.splits.train)
            )
            trained_importances = {
                name: importances[name]
                for name in list_trained_parameters(finetune_context, self.backbone, self.initial_head.layers)
            }
            ewc_penalty = make_ewc_penalty(
                self.initial_head.layers,
                make_old_layers(full_step),
                trained_importances,
                penalty_weight,
                self.backbone.network,
            )
            regularizers = replace(regularizers, ewc=ewc_penalty)
        return replace(
            self,
            finetune_context=replace(
                finetune_context, regularizers=replace(regularizers, provenance=self._describe_request())
            ),
            importances=importances,
        )

    def _describe_request(self) -> dict[str, Any]:
        """What decides the training beside what fine-tuning asks itself."""
        settings, model = vars(self.context.settings), self.context.model
        return {"method": self.method, "k_old": self.full_step.k_old, "settings": settings, "from": model.identity}

    def load_embeddings(self, cache: FeatureCache, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Of some rows of the pictures, shape (m, d)."""
        return np.asarray(cache.features(self.context.model.output)[rows], np.float32)


def _select_output(model: Model) -> Backbone:
    (output,) = (output for output in model.backbone.outputs if output.name == model.output)
    return replace(model.backbone, outputs=(output,))


def _make_expanded_model(context: ExpansionContext, method: str, replay_dataset: ReplayDataset) -> Model:
    """The model that the method on features gives."""
    model = context.model
    calibration = None if model.calibration is None else Calibration(model.calibration.temperature)
    return replace(
        model,
        head=DEEP_METHODS[method].make_head(replay_dataset.step),
        classes=context.class_mapping.classes,
        calibration=calibration,
        kept=None,
        trust=Uncertainty(),
        scores={},
    )


def _make_splits(
    context: ExpansionContext,
    replay_dataset: ReplayDataset,
    pool_rows: NDArray[np.int64],
    test_rows: NDArray[np.int64],
    n: int,
) -> Splits:
    """Rows of the pictures, of which there are n, and their classes."""
    y = np.full(n, -1, np.int64)
    y[test_rows], y[pool_rows] = context.data.test.y, replay_dataset.pool.y
    train, validation, test = (
        np.sort(pool_rows[replay_dataset.is_train]),
        np.sort(pool_rows[~replay_dataset.is_train]),
        np.unique(test_rows),
    )
    description = f"{len(train)} images to train on, {len(validation)} to say when to stop, {len(test)} to judge by"
    return Splits(train, validation, test, y, description)
