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
from featpipe.finetuning.after import answers_of, model_of, tuned_backbone
from featpipe.finetuning.board import board
from featpipe.finetuning.case import Case, embedded
from featpipe.finetuning.layers import Layers
from featpipe.finetuning.parallel import joined
from featpipe.finetuning.probe import fitted_without
from featpipe.finetuning.result import FineTuned, compared
from featpipe.finetuning.sides import sides_of
from featpipe.finetuning.start import Start
from featpipe.finetuning.state import State
from featpipe.finetuning.work import begin, trained
from featpipe.model import Model, load_model
from featpipe.progress import Progress, Tell, quiet
from featpipe.recipe import FineTuning

__all__ = ["device_of", "finetune"]


def finetune(
    model: Model | str | os.PathLike[str],
    archives: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    labels: Any = None,
    cache: str | os.PathLike[str] = "cache",
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    tensorboard: str | os.PathLike[str] | None = None,
    progress: Tell = quiet,
    **settings: Any,
) -> FineTuned:
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
    tuning = FineTuning.of(settings)
    model = model if isinstance(model, Model) else load_model(model)
    if out is not None:
        Model.check_target(out)
    device = device_of(tuning.device)
    with joined(device) as world:
        tell = progress if world.first else quiet
        index = archive.index(archives, labels=labels)
        before = world.in_turn(lambda: embedded(index, model, model.backbone, cache, tell))
        sides = sides_of(model, before, tuning)
        writes = None if tensorboard is None or not world.first else board(tensorboard)
        case = Case(model, index, before, sides, tuning, device, world, cache, out, tell, writes)
        tell(Progress("note", sides.how))
        if (done := _done(case)) is not None:
            tell(Progress("note", f"{out}: is what is asked for already"))
            return done
        start_model, start, backbone = begin(case)
        network, layers, state = trained(case, backbone, start, resume)
        return world.in_turn(lambda: _outcome(case, start_model, start, network, layers, state))


def device_of(name: str) -> torch.device:
    """Of several processes on one machine each has a GPU of its own."""
    device = resolve_device(name)
    if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
        device = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def _done(case: Case) -> FineTuned | None:
    """What is at the target already, if it came of this request."""
    if case.out is None or not Path(case.out).is_file():
        return None
    try:
        there = load_model(case.out)
    except ModelError:
        return None
    last = there.history.get("finetuning") or {}
    return FineTuned.of(there, last["result"]) if last.get("request") == case.request else None


def _outcome(
    case: Case, start_model: Model, start: Start, network: nn.Module, layers: Layers, state: State
) -> FineTuned:
    """Compare on the held-out rows, and keep what is better."""
    model, sides = case.model, case.sides
    weights = None if case.out is None else os.path.abspath(case.out)
    backbone = tuned_backbone(model.backbone, network, weights)
    after = case.extracted(backbone)
    history = {"finetuning": {"from": model.identity, "request": case.request}}
    tuned = model_of(model, start_model, backbone, after, sides, layers, state, history)
    probe = fitted_without(model, case.before, sides, sides.held, sides.seen, case.tell)
    truth = _truth(model, sides.y[sides.held])
    answers = answers_of(probe, case.before, sides.held), answers_of(tuned, after, sides.held)
    comparison = compared(model.task, truth, *answers, model.classes)
    keeps = case.tuning.keep_worse or (comparison.gain >= 0 and state.best_epoch.number > 0)
    notes: tuple[str, ...] = (sides.how, start.how)
    if state.best_epoch.number == 0:
        notes += ("no epoch was better on the validation images than the start, which is what is compared",)
        case.tell(Progress("note", notes[-1]))
    best = tuned if keeps else replace(model, history=dict(model.history), scores=dict(model.scores))
    found = FineTuned(
        best,
        "fine-tuned" if keeps else "probe",
        comparison,
        [epoch.facts() for epoch in state.curve],
        state.best_epoch.number,
        notes,
    )
    best.history["finetuning"] = {**history["finetuning"], "result": found.to_dict()}
    if keeps:
        best.scores["finetuning"] = {
            "how": f"{len(sides.held)} images held out",
            "metrics": {row["name"]: _three(row["tuned"]) for row in comparison.metrics},
        }
    _save(case, best)
    return found


def _save(case: Case, model: Model) -> None:
    if case.out is None:
        return
    if case.world.first:
        model.save(case.out)
        if case.checkpoint is not None:
            case.checkpoint.unlink(missing_ok=True)
    model.path = Path(case.out)


def _truth(model: Model, y: NDArray[Any]) -> NDArray[Any]:
    """As scores take it."""
    if model.task == "classification":
        return np.array(model.classes, dtype=object)[y]
    return y[:, 0] if model.task == "regression" and y.shape[1] == 1 else y


def _three(values: Sequence[float | None]) -> dict[str, float | None]:
    return dict(zip(("value", "low", "high"), values, strict=True))
