"""`finetune`: train part of a model's network together with its head, and compare with the head alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from featpipe import backbones, data
from featpipe.backbones import Backbone
from featpipe.config import FineTuneConfig, FineTuneOptions
from featpipe.errors import ConfigError, ModelError
from featpipe.finetuning.augmentation import Augmentation
from featpipe.finetuning.context import FineTuneContext, extract_for_model
from featpipe.finetuning.distributed import join_distributed, resolve_process_device
from featpipe.finetuning.head_layers import HeadLayers, InitialHead, initialize_head
from featpipe.finetuning.loop import make_tensorboard_logger
from featpipe.finetuning.result import FineTuningResult, compare_models, predict_rows
from featpipe.finetuning.split import make_dataset, make_splits, refit_without
from featpipe.finetuning.train import train_network
from featpipe.finetuning.trained_network import TrainedNetwork
from featpipe.metrics import Note, format_note
from featpipe.model import Model, load_model
from featpipe.runtime import ProgressCallback, ignore_progress
from featpipe.storage import Receipt

logger = logging.getLogger(__name__)


def finetune(
    model: Model | str | os.PathLike[str],
    archives: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    labels: Any = None,
    cache: str | os.PathLike[str] = "cache",
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    tensorboard: str | os.PathLike[str] | None = None,
    progress: ProgressCallback = ignore_progress,
    **settings: Unpack[FineTuneOptions],
) -> FineTuningResult:
    """Train part of a model's backbone together with its head, and compare with the head alone.

    The new layer starts as the model's own head, so the first predictions are the model's. The model and the fine-tuned
    model are compared on held-out test images; if the model was trained on some of them, the same head is fitted again
    without them first.

    Parameters
    ----------
    model : Model or path of one
    archives : path-like or sequence of path-like
        Labelled images of the model's classes, as for :func:`featpipe.extract`.
    labels : path-like or Table, optional
    cache : path-like
        The folder for embeddings of both backbones.
    out : path-like, optional
        Where the model is saved, with its backbone's weights; the checkpoint is next to it. If the same call has
        written that file before, it is reused.
    resume : bool
        Resume from the checkpoint, if there is one.
    tensorboard : path-like, optional
        A folder for losses and scores by epoch, for TensorBoard.
    progress : callable
    **settings
        The fields of :class:`featpipe.config.FineTuneConfig`.

    Returns
    -------
    FineTuningResult
        Its ``model`` is the fine-tuned one, or the old one if fine-tuning was worse on the test images.

    Raises
    ------
    ConfigError
        If a setting is unknown, nothing is left to train, the labels are not the model's classes, or the checkpoint
        belongs to a run with other settings.
    CacheError
        If the images have no labels.
    KeyboardInterrupt
        If the training was interrupted; the same call resumes it from the checkpoint.

    Examples
    --------
    >>> finetune("photos.model", "photos/", unfreeze="last", out="photos.tuned.model")       # doctest: +SKIP
    """
    tuning = FineTuneConfig.from_settings(settings)
    Augmentation.from_dict(tuning.augmentation)  # refuse unknown names before any work
    model = model if isinstance(model, Model) else load_model(model)
    if out is not None:
        Model.check_target(out)
    device = resolve_process_device(tuning.device)
    with join_distributed(device) as distributed:
        if not distributed.is_main:
            progress = ignore_progress
        index = data.index(archives, labels=labels, modality=model.modality)
        base_cache = distributed.run_main_first(
            lambda: extract_for_model(index, model, model.backbone, cache, progress)
        )
        splits = make_splits(model, base_cache, tuning)
        on_epoch = make_tensorboard_logger(tensorboard) if tensorboard is not None and distributed.is_main else None
        context = FineTuneContext(
            model,
            index,
            base_cache,
            splits,
            tuning,
            cache_folder=cache,
            out=out,
            progress=progress,
            distributed=distributed,
            epoch_callback=on_epoch,
        )
        logger.info(format_note(splits.note))
        if (finished := _load_finished(context)) is not None:
            logger.info(f"{out}: up to date, nothing to do")
            return finished
        start_model, initial_head, backbone = prepare_start(context)
        trained = train_network(context, backbone, initial_head, resume)
        return distributed.run_main_first(lambda: _compare_and_save(trained, start_model, initial_head))


def _load_finished(context: FineTuneContext) -> FineTuningResult | None:
    """The result saved at ``out``, if the same request made it."""
    if context.out is None or not Path(context.out).is_file():
        return None
    try:
        saved_model = load_model(context.out)
    except ModelError:
        return None
    record = saved_model.history.get("finetuning") or {}
    if not Receipt(record.get("request", "")).is_current(context.run_digest):
        return None
    return FineTuningResult.from_dict(saved_model, record["result"])


def _compare_and_save(trained: TrainedNetwork, start_model: Model, initial_head: InitialHead) -> FineTuningResult:
    context, model, splits = trained.context, trained.context.model, trained.context.splits
    record = {"from": model.identity, "request": context.run_digest}
    finetuned = trained.to_model(start_model=start_model, history={"finetuning": record})
    probe = refit_without(model, context.base_cache, splits, splits.test, splits.train_and_validation)
    comparison = compare_models(
        model.task,
        make_dataset(model, context.base_cache, splits.y, splits.test).labels,
        predict_rows(probe, context.base_cache, splits.test),
        predict_rows(finetuned, trained.cache, splits.test),
        model.classes,
    )
    keep_finetuned = context.tuning.keep_worse or (comparison.gain >= 0 and trained.best_epoch.number > 0)
    remarks: tuple[Note, ...] = (splits.note, initial_head.note)
    if trained.best_epoch.number == 0:
        remarks += ({"kind": "no_better_epoch"},)
        logger.info(format_note(remarks[-1]))
    unchanged = replace(model, history=dict(model.history), scores=dict(model.scores))
    selected_model = finetuned if keep_finetuned else unchanged
    result = FineTuningResult(
        selected_model,
        "fine-tuned" if keep_finetuned else "probe",
        comparison,
        [epoch.to_dict() for epoch in trained.curve],
        trained.best_epoch.number,
        remarks,
        {"training": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
    )
    selected_model.history["finetuning"] = {**record, "result": result.to_dict()}
    if keep_finetuned:
        selected_model.scores["finetuning"] = {
            "how": {"kind": "holdout", "n": len(splits.test)},
            "metrics": {
                row["name"]: dict(zip(("value", "low", "high"), row["tuned"], strict=True))
                for row in comparison.metrics
            },
        }
    _save(context, selected_model)
    return result


def _save(context: FineTuneContext, model: Model) -> None:
    if context.out is None:
        return
    if context.distributed.is_main:
        model.save(context.out)
        if context.checkpoint_path is not None:
            context.checkpoint_path.unlink(missing_ok=True)
    model.path = Path(context.out)


def prepare_start(context: FineTuneContext) -> tuple[Model, InitialHead, Backbone]:
    """The model that training starts from, its head as layers, and the backbone to train."""
    model, splits, tuning = context.model, context.splits, context.tuning
    (output,) = (output for output in model.backbone.outputs if output.name == model.output)
    backbone = replace(model.backbone, outputs=(output,))
    excluded_rows = np.concatenate([splits.validation, splits.test])
    start_model = refit_without(model, context.base_cache, splits, excluded_rows, splits.train)
    train_set = make_dataset(model, context.base_cache, splits.y, splits.train)
    initial_head = initialize_head(start_model, np.asarray(train_set.X), train_set.y)
    if tuning.weights == "none":
        layers = HeadLayers.zeros(train_set.X.shape[1], len(model.classes))
        initial_head = replace(initial_head, layers=layers, note={"kind": "start_untrained"})
        backbone = _load_untrained_backbone(context, backbone)
    logger.info(format_note(initial_head.note))
    return start_model, initial_head, backbone


def _load_untrained_backbone(context: FineTuneContext, backbone: Backbone) -> Backbone:
    if ":" in backbone.name:
        raise ConfigError(
            f"weights=none is for built-in backbones, not for the custom network {backbone.name}; give an untrained one"
        )
    outputs = [output.name for output in backbone.outputs]
    untrained = backbones.load(backbone.name, weights="none", outputs=outputs, seed=context.tuning.seed)
    return replace(backbone, network=untrained.network, digest=untrained.digest, origin=untrained.origin)
