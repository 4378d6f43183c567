"""The setup of an expansion through the network, before the first training step."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import data
from featpipe.backbones import Backbone
from featpipe.cache import FeatureCache
from featpipe.config import FineTuneConfig
from featpipe.errors import ConfigError
from featpipe.finetuning import (
    FineTuneContext,
    InitialHead,
    LossTerm,
    Splits,
    extract_for_model,
    initialize_head,
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
from featpipe.incremental.deep.methods import DEEP_METHODS, UNSUPPORTED_METHODS, ReplayDataset, make_replay_dataset
from featpipe.incremental.problem import ExpansionConfig, IncrementalStep
from featpipe.metrics import Calibration, format_note
from featpipe.model import Model, Uncertainty
from featpipe.training import EmbeddingDataset, as_list, is_cache

logger = logging.getLogger(__name__)

UNSUPPORTED_FINETUNE_FIELDS = ("weights", "test", "keep_worse", "class_weight", "sampling")  # of FineTuneConfig
OLD_CLASSES, NEW_CLASSES = "old classes", "new classes"  # names of the monitors


@dataclass(frozen=True, eq=False)
class DeepTrainingConfig:
    """How the network is trained, and on which images.

    Attributes
    ----------
    finetune_config : FineTuneConfig
    archives : list of path-like
        All images, test images included.
    labels, cache_folder
        As for `expand`.
    resume : bool
        Resume from the checkpoint, if there is one.
    out : path-like or None
        Where the model will be saved; the checkpoint is next to it.
    """

    finetune_config: FineTuneConfig
    archives: list[Any]
    labels: Any
    cache_folder: str | os.PathLike[str]
    resume: bool
    out: str | os.PathLike[str] | None = None

    @classmethod
    def from_params(
        cls, method: str | None, params: Mapping[str, Any], unfreeze: Any, sources: Sequence[Any], **options: Any
    ) -> tuple[DeepTrainingConfig, dict[str, Any]]:
        """The configuration, and the remaining settings, which are those of the methods on features.

        Parameters
        ----------
        method : str or None
        params : mapping
        unfreeze : str, int or float
        sources : sequence
            Arguments that name archives.
        **options
            ``labels``, ``cache_folder`` and ``resume``.

        Raises
        ------
        ConfigError
            If the method cannot train a network, a setting is unknown or not for an expansion, or a source is a cache.
        """
        archives = [item for source in sources for item in as_list(source)]
        for item in filter(is_cache, archives):
            name = item.path if isinstance(item, FeatureCache) else item
            raise ConfigError(
                f"{name}: is a cache, and --unfreeze trains on images, which a cache does not hold; give the archives"
            )
        if method in UNSUPPORTED_METHODS:
            raise ConfigError(
                f"{method} {UNSUPPORTED_METHODS[method]}. Available with --unfreeze: {', '.join(DEEP_METHODS)}"
            )
        for name in UNSUPPORTED_FINETUNE_FIELDS:
            if name in params:
                raise ConfigError(f"setting {name} is for `featpipe finetune`, not for an expansion; leave it out")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "expand --unfreeze runs in one process, torchrun started several; start it without torchrun"
            )
        expansion_fields = {field.name for field in fields(ExpansionConfig)} - {"epochs"}
        finetune_params = {name: value for name, value in params.items() if name not in expansion_fields}
        finetune_config = FineTuneConfig.from_settings({**finetune_params, "unfreeze": unfreeze})
        remaining_params = {name: value for name, value in params.items() if name in expansion_fields}
        return cls(finetune_config, archives, **options), remaining_params


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """Everything that exists before the first training step.

    Attributes
    ----------
    context : ExpansionContext
    method : str
    full_step : IncrementalStep
        With all images except the test images.
    replay_dataset : ReplayDataset
    backbone : Backbone
        The old one, with the one output that the head is on.
    pool_rows : ndarray of shape (m,), int64
        Rows of the archive of the images in ``replay_dataset.pool``.
    finetune_context : FineTuneContext
    initial_head : InitialHead
    importances : mapping or None
        Importances of the weights for the old classes, by parameter; those of the last layer have shape (k, …).
    """

    context: ExpansionContext
    method: str
    full_step: IncrementalStep
    replay_dataset: ReplayDataset
    backbone: Backbone
    pool_rows: NDArray[np.int64]
    finetune_context: FineTuneContext
    initial_head: InitialHead
    importances: ParameterImportances | None = None

    @classmethod
    def create(
        cls, context: ExpansionContext, method: str, deep_config: DeepTrainingConfig, full_step: IncrementalStep
    ) -> TrainingSetup:
        """Fit the method on features, and prepare the training that starts there."""
        model, tuning, cache_folder = context.model, deep_config.finetune_config, deep_config.cache_folder
        (output,) = (output for output in model.backbone.outputs if output.name == model.output)
        backbone = replace(model.backbone, outputs=(output,))
        select_unfrozen(backbone, str(tuning.unfreeze))  # fail before any work
        replay_dataset = make_replay_dataset(full_step, method, tuning.validation)
        index = data.index(deep_config.archives, labels=deep_config.labels, modality=model.modality)
        base_cache = extract_for_model(index, model, model.backbone, cache_folder, context.progress)
        pool_rows = find_rows(base_cache, replay_dataset.pool)
        splits = _make_splits(context, replay_dataset, base_cache, pool_rows)
        expanded_model = _make_expanded_model(context, method, replay_dataset)
        train_set = replay_dataset.pool.take(replay_dataset.is_train)
        initial_head = initialize_head(expanded_model, train_set.features, train_set.y)
        for note in (splits.note, initial_head.note):
            logger.info(format_note(note))
        is_old = splits.y[splits.test] < full_step.k_old
        sample_weights, logit_adjustment = replay_dataset.compute_sample_weights(pool_rows, len(index))
        finetune_context = FineTuneContext(
            expanded_model,
            index,
            base_cache,
            splits,
            tuning,
            cache_folder=cache_folder,
            out=deep_config.out,
            progress=context.progress,
            monitors={OLD_CLASSES: splits.test[is_old], NEW_CLASSES: splits.test[~is_old]} if len(is_old) else {},
            sample_weights=sample_weights,
            logit_adjustment=logit_adjustment,
            extra_config={"expansion": _describe_request(context, method, full_step)},
        )
        setup = cls(context, method, full_step, replay_dataset, backbone, pool_rows, finetune_context, initial_head)
        return setup._with_loss_terms()

    def _with_loss_terms(self) -> TrainingSetup:
        strength, distill_strength = self.context.settings.strength, DEEP_METHODS[self.method].distill_strength
        if self.method == "distill" and strength is not None:
            distill_strength = strength
        context, loss_terms, importances = self.finetune_context, list[LossTerm](), None
        if distill_strength:
            n = len(context.index)
            loss_terms.append(self.replay_dataset.make_distillation_loss(self.pool_rows, n, distill_strength))
        if self.method == "ewc":
            old_rows = find_rows(context.base_cache, self.full_step.old)
            importances = compute_importances(context, self.backbone, self.full_step, old_rows)
            layers, network = self.initial_head.layers, self.backbone.network
            names = list_trained_parameters(context, self.backbone, layers)
            images_per_row = int(self.full_step.counts.sum()) / len(context.splits.train)
            penalty_strength = images_per_row * (1.0 if strength is None else strength)  # as strong as all old images
            selected = {name: importances[name] for name in names}
            old_layers = make_old_layers(self.full_step)
            loss_terms.append(make_ewc_penalty(layers, old_layers, selected, penalty_strength, network))
        context = replace(context, loss_terms=tuple(loss_terms))
        return replace(self, finetune_context=context, importances=importances)

    def load_embeddings(self, cache: FeatureCache, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings of rows of the archive, shape (m, d)."""
        return np.asarray(cache.features(self.context.model.output)[rows], np.float32)


