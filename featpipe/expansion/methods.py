"""The methods: how a head learns more classes, behind one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logsumexp
from sklearn.base import clone
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import has_fit_parameter

from featpipe.expansion.arrivals import Side
from featpipe.expansion.objective import Anchor, Objective, Teacher, minimise
from featpipe.expansion.step import Step, Watch
from featpipe.heads.grown import grown, innermost
from featpipe.heads.layer import LastLayer, fisher, with_layer
from featpipe.heads.statistics import fit_from_statistics, gather, in_place_of, kind_for
from featpipe.heads.torch_heads import MLPClassifier
from featpipe.kept import pick

__all__ = [
    "BALANCED",
    "DISTILL_STRENGTH",
    "METHODS",
    "REPLAY_DISTILL",
    "Method",
    "no_layer",
    "no_old_images",
    "old_head",
    "regrouped_head",
    "shared_out",
    "start",
    "started_head",
]

Array = NDArray[np.float64]

FOLDS, FOLDS_FROM = 3, 6  # rows; on which the offset between old and new classes is found
REPLAY_DISTILL = 1.0  # how much replay weighs what the old head says
DISTILL_STRENGTH = 20.0
DRAWN = 100  # made-up rows of each old class
SLOPE_RIDGE = 1e-3  # for old and new rows that are told apart without a mistake
# Of a margin that tells next to nothing, in its deviations: with less all rows go to the more frequent side.
LEAST_SLOPE = 1.0
NEW_WIN = 0.75  # the share of new rows that the offset lets win where nothing is remembered of the old ones


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes
    ----------
    summary : str
    fit : callable
        From a step, and a function that is told each epoch, to a fitted pipeline of the classes after.
    missing : callable
        From a step to what it lacks, in words; or None.
    keeps : str
        The part of what a model keeps that it lives on.
    """

    summary: str
    fit: Callable[[Step, Watch | None], Pipeline]
    missing: Callable[[Step], str | None]
    keeps: str = ""


# ------------------------------------------------------------------------------------------------- where all starts
def start(layer: LastLayer, Z: Array, y: NDArray[np.integer[Any]], k: int) -> LastLayer:
    """The old rows as they are, and new ones at the means of their classes, as long as old ones are on average.

    Parameters
    ----------
    layer : LastLayer
        Of the k_old classes before.
    Z : ndarray of shape (n, p), y : ndarray of shape (n,)
        Rows of the new classes, k_old to k - 1, and perhaps of old ones.
    """
    k_old = len(layer.b)
    means = np.stack([Z[y == code].mean(axis=0) for code in range(k_old, k)]) if k > k_old else layer.W[:0]
    length = np.linalg.norm(layer.W, axis=1).mean()
    scale = length / max(np.linalg.norm(means, axis=1).mean() if len(means) else 1.0, 1e-12)
    # nearest mean: |z - m|² is, but for what is the same for all classes, -2 (z m - |m|² / 2)
    b = layer.b.mean() - 0.5 * scale * (means**2).sum(axis=1)
    return LastLayer(np.vstack([layer.W, scale * means]), np.concatenate([layer.b, b]))


def _pipeline(step: Step, layer: LastLayer) -> Pipeline:
    head = with_layer(innermost(step.pipeline[-1]), layer)
    return Pipeline([("scale", step.pipeline[0]), ("head", head)])


def started_head(step: Step) -> Pipeline:
    """The head with more classes, before it learns anything."""
    assert step.layer is not None
    return _pipeline(step, start(step.layer, step.features(step.new.X), step.new.y, step.k))


def old_head(step: Step) -> Pipeline:
    """The head before, of the classes that stay: one whose last layer is linear, also where classes were joined."""
    assert step.layer is not None
    return _pipeline(step, step.layer)


def _theta(layer: LastLayer) -> Array:
    return np.column_stack([layer.W, layer.b])


# ------------------------------------------------------------------------------------------------- old rows at hand
def _joint(step: Step, watch: Watch | None) -> Pipeline:
    """As `train` does, with the settings that the head has, on old and new rows together."""
    rows = step.old + step.new
    return step.fresh().fit(rows.X, rows.y)


