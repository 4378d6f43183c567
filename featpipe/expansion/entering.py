"""Which methods go on into the network, what each lacks, and what holds the network to the classes that it knew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from featpipe import split
from featpipe.errors import ConfigError
from featpipe.expansion.arrivals import Side
from featpipe.expansion.methods import (
    DISTILL_STRENGTH,
    METHODS,
    REPLAY_DISTILL,
    no_layer,
    no_old_images,
    shared_out,
    started_head,
)
from featpipe.expansion.step import Step
from featpipe.finetuning.past import Past, Teacher
from featpipe.finetuning.sides import VALIDATION_SEED
from featpipe.kept import Kept, pick

__all__ = ["REFUSED", "THROUGH", "Lesson", "Through", "default", "lesson_of", "missing"]

WATCHED_FROM = 3  # images that a class must have for some of them to say when to stop
REFUSED = {
    "statistics": "is sums over embeddings, and a network that is trained gives others",
    "frozen-old": "keeps the old scores bit for bit, and a network that is trained moves all of them",
    "all": "compares methods on features, in seconds; choose one, and the table shows beside it what features give",
}


@dataclass(frozen=True, eq=False)
class Lesson:
    """What goes through the network, and where the new layer starts.

    Attributes
    ----------
    step : Step
        As the methods on features see it: without what says when to stop.
    pool : Side
        All that is trained on or says when to stop, each image once.
    train, is_old : ndarray of shape (m,), bool
        Which of the pool is trained on, and which the model was trained on before.
    stand_for : ndarray of shape (m,)
        How many images each of the pool stands for.
    """

    step: Step
    pool: Side
    train: NDArray[np.bool_]
    is_old: NDArray[np.bool_]
    stand_for: NDArray[np.float64]

    def past(self, rows: NDArray[np.int64], n: int, distill: float) -> Past:
        """What the old head says of the pool as soft targets, of a strength; and how much each image counts.

        Parameters
        ----------
        rows : ndarray of shape (m,), int64
            Where the pool is in an archive of n rows.
        n : int
        distill : float
        """
        step, k = self.step, self.step.k
        scores, weights = torch.zeros(n, step.k_old), np.ones(n)
        scores[torch.from_numpy(rows)] = torch.from_numpy(step.old_scores(self.pool.X) / step.temperature).float()
        weights[rows], adjustment = shared_out(self.pool.y, self.stand_for, k)
        weights /= weights[rows[self.train]].mean()
        teacher = Teacher(scores, step.settings.temperature, distill) if distill else None
        return Past(step.k_old, teacher, None, weights, adjustment if adjustment.any() else None)


@dataclass(frozen=True)
class Through:
    """One row of the table.

    Attributes
    ----------
    old : callable
        From a step to the old images that go through the network.
    missing : callable
        From a step to what it lacks, in words; or None.
    head : callable
        From a step to the head that the new layer starts as: what the method makes of features.
    distill : float
        How much the soft targets weigh if nothing else is said.
    """

    old: Callable[[Step], Side]
    missing: Callable[[Step], str | None]
    head: Callable[[Step], Pipeline]
    distill: float = 0.0


def missing(method: str, step: Step) -> str | None:
    """What a method lacks to go into the network; None if it can."""
    if not len(step.new):
        return "with --unfreeze learns from new images, and there are none"
    return THROUGH[method].missing(step)


def default(step: Step) -> str:
    """The method where none is named: the one that has most of the old classes at hand."""
    if step.whole and len(step.old):
        return "joint"
    return next((name for name in ("replay", "ewc") if THROUGH[name].missing(step) is None), "distill")


def lesson_of(step: Step, method: str, share: float) -> Lesson:
    """Which images go through the network, and which of them say when to stop.

    Parameters
    ----------
    step : Step
        Without the images that it is judged by.
    method : str
    share : float
        Of the images, to say when to stop: of each class of which there are enough.

    Raises
    ------
    ConfigError
        If there are not enough of any.
    """
    old = THROUGH[method].old(step)
    pool = old + step.new
    once = np.sort(pool.first)
    is_old, pool = once < len(old), pool.take(once)
    train = _divided(pool, share, step.growth.classes)
    stays = pool.take(train & is_old)
    begin = replace(step, new=pool.take(train & ~is_old), old=stays if method == "joint" else step.old)
    stand_for = np.ones(len(pool))
    if method == "replay":
        counts = step.counts
        stand_for[is_old] = (counts / np.maximum(1, np.bincount(pool.y[is_old], minlength=step.k)))[pool.y[is_old]]
        statistics = None if step.kept is None else step.kept.statistics
        begin = replace(begin, kept=Kept(counts, stays.X, stays.y.astype(np.int32), statistics))
    return Lesson(begin, pool, train, is_old, stand_for)


def _divided(pool: Side, share: float, names: Sequence[str]) -> NDArray[np.bool_]:
    """Which images are trained on."""
    enough = np.flatnonzero(np.bincount(pool.y)[pool.y] >= WATCHED_FROM)
    if not len(enough):
        raise ConfigError(
            f"no class has {WATCHED_FROM} images to train on, of which some say when to stop; give more, or leave "
            "--unfreeze out"
        )
    some = pool.take(enough)
    held = enough[split.holdout(some.digests, some.y, test=share, seed=VALIDATION_SEED, names=names)[1]]
    return ~np.isin(np.arange(len(pool)), held)


def _none(step: Step) -> Side:
    return step.old.take(np.zeros(len(step.old), bool))


def _some(step: Step) -> Side:
    """The old images that stand for the others, as ``replay`` on features chooses them."""
    return step.old.take(pick(step.settings.selection, step.features(step.old.X), step.old.y, step.settings.memory))


def _no_pictures(step: Step) -> str | None:
    """Kept rows are what came out of the network, and cannot go through it again."""
    lacks = no_old_images(step)
    if lacks is None:
        return None
    return (
        "with --unfreeze needs some images of each old class: kept rows are embeddings, which cannot go through the "
        f"network again. Give an archive with {step.settings.memory} of each, which are known by their bytes"
    )


def _no_importances(step: Step) -> str | None:
    if (lacks := no_layer(step)) is not None:
        return lacks
    if step.k_old < 2:
        return "with --unfreeze needs two old classes: of one there is nothing to forget that importances would tell"
    known = step.kept is not None and step.kept.network is not None and step.kept.importances is not None
    if known or no_old_images(step) is None:
        return None
    return (
        "with --unfreeze needs importances of the network, and the model keeps none: they are kept where it is trained "
        "with --unfreeze and --keep network, or give old images of each class too"
    )


def _on_features(method: str) -> Callable[[Step], Pipeline]:
    return lambda step: METHODS[method].fit(step, None)


THROUGH: Mapping[str, Through] = {
    "joint": Through(lambda step: step.old, no_old_images, _on_features("joint")),
    "replay": Through(_some, _no_pictures, _on_features("replay"), REPLAY_DISTILL),
    "distill": Through(_none, no_layer, _on_features("distill"), DISTILL_STRENGTH),
    "ewc": Through(_none, _no_importances, _on_features("ewc")),
    "naive": Through(_none, no_layer, started_head),
}
