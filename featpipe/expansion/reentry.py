"""An expansion that goes on into the network: it starts where the same method on features ends.

The loop is that of fine-tuning; what holds it to the old classes is a `Past`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import nn

from featpipe.backbone import Backbone
from featpipe.cache import FeatureCache
from featpipe.calibration import Calibration, logits_of
from featpipe.errors import ConfigError
from featpipe.expansion.after import history_of, model_after, told
from featpipe.expansion.case import Case
from featpipe.expansion.choice import BESIDE, Found, learnt
from featpipe.expansion.entering import THROUGH, Lesson, default, lesson_of, missing
from featpipe.expansion.measure import Judge, Outcome
from featpipe.expansion.memory import wanted
from featpipe.expansion.methods import METHODS, NEW_WIN, old_head
from featpipe.expansion.pictures import Pictures
from featpipe.expansion.result import Expansion
from featpipe.expansion.step import Settings, Step
from featpipe.finetuning import case as fine
from featpipe.finetuning.after import model_of, tuned_backbone
from featpipe.finetuning.job import BELOW, HEAD
from featpipe.finetuning.layers import Layers, layers_of
from featpipe.finetuning.parallel import World
from featpipe.finetuning.past import Anchor, Past
from featpipe.finetuning.sides import Sides
from featpipe.finetuning.start import Start, start_of
from featpipe.finetuning.state import State
from featpipe.finetuning.unfreezing import unfrozen
from featpipe.finetuning.verb import device_of
from featpipe.finetuning.work import trained, weighed
from featpipe.heads.network import forward
from featpipe.kept import Kept, keep_of
from featpipe.model import Model
from featpipe.progress import Progress
from featpipe.recipe import FineTuning
from featpipe.trust import Trust

__all__ = ["Way", "reentered", "settings_of"]

Weights = dict[str, NDArray[np.float32]]
NOT_HERE = ("weights", "test", "keep_worse", "class_weight", "sampling")  # fields of FineTuning
AS_IT_WAS = (
    "no epoch was better on the images that say when to stop than the start: the network stays as it was, and the model "
    "is the one that features give"
)
OFFSET = ("distill", "ewc")  # after which old and new classes are set against each other


@dataclass(frozen=True, eq=False)
class Way:
    """How the network is trained, and on which pictures.

    Attributes
    ----------
    tuning : FineTuning
    pictures : Pictures
    cache : path-like
        The folder of all caches.
    out : path-like or None
    resume : bool
    """

    tuning: FineTuning
    pictures: Pictures
    cache: str | os.PathLike[str]
    out: str | os.PathLike[str] | None
    resume: bool


def settings_of(params: Mapping[str, Any], unfreeze: Any) -> tuple[dict[str, Any], FineTuning]:
    """What is set, divided into what methods and what the training of the network are told.

    Raises
    ------
    ConfigError
        If a setting is unknown, or has no place in an expansion.
    """
    ours = {field.name for field in fields(Settings)} - {"epochs"}
    for name in NOT_HERE:
        if name in params:
            raise ConfigError(f"setting {name} is for `featpipe finetune`, and not for an expansion; leave it out")
    rest = {name: value for name, value in params.items() if name not in ours}
    return {n: v for n, v in params.items() if n in ours}, FineTuning.of({**rest, "unfreeze": unfreeze})


def reentered(case: Case, method: str | None, way: Way, caches: Sequence[str], request: str) -> Expansion:
    """Learn on features, then go on into the network from there, and judge both on images that neither has seen.

    Parameters
    ----------
    case : Case
    method : str or None
        If none is named, the one that has most of the old classes at hand.
    way : Way
    caches : sequence of str
        Names of what is learnt from.
    request : str

    Raises
    ------
    ConfigError
        If the method cannot, or lacks what it needs.
    KeyboardInterrupt
        If the work was interrupted; the same call goes on from its checkpoint.
    """
    given, case = case, replace(case, rows=case.rows.held_out())
    whole, started = case.step(case.rows), perf_counter()
    if method is None:
        method = default(whole)
        case.note(f"method: {method}, {METHODS[method].summary}")
    if (lacks := missing(method, whole)) is not None:
        raise ConfigError(f"{method} {lacks}")
    backbone = _backbone(case.model)
    unfrozen(backbone, str(way.tuning.unfreeze))  # a mistake is told before there is work
    lesson = lesson_of(whole, method, way.tuning.validation)
    begun = _Begun.of(case, method, way, whole, lesson, backbone)
    case.note(begun.start.how)
    network, layers, state = trained(begun.tuned_by, backbone, begun.start, way.resume)
    if state.best_epoch.number == 0 and METHODS[method].missing(whole) is None:
        case.note(AS_IT_WAS)
        expansion = model_after(given, learnt(given, method), caches, request, notes=(AS_IT_WAS,))
    else:
        expansion = _outcome(begun, network, layers, state, caches, request, round(perf_counter() - started, 3))
    if way.out is not None:
        expansion.model.save(way.out)
        expansion.model.path = Path(way.out)
        Path(f"{way.out}.checkpoint").unlink(missing_ok=True)
    return expansion


def _backbone(model: Model) -> Backbone:
    """With the one output that its head is on."""
    (output,) = (output for output in model.backbone.outputs if output.name == model.output)
    return replace(model.backbone, outputs=(output,))


@dataclass(frozen=True, eq=False)
class _Begun:
    """All that is there before the first step.

    Attributes
    ----------
    case : Case
        Of `expand`.
    method : str
    whole : Step
    lesson : Lesson
    rows : ndarray of shape (m,), int64
        Where the lesson's pool is among the pictures.
    tested : ndarray of shape (t,), int64
        Where the test images are.
    tuned_by : featpipe.finetuning.case.Case
    start : Start
    known : mapping or None
        Importances of the weights for the old classes, by parameter; those of the last layer of shape (k, …).
    """

    case: Case
    method: str
    whole: Step
    lesson: Lesson
    rows: NDArray[np.int64]
    tested: NDArray[np.int64]
    tuned_by: fine.Case
    start: Start
    known: Weights | None

    @classmethod
    def of(cls, case: Case, method: str, way: Way, whole: Step, lesson: Lesson, backbone: Backbone) -> _Begun:
        model, pictures, pool = case.model, way.pictures, lesson.pool
        rows, tested = pictures.rows(pool), pictures.rows(case.rows.test)
        head = THROUGH[method].head(lesson.step)
        calibration = None if model.calibration is None else Calibration(model.calibration.temperature)
        fresh = {"kept": None, "trust": Trust(), "scores": {}, "history": dict(model.history)}
        first = replace(model, head=head, classes=case.growth.classes, calibration=calibration, **fresh)
        start = start_of(first, pool.X[lesson.train], pool.y[lesson.train])
        sides = _sides(case, lesson, rows, tested, len(pictures.index))
        device = device_of(way.tuning.device)
        tuned_by = fine.Case(
            first, pictures.index, pictures.before, sides, way.tuning, device, World(), way.cache, way.out, case.tell
        )
        case.note(sides.how)
        past = lesson.past(rows, len(pictures.index), _distill(method, case.settings))
        known = _known(tuned_by, backbone, whole, pictures) if method == "ewc" else None
        if known is not None:
            amount = _images(whole) * _strength(case.settings, 1.0) / len(sides.train)
            names = _names(tuned_by, backbone, start.layers)
            trained_ = {name: known[name] for name in names}
            past = replace(past, anchor=_anchor(start, _old_layers(whole), trained_, amount, backbone.network))
        facts = {"method": method, "k_old": whole.k_old, "settings": vars(case.settings), "from": model.identity}
        tuned_by = replace(tuned_by, past=replace(past, facts=facts))
        return cls(case, method, whole, lesson, rows, tested, tuned_by, start, known)

    def embeddings(self, cache: FeatureCache, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.asarray(cache.features(self.case.model.output)[rows], np.float32)


def _sides(case: Case, lesson: Lesson, rows: NDArray[np.int64], tested: NDArray[np.int64], n: int) -> Sides:
    """Rows of the pictures, of which there are n, and their classes."""
    y = np.full(n, -1, np.int64)
    y[tested], y[rows] = case.rows.test.y, lesson.pool.y
    train, watched, held = np.sort(rows[lesson.train]), np.sort(rows[~lesson.train]), np.unique(tested)
    how = f"{len(train)} images to train on, {len(watched)} to say when to stop, {len(held)} to judge by"
    return Sides(train, watched, held, y, how)


def _strength(settings: Settings, default: float) -> float:
    return default if settings.strength is None else settings.strength


def _distill(method: str, settings: Settings) -> float:
    """How much the soft targets weigh."""
    default = THROUGH[method].distill
    return _strength(settings, default) if method == "distill" else default


def _images(step: Step) -> int:
    """Of the old classes, that the model was trained on, as far as that is known."""
    return len(step.old) if step.kept is None else int(step.kept.counts.sum())


# ------------------------------------------------------------------------------------------------- importances
def _old_layers(step: Step) -> Layers:
    """The layers of the model before, of the classes that stay."""
    pipeline = old_head(step)
    found = layers_of(pipeline, "classification", Calibration(step.temperature), int(pipeline[-1].n_features_in_))
    assert found is not None
    return found


def _known(case: fine.Case, backbone: Backbone, step: Step, pictures: Pictures) -> Weights:
    """How important each weight is for the old classes: from old images at hand, else as the model keeps it.

    Raises
    ------
    ConfigError
        If it keeps none of some of the weights that are to be trained.
    """
    layers = _old_layers(step)
    if len(np.unique(step.old.y)) == step.k_old:
        rows = np.unique(pictures.rows(step.old))
        case.tell(Progress("note", f"importances of the weights, from {len(rows)} old images"))
        start = Start(layers, np.zeros(1), np.ones(1), "")
        return _padded(weighed(case, backbone, backbone.network, start, rows), step.k)
    assert step.kept is not None
    assert step.kept.network is not None
    assert step.kept.importances is not None
    last = _last(layers)
    W = step.kept.importances
    found: Weights = {f"{last}.weight": W[:, :-1], f"{last}.bias": W[:, -1], **step.kept.network}
    if lacks := [name for name in _names(case, backbone, layers) if name not in found]:
        raise ConfigError(
            f"ewc with --unfreeze {case.tuning.unfreeze}: the model keeps no importances of {len(lacks)} of the weights "
            f"({lacks[0].removeprefix(BELOW)}); unfreeze less, or give old images of each class too"
        )
    return found


def _names(case: fine.Case, backbone: Backbone, layers: Layers) -> list[str]:
    """Of all that is trained, as a job calls it."""
    below = unfrozen(backbone, str(case.tuning.unfreeze)).names
    return [*(HEAD + name for name, _ in layers.module().named_parameters()), *(BELOW + name for name in below)]


def _last(layers: Layers) -> str:
    """The last layer, as a job calls it."""
    return f"{HEAD}{len(layers.module()) - 1}"


def _padded(found: Weights, k: int) -> Weights:
    """With zeros for new classes, in what belongs to the last layer."""
    last = max(int(name[len(HEAD) :].split(".")[0]) for name in found if name.startswith(HEAD))
    padded = dict(found)
    for name in (f"{HEAD}{last}.weight", f"{HEAD}{last}.bias"):
        padded[name] = np.zeros((k, *found[name].shape[1:]), np.float32)
        padded[name][: len(found[name])] = found[name]
    return padded


def _anchor(start: Start, before: Layers, known: Weights, amount: float, network: nn.Module) -> Anchor:
    """The old weights, and their importances as heavy as so many images for each that is trained on.

    To the old model it is the same whatever is added to all rows of its last layer; of those that are the same, the
    reference is the one that is nearest to where training starts.
    """
    here, was = (dict(layers.module().named_parameters()) for layers in (start.layers, before))
    weights = {BELOW + name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    weights |= {HEAD + name: parameter.detach().clone() for name, parameter in here.items()}
    for name, parameter in was.items():
        old, now = parameter.detach(), here[name].detach()
        moved = (now[: len(old)] - old).mean(dim=0) if (HEAD + name).startswith(_last(start.layers)) else 0.0
        weights[HEAD + name][: len(old)] = old + moved
    return Anchor(
        {name: weights[name] for name in known},
        {name: amount * torch.from_numpy(np.ascontiguousarray(importance)) for name, importance in known.items()},
    )


# ------------------------------------------------------------------------------------------------- afterwards
def _outcome(
    begun: _Begun,
    network: nn.Module,
    layers: Layers,
    state: State,
    caches: Sequence[str],
    request: str,
    seconds: float,
) -> Expansion:
    """The model, and how both ways compare on images that neither has seen."""
    case, tuned_by, judge = begun.case, begun.tuned_by, None
    weights = None if tuned_by.out is None else os.path.abspath(tuned_by.out)
    backbone = tuned_backbone(case.model.backbone, network, weights)
    after = tuned_by.extracted(backbone)
    layers = _set_apart(begun, layers, after)
    plain = replace(tuned_by.model, calibration=None)  # its temperature is in the layers
    model = model_of(plain, tuned_by.model, backbone, after, tuned_by.sides, layers, state, {})
    model.kept = _kept(begun, model, network, layers, after)
    outcomes: tuple[Outcome, ...] = ()
    notes = [begun.start.how, tuned_by.sides.how, *_gone(case.model.kept, model.kept)]
    if len(case.rows.test):
        judge = Judge.of(case.rows.test, begun.whole, *case.past())
        outcomes, verdict = _judged(begun, judge, model, after, state, seconds)
        notes.append(verdict)
    for text in notes[2:]:
        case.note(text)
    found = Found(begun.method, model.head, begun.whole, outcomes, judge)
    what = {"unfreeze": str(tuned_by.tuning.unfreeze), "best_epoch": state.best_epoch.number}
    model.history = {**model.history, **_remembered(history_of(case, found, caches, request, **what))}
    how = f"{len(case.rows.test):,} images that were not trained on" if judge is not None else "not judged"
    return told(case, found, model, how, notes)


def _remembered(history: dict[str, Any]) -> dict[str, Any]:
    return {name: history[name] for name in ("trained_on", "steps", "judged", "expansions")}


def _set_apart(begun: _Begun, layers: Layers, after: FeatureCache) -> Layers:
    """With scores of new classes as high above old ones as before the network was trained.

    Images of new classes alone draw the two apart without end. How many of those that say when to stop are taken for
    new ones is what the start, which was set by what is remembered of old images, had found to be right.
    """
    k_old, pool = begun.whole.k_old, begun.lesson.pool
    watched = ~begun.lesson.train & (pool.y >= k_old)
    if begun.method not in OFFSET or not watched.any():
        return layers
    before = _margin(begun.start.layers, pool.X[watched], k_old)
    now = _margin(layers, begun.embeddings(after, begun.rows[watched]), k_old)
    share = max(NEW_WIN, float((before > 0).mean()))
    added = np.zeros(len(layers.biases[-1]))
    added[k_old:] = -float(np.quantile(now, 1 - share))
    return layers.before(1.0, added)


def _margin(layers: Layers, X: NDArray[np.float32], k_old: int) -> NDArray[np.float64]:
    """How much more is said for new classes than for old ones, of shape (m,)."""
    scores = forward(X.astype(np.float64), [w.T for w in layers.weights], layers.biases, layers.activation)
    return np.asarray(logsumexp(scores[:, k_old:], axis=1) - logsumexp(scores[:, :k_old], axis=1))


def _judged(
    begun: _Begun, judge: Judge, model: Model, after: FeatureCache, state: State, seconds: float
) -> tuple[tuple[Outcome, ...], str]:
    """The rows of the table, this way first, and what is to be said of it."""
    case, method, whole = begun.case, begun.method, begun.whole
    X = begun.embeddings(after, begun.tested)
    right = np.asarray(logits_of(model.head, X).argmax(axis=1) == judge.test.y)
    kept = {} if method != "ewc" or model.kept is None else model.kept.facts()["bytes"]
    size = sum(kept.get(part, 0) for part in ("importances", "network"))
    outcomes = [judge.outcome(method, right, bytes=size, seconds=seconds, curves=_curves(state))]
    rights: dict[str, NDArray[np.bool_]] = {}
    for name in dict.fromkeys((method, *BESIDE)):
        if METHODS[name].missing(whole) is None:
            started = perf_counter()
            rights[name] = judge.right(METHODS[name].fit(whole, None))
            outcomes.append(
                judge.outcome(f"{name} on features", rights[name], seconds=round(perf_counter() - started, 3))
            )
    if method not in rights:
        return tuple(outcomes), ""
    return tuple(outcomes), _verdict(judge, right, rights[method])


def _verdict(judge: Judge, right: NDArray[np.bool_], on_features: NDArray[np.bool_]) -> str:
    change = judge.difference(right, on_features)
    if change.low > 0:
        return f"training the network brought {change}"
    if change.high < 0:
        return f"training the network cost accuracy ({change}): expand without --unfreeze"
    return f"training the network made no difference beyond chance ({change}); without --unfreeze it is done in seconds"


def _curves(state: State) -> dict[str, list[Any]]:
    """By the names of :class:`featpipe.expansion.measure.Curves`."""
    epochs = [epoch.facts() for epoch in state.curve]
    names = {"train_loss": "loss", "old_loss": "old_loss", "new_loss": "new_loss"}
    names |= {"old_accuracy": "old_score", "new_accuracy": "new_score"}
    return {"epochs": [epoch["number"] for epoch in epochs]} | {
        name: [epoch.get(field) for epoch in epochs] for name, field in names.items()
    }


# ------------------------------------------------------------------------------------------------- what is kept
def _kept(begun: _Begun, model: Model, network: nn.Module, layers: Layers, after: FeatureCache) -> Kept | None:
    """What can be known of embeddings that are others now: of the images that are at hand."""
    case, whole, lesson, method = begun.case, begun.whole, begun.lesson, begun.method
    keep = _keep(case, method)
    if not keep:
        return None
    X, y = begun.embeddings(after, begun.rows), lesson.pool.y
    counts = np.bincount(whole.new.y, minlength=whole.k).astype(np.int64)
    counts[: whole.k_old] += (np.bincount(whole.old.y, minlength=whole.k) if whole.kept is None else whole.kept.counts)[
        : whole.k_old
    ]
    if method == "joint":
        kept = keep_of(replace(keep, network=False), model.head, X, y, whole.k, case.settings.selection)
    elif method == "replay":
        rows = replace(keep, statistics=False, importances=False, network=False)
        kept = replace(keep_of(rows, model.head, X, y, whole.k, case.settings.selection), counts=counts)
    else:
        kept = Kept(counts, X[:0], np.zeros(0, np.int32))
    found = _importances(begun, network, layers) if keep.network else None
    if found is None:
        return kept
    last = _last(layers)
    W = np.column_stack([found.pop(f"{last}.weight"), found.pop(f"{last}.bias")])
    return replace(kept, importances=np.asarray(W, np.float32), network=found)


def _keep(case: Case, method: str) -> Any:
    """As asked for, or as before; for ewc its importances too, unless the model keeps nothing."""
    keep = wanted(case.model.kept, case.keep, case.settings if case.memory_given else None, method)
    if case.keep is None and case.model.kept is not None and method == "ewc":
        keep = replace(keep, network=True)
    return keep


def _importances(begun: _Begun, network: nn.Module, layers: Layers) -> Weights | None:
    """Of all images so far: of the new ones as they are now, of old ones too if they are at hand, or as was known."""
    lesson, whole, case = begun.lesson, begun.whole, begun.tuned_by
    start = replace(begun.start, layers=layers)
    backbone = _backbone(case.model)

    def of(which: NDArray[np.bool_]) -> Weights:
        return weighed(case, backbone, network, start, np.unique(begun.rows[which]))

    if begun.known is None and not lesson.is_old.any():
        case.tell(Progress("note", "no importances are kept: of those of the old classes nothing is known"))
        return None
    new, old = of(~lesson.is_old), begun.known or of(lesson.is_old)
    n, m = _images(whole), len(whole.new)
    return {
        name: (n * old[name] + m * new.get(name, np.zeros((), np.float32))).astype(np.float32) / np.float32(n + m)
        for name in old
    }


def _gone(before: Kept | None, after: Kept | None) -> list[str]:
    """What the model before kept of embeddings that are no longer those of the network."""
    had = {} if before is None else before.facts()["bytes"]
    has = {} if after is None else after.facts()["bytes"]
    gone = [part for part in had if part not in has]
    return [f"the network gives other embeddings now; gone is what was kept of those before: {', '.join(gone)}"] * bool(gone)