def _naive(step: Step, watch: Watch | None) -> Pipeline:
    """On the new rows alone."""
    assert step.layer is not None
    Z, y = step.features(step.new.X), step.new.y
    objective = Objective(Z, y, np.ones(len(y)), step.ridge)
    return _pipeline(step, minimise(objective, start(step.layer, Z, y, step.k), step.settings.epochs, watch))


# ------------------------------------------------------------------------------------------------- some old rows
@dataclass(frozen=True, eq=False)
class _Rows:
    """Old rows that stand for others, and new ones.

    Attributes
    ----------
    X : ndarray of shape (r, d)
    y, weights : ndarray of shape (r,)
    judges : ndarray of shape (r,)
        How much each tells of where old and new classes part: made-up rows nothing, where there are others, which
        are harder.
    """

    X: NDArray[Any]
    y: NDArray[np.integer[Any]]
    weights: Array
    judges: Array

    @classmethod
    def plain(cls, side: Side) -> _Rows:
        one = np.ones(len(side))
        return cls(side.X, side.y, one, one)

    def take(self, which: NDArray[np.bool_]) -> _Rows:
        return _Rows(self.X[which], self.y[which], self.weights[which], self.judges[which])

    def __add__(self, other: _Rows) -> _Rows:
        return _Rows(*(np.concatenate(pair) for pair in zip(vars(self).values(), vars(other).values(), strict=True)))


def _remembered(step: Step) -> _Rows:
    """Kept rows, each as heavy as the rows that it stands for; from the old rows at hand if none are kept.

    Where statistics are kept too, kept rows stand for themselves alone, and made-up rows for the others.
    """
    kept, n = step.kept, step.settings.memory
    if kept is not None and len(kept.rows):
        kept = kept.first(n)
        stands = kept.weights()
        rows = _Rows(np.asarray(kept.rows, np.float32), kept.codes, stands, stands)
        drawn = _drawn(step, kept.counts - np.bincount(kept.codes, minlength=len(kept.counts)))
        if drawn is None:
            return rows
        return replace(rows, weights=np.ones(len(stands))) + replace(drawn, judges=np.zeros(len(drawn.y)))
    old = step.old
    chosen = pick(step.settings.selection, step.features(old.X), old.y, n)
    counts = np.bincount(old.y, minlength=step.k)
    of = np.bincount(old.y[chosen], minlength=step.k)
    stands = (counts / np.maximum(of, 1))[old.y[chosen]]
    return _Rows(old.X[chosen], old.y[chosen], stands, stands)


def _replay(step: Step, watch: Watch | None) -> Pipeline:
    """On remembered and new rows: classes weigh as they would if all old rows were there.

    What old rows said that are no longer there, the old head still says, of all rows that are; and the weights that it
    learnt from them are drawn to what they were, as strongly as by its own penalty.
    """
    old = _remembered(step)
    if step.layer is None:
        return _refit(step, old)
    rows = old + _Rows.plain(step.new)
    was, now = step.pipeline[0], _standardised_anew(step, rows)
    layer = step.layer if now is was else _rescaled(step.layer, was, now)
    Z = step.features(rows.X) if now is was else np.asarray(now.transform(rows.X), np.float64)

    def told(found: LastLayer, loss: float) -> None:
        if watch is not None:
            watch(found if now is was else _rescaled(found, now, was), loss)

    theta = _theta(layer)
    hold = np.zeros((step.k, theta.shape[1]))
    hold[: step.k_old, :-1] = step.ridge
    weights, offsets = shared_out(rows.y, rows.weights, step.k)
    objective = Objective(
        Z,
        rows.y,
        weights,
        step.ridge,
        offsets=offsets,
        teacher=Teacher(step.old_scores(rows.X), step.settings.temperature, REPLAY_DISTILL),
        anchor=Anchor(theta, hold),
    )
    found = minimise(objective, start(layer, Z, rows.y, step.k), step.settings.epochs, told)
    return Pipeline([("scale", now), ("head", with_layer(innermost(step.pipeline[-1]), found))])


