"""The work of a case: from the model's own answers to the weights after the best epoch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featpipe import backbone as backbones
from featpipe.backbone import Backbone
from featpipe.errors import ConfigError
from featpipe.finetuning import checkpoint
from featpipe.finetuning.case import Case
from featpipe.finetuning.finder import found_rate
from featpipe.finetuning.job import Job, Targets
from featpipe.finetuning.layers import Layers
from featpipe.finetuning.loop import fine_tune
from featpipe.finetuning.past import importances
from featpipe.finetuning.probe import fitted_without, rows_of
from featpipe.finetuning.source import Source
from featpipe.finetuning.sources import opened
from featpipe.finetuning.start import Start, start_of
from featpipe.finetuning.state import State
from featpipe.finetuning.unfreezing import Unfrozen, unfrozen
from featpipe.heads.losses import Objective
from featpipe.model import Model
from featpipe.progress import Progress

__all__ = ["begin", "trained", "weighed"]

LINKS: Mapping[str, Any] = {"classification": "softmax", "multilabel": "sigmoid", "regression": "identity"}


def begin(case: Case) -> tuple[Model, Start, Backbone]:
    """The model that is started from, its layers, and the backbone that is trained."""
    model, sides, tuning = case.model, case.sides, case.tuning
    (output,) = (output for output in model.backbone.outputs if output.name == model.output)
    backbone = replace(model.backbone, outputs=(output,))
    unseen = np.concatenate([sides.validation, sides.held])
    start_model = fitted_without(model, case.before, sides, unseen, sides.train, case.tell)
    rows = rows_of(model, case.before, sides.y, sides.train)
    start = start_of(start_model, np.asarray(rows.X), rows.y)
    if tuning.weights == "none":
        layers = Layers.untrained(rows.X.shape[1], len(model.classes))
        start = replace(start, layers=layers, how="an untrained network and a new layer: the architecture alone")
        backbone = _untrained(case, backbone)
    case.tell(Progress("note", start.how))
    return start_model, start, backbone


def _untrained(case: Case, backbone: Backbone) -> Backbone:
    if ":" in backbone.name:
        raise ConfigError(f"weights=none: {backbone.name} is a network of your own; give one that is untrained instead")
    outputs = [output.name for output in backbone.outputs]
    fresh = backbones.load(backbone.name, weights="none", outputs=outputs, seed=case.tuning.seed)
    return replace(backbone, network=fresh.network, digest=fresh.digest, origin=fresh.origin)


def trained(case: Case, backbone: Backbone, start: Start, resume: bool) -> tuple[nn.Module, Layers, State]:
    """The network after the best epoch, and its new layers, with answers in the units of the targets."""
    chosen = unfrozen(backbone, str(case.tuning.unfreeze))
    case.tell(Progress("note", chosen.told(backbone.network)))
    network = _copied(case, backbone.network)
    with ExitStack() as stack:
        sources = [stack.enter_context(source) for source in opened(case, backbone, network, chosen)]
        job = _job(case, network, start, chosen, sources)
        _check_batch_norms(job)
        case.world.take_from_first(job.kept().values())
        state = _run(case, job, resume)
    return network, start.in_units(start.layers.learnt(job.head)), state


def weighed(
    case: Case, backbone: Backbone, network: nn.Module, start: Start, rows: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    """How important each weight that a case trains is for the answers to some images, as they are; see `importances`.

    Parameters
    ----------
    case : Case
    backbone : Backbone
        Before the training, which is what the frozen part is.
    network : Module
        Its network, before or after.
    start : Start
        The layers on it.
    rows : ndarray of shape (m,), int64
    """
    tuning = replace(case.tuning, augmentation={}, mixup=0.0, cutmix=0.0)
    sides = replace(case.sides, train=rows, validation=rows[:0], held=rows[:0])
    plain, chosen = replace(case, tuning=tuning, sides=sides, past=None), unfrozen(backbone, str(tuning.unfreeze))
    copied = _copied(case, network)
    with ExitStack() as stack:
        sources = [stack.enter_context(source) for source in opened(plain, backbone, copied, chosen)]
        found = importances(_job(plain, copied, start, chosen, sources), rows)
    return {name: np.asarray(value.cpu().numpy(), np.float32) for name, value in found.items()}


def _copied(case: Case, network: nn.Module) -> nn.Module:
    copied = copy.deepcopy(network).to(case.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return cast(nn.Module, copied)


def _job(case: Case, network: nn.Module, start: Start, chosen: Unfrozen, sources: Sequence[Source]) -> Job:
    objective = Objective(
        LINKS[case.model.task],
        "squares" if case.model.task == "regression" else "cross_entropy",
        adjustment=None if case.past is None else case.past.adjustment,
    )
    return Job(
        network=network,
        head=start.layers.module().to(case.device),
        unfrozen=chosen,
        source=sources[0],
        watched=sources[1],
        train=case.sides.train,
        validation=case.sides.validation,
        targets=_targets(case, start),
        objective=objective,
        tuning=case.tuning,
        ids=case.before.ids,
        device=case.device,
        world=case.world,
        progress=case.tell,
        board=case.board,
        past=case.past,
        beside=case.beside,
    )


def _check_batch_norms(job: Job) -> None:
    """Of a batch of one there are no statistics."""
    smallest = min(len(rows) for rows in job.batches(0)) // job.tuning.accumulate // job.world.size
    if smallest < 2 and len(job.kept()) > len(job.parameters()):
        raise ConfigError(
            f"batch_norm=trained: batch norms follow the batches, and a batch of one (of {job.tuning.batch} images, in "
            f"{job.tuning.accumulate * job.world.size} pieces) has no statistics; give a larger batch"
        )


def _run(case: Case, job: Job, resume: bool) -> State:
    """From the beginning, or from the checkpoint."""
    place, asked = case.checkpoint, case.asked
    if place is not None and resume and place.exists():
        state = checkpoint.read(place, job, asked)
        case.tell(Progress("note", f"going on from {place}: epoch {state.epoch + 1}, step {state.step + 1}"))
    else:
        rate = case.tuning.learning_rate
        state = State.begun(job, found_rate(job) if isinstance(rate, str) else rate)

    def save(now: State) -> None:
        if place is not None and case.world.first:
            checkpoint.write(place, job, now, asked)

    return fine_tune(job, state, save)


def _targets(case: Case, start: Start) -> Targets:
    y, train = case.sides.y, case.sides.train
    if case.model.task == "regression":
        Y = torch.from_numpy((y - start.mean) / start.spread).float()
    else:
        Y = torch.from_numpy(y.astype(np.int64 if case.model.task == "classification" else np.float32))
    weights = np.ones(len(y))
    if (case.tuning.class_weight or case.tuning.sampling) and case.model.task != "classification":
        raise ConfigError(
            f"class_weight and sampling are for classes that exclude each other, not for {case.model.task}"
        )
    if case.past is not None and case.past.weights is not None:
        weights = case.past.weights
    if case.tuning.class_weight:
        counts = np.bincount(y[train], minlength=len(case.model.classes))
        weights = len(train) / (len(counts) * np.maximum(counts, 1))[np.maximum(y, 0)]
    return Targets(Y, torch.from_numpy(weights).float())
