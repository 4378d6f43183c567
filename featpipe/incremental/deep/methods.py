"""Which methods go on into the network, what each lacks, and what holds the network to the classes that it knew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from featpipe import splits
from featpipe.errors import ConfigError
from featpipe.finetuning import DistillationLoss, Regularizers
from featpipe.incremental.dataset import LabeledEmbeddings
from featpipe.incremental.methods import (
    DISTILL_STRENGTH,
    METHODS,
    REPLAY_DISTILL_STRENGTH,
    compute_weights_and_offsets,
    make_initial_head,
    missing_last_layer,
    missing_old_images,
)
from featpipe.incremental.problem import IncrementalStep
from featpipe.model import ReplayMemory, select_exemplars

__all__ = [
    "DEEP_METHODS",
    "UNSUPPORTED_METHODS",
    "DeepMethod",
    "ReplayDataset",
    "find_missing_requirement",
    "make_replay_dataset",
    "select_default_method",
]

MIN_IMAGES_FOR_VALIDATION = 3  # images that a class must have for some of them to say when to stop
UNSUPPORTED_METHODS = {
    "statistics": "is sums over embeddings, and a network that is trained gives others",
    "frozen-old": "keeps the old scores bit for bit, and a network that is trained moves all of them",
    "all": "compares methods on features, in seconds; choose one, and the table shows beside it what features give",
}


@dataclass(frozen=True, eq=False)
class ReplayDataset:
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

    step: IncrementalStep
    pool: LabeledEmbeddings
    is_train: NDArray[np.bool_]
    is_old: NDArray[np.bool_]
    represented_counts: NDArray[np.float64]

    def make_regularizers(self, rows: NDArray[np.int64], n: int, distill_strength: float) -> Regularizers:
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
        scores[torch.from_numpy(rows)] = torch.from_numpy(
            step.compute_old_scores(self.pool.X) / step.temperature
        ).float()
        weights[rows], adjustment = compute_weights_and_offsets(self.pool.y, self.represented_counts, k)
        weights /= weights[rows[self.is_train]].mean()
        distillation = (
            DistillationLoss(scores, step.settings.temperature, distill_strength) if distill_strength else None
        )
        return Regularizers(step.k_old, distillation, None, weights, adjustment if adjustment.any() else None)


@dataclass(frozen=True)
class DeepMethod:
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

    select_old_images: Callable[[IncrementalStep], LabeledEmbeddings]
    missing_requirement: Callable[[IncrementalStep], str | None]
    make_head: Callable[[IncrementalStep], Pipeline]
    distill_strength: float = 0.0


def find_missing_requirement(method: str, step: IncrementalStep) -> str | None:
    """What a method lacks to go into the network; None if it can."""
    if not len(step.new):
        return "with --unfreeze learns from new images, and there are none"
    return DEEP_METHODS[method].missing_requirement(step)


def select_default_method(step: IncrementalStep) -> str:
    """The method where none is named: the one that has most of the old classes at hand."""
    if step.has_all_old_rows and len(step.old):
        return "joint"
    return next((name for name in ("replay", "ewc") if DEEP_METHODS[name].missing_requirement(step) is None), "distill")


def make_replay_dataset(step: IncrementalStep, method: str, validation_fraction: float) -> ReplayDataset:
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
    old_images = DEEP_METHODS[method].select_old_images(step)
    pool = old_images + step.new
    first_rows = np.sort(pool.first_occurrences)
    is_old, pool = first_rows < len(old_images), pool.take(first_rows)
    is_train = _split_validation(pool, validation_fraction, step.class_mapping.classes)
    old_train = pool.take(is_train & is_old)
    train_step = replace(step, new=pool.take(is_train & ~is_old), old=old_train if method == "joint" else step.old)
    represented_counts = np.ones(len(pool))
    if method == "replay":
        counts = step.counts
        represented_counts[is_old] = (counts / np.maximum(1, np.bincount(pool.y[is_old], minlength=step.k)))[
            pool.y[is_old]
        ]
        statistics = None if step.replay_memory is None else step.replay_memory.statistics
        train_step = replace(
            train_step, replay_memory=ReplayMemory(counts, old_train.X, old_train.y.astype(np.int32), statistics)
        )
    return ReplayDataset(train_step, pool, is_train, is_old, represented_counts)


def _split_validation(pool: LabeledEmbeddings, validation_fraction: float, names: Sequence[str]) -> NDArray[np.bool_]:
    """Which images are trained on."""
    eligible = np.flatnonzero(np.bincount(pool.y)[pool.y] >= MIN_IMAGES_FOR_VALIDATION)
    if not len(eligible):
        raise ConfigError(
            f"no class has {MIN_IMAGES_FOR_VALIDATION} images to train on, of which some say when to stop; give more, or leave "
            "--unfreeze out"
        )
    candidates = pool.take(eligible)
    validation_rows = eligible[
        splits.make_holdout(
            candidates.digests,
            candidates.y,
            test=validation_fraction,
            seed=splits.SplitSeed.FINETUNING_VALIDATION,
            names=names,
        )[1]
    ]
    return ~np.isin(np.arange(len(pool)), validation_rows)


def _select_none(step: IncrementalStep) -> LabeledEmbeddings:
    return step.old.take(np.zeros(len(step.old), bool))


def _select_exemplars(step: IncrementalStep) -> LabeledEmbeddings:
    """The old images that stand for the others, as ``replay`` on features chooses them."""
    return step.old.take(
        select_exemplars(step.settings.selection, step.compute_features(step.old.X), step.old.y, step.settings.memory)
    )


def _missing_exemplar_images(step: IncrementalStep) -> str | None:
    """Kept rows are what came out of the network, and cannot go through it again."""
    reason = missing_old_images(step)
    if reason is None:
        return None
    return (
        "with --unfreeze needs some images of each old class: kept rows are embeddings, which cannot go through the "
        f"network again. Give an archive with {step.settings.memory} of each, which are known by their bytes"
    )


def _missing_importances(step: IncrementalStep) -> str | None:
    if (reason := missing_last_layer(step)) is not None:
        return reason
    if step.k_old < 2:
        return "with --unfreeze needs two old classes: of one there is nothing to forget that importances would tell"
    has_importances = (
        step.replay_memory is not None
        and step.replay_memory.network is not None
        and step.replay_memory.importances is not None
    )
    if has_importances or missing_old_images(step) is None:
        return None
    return (
        "with --unfreeze needs importances of the network, and the model keeps none: they are kept where it is trained "
        "with --unfreeze and --keep network, or give old images of each class too"
    )


def _fit_on_features(method: str) -> Callable[[IncrementalStep], Pipeline]:
    return lambda step: METHODS[method].fit(step, None)


DEEP_METHODS: Mapping[str, DeepMethod] = {
    "joint": DeepMethod(lambda step: step.old, missing_old_images, _fit_on_features("joint")),
    "replay": DeepMethod(
        _select_exemplars, _missing_exemplar_images, _fit_on_features("replay"), REPLAY_DISTILL_STRENGTH
    ),
    "distill": DeepMethod(_select_none, missing_last_layer, _fit_on_features("distill"), DISTILL_STRENGTH),
    "ewc": DeepMethod(_select_none, _missing_importances, _fit_on_features("ewc")),
    "naive": DeepMethod(_select_none, missing_last_layer, make_initial_head),
}