def shared_out(y: NDArray[np.integer[Any]], stand_for: Array, k: int) -> tuple[Array, Array]:
    """How few rows stand for many: half by their weight, half by an offset of their class, in logarithms.

    Few rows of great weight are learnt by heart; rows of weight one, of which the loss alone knows how rare they are
    (Menon et al., "Long-tail learning via logit adjustment", 2021), give too much room to classes of many rows.
    """
    stands = np.bincount(y, stand_for, k) / np.maximum(np.bincount(y, minlength=k), 1)
    stands = np.where(stands > 0, stands, 1.0)
    return np.sqrt(stands)[y], -0.5 * np.log(stands)


def _standardised_anew(step: Step, rows: _Rows) -> Any:
    """A scaler of old and new classes; that of the old ones where hidden layers have learnt from what it gives."""
    scaler = step.pipeline[0]
    if isinstance(innermost(step.pipeline[-1]), MLPClassifier) or not isinstance(scaler, StandardScaler):
        return scaler
    if not (scaler.with_mean and scaler.with_std):
        return scaler
    return clone(scaler).fit(np.asarray(rows.X, np.float64), sample_weight=rows.weights)


def _rescaled(layer: LastLayer, was: StandardScaler, now: StandardScaler) -> LastLayer:
    """The layer that says of features of one scaler what a layer says of those of another."""
    W = layer.W / was.scale_
    return LastLayer(W * now.scale_, layer.b + W @ (now.mean_ - was.mean_))


def _start_with(step: Step, Z: Array, y: NDArray[np.integer[Any]]) -> LastLayer:
    """`start`; a new class all of whose rows are in the other folds starts from those."""
    assert step.layer is not None
    if np.isin(np.arange(step.k_old, step.k), y).all():
        return start(step.layer, Z, y, step.k)
    return start(step.layer, step.features(step.new.X), step.new.y, step.k)


def _refit(step: Step, old: _Rows) -> Pipeline:
    """Heads without a last layer: anew, on what there is.

    Where rows cannot have weights, those that are made up bring old classes nearer to their true shares: without them
    an LDA on emoji lost seven more points.
    """
    pipeline, rows = step.fresh(), old + _Rows.plain(step.new)
    if has_fit_parameter(pipeline[-1], "sample_weight"):
        return pipeline.fit(rows.X, rows.y, head__sample_weight=rows.weights)
    return pipeline.fit(rows.X, rows.y)


# ------------------------------------------------------------------------------------------------- sums over old rows
def _statistics(step: Step, watch: Watch | None) -> Pipeline:
    """In closed form: what training on everything at once gives. Heads without one give way, see `in_place_of`."""
    pipeline, kept = step.fresh(), step.kept
    kind = kind_for(pipeline)[0]
    if kept is not None and kept.statistics is not None:
        old, kind = kept.statistics, kept.statistics.kind
    else:
        old = gather(kind, step.old.X, step.old.y, step.k)
    if len(step.new):
        old = old + gather(kind, step.new.X, step.new.y, step.k, old.shift)
    return fit_from_statistics(in_place_of(pipeline, kind), old)


# ------------------------------------------------------------------------------------------------- no old rows
def _distill(step: Step, watch: Watch | None) -> Pipeline:
    """On new rows, with what the old head says of them as soft targets."""

    def fit(rows: _Rows, told: Watch | None) -> LastLayer:
        assert step.layer is not None
        Z, strength = step.features(rows.X), step.settings.strength
        teacher = Teacher(
            step.old_scores(rows.X), step.settings.temperature, DISTILL_STRENGTH if strength is None else strength
        )
        ridge, anchor = _held(step)
        objective = Objective(Z, rows.y, rows.weights, ridge, teacher=teacher, anchor=anchor)
        return minimise(objective, _start_with(step, Z, rows.y), step.settings.epochs, told)

    return _balanced(step, fit, watch)


