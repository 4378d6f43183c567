"""The methods that can train the network, and the images that each trains on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from featpipe.errors import ConfigError
from featpipe.incremental.deep.regularizers import DistillationLoss
from featpipe.incremental.methods import (
    DISTILL_STRENGTH,
    METHODS,
    REPLAY_DISTILL_STRENGTH,
    compute_weights_and_offsets,
    explain_missing_last_layer,
    explain_missing_old_images,
    make_initial_head,
)
from featpipe.incremental.problem import IncrementalStep
from featpipe.metrics import Note, format_note
from featpipe.model import ReplayMemory
from featpipe.splits import SplitSeed
from featpipe.training import EmbeddingDataset

MIN_IMAGES_FOR_VALIDATION = 3  # of a class, for some of them to be validation images
UNSUPPORTED_METHODS = {
    "statistics": "uses sums over embeddings, and training the network changes the embeddings",
    "frozen-old": "keeps the old scores bit for bit, and training the network changes them",
    "all": "compares methods on features, in seconds; choose a method, and the table shows its result on features too",
}


@dataclass(frozen=True, eq=False)
class ReplayDataset:
    """The training and validation images of the network.

    Attributes
    ----------
    step : IncrementalStep
        For the method on features: without validation images.
    pool : EmbeddingDataset
        Training and validation images, each once.
    is_train, is_old : ndarray of shape (m,), bool
        Which images of the pool are training images, and which the old model was trained on.
    represented_counts : ndarray of shape (m,)
        How many images each image of the pool represents.
    """

    step: IncrementalStep
    pool: EmbeddingDataset
    is_train: NDArray[np.bool_]
    is_old: NDArray[np.bool_]
    represented_counts: NDArray[np.float64]

    def make_distillation_loss(self, rows: NDArray[np.int64], n: int, strength: float) -> DistillationLoss:
        """Soft targets from the old head.

        Parameters
        ----------
        rows : ndarray of shape (m,), int64
            Rows of the pool in an archive of ``n`` images.
        n : int
        strength : float
        """
        teacher_scores = torch.zeros(n, self.step.k_old)
        old_scores = self.step.compute_old_scores(self.pool.features) / self.step.temperature
        teacher_scores[torch.from_numpy(rows)] = torch.from_numpy(old_scores).float()
        return DistillationLoss(teacher_scores, self.step.settings.temperature, strength)

    def compute_sample_weights(
        self, rows: NDArray[np.int64], n: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """The weight of each of the ``n`` images of an archive, shape (n,), and the logit adjustment, shape (k,).

        Both together let each image count as much as the images that it represents.
        """
        weights = np.ones(n)
        weights[rows], adjustment = compute_weights_and_offsets(self.pool.y, self.represented_counts, self.step.k)
        weights /= weights[rows[self.is_train]].mean()
        return weights, adjustment if adjustment.any() else None


@dataclass(frozen=True)
class DeepMethod:
    """How a method trains the network.

    Attributes
    ----------
    select_old_images : callable
        From a step to the old images to train on.
    missing_requirement : callable
        From a step to the reason why the method is unavailable, None if it is available.
    make_head : callable
        From a step to the head that training starts from: the method's result on features.
    distill_strength : float
        Default weight of the soft targets.
    """

    select_old_images: Callable[[IncrementalStep], EmbeddingDataset]
    missing_requirement: Callable[[IncrementalStep], Note | str | None]
    make_head: Callable[[IncrementalStep], Pipeline]
    distill_strength: float = 0.0


def find_missing_requirement(method: str, step: IncrementalStep) -> str | None:
    """Why a method cannot train the network; None if it can."""
    if not len(step.new):
        return "with --unfreeze needs new images, and there are none"
    reason = DEEP_METHODS[method].missing_requirement(step)
    return None if reason is None else format_note(reason)


def select_default_method(step: IncrementalStep) -> str:
    """The default method: the one that uses most of the available data of old classes."""
    if step.has_all_old_rows and len(step.old):
        return "joint"
    return next((name for name in ("replay", "ewc") if DEEP_METHODS[name].missing_requirement(step) is None), "distill")


def make_replay_dataset(step: IncrementalStep, method: str, validation_fraction: float) -> ReplayDataset:
    """Select the images to train on, and divide them into training and validation images.

    Parameters
    ----------
    step : IncrementalStep
        Without test images.
    method : str
    validation_fraction : float
        Of the images of each class that has enough.

    Raises
    ------
    ConfigError
        If no class has enough images.
    """
    old_images = DEEP_METHODS[method].select_old_images(step)
    pool = old_images + step.new
    first_rows = pool.first_occurrences
    is_old, pool = first_rows < len(old_images), pool.take(first_rows)
    is_train = _split_validation(pool, validation_fraction)
    old_train = pool.take(is_train & is_old)
    train_step = replace(step, new=pool.take(is_train & ~is_old), old=old_train if method == "joint" else step.old)
    represented_counts = np.ones(len(pool))
    if method == "replay":
        counts_per_image = step.counts / np.maximum(1, np.bincount(pool.y[is_old], minlength=step.k))
        represented_counts[is_old] = counts_per_image[pool.y[is_old]]
        statistics = None if step.replay_memory is None else step.replay_memory.statistics
        memory = ReplayMemory(step.counts, old_train.features, old_train.y.astype(np.int32), statistics)
        train_step = replace(train_step, replay_memory=memory)
    return ReplayDataset(train_step, pool, is_train, is_old, represented_counts)


def _split_validation(pool: EmbeddingDataset, validation_fraction: float) -> NDArray[np.bool_]:
    """Which images are training images, shape (m,)."""
    eligible = np.flatnonzero(np.bincount(pool.y)[pool.y] >= MIN_IMAGES_FOR_VALIDATION)
    if not len(eligible):
        raise ConfigError(
            f"no class has {MIN_IMAGES_FOR_VALIDATION} images to train on, of which some are for validation; give "
            "more, or leave --unfreeze out"
        )
    seed = SplitSeed.FINETUNING_VALIDATION
    _, validation_rows = pool.take(eligible).make_holdout(validation_fraction, seed=seed)
    return ~np.isin(np.arange(len(pool)), eligible[validation_rows])


def _select_none(step: IncrementalStep) -> EmbeddingDataset:
    return step.old.take(np.zeros(len(step.old), bool))


def _select_exemplars(step: IncrementalStep) -> EmbeddingDataset:
    """The exemplars among the old images, as ``replay`` on features selects them."""
    return step.old.take(step.select_old_exemplars())


def _explain_missing_exemplar_images(step: IncrementalStep) -> str | None:
    """Stored exemplars are embeddings: images are needed."""
    reason = explain_missing_old_images(step)
    if reason is None:
        return None
    return (
        "with --unfreeze needs some images of each old class: stored exemplars are embeddings, which cannot go through "
        f"the network again. Give an archive with {step.settings.memory} of each; they are recognized by their bytes"
    )


def _explain_missing_importances(step: IncrementalStep) -> Note | str | None:
    if (reason := explain_missing_last_layer(step)) is not None:
        return reason
    if step.k_old < 2:
        return "with --unfreeze needs two old classes: with one class all importances are zero"
    memory = step.replay_memory
    has_importances = memory is not None and memory.network is not None and memory.importances is not None
    if has_importances or explain_missing_old_images(step) is None:
        return None
    return (
        "with --unfreeze needs importances of the network, and the model retains none: train it with --unfreeze and "
        "--keep network, or give old images of each class too"
    )


def _fit_on_features(method: str) -> Callable[[IncrementalStep], Pipeline]:
    return lambda step: METHODS[method].fit(step, None)


DEEP_METHODS: Mapping[str, DeepMethod] = {
    "joint": DeepMethod(lambda step: step.old, explain_missing_old_images, _fit_on_features("joint")),
    "replay": DeepMethod(
        _select_exemplars, _explain_missing_exemplar_images, _fit_on_features("replay"), REPLAY_DISTILL_STRENGTH
    ),
    "distill": DeepMethod(_select_none, explain_missing_last_layer, _fit_on_features("distill"), DISTILL_STRENGTH),
    "ewc": DeepMethod(_select_none, _explain_missing_importances, _fit_on_features("ewc")),
    "naive": DeepMethod(_select_none, explain_missing_last_layer, make_initial_head),
}
