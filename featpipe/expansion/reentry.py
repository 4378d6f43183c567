"""An expansion that goes on into the network: it starts where the same method on features ends.

The loop is that of fine-tuning; what holds it to the old classes is a :class:`featpipe.finetuning.past.Past`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import nn

from featpipe.cache import FeatureCache
from featpipe.calibration import logits_of
from featpipe.errors import ConfigError
from featpipe.expansion.after import history_of, model_after, told
from featpipe.expansion.begun import Begun, Way
from featpipe.expansion.case import Case
from featpipe.expansion.choice import BESIDE, Found, learnt
from featpipe.expansion.entering import default, missing
from featpipe.expansion.measure import Judge, Outcome
from featpipe.expansion.methods import METHODS, NEW_WIN
from featpipe.expansion.remaining import gone, kept_after
from featpipe.expansion.result import Expansion
from featpipe.finetuning.after import model_of, tuned_backbone
from featpipe.finetuning.layers import Layers
from featpipe.finetuning.state import State
from featpipe.finetuning.work import trained
from featpipe.heads.network import forward
from featpipe.model import Model

__all__ = ["reentered"]

OFFSET = ("distill", "ewc")  # after which old and new classes are set against each other
AS_IT_WAS = (
    "no epoch was better than the start on the images that say when to stop: the network stays as it was, and what "
    "comes out is what features give"
)


def reentered(
    case: Case,
    method: str | None,
    way: Way,
    caches: Sequence[str],
    request: str,
) -> Expansion:
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
    if way.out is not None:
        Model.check_target(way.out)
    begun = Begun.of(case, method, way, whole)
    network, layers, state = trained(begun.tuned_by, begun.backbone, begun.start, way.resume)
    if state.best_epoch.number == 0 and METHODS[method].missing(whole) is None:
        case.note(AS_IT_WAS)
        return model_after(given, learnt(given, method), caches, request, notes=(AS_IT_WAS,))
    return _outcome(begun, network, layers, state, caches, request, round(perf_counter() - started, 3))


def _outcome(
    begun: Begun,
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
    unmoved = [AS_IT_WAS] if state.best_epoch.number == 0 else []
    layers = layers if unmoved else _set_apart(begun, layers, after)
    plain = replace(tuned_by.model, calibration=None)  # its temperature is in the layers
    model = model_of(plain, tuned_by.model, backbone, after, tuned_by.sides, layers, state, {})
    model.kept = kept_after(begun, model, network, layers, after)
    outcomes: tuple[Outcome, ...] = ()
    notes = [begun.start.how, tuned_by.sides.how, *unmoved, *gone(case.model.kept, model.kept)]
    if len(case.rows.test):
        judge = Judge.of(case.rows.test, begun.whole, *case.past())
        outcomes, verdict = _judged(begun, judge, model, after, state, seconds)
        notes += [verdict] if verdict else []
    for text in notes[2:]:
        case.note(text)
    found = Found(begun.method, model.head, begun.whole, outcomes, judge)
    what = {"unfreeze": str(tuned_by.tuning.unfreeze), "best_epoch": state.best_epoch.number}
    model.history = {**model.history, **_remembered(history_of(case, found, caches, request, **what))}
    how = f"{len(case.rows.test):,} images that were not trained on" if judge is not None else "not judged"
    return told(case, found, model, how, notes)


def _remembered(history: dict[str, Any]) -> dict[str, Any]:
    return {name: history[name] for name in ("trained_on", "steps", "judged", "expansions")}


def _set_apart(begun: Begun, layers: Layers, after: FeatureCache) -> Layers:
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
    begun: Begun, judge: Judge, model: Model, after: FeatureCache, state: State, seconds: float
) -> tuple[tuple[Outcome, ...], str]:
    """The rows of the table, this way first, and what is to be said of it."""
    method, whole = begun.method, begun.whole
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