def _held(step: Step, importances: NDArray[np.floating] | float = 0.0) -> tuple[Array, Anchor]:
    """The head's penalty, which draws new weights to zero, and old ones to what they were; and importances beside it.

    Drawn to zero, old weights would be forgotten by the penalty alone, the sooner the fewer new rows there are.
    """
    assert step.layer is not None
    theta = _theta(step.layer)
    hold = np.zeros((step.k, theta.shape[1]))
    hold[: step.k_old, :-1] = step.ridge
    hold[: step.k_old] += importances
    ridge = np.where(np.arange(step.k) < step.k_old, 0.0, step.ridge)[:, None]
    return ridge, Anchor(theta, hold)


def _ewc(step: Step, watch: Watch | None) -> Pipeline:
    """On new rows, with the old weights held by their importance: of strength 1 as much as the old rows would."""
    assert step.layer is not None
    found: NDArray[Any]
    if step.kept is not None and step.kept.importances is not None:
        found, n = step.kept.importances[: step.k_old], int(step.kept.counts.sum())
    else:
        found, n = fisher(step.layer, step.features(step.old.X)), len(step.old)
    strength = step.settings.strength
    ridge, anchor = _held(step, n * (1.0 if strength is None else strength) * found)

    def fit(rows: _Rows, told: Watch | None) -> LastLayer:
        Z = step.features(rows.X)
        objective = Objective(Z, rows.y, rows.weights, ridge, anchor=anchor)
        return minimise(objective, _start_with(step, Z, rows.y), step.settings.epochs, told)

    return _balanced(step, fit, watch)


def _balanced(step: Step, fit: Callable[[_Rows, Watch | None], LastLayer], watch: Watch | None) -> Pipeline:
    """With an offset between old and new classes that is found on new rows that were held out."""
    rows = _Rows.plain(step.new)
    layer = _level(step, fit(rows, watch), rows)
    old = _stand_ins(step)
    scores = np.zeros((len(rows.y), step.k))
    scores_old = np.zeros((0 if old is None else len(old.y), step.k))
    turns = _turns(len(rows.y))
    for ((fit_rows, held),) in turns:
        part = _level(step, fit(rows.take(fit_rows), None), rows.take(fit_rows))
        scores[held] = part.scores(step.features(rows.X[held]))
        if old is not None:
            scores_old += part.scores(step.features(old.X)) / len(turns)
    weights = np.zeros(0) if old is None else old.judges
    return _pipeline(step, _moved(layer, step.k_old, _offset(step.k_old, scores_old, weights, scores, rows.y)))


def _level(step: Step, layer: LastLayer, rows: _Rows) -> LastLayer:
    """New classes as high as old ones, on average over the new rows that the layer was fitted on.

    Rows of new classes alone draw the two apart without end, and how far they come is the search's, not the rows'. An
    offset can only be carried over between layers that begin alike.
    """
    Z = step.features(rows.X[rows.y >= step.k_old])
    if not len(Z):
        return layer
    scores = layer.scores(Z)
    gap = logsumexp(scores[:, step.k_old :], axis=1) - logsumexp(scores[:, : step.k_old], axis=1)
    return _moved(layer, step.k_old, -float(gap.mean()))


def _frozen_old(step: Step, watch: Watch | None) -> Pipeline:
    """New rows alone are trained, against what stands for old rows, or else against each other; then the offset."""
    old, T = _stand_ins(step), step.temperature
    inside = _Rows.plain(step.new)
    new_only = inside.take(inside.y >= step.k_old)

    def fit(rows: _Rows, told: Watch | None) -> LastLayer:
        Z = step.features(rows.X)
        none = LastLayer(np.zeros((step.k_old, Z.shape[1])), np.zeros(step.k_old))
        first = start(step.layer or none, *_of_new(step, Z, rows.y), step.k)
        own = LastLayer(first.W[step.k_old :], first.b[step.k_old :])
        if old is None:
            return minimise(
                Objective(Z, rows.y - step.k_old, rows.weights, step.ridge), own, step.settings.epochs, told
            )
        fixed = step.old_scores(rows.X) / T
        return minimise(Objective(Z, rows.y, rows.weights, step.ridge, fixed), own, step.settings.epochs, told)

    rows = new_only if old is None else old + inside
    layer = fit(rows, watch)
    beside = np.zeros((len(rows.y), step.k))
    beside[:, : step.k_old] = step.old_scores(rows.X) / T
    for ((fit_rows, held),) in _turns(len(rows.y)):
        beside[held, step.k_old :] = fit(rows.take(fit_rows), None).scores(step.features(rows.X[held]))
    is_new = rows.y >= step.k_old
    scores, scores_old = beside[is_new], beside[~is_new]
    offset = _offset(step.k_old, scores_old, rows.judges[~is_new], scores, rows.y[is_new])
    new = LastLayer(T * layer.W, T * (layer.b + offset))
    head = grown(step.pipeline[-1], step.growth.place, new, int(step.pipeline[-1].n_features_in_))
    return Pipeline([("scale", step.pipeline[0]), ("head", head)])


