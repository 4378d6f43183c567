"""Training, validation and test rows of an archive."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import heads
from featpipe.cache import FeatureCache
from featpipe.config import FineTuneConfig, TrainingConfig
from featpipe.errors import CacheError, ConfigError
from featpipe.metrics import Calibration, Note
from featpipe.model import Model
from featpipe.splits import SplitSeed
from featpipe.training import EmbeddingDataset, get_head_params, make_head_config, train_head

logger = logging.getLogger(__name__)

MAX_LISTED_NAMES = 3


@dataclass(frozen=True, eq=False)
class Splits:
    """Rows of an archive, and their labels.

    Attributes
    ----------
    train, validation, test : ndarray of int64
        Row numbers, ascending; no image (by its bytes) is in two of them.
    y : ndarray
        For each row of the archive: class codes of shape (n,), targets of shape (n, t), or 0 and 1 of shape (n, k).
        Arbitrary for rows in none of the splits.
    note : mapping
        The numbers of images, see :func:`featpipe.metrics.format_note`.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    y: NDArray[Any]
    note: Note

    @property
    def train_and_validation(self) -> NDArray[np.int64]:
        """Training and validation rows, ascending."""
        return np.sort(np.concatenate([self.train, self.validation]))


def make_splits(model: Model, cache: FeatureCache, tuning: FineTuneConfig) -> Splits:
    """Split the labelled, readable rows of a cache.

    Rows are split as the labels mark them; a missing validation or test split is held out of the training rows. The
    split of a row depends only on the bytes of its image.

    Raises
    ------
    CacheError
        If there are no labels.
    ConfigError
        If the labels are not exactly the model's classes, or there are too few images.
    """
    dataset = _load_dataset(model, cache)
    if not len(dataset):
        raise CacheError(f"{cache.path}: no row is labelled and readable; give images with labels")
    train = dataset.marked("train") if cache.split[dataset.rows].any() else dataset
    if not len(train):
        raise CacheError(f"{cache.path}: the labels mark no row for training; mark some as train")
    validation = dataset.marked("validation").exclude_duplicates_of(train)
    test = dataset.marked("test").exclude_duplicates_of(train).exclude_duplicates_of(dataset.marked("validation"))
    marked_names = [name for name, marked in (("validation", validation), ("test", test)) if len(marked)]
    if not len(test):
        train, test = _hold_out(train, tuning.test, SplitSeed.FINETUNING_TEST)
    if not len(validation):
        train, validation = _hold_out(train, tuning.validation, SplitSeed.FINETUNING_VALIDATION)
    missing_classes = [name for name in model.classes if name not in train.list_present_classes()]
    if model.task == "classification" and missing_classes:
        raise ConfigError(
            f"{cache.path}: no training image is of {_format_names('class', missing_classes)}, which the model would "
            "forget; give images of all its classes, or train a model with fewer"
        )
    counts = {"training": len(train), "validation": len(validation), "test": len(test)}
    y = np.zeros((len(cache), *dataset.y.shape[1:]), dataset.y.dtype)
    y[dataset.rows] = dataset.y
    return Splits(
        train.rows,
        validation.rows,
        test.rows,
        y,
        {"kind": "marked_splits", **counts, "marked": " and ".join(marked_names) or "none"},
    )


def _hold_out(dataset: EmbeddingDataset, fraction: float, seed: SplitSeed) -> tuple[EmbeddingDataset, EmbeddingDataset]:
    if not fraction:
        raise ConfigError(
            "test and validation must be above 0: the models are compared on test images; give shares such as 0.2"
        )
    train_rows, test_rows = dataset.make_holdout(fraction, seed=seed)
    return dataset.take(train_rows), dataset.take(test_rows)


