"""The verb: score models on images that none of them was trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import FeatureCache
from featpipe.diagnostics import NEAR_DUPLICATE_COSINE
from featpipe.errors import ConfigError
from featpipe.evaluation.dataset import find_training_reference, load_true_labels, select_rows_to_score
from featpipe.evaluation.result import BaselineModel, Evaluation
from featpipe.metrics import compare_paired, score
from featpipe.model import Model
from featpipe.runtime import Progress, ProgressCallback, report_warnings_only
from featpipe.splits import find_listed_rows

__all__ = ["evaluate"]


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
    progress: ProgressCallback = report_warnings_only,
) -> Evaluation:
    """Score a model.

    Rows that the model was trained on, known by their images' bytes, are left out. If the labels came with a split,
    only its test rows are scored.

    Parameters
    ----------
    model : Model
    data : FeatureCache, or path of one, or archives
        Archives are embedded first, through the caches in ``cache``.
    against : sequence of Model
        Others to compare it with on the same rows: those that none of them was trained on.
    labels : path-like or Table, optional
        Labels of the archives.
    trained_on : FeatureCache or path of one, optional
        The cache that the model was trained on, for near-duplicates, outliers and the learning curve. Looked for beside
        the model, beside the data and in ``cache`` if not given.
    without : path-like, optional
        A table of samples to leave out, such as one of the findings.
    near : float
        The cosine, seen from the mean of the training embeddings, from which two images are near-duplicates.
    cache : path-like
    progress : callable

    Raises
    ------
    CacheMismatchError
        If the cache holds other embeddings than the model was trained on.
    CacheError
        If no row is left to score.
    ConfigError
        If the labels are of another kind than the model's, or of classes that it does not know.
    """
    if not 0 < near <= 1:
        raise ConfigError(f"near is {near}; it is a cosine, from above 0 to 1")
    models = [model, *against]
    caches = [_open_cache(evaluated_model, data, labels, cache, progress) for evaluated_model in models]
    for evaluated_model, model_cache in zip(models, caches, strict=True):
        _check_cache(evaluated_model, model_cache)
    _check_same_samples(caches)
    first_cache = caches[0]
    excluded_rows = find_listed_rows(first_cache, without) if without is not None else np.zeros(0, np.int64)
    rows, left_out = select_rows_to_score(models, first_cache, excluded_rows)
    if left_out:
        text = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        progress(Progress("note", f"{len(rows)} rows are scored; left out: {text}"))
    X = np.asarray(first_cache.features(model.output)[rows], np.float32)
    predicted = _predict(model, X)
    scores = score(model.task, load_true_labels(model, first_cache, rows), predicted, model.classes)
    baselines = [
        _score_baseline(model, predicted, baseline_model, baseline_cache, rows, name)
        for baseline_model, baseline_cache, name in zip(
            against, caches[1:], _make_display_names(models)[1:], strict=True
        )
    ]
    reference = find_training_reference(model, first_cache, trained_on, Path(cache))
    return Evaluation(scores, first_cache, rows, predicted, left_out, model, tuple(baselines), reference, near)


def _predict(model: Model, X: NDArray[np.float32]) -> NDArray[np.float64]:
    return model.predict_features(X) if model.task == "regression" else model.predict_proba_features(X)


def _check_cache(model: Model, cache: FeatureCache) -> None:
    """Refuse a cache that this model cannot be judged by."""
    model.check_cache(cache)
    if cache.task != model.task:
        label_kind = "no labels" if cache.task == "none" else f"labels for {cache.task}"
        raise ConfigError(
            f"{cache.path}: has {label_kind}, the model does {model.task}; give fitting labels with --labels"
        )


def _check_same_samples(caches: Sequence[FeatureCache]) -> None:
    first_cache = caches[0]
    for other_cache in caches[1:]:
        if other_cache is not first_cache and (
            other_cache.ids != first_cache.ids or not np.array_equal(other_cache.digests, first_cache.digests)
        ):
            raise ConfigError(
                f"{other_cache.path} holds other samples than {first_cache.path}; models are compared on the same images: "
                "give archives"
            )


def _make_display_names(models: Sequence[Model]) -> list[str]:
    """What to call each model: its head, or its file where heads are alike, or a number where those are alike too."""
    head_names = [model.head_name for model in models]
    file_names = [model.path.name if model.path else head for model, head in zip(models, head_names, strict=True)]
    if len(set(head_names)) == len(head_names):
        return head_names
    return (
        file_names
        if len(set(file_names)) == len(file_names)
        else [f"{i + 1}: {name}" for i, name in enumerate(file_names)]
    )


def _score_baseline(
    model: Model,
    predicted: NDArray[np.float64],
    baseline_model: Model,
    cache: FeatureCache,
    rows: NDArray[np.int64],
    name: str,
) -> BaselineModel:
    baseline_predicted = _predict(baseline_model, np.asarray(cache.features(baseline_model.output)[rows], np.float32))
    scores = score(
        baseline_model.task, load_true_labels(baseline_model, cache, rows), baseline_predicted, baseline_model.classes
    )
    if model.task == "regression":
        names: tuple[str, ...] = model.classes
        if set(names) != set(baseline_model.classes):
            raise ConfigError(f"{name} predicts other targets than the first model; compare models of the same targets")
        baseline_predicted = np.reshape(baseline_predicted, (len(rows), -1))[
            :, [baseline_model.classes.index(target) for target in names]
        ]
        y, model_predicted = load_true_labels(model, cache, rows), predicted
    else:
        names = tuple(dict.fromkeys([*model.classes, *baseline_model.classes]))
        model_predicted, baseline_predicted = (
            _reorder_columns(predicted, model.classes, names),
            _reorder_columns(baseline_predicted, baseline_model.classes, names),
        )
        y = load_true_labels(model, cache, rows)
        y = _reorder_columns(y, model.classes, names) if model.task == "multilabel" else y
    return BaselineModel(
        name, baseline_model, scores, compare_paired(model.task, y, model_predicted, baseline_predicted, names)
    )


def _reorder_columns(values: NDArray[Any], source_names: Sequence[str], target_names: Sequence[str]) -> NDArray[Any]:
    """Columns in another order; nothing, of a class that a model does not know."""
    reordered = np.zeros((len(values), len(target_names)), values.dtype)
    reordered[:, [target_names.index(name) for name in source_names]] = values
    return reordered


def _open_cache(
    model: Model, data: Any, labels: Any, cache: str | os.PathLike[str], progress: ProgressCallback
) -> FeatureCache:
    if isinstance(data, FeatureCache):
        return data
    paths = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    if not paths:
        raise ConfigError("there is nothing to evaluate on: give a cache, or archives")
    suffixes = {Path(path).suffix for path in paths}
    if suffixes <= {".h5", ".hdf5"}:
        if len(paths) > 1:
            raise ConfigError(f"{len(paths)} caches; evaluate takes one, or archives")
        if labels is not None:
            raise ConfigError("--labels goes with archives; a cache has labels of its own: extract again with --labels")
        return FeatureCache(paths[0])
    from featpipe.extraction import extract

    return extract(paths, labels=labels, cache=cache, progress=progress, **model.extraction())
