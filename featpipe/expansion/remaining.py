"""What a model keeps after its network was trained: embeddings are others then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from featpipe.cache import FeatureCache
from featpipe.expansion.begun import Begun
from featpipe.expansion.case import Case
from featpipe.expansion.memory import wanted, within
from featpipe.expansion.weighing import Weights, last_of
from featpipe.finetuning.layers import Layers
from featpipe.finetuning.work import weighed
from featpipe.kept import Keep, Kept, keep_of
from featpipe.model import Model
from featpipe.progress import Progress

__all__ = ["gone", "kept_after"]


def kept_after(begun: Begun, model: Model, network: nn.Module, layers: Layers, after: FeatureCache) -> Kept | None:
    """What can be known of embeddings that are others now: of the images that are at hand."""
    case, whole, lesson, method = begun.case, begun.whole, begun.lesson, begun.method
    keep = _keep(case, method)
    if not keep:
        return None
    X, y = begun.embeddings(after, begun.rows), lesson.pool.y
    counts = np.bincount(whole.new.y, minlength=whole.k) + whole.counts
    if method == "joint":
        kept = keep_of(replace(keep, network=False), model.head, X, y, whole.k, case.settings.selection)
    elif method == "replay":
        rows = replace(keep, statistics=False, importances=False, network=False)
        kept = replace(keep_of(rows, model.head, X, y, whole.k, case.settings.selection), counts=counts)
    else:
        kept = Kept(counts, X[:0], np.zeros(0, np.int32))
    found = _importances(begun, network, layers) if keep.network else None
    if found is not None:
        kept = _with_importances(kept, found, layers)
    return kept if case.budget is None else within(kept, case.budget)


def _with_importances(kept: Kept, found: Weights, layers: Layers) -> Kept:
    last = last_of(layers)
    W = np.column_stack([found.pop(f"{last}.weight"), found.pop(f"{last}.bias")])
    return replace(kept, importances=np.asarray(W, np.float32), network=found)


def _keep(case: Case, method: str) -> Keep:
    """As asked for, or as before; for ewc its importances too, unless the model keeps nothing."""
    keep = wanted(case.model.kept, case.keep, case.settings if case.memory_given else None, method)
    if case.keep is None and case.model.kept is not None and method == "ewc":
        keep = replace(keep, network=True)
    return keep


def _importances(begun: Begun, network: nn.Module, layers: Layers) -> Weights | None:
    """Of all images so far: of the new ones as they are now, of old ones too if they are at hand, or as was known."""
    lesson, whole, case = begun.lesson, begun.whole, begun.tuned_by
    start = replace(begun.start, layers=layers)

    def of(which: NDArray[np.bool_]) -> Weights:
        return weighed(case, begun.backbone, network, start, np.unique(begun.rows[which]))

    if begun.known is None and not lesson.is_old.any():
        case.tell(Progress("note", "no importances are kept: of those of the old classes nothing is known"))
        return None
    new, old = of(~lesson.is_old), begun.known or of(lesson.is_old)
    n, m = int(whole.counts.sum()), len(whole.new)
    return {
        name: (n * old[name] + m * new.get(name, np.zeros((), np.float32))).astype(np.float32) / np.float32(n + m)
        for name in old
    }


def gone(before: Kept | None, after: Kept | None) -> list[str]:
    """What the model before kept of embeddings that are no longer those of the network."""
    had = {} if before is None else before.facts()["bytes"]
    has = {} if after is None else after.facts()["bytes"]
    lost = [part for part in had if part not in has]
    return [f"gone is what was kept of the embeddings before: {', '.join(lost)}"] if lost else []