def _of_new(step: Step, Z: Array, y: NDArray[np.integer[Any]]) -> tuple[Array, NDArray[np.integer[Any]]]:
    if np.isin(np.arange(step.k_old, step.k), y).all():
        return Z, y
    return step.features(step.new.X), step.new.y


def _stand_ins(step: Step) -> _Rows | None:
    """What stands for the old rows: kept ones, or rows that are made up from statistics."""
    kept = step.kept
    if kept is None:
        return None
    return _remembered(step) if len(kept.rows) else _drawn(step, kept.counts)


def _drawn(step: Step, counts: NDArray[np.int64]) -> _Rows | None:
    """Rows made up from the statistics that are kept, as heavy as so many of each class."""
    if step.kept is None or step.kept.statistics is None:
        return None
    each = int(min(DRAWN, max(1, counts.max(initial=0))))
    X, codes = step.kept.statistics.draw(each)
    stands = counts[codes] / each
    rows = _Rows(X.astype(np.float32), codes, stands, stands)
    return rows.take(rows.weights > 0)


# ------------------------------------------------------------------------------------------------- no new rows
def regrouped_head(step: Step) -> Pipeline:
    """The head with classes left out or joined, exactly: what is left of its probabilities, or their sums."""
    place, head = step.growth.place, step.pipeline[-1]
    if np.array_equal(place, np.arange(len(place))):
        return step.pipeline
    if step.layer is not None and len(np.unique(place[place >= 0])) == (place >= 0).sum():
        return _pipeline(step, step.layer)
    width = (step.layer or LastLayer(np.zeros((0, head.n_features_in_)), np.zeros(0))).W.shape[1]
    none = LastLayer(np.zeros((0, width)), np.zeros(0))
    return Pipeline([("scale", step.pipeline[0]), ("head", grown(head, place, none, int(head.n_features_in_)))])


# ------------------------------------------------------------------------------------------------- old against new
def _turns(*numbers: int) -> list[tuple[tuple[NDArray[np.bool_], NDArray[np.bool_]], ...]]:
    """Which rows to fit on and which to judge by, in turns; for each of several kinds of rows, of so many each.

    All of them are both where there are too few of a kind.
    """
    if min(numbers) < FOLDS_FROM:
        return [tuple((np.ones(n, bool), np.ones(n, bool)) for n in numbers)]
    folds = [np.random.default_rng(seed).permutation(n) % FOLDS for seed, n in enumerate(numbers)]
    return [tuple((fold != number, fold == number) for fold in folds) for number in range(FOLDS)]