def find_rows(cache: FeatureCache, dataset: EmbeddingDataset) -> NDArray[np.int64]:
    """Rows of a cache with the images of a dataset, by their bytes; the first of copies."""
    row_by_digest = {cache.digests[row].tobytes(): row for row in np.flatnonzero(cache.ok)[::-1].tolist()}
    return np.array([row_by_digest[digest.tobytes()] for digest in dataset.digests], np.int64)


def _describe_request(context: ExpansionContext, method: str, step: IncrementalStep) -> dict[str, Any]:
    """Everything that determines the training besides the settings of fine-tuning."""
    settings = vars(context.settings)
    return {"method": method, "k_old": step.k_old, "settings": settings, "from": context.model.identity}


def _make_expanded_model(context: ExpansionContext, method: str, replay_dataset: ReplayDataset) -> Model:
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
    context: ExpansionContext, replay_dataset: ReplayDataset, cache: FeatureCache, pool_rows: NDArray[np.int64]
) -> Splits:
    test_rows, is_train = find_rows(cache, context.data.test), replay_dataset.is_train
    y = np.full(len(cache), -1, np.int64)
    y[test_rows], y[pool_rows] = context.data.test.y, replay_dataset.pool.y
    train, validation, test = np.sort(pool_rows[is_train]), np.sort(pool_rows[~is_train]), np.unique(test_rows)
    counts = {"training": len(train), "validation": len(validation), "test": len(test)}
    return Splits(train, validation, test, y, {"kind": "splits", **counts})
