"""Select the rows on which a model may be scored, align their labels, and find the model's training rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featpipe.cache import FeatureCache
from featpipe.data import read_column_names
from featpipe.diagnostics import PREDICTION_COLUMNS
from featpipe.errors import CacheError, ConfigError, FeatpipeError
from featpipe.model import Model
from featpipe.training import EmbeddingDataset


def select_scored_rows(
    models: Sequence[Model], cache: FeatureCache, without: str | os.PathLike[str] | None = None
) -> tuple[EmbeddingDataset, dict[str, int]]:
    """Select the rows to score, and count those left out by reason.

    Parameters
    ----------
    models : sequence of Model
        A row on which any of them was trained is excluded for all.
    cache : FeatureCache
        Of the first model.
    without : path-like, optional
        A table of samples that the user excludes; not one that was selected by predictions on them.

    Returns
    -------
    dataset : EmbeddingDataset
    left_out : dict of str to int
        Rows left out, by reason.

    Raises
    ------
    CacheError
        If no row is left.
    ConfigError
        If the table was selected by predictions: scores without mistakes are not scores.
    """
    if without is not None:
        _reject_prediction_table(Path(without))
    labeled = EmbeddingDataset.from_cache(cache, output=models[0].output)
    marked = EmbeddingDataset.from_cache(cache, output=models[0].output, split="test")
    included = marked if without is None else marked.without(without)
    unseen = included
    for model in models:
        unseen = unseen.unseen_by(model)
    counts = {
        **cache.bad_rows(),
        "not in the test split": len(labeled) - len(marked),
        "named by --without": len(marked) - len(included),
        "without a label": int(np.count_nonzero(cache.ok)) - len(labeled),
        "trained on": len(included) - len(unseen),
    }
    left_out = {reason: count for reason, count in counts.items() if count}
    if not len(unseen):
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise CacheError(
            f"{cache.path}: no row is left to score ({reasons}); evaluate on other images, "
            "or read the cross-validated scores that `featpipe info MODEL` shows"
        )
    return unseen, left_out


def _reject_prediction_table(path: Path) -> None:
    columns = [name for name in read_column_names(path) if name.lower() in PREDICTION_COLUMNS]
    if columns:
        raise ConfigError(
            f"{path}: has the column {columns[0]!r}, so its images were selected by predictions on them, and scores "
            "without these images would be too good; correct the labels that are wrong, and evaluate on all images"
        )


def align_to_model(model: Model, dataset: EmbeddingDataset) -> EmbeddingDataset:
    """Encode the labels of rows of one cache in the order of a model's classes, labels or targets.

    Raises
    ------
    ConfigError
        If the cache has labels that the model does not know, or lacks a target that the model predicts.
    """
    path = "" if dataset.cache is None else f"{dataset.cache.path}: "
    if model.task == "regression":
        missing = [name for name in model.classes if name not in dataset.classes]
        if missing:
            raise ConfigError(
                f"{path}has no target {', '.join(map(repr, missing[:3]))}, which the model predicts; "
                f"it has {', '.join(map(repr, dataset.classes[:5]))}: give matching labels with --labels"
            )
    else:
        unknown = [name for name in dataset.list_present_classes() if name not in model.classes]
        if unknown:
            text = ", ".join(map(repr, unknown[:3])) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            raise ConfigError(
                f"{path}has labels that the model does not know: {text}; leave those images out, or train a model that "
                "has them"
            )
    return dataset.aligned_to(model.classes)


def find_training_reference(
    model: Model,
    evaluated_cache: FeatureCache,
    training_cache: FeatureCache | str | os.PathLike[str] | None,
    cache_folder: Path,
) -> EmbeddingDataset | None:
    """Find the rows on which the model was trained, matched by the digests of their images, never by name alone.

    Parameters
    ----------
    model : Model
    evaluated_cache : FeatureCache
    training_cache : FeatureCache or path of one, or None
        The cache on which the model was trained; if None, it is searched for next to the data, in `cache_folder`
        and next to the model.
    cache_folder : Path

    Returns
    -------
    EmbeddingDataset or None
        None if no cache with at least half of the training images was found.

    Raises
    ------
    ConfigError
        If `training_cache` holds none of the training images.
    CacheMismatchError
        If `training_cache` holds embeddings of another backbone, transform, output or precision.
    """
    if training_cache is not None:
        cache = training_cache if isinstance(training_cache, FeatureCache) else FeatureCache(training_cache)
        model.check_cache(cache)
        reference = _select_trained_rows(model, cache)
        if reference is None:
            raise ConfigError(
                f"{cache.path}: the model was trained on none of its images; give the cache on which it was trained"
            )
        return reference
    for cache in _iter_candidate_caches(model, evaluated_cache, cache_folder):
        reference = _select_trained_rows(model, cache)
        if reference is not None and 2 * len(reference) >= len(model.trained_on):
            return reference
    return None


def _iter_candidate_caches(model: Model, evaluated_cache: FeatureCache, cache_folder: Path) -> Iterator[FeatureCache]:
    """The evaluated cache itself, then files named like the cache on which the model was trained."""
    yield evaluated_cache
    name = Path(str(model.history.get("trained_on", {}).get("cache", ""))).name
    folders = [evaluated_cache.path.parent, cache_folder, *([model.path.parent] if model.path is not None else [])]
    for candidate_folder in dict.fromkeys(folders) if name else ():
        path: Any = candidate_folder / name
        if path.is_file() and path != evaluated_cache.path:
            try:
                cache = FeatureCache(path)
                model.check_cache(cache)
            except FeatpipeError:
                continue  # another cache of the same name
            yield cache


def _select_trained_rows(model: Model, cache: FeatureCache) -> EmbeddingDataset | None:
    # marked for training, because a test row may be an exact copy of a training image
    dataset = EmbeddingDataset.from_cache(cache, split="train", output=model.output)
    dataset = dataset.take(model.was_trained_on(dataset.digests))
    return dataset if len(dataset) else None