def _offset(k_old: int, old: Array, weights: Array, new: Array, y: NDArray[np.integer[Any]]) -> float:
    """What is added to the scores of new classes so that old and new are told apart as well as can be.

    Parameters
    ----------
    k_old : int
    old : ndarray of shape (r, k), weights : ndarray of shape (r,)
        Scores of rows of old classes; there may be none.
    new : ndarray of shape (n, k), y : ndarray of shape (n,)
        Scores of rows that the head was not trained on, of which some may be of old classes too.
    """
    margin = logsumexp(new[:, k_old:], axis=1) - logsumexp(new[:, :k_old], axis=1)
    is_new = y >= k_old
    if not is_new.any():
        return 0.0
    if not len(old) and is_new.all():
        return -float(np.quantile(margin, 1 - NEW_WIN))
    beside = logsumexp(old[:, k_old:], axis=1) - logsumexp(old[:, :k_old], axis=1)
    z, sign = np.concatenate([beside, margin]), np.concatenate([np.ones(len(beside)), np.where(is_new, -1.0, 1.0)])
    w, unit = np.concatenate([weights, np.ones(len(margin))]), max(float(z.std()), 1e-12)

    def loss(slope_and_offset: Array) -> tuple[float, Array]:
        """Of telling old from new by the margin; with a slope, since scores of few rows are too sure of themselves."""
        slope, offset = slope_and_offset
        wrong = sign * (slope * z / unit + offset)
        pull = w * sign * expit(wrong)
        value = w @ np.logaddexp(0, wrong) + 0.5 * SLOPE_RIDGE * w.sum() * slope**2
        return float(value), np.array([pull @ z / unit + SLOPE_RIDGE * w.sum() * slope, pull.sum()])

    bounds = [(LEAST_SLOPE, None), (None, None)]
    slope, offset = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(unit * offset / slope)


def _moved(layer: LastLayer, k_old: int, offset: float) -> LastLayer:
    b = layer.b.copy()
    b[k_old:] += offset
    return LastLayer(layer.W, b)


# ------------------------------------------------------------------------------------------------- what each needs
def no_layer(step: Step) -> str | None:
    """What a method of last layers lacks."""
    if step.layer is None:
        kind = type(innermost(step.pipeline[-1])).__name__
        return f"is for heads that end in a softmax layer (logistic, linear, mlp, keras), and this one is a {kind}"
    return _no_rows(step)


def _no_rows(step: Step) -> str | None:
    return None if len(step.new) else "learns from new images, and there are none"


def _no_new_class(step: Step) -> str | None:
    return None if step.growth.new else "trains new classes alone, and there are none"


def no_old_images(step: Step) -> str | None:
    """What a method that sees old images lacks: some of each class."""
    of_old = np.unique(step.old.y)
    if len(of_old) < step.k_old:
        missing = [name for code, name in enumerate(step.growth.classes[: step.k_old]) if code not in of_old]
        return (
            f"needs the images that the model was trained on, and there are none of {', '.join(map(repr, missing[:3]))}"
            "; give the old cache too"
        )
    return None


def _no_memory(part: str, typed: str) -> Callable[[Step], str | None]:
    def missing(step: Step) -> str | None:
        held = getattr(step.kept, part, None)
        if held is not None and (part != "rows" or len(held)):
            return None
        if no_old_images(step) is None and (step.whole or part == "rows"):
            return None
        return (
            f"needs {part} of the old classes, and the model keeps none: train it with --keep {typed}, "
            "or give the cache that it was trained on too"
        )

    return missing


def _all_of(*checks: Callable[[Step], str | None]) -> Callable[[Step], str | None]:
    return lambda step: next((found for found in (check(step) for check in checks) if found), None)


METHODS: dict[str, Method] = {
    "joint": Method("old and new images together, which must be at hand", _joint, no_old_images),
    "statistics": Method(
        "closed form from sums over the old rows; lda, ridge and centroid exactly, other heads become ridge",
        _statistics,
        _no_memory("statistics", "statistics"),
        keeps="statistics",
    ),
    "replay": Method(
        "with some embeddings of each old class; any head",
        _replay,
        _all_of(_no_rows, _no_memory("rows", "rows=20")),
        keeps="rows",
    ),
    "frozen-old": Method("the scores of old classes stay bit for bit; any classifier", _frozen_old, _no_new_class),
    "distill": Method("the old model's answers on the new images as soft targets", _distill, no_layer),
    "ewc": Method(
        "old weights held by their importance",
        _ewc,
        _all_of(no_layer, _no_memory("importances", "importances")),
        keeps="importances",
    ),
    "naive": Method("the new images alone: what forgetting is", _naive, no_layer),
}
# which remember no old row, and are set against old classes by what there is
BALANCED = ("frozen-old", "distill", "ewc")
