"""What training images look like, so that a model can say how new another one looks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import split
from featpipe.training.rows import Rows
from featpipe.training.selection import subset
from featpipe.trust import KEPT, Novelty

__all__ = ["novelty_of"]

MOST = 20_000  # rows that are looked at
SEED = 3  # other rows than those of folds and parts
LEAST = 10  # rows


def novelty_of(rows: Rows, task: str) -> Novelty | None:
    """From some training rows, each class with as many as there are of it up to its share; None of very few."""
    some = subset(rows, MOST, SEED)
    if len(some) < LEAST:
        return None
    X = np.asarray(some.X, np.float32)
    kept = np.sort(_by_turns(some, task)[: max(KEPT, len(rows.classes))])
    _, copies = np.unique(some.digests, axis=0, return_inverse=True)
    alike: list[NDArray[Any]] = [np.ravel(copies)]
    if some.groups is not None:
        alike.append(np.unique(some.groups, return_inverse=True)[1])
    found = Novelty.of(X, kept, np.column_stack(alike))
    return found if len(found.distances) >= LEAST else None


def _by_turns(rows: Rows, task: str) -> NDArray[np.intp]:
    """The rows in an order that takes one of each class by turns; which ones follows from their images' bytes."""
    keys = split.key(rows.digests, SEED)
    turn = np.zeros(len(rows), np.intp)
    if task == "classification":
        for code in range(len(rows.classes)):
            own = np.flatnonzero(rows.y == code)
            turn[own[np.argsort(keys[own], kind="stable")]] = np.arange(len(own))
    return np.lexsort((keys, turn))
