"""What the model after an expansion keeps, from what the one before kept and the rows that came."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from featpipe.expansion.methods import BALANCED, METHODS
from featpipe.expansion.step import Settings, Step
from featpipe.heads.grown import layer_of
from featpipe.heads.layer import fisher
from featpipe.heads.statistics import Statistics, gather, kind_for, takes
from featpipe.kept import Keep, Kept, features_of, keep_of, pick

__all__ = ["bytes_for", "remembered", "wanted", "within"]


def wanted(before: Kept | None, keep: Keep | None, given: Settings | None, method: str) -> Keep:
    """What to keep: as asked for; else what the model kept, with as many rows as asked for, and for replay some."""
    if keep is not None:
        return keep
    if before is None:
        return Keep()
    had = int(np.bincount(before.codes).max(initial=0))
    rows = given.memory if given is not None and (had or method == "replay") else had
    return Keep(before.statistics is not None, before.importances is not None, rows, before.network is not None)


def remembered(step: Step, pipeline: Pipeline, keep: Keep, *, retrained: bool) -> Kept | None:
    """What is kept after a step.

    Parameters
    ----------
    step : Step
    pipeline : Pipeline
        After.
    keep : Keep
    retrained : bool
        Whether it was fitted to all old and new rows.
    """
    if not keep:
        return None
    rows = step.old + step.new
    if retrained:
        again = keep_of(keep, pipeline, rows.X, rows.y, step.k, step.settings.selection)
        return replace(again, network=_network(step, step.kept) if keep.network else None)
    before = step.kept
    counts = np.bincount(step.new.y, minlength=step.k)
    counts[: step.k_old] += step.counts[: step.k_old]
    X, codes = _rows(step, keep.rows)
    return Kept(
        counts.astype(np.int64),
        X,
        codes,
        _statistics(step, pipeline, before) if keep.statistics else None,
        _importances(step, pipeline, before) if keep.importances else None,
        _network(step, before) if keep.network else None,
    )


def _rows(step: Step, n: int) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """At most n rows of each class: of those kept, of the old ones at hand where none are, and of the new ones."""
    if not n:
        return np.zeros((0, step.new.X.shape[1]), np.float32), np.zeros(0, np.int32)
    kept = step.kept
    old_X: NDArray[Any] = step.old.X
    old_y: NDArray[Any] = step.old.y
    if kept is not None and len(kept.rows):
        old_X, old_y = kept.rows, kept.codes
    X = np.concatenate([old_X, step.new.X.astype(old_X.dtype)])
    y = np.concatenate([old_y, step.new.y]).astype(np.int32)
    of_new = np.isin(y, np.unique(step.new.y))
    fits = [np.flatnonzero(y == code)[:n] for code in np.unique(y[~of_new])]  # in the order in which they were kept
    if kept is None or not len(kept.rows):
        fits = [pick(step.settings.selection, step.features(X[~of_new]), y[~of_new], n)] if (~of_new).any() else []
        fits = [np.flatnonzero(~of_new)[rows] for rows in fits]
    if of_new.any():
        fits.append(np.flatnonzero(of_new)[pick(step.settings.selection, step.features(X[of_new]), y[of_new], n)])
    every = np.concatenate(fits).astype(np.intp)
    return X[every], y[every]


def _statistics(step: Step, pipeline: Pipeline, before: Kept | None) -> Statistics | None:
    if before is not None and before.statistics is not None:
        old = before.statistics
    elif step.whole and len(step.old):
        old = gather(kind_for(pipeline)[0], step.old.X, step.old.y, step.k)
    else:
        return None
    if not takes(pipeline, old.kind):
        return None
    return old + gather(old.kind, step.new.X, step.new.y, step.k, old.shift) if len(step.new) else old


def _importances(step: Step, pipeline: Pipeline, before: Kept | None) -> NDArray[np.float32] | None:
    """Those before, with zeros for new classes, and those of the new rows: each weighs by its images."""
    layer = layer_of(pipeline[-1])
    if layer is None:
        return None
    found = fisher(layer, features_of(pipeline, step.new.X)) if len(step.new) else 0.0
    old: NDArray[Any]
    if before is not None and before.importances is not None:
        old, n = before.importances, int(before.counts.sum())
    elif step.whole and len(step.old):
        old, n = fisher(layer, features_of(pipeline, step.old.X)), len(step.old)
    else:
        return None
    m = len(step.new)
    return np.asarray((n * old + m * found) / (n + m), np.float32)


def _network(step: Step, before: Kept | None) -> dict[str, NDArray[np.float32]] | None:
    """Those before: of new images, which did not go through the network, nothing is known."""
    if before is None or before.network is None:
        return None
    n, m = int(before.counts.sum()), len(step.new)
    return {name: np.asarray(n / max(1, n + m) * array, np.float32) for name, array in before.network.items()}


def within(kept: Kept, budget: int, first: str = "") -> Kept:
    """What of it is not larger than so many bytes, in all: of rows as many as that allows; one part before others."""
    left = budget
    for part in sorted(("rows", "statistics", "importances"), key=lambda name: name != first):
        held = getattr(kept, part)
        if held is None or not len(held if part == "rows" else [0]):
            continue
        if part == "rows":
            each = int(np.bincount(kept.codes).max())
            kept = kept.first(min(each, left // (len(kept.counts) * (held[:1].nbytes + kept.codes.itemsize))))
            left -= kept.rows.nbytes + kept.codes.nbytes
        elif held.nbytes <= left:
            left -= held.nbytes
        else:
            kept = replace(kept, statistics=None) if part == "statistics" else replace(kept, importances=None)
    too_large = kept.network is not None and sum(array.nbytes for array in kept.network.values()) > left
    return replace(kept, network=None) if too_large else kept


def bytes_for(method: str, step: Step) -> int:
    """How much of what a model keeps a method lives on, also where it only sets old classes against new ones by it."""
    parts, kept = {METHODS[method].keeps}, step.kept
    if kept is not None and (method in BALANCED or method == "replay"):  # old rows are made up too, from statistics
        parts |= {"rows"} if len(kept.rows) else set()
        parts |= {"statistics"} if kept.statistics is not None else set()
    return sum(_bytes_of(part, step) for part in parts)


def _bytes_of(part: str, step: Step) -> int:
    kept = step.kept
    d = step.new.X.shape[1]
    if part == "rows":
        return step.k * step.settings.memory * d * 4
    if part == "statistics":
        known = kept.statistics if kept is not None else None
        return known.nbytes if known is not None else 8 * d * (d + 1) // 2
    if part == "importances":
        return 4 * step.k * (d + 1) if step.layer is None else 4 * step.k * (step.layer.W.shape[1] + 1)
    return 0
