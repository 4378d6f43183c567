"""The verb: go back into the network, from where the probe ended, and say whether that helped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featpipe import archive
from featpipe.engine import resolve_device
from featpipe.engine.memory import keep_freed_memory
from featpipe.errors import ModelError
from featpipe.finetuning.after import make_finetuned_backbone, make_finetuned_model, predict_rows
from featpipe.finetuning.board import make_tensorboard_logger
from featpipe.finetuning.case import FineTuneContext, extract_for_model
from featpipe.finetuning.layers import HeadLayers
from featpipe.finetuning.parallel import join_distributed
from featpipe.finetuning.probe import refit_without
from featpipe.finetuning.result import FineTuningResult, compare_models
from featpipe.finetuning.sides import make_splits
from featpipe.finetuning.start import InitialHead
from featpipe.finetuning.state import TrainingState
from featpipe.finetuning.work import finetune_network, prepare_start
from featpipe.model import Model, load_model
from featpipe.progress import Progress, ProgressCallback, report_warnings_only
from featpipe.recipe import FineTuneConfig

__all__ = ["finetune", "resolve_process_device"]


def finetune(
    model: Model | str | os.PathLike[str],
    archives: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    labels: Any = None,
    cache: str | os.PathLike[str] = "cache",
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    tensorboard: str | os.PathLike[str] | None = None,
    progress: ProgressCallback = report_warnings_only,
    **settings: Any,
) -> FineTuningResult:
    """Train some of a model's backbone together with its head, and compare with the head alone.

    The new layer starts as the model's own head, so that the first answers are the model's. Images of the archive are
    held out, by which model and fine-tuned model are compared at the end; if the model was trained on some of those,
    the same head is fitted again without them first.

    Parameters
    ----------
    model : Model or path of one
    archives : path-like or sequence of path-like
        Labelled images of the model's classes, as :func:`featpipe.extract` takes them.
    labels : path-like or Table, optional
    cache : path-like
        The folder where embeddings of both backbones are kept.
    out : path-like, optional
        Where the model is saved, with its backbone's weights; a checkpoint lies beside it until then. If that file is
        what these very arguments gave before, no work is done.
    resume : bool
        Go on from the checkpoint, if there is one.
    tensorboard : path-like, optional
        A folder for losses and scores by epoch, for TensorBoard.
    progress : callable
    **settings
        The fields of :class:`featpipe.recipe.FineTuning`.

    Returns
    -------
    FineTuned
        Its ``model`` is the fine-tuned one; the one before, if fine-tuning was worse on the held-out images.

    Raises
    ------
    ConfigError
        If a setting is unknown, nothing is left to train, the labels are not of the model's classes, or the checkpoint
        is of a run that was asked for otherwise.
    CacheError
        If the images have no labels.
    KeyboardInterrupt
        If the work was interrupted; the same call goes on from its checkpoint.

    Examples
    --------
    >>> finetune("photos.model", "photos/", unfreeze="last", out="photos.tuned.model")       # doctest: +SKIP
    """
    tuning = FineTuneConfig.from_settings(settings)
    model = model if isinstance(model, Model) else load_model(model)
    if out is not None:
        Model.check_target(out)
    device = resolve_process_device(tuning.device)
    with join_distributed(device) as distributed:
        report = progress if distributed.is_main else report_warnings_only
        index = archive.index(archives, labels=labels)
        base_cache = distributed.run_main_first(lambda: extract_for_model(index, model, model.backbone, cache, report))
        splits = make_splits(model, base_cache, tuning)
        epoch_callback = (
            None if tensorboard is None or not distributed.is_main else make_tensorboard_logger(tensorboard)
        )
        context = FineTuneContext(
            model, index, base_cache, splits, tuning, device, distributed, cache, out, report, epoch_callback
        )
        report(Progress("note", splits.description))
        if (finished := _load_finished(context)) is not None:
            report(Progress("note", f"{out}: is what is asked for already"))
            return finished
        start_model, initial_head, backbone = prepare_start(context)
        network, layers, state = finetune_network(context, backbone, initial_head, resume)
        return distributed.run_main_first(
            lambda: _compare_and_save(context, start_model, initial_head, network, layers, state)
        )


def resolve_process_device(name: str) -> torch.device:
    """Of several processes on one machine each has a GPU of its own."""
    device = resolve_device(name)
    if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
        device = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def _load_finished(context: FineTuneContext) -> FineTuningResult | None:
    """What is at the target already, if it came of this request."""
    if context.out is None or not Path(context.out).is_file():
        return None
    try:
        saved_model = load_model(context.out)
    except ModelError:
        return None
    finetuning_record = saved_model.history.get("finetuning") or {}
    return (
        FineTuningResult.from_dict(saved_model, finetuning_record["result"])
        if finetuning_record.get("request") == context.run_digest
        else None
    )


def _compare_and_save(
    context: FineTuneContext,
    start_model: Model,
    initial_head: InitialHead,
    network: nn.Module,
    layers: HeadLayers,
    state: TrainingState,
) -> FineTuningResult:
    """Compare on the held-out rows, and keep what is better."""
    model, splits = context.model, context.splits
    weights = None if context.out is None else os.path.abspath(context.out)
    backbone = make_finetuned_backbone(model.backbone, network, weights)
    finetuned_cache = context.extract_embeddings(backbone)
    history = {"finetuning": {"from": model.identity, "request": context.run_digest}}
    finetuned = make_finetuned_model(model, start_model, backbone, finetuned_cache, splits, layers, state, history)
    probe = refit_without(model, context.base_cache, splits, splits.test, splits.train_and_validation, context.progress)
    truth = _ground_truth(model, splits.y[splits.test])
    predictions = (
        predict_rows(probe, context.base_cache, splits.test),
        predict_rows(finetuned, finetuned_cache, splits.test),
    )
    comparison = compare_models(model.task, truth, *predictions, model.classes)
    keep_finetuned = context.tuning.keep_worse or (comparison.gain >= 0 and state.best_epoch.number > 0)
    notes: tuple[str, ...] = (splits.description, initial_head.description)
    if state.best_epoch.number == 0:
        notes += ("no epoch was better on the validation images than the start, which is what is compared",)
        context.progress(Progress("note", notes[-1]))
    selected_model = (
        finetuned if keep_finetuned else replace(model, history=dict(model.history), scores=dict(model.scores))
    )
    result = FineTuningResult(
        selected_model,
        "fine-tuned" if keep_finetuned else "probe",
        comparison,
        [epoch.to_dict() for epoch in state.curve],
        state.best_epoch.number,
        notes,
    )
    selected_model.history["finetuning"] = {**history["finetuning"], "result": result.to_dict()}
    if keep_finetuned:
        selected_model.scores["finetuning"] = {
            "how": f"{len(splits.test)} images held out",
            "metrics": {row["name"]: _interval_to_dict(row["tuned"]) for row in comparison.metrics},
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


def _ground_truth(model: Model, y: NDArray[Any]) -> NDArray[Any]:
    """As scores take it."""
    if model.task == "classification":
        return np.array(model.classes, dtype=object)[y]
    return y[:, 0] if model.task == "regression" and y.shape[1] == 1 else y


def _interval_to_dict(values: Sequence[float | None]) -> dict[str, float | None]:
    return dict(zip(("value", "low", "high"), values, strict=True))
