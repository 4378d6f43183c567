"""Score models on images on which none of them was trained."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import FeatureCache
from featpipe.diagnostics import NEAR_DUPLICATE_COSINE, LabeledPredictions
from featpipe.errors import ConfigError
from featpipe.evaluation.dataset import align_to_model, find_training_reference, select_scored_rows
from featpipe.evaluation.result import BaselineModel, Evaluation
from featpipe.evaluation.uncertainty import compute_coverage
from featpipe.metrics import compare_paired, score
from featpipe.model import Model
from featpipe.runtime import ProgressCallback, ignore_progress
from featpipe.training import EmbeddingDataset, as_list, open_caches

logger = logging.getLogger(__name__)


def evaluate(
    model: Model,
    data: FeatureCache | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    against: Sequence[Model] = (),
    labels: Any = None,
    trained_on: FeatureCache | str | os.PathLike[str] | None = None,
    without: str | os.PathLike[str] | None = None,
    near: float = NEAR_DUPLICATE_COSINE,
    cache: str | os.PathLike[str] = "cache",
    progress: ProgressCallback = ignore_progress,
) -> Evaluation:
    """Score a model.

    Rows on which the model was trained, matched by the digests of their images, are left out. If the labels came with
    a split, only its test rows are scored.

    Parameters
    ----------
    model : Model
    data : FeatureCache, path of one, or one or several archives
        Archives are embedded first, using the caches in `cache`.
    against : sequence of Model
        Models to compare with on the same rows, which exclude the training rows of every model.
    labels : path-like or LabelTable, optional
        Labels of the archives.
    trained_on : FeatureCache or path of one, optional
        The cache on which the model was trained; near duplicates, outliers and the learning curve need it. If not
        given, it is searched for next to the data, in `cache` and next to the model.
    without : path-like, optional
        A table of samples to leave out, such as one written from the findings.
    near : float
        Cosine similarity, relative to the mean of the training embeddings, from which two images count as near
        duplicates.
    cache : path-like
        Folder of caches.
    progress : callable

    Raises
    ------
    CacheMismatchError
        If the cache holds embeddings of another backbone, transform, output or precision than the model's.
    CacheError
        If no row is left to score.
    ConfigError
        If the labels are for another task than the model's, or have classes that it does not know.
    """
    if not 0 < near <= 1:
        raise ConfigError(f"near is {near}; give a cosine above 0, at most 1")
    models = [model, *against]
    caches = [_open_cache(compared_model, data, labels, cache, progress) for compared_model in models]
    for compared_model, model_cache in zip(models, caches, strict=True):
        _check_cache(compared_model, model_cache)
    _check_same_samples(caches)
    first_cache = caches[0]
    dataset, left_out = select_scored_rows(models, first_cache, without)
    rows = dataset.rows
    if left_out:
        text = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        logger.info(f"{len(rows)} rows are scored; left out: {text}")
    dataset = align_to_model(model, dataset).to_memory()
    X, truth = dataset.features, dataset.labels
    predicted = _predict(model, X)
    predictions = LabeledPredictions(model.task, list(dataset.ids), dataset.y, predicted, model.classes)
    names = _make_display_names(models)[1:]
    return Evaluation(
        scores=score(model.task, truth, predicted, model.classes),
        cache=first_cache,
        rows=rows,
        predicted=predicted,
        left_out=left_out,
        model=model,
        truth=truth,
        features=X,
        judged=predictions,
        novelty=None if model.trust.novelty is None else model.novelty_features(X),
        coverage=compute_coverage(model.trust.conformal, predictions),
        rivals=tuple(
            _score_baseline(model, truth, predicted, name, baseline, baseline_cache, rows)
            for name, baseline, baseline_cache in zip(names, against, caches[1:], strict=True)
        ),
        reference=find_training_reference(model, first_cache, trained_on, Path(cache)),
        near=near,
    )


def _open_cache(
    model: Model, data: Any, labels: Any, cache: str | os.PathLike[str], progress: ProgressCallback
) -> FeatureCache:
    if isinstance(data, FeatureCache):
        return data
    items = as_list(data)
    if not items:
        raise ConfigError("there is nothing to evaluate on: give a cache, or archives")
    caches = open_caches(model, items, labels, cache, progress)
    if len(caches) > 1:
        raise ConfigError(f"{len(caches)} caches were given; give one cache, or archives")
    return caches[0]


def _check_cache(model: Model, cache: FeatureCache) -> None:
    """Refuse a cache whose embeddings or task differ from the model's."""
    model.check_cache(cache)
    if cache.task != model.task:
        label_kind = "no labels" if cache.task == "none" else f"labels for {cache.task}"
        raise ConfigError(
            f"{cache.path}: has {label_kind}, the model is for {model.task}; give matching labels with --labels"
        )


def _check_same_samples(caches: Sequence[FeatureCache]) -> None:
    first_cache = caches[0]
    for other_cache in caches[1:]:
        if other_cache is not first_cache and (
            other_cache.ids != first_cache.ids or not np.array_equal(other_cache.digests, first_cache.digests)
        ):
            raise ConfigError(
                f"{other_cache.path}: has other samples than {first_cache.path}; models are compared on the same "
                "images: give archives"
            )


def _make_display_names(models: Sequence[Model]) -> list[str]:
    """Name each model by its head; by its file if two heads are equal; and with a number if files are equal too."""
    head_names = [model.head_name for model in models]
    if len(set(head_names)) == len(head_names):
        return head_names
    file_names = [model.path.name if model.path else model.head_name for model in models]
    if len(set(file_names)) == len(file_names):
        return file_names
    return [f"{i + 1}: {name}" for i, name in enumerate(file_names)]


def _predict(model: Model, X: NDArray[np.float32]) -> NDArray[np.float64]:
    return model.predict_features(X) if model.task == "regression" else model.predict_proba_features(X)


def _score_baseline(
    model: Model,
    truth: NDArray[Any],
    predicted: NDArray[np.float64],
    name: str,
    baseline: Model,
    baseline_cache: FeatureCache,
    rows: NDArray[np.int64],
) -> BaselineModel:
    """Score another model on its own classes, and compare the two on the classes of both."""
    dataset = EmbeddingDataset.from_cache(baseline_cache, rows=rows, output=baseline.output)
    dataset = align_to_model(baseline, dataset)
    baseline_predicted = _predict(baseline, dataset.features)
    scores = score(baseline.task, dataset.labels, baseline_predicted, baseline.classes)
    if model.task == "regression":
        names: tuple[str, ...] = model.classes
        if set(names) != set(baseline.classes):
            raise ConfigError(f"{name} predicts other targets than the first model; compare models of the same targets")
        columns = [baseline.classes.index(target) for target in names]
        baseline_predicted = np.reshape(baseline_predicted, (len(rows), -1))[:, columns]
    else:
        names = tuple(dict.fromkeys([*model.classes, *baseline.classes]))
        predicted = _reorder_columns(predicted, model.classes, names)
        baseline_predicted = _reorder_columns(baseline_predicted, baseline.classes, names)
        truth = _reorder_columns(truth, model.classes, names) if model.task == "multilabel" else truth
    return BaselineModel(
        name, baseline, scores, compare_paired(model.task, truth, predicted, baseline_predicted, names)
    )


def _reorder_columns(values: NDArray[Any], source_names: Sequence[str], target_names: Sequence[str]) -> NDArray[Any]:
    """Bring columns into another order; columns of classes unknown to the model are zero."""
    reordered = np.zeros((len(values), len(target_names)), values.dtype)
    reordered[:, [target_names.index(name) for name in source_names]] = values
    return reordered
