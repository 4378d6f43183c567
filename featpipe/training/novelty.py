"""What training images look like, so that a model can say how new another one looks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import split
from featpipe.training.rows import Rows
from featpipe.training.selection import subset
from featpipe.trust import KEPT, Novelty

__all__ = ["novelty_after", "novelty_of"]

MOST = 20_000  # rows that are looked at
SEED = 3  # other rows than those of folds and parts
LEAST = 10  # rows


def novelty_of(rows: Rows, task: str) -> Novelty | None:
    """From some training rows, each class with as many as there are of it up to its share; None of very few."""
    some = subset(rows, MOST, SEED)
    if len(some) < LEAST:
        return None
    kept = np.sort(_by_turns(some, task)[: max(KEPT, len(rows.classes))])
    found = Novelty.of(np.asarray(some.X, np.float32), kept, _alike(some))
    return found if len(found.distances) >= LEAST else None


def novelty_after(before: Novelty, images: int, rows: Rows) -> Novelty:
    """Of a classifier that learnt more rows, from what is known of earlier ones.

    Parameters
    ----------
    before : Novelty
    images : int
        That ``before`` stands for.
    rows : Rows
        That came. As large a share of them is kept as of the earlier ones, and one of each class.
    """
    if not len(rows):
        return before
    some = subset(rows, MOST, SEED)
    share = min(1.0, len(before.rows) / max(1, images))
    n = max(round(share * len(rows)), len(np.unique(some.y)))
    return before.joined(
        np.asarray(some.X, np.float32), np.sort(_by_turns(some, "classification")[:n]), _alike(some), images
    )


def _alike(rows: Rows) -> NDArray[Any]:
    """What copies have in common, and what groups have, shape (m, 1) or (m, 2)."""
    _, copies = np.unique(rows.digests, axis=0, return_inverse=True)
    alike: list[NDArray[Any]] = [np.ravel(copies)]
    if rows.groups is not None:
        alike.append(np.unique(rows.groups, return_inverse=True)[1])
    return np.column_stack(alike)


def _by_turns(rows: Rows, task: str) -> NDArray[np.intp]:
    """The rows in an order that takes one of each class by turns; which ones follows from their images' bytes."""
    keys = split.key(rows.digests, SEED)
    turn = np.zeros(len(rows), np.intp)
    if task == "classification":
        for code in range(len(rows.classes)):
            own = np.flatnonzero(rows.y == code)
            turn[own[np.argsort(keys[own], kind="stable")]] = np.arange(len(own))
    return np.lexsort((keys, turn))