def _load_dataset(model: Model, cache: FeatureCache) -> EmbeddingDataset:
    """The labelled, readable rows, in the model's classes; targets of a regression of shape (m, t)."""
    if cache.task != model.task:
        labels_text = "no labels" if cache.task == "none" else f"labels for {cache.task}"
        raise CacheError(
            f"{cache.path}: has {labels_text}, the model is for {model.task}; give matching labels with --labels"
        )
    dataset = EmbeddingDataset.from_cache(cache)
    unknown_classes = [name for name in dataset.list_present_classes() if name not in model.classes]
    missing_classes = [name for name in model.classes if name not in cache.classes]
    if unknown_classes:
        raise ConfigError(
            f"{cache.path}: has {_format_names('class', unknown_classes)}, which the model does not know; add them "
            "with `featpipe expand` first, or remove those images"
        )
    if missing_classes:
        raise ConfigError(
            f"{cache.path}: has no image of {_format_names('class', missing_classes)}, which the model would forget; "
            "give images of all its classes, or train a model with fewer"
        )
    dataset = dataset.aligned_to(model.classes)
    return (
        replace(dataset, y=dataset.y.reshape(len(dataset), len(model.classes)))
        if model.task == "regression"
        else dataset
    )


def _format_names(noun: str, names: list[str]) -> str:
    more_text = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
    plural = noun + ("es" if noun.endswith("s") else "s") if len(names) > 1 else noun
    return f"{plural} {', '.join(map(repr, names[:MAX_LISTED_NAMES]))}{more_text}"


def refit_without(
    model: Model,
    cache: FeatureCache,
    splits: Splits,
    excluded_rows: NDArray[np.int64],
    training_rows: NDArray[np.int64],
) -> Model:
    """The model itself if it was trained on none of ``excluded_rows``; else its head fitted again on other rows.

    Parameters
    ----------
    model : Model
    cache : FeatureCache
        Of the model's backbone.
    splits : Splits
    excluded_rows : ndarray of int64
    training_rows : ndarray of int64
        Rows for the new fit.
    """
    if not model.was_trained_on(cache.digests[excluded_rows]).any():
        return model
    dataset = make_dataset(model, cache, splits.y, training_rows)
    head_name, params = _get_head_settings(model)
    config = TrainingConfig(
        head=head_name,
        params=params,
        output=model.output,
        balance=model.history.get("balance"),
        random_state=model.history.get("random_state", 0),
        calibrate=model.calibration is not None and model.calibration.temperature != 1,
    )
    text = (
        f"the model was trained on validation or test images; its head is fitted again on {len(dataset)} other images"
    )
    logger.info(text)
    refitted = train_head(cache, dataset, config, make_head_config(config, dataset)).to_model(cache, dataset)
    refitted.request, refitted.device = model.request, model.device
    refitted._backbone, refitted._engine = model._backbone, model._engine
    if model.calibration is not None and model.calibration.offsets:
        temperature = 1.0 if refitted.calibration is None else refitted.calibration.temperature
        refitted.calibration = Calibration(temperature, model.calibration.offsets)
    return refitted


def make_dataset(model: Model, cache: FeatureCache, y: NDArray[Any], rows: NDArray[np.int64]) -> EmbeddingDataset:
    """Rows as a dataset in the model's classes."""
    targets = y[rows]
    if model.task == "regression" and targets.shape[1] == 1:
        targets = targets[:, 0]
    X = np.asarray(cache.features(model.output)[rows], np.float32)
    digests = np.ascontiguousarray(cache.digests[rows])
    return EmbeddingDataset(rows, X, targets, model.classes, digests, task=model.task, cache=cache, output=model.output)


def _get_head_settings(model: Model) -> tuple[str, Mapping[str, object]]:
    """Name and settings of the model's head; logistic or ridge if it cannot be built from its settings."""
    params = get_head_params(model, with_chosen=model.head_name != "logistic")  # which selects its strength again
    try:
        heads.build(model.head_name, model.task, params={k: v for k, v in params.items() if k != "class_weight"})
    except ConfigError:
        return ("ridge" if model.task == "regression" else "logistic"), {}
    return model.head_name, params
