"""The verb: go back into the network, from where the probe ended, and say whether that helped."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featpipe import archive
from featpipe import backbone as backbones
from featpipe.archive import Index
from featpipe.backbone import Backbone
from featpipe.cache import FeatureCache
from featpipe.engine import resolve_device
from featpipe.engine.memory import keep_freed_memory
from featpipe.errors import ConfigError, ModelError
from featpipe.extraction import extract_index
from featpipe.finetune import checkpoint
from featpipe.finetune.after import answers_of, model_of, tuned_backbone
from featpipe.finetune.finder import found_rate
from featpipe.finetune.job import Job, Targets
from featpipe.finetune.layers import Layers
from featpipe.finetune.loop import fine_tune
from featpipe.finetune.parallel import World, joined
from featpipe.finetune.probe import fitted_without, rows_of
from featpipe.finetune.result import FineTuned, compared
from featpipe.finetune.sides import Sides, sides_of
from featpipe.finetune.source import Embedding, PictureSource, plain
from featpipe.finetune.start import Start, start_of
from featpipe.finetune.state import State
from featpipe.finetune.unfreezing import unfrozen
from featpipe.fingerprint import fingerprint
from featpipe.heads.losses import Objective
from featpipe.model import Model, load_model
from featpipe.progress import Progress, Tell, quiet
from featpipe.recipe import Extraction, FineTuning

__all__ = ["finetune"]

LINKS: Mapping[str, Any] = {"classification": "softmax", "multilabel": "sigmoid", "regression": "identity"}
MACHINE = ("device", "workers", "keep_worse")  # settings that decide nothing in the training


def finetune(
    model: Model | str | os.PathLike[str],
    archives: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    labels: Any = None,
    cache: str | os.PathLike[str] = "cache",
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
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
    device = _device(tuning.device)
    with joined(device) as world:
        tell = progress if world.first else quiet
        index = archive.index(archives, labels=labels)
        before = world.in_turn(lambda: _embedded(index, model, model.backbone, cache, tell))
        sides = sides_of(model, before, tuning)
        case = Case(model, index, before, sides, tuning, device, world, cache, out, tell)
        tell(Progress("note", sides.how))
        if (done := _done(case)) is not None:
            tell(Progress("note", f"{out}: is what is asked for already"))
            return done
        start_model, start, backbone = _start(case)
        network, layers, state = _trained(case, backbone, start, resume)
        return world.in_turn(lambda: _outcome(case, start_model, start, network, layers, state))


@dataclass(frozen=True, eq=False)
class Case:
    """One model, the images that it is trained on, and what is asked for."""

    model: Model
    index: Index
    before: FeatureCache
    sides: Sides
    tuning: FineTuning
    device: torch.device
    world: World
    cache: str | os.PathLike[str]
    out: str | os.PathLike[str] | None
    tell: Tell

    @property
    def checkpoint(self) -> Path | None:
        return None if self.out is None else Path(f"{self.out}.checkpoint")

    @property
    def asked(self) -> dict[str, Any]:
        """All that decides what comes of the training; JSON can hold it."""
        settings = {name: value for name, value in asdict(self.tuning).items() if name not in MACHINE}
        rows = hashlib.sha256()
        for side in (self.sides.train, self.sides.validation, self.sides.held):
            rows.update(self.before.digests[side].tobytes() + np.ascontiguousarray(self.sides.y[side]).tobytes() + b"|")
        return {
            "settings": settings,
            "model": self.model.identity,
            "backbone": fingerprint(self.before.facts["backbone"]),
            "images": rows.hexdigest(),
        }

    @property
    def request(self) -> str:
        return fingerprint([self.asked, self.tuning.keep_worse])

    def extracted(self, backbone: Backbone) -> FeatureCache:
        """The embeddings of all images by a backbone."""
        return _embedded(self.index, self.model, backbone, self.cache, self.tell)


def _embedded(index: Index, model: Model, backbone: Backbone, cache: Any, tell: Tell) -> FeatureCache:
    settings = {**model.extraction(), "backbone": backbone, "cache": cache}
    return extract_index(index, backbone, Extraction.of(settings), tell)


def _device(name: str) -> torch.device:
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


def _start(case: Case) -> tuple[Model, Start, Backbone]:
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


def _trained(case: Case, backbone: Backbone, start: Start, resume: bool) -> tuple[nn.Module, Layers, State]:
    """The network after the best epoch, and its new layers, with answers in the units of the targets."""
    tuning, device = case.tuning, case.device
    chosen = unfrozen(backbone, tuning.unfreeze)
    case.tell(Progress("note", chosen.told(backbone.network)))
    network = copy.deepcopy(backbone.network).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    embedding = Embedding(network, backbone.outputs[0])
    digests = case.before.digests
    with PictureSource(case.index, digests, embedding, plain(backbone), tuning.workers) as source:
        job = Job(
            network=network,
            head=start.layers.module().to(device),
            unfrozen=chosen,
            source=source,
            watched=source,
            train=case.sides.train,
            validation=case.sides.validation,
            targets=_targets(case, start),
            objective=Objective(
                LINKS[case.model.task], "squares" if case.model.task == "regression" else "cross_entropy"
            ),
            tuning=tuning,
            ids=case.before.ids,
            device=device,
            world=case.world,
            progress=case.tell,
        )
        _check_batch_norms(job)
        case.world.take_from_first(job.kept().values())
        state = _run(case, job, resume)
    return network, start.in_units(start.layers.learnt(job.head)), state


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
    if case.tuning.class_weight:
        counts = np.bincount(y[train], minlength=len(case.model.classes))
        weights = len(train) / (len(counts) * np.maximum(counts, 1))[np.maximum(y, 0)]
    return Targets(Y, torch.from_numpy(weights).float())


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
    notes = (sides.how, start.how)
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
