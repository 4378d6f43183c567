"""The verb: score models on images that none of them was trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import FeatureCache
from featpipe.errors import ConfigError
from featpipe.evaluation.reference import reference_of
from featpipe.evaluation.result import Evaluation, Rival
from featpipe.evaluation.rows import rows_to_score, truth_of
from featpipe.findings import NEAR
from featpipe.grouping import rows_named
from featpipe.model import Model
from featpipe.progress import Progress, Tell, quiet
from featpipe.scores import paired, score

__all__ = ["evaluate"]


def evaluate(
    model: Model,
    data: FeatureCache | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    against: Sequence[Model] = (),
    labels: Any = None,
    trained_on: FeatureCache | str | os.PathLike[str] | None = None,
    without: str | os.PathLike[str] | None = None,
    near: float = NEAR,
    cache: str | os.PathLike[str] = "cache",
    progress: Tell = quiet,
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
    caches = [_open(one, data, labels, cache, progress) for one in models]
    for one, held in zip(models, caches, strict=True):
        _check(one, held)
    _refuse_other_samples(caches)
    opened = caches[0]
    unwanted = rows_named(opened, without) if without is not None else np.zeros(0, np.int64)
    rows, left_out = rows_to_score(models, opened, unwanted)
    if left_out:
        text = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        progress(Progress("note", f"{len(rows)} rows are scored; left out: {text}"))
    X = np.asarray(opened.features(model.output)[rows], np.float32)
    predicted = _answers(model, X)
    scores = score(model.task, truth_of(model, opened, rows), predicted, model.classes)
    rivals = [
        _rival(model, predicted, other, held, rows, name)
        for other, held, name in zip(against, caches[1:], _names(models)[1:], strict=True)
    ]
    reference = reference_of(model, opened, trained_on, Path(cache))
    return Evaluation(scores, opened, rows, predicted, left_out, model, tuple(rivals), reference, near)


def _answers(model: Model, X: NDArray[np.float32]) -> NDArray[np.float64]:
    return model.predict_features(X) if model.task == "regression" else model.predict_proba_features(X)


def _check(model: Model, cache: FeatureCache) -> None:
    """Refuse a cache that this model cannot be judged by."""
    model.check_cache(cache)
    if cache.task != model.task:
        found = "no labels" if cache.task == "none" else f"labels for {cache.task}"
        raise ConfigError(f"{cache.path}: has {found}, the model does {model.task}; give fitting labels with --labels")


def _refuse_other_samples(caches: Sequence[FeatureCache]) -> None:
    first = caches[0]
    for other in caches[1:]:
        if other is not first and (other.ids != first.ids or not np.array_equal(other.digests, first.digests)):
            raise ConfigError(
                f"{other.path} holds other samples than {first.path}; models are compared on the same images: "
                "give archives"
            )


def _names(models: Sequence[Model]) -> list[str]:
    """What to call each model: its head, or its file where heads are alike, or a number where those are alike too."""
    heads = [model.head_name for model in models]
    files = [model.path.name if model.path else head for model, head in zip(models, heads, strict=True)]
    if len(set(heads)) == len(heads):
        return heads
    return files if len(set(files)) == len(files) else [f"{i + 1}: {name}" for i, name in enumerate(files)]


def _rival(
    model: Model,
    predicted: NDArray[np.float64],
    other: Model,
    cache: FeatureCache,
    rows: NDArray[np.int64],
    name: str,
) -> Rival:
    theirs = _answers(other, np.asarray(cache.features(other.output)[rows], np.float32))
    scores = score(other.task, truth_of(other, cache, rows), theirs, other.classes)
    if model.task == "regression":
        names: tuple[str, ...] = model.classes
        if set(names) != set(other.classes):
            raise ConfigError(f"{name} predicts other targets than the first model; compare models of the same targets")
        theirs = np.reshape(theirs, (len(rows), -1))[:, [other.classes.index(target) for target in names]]
        y, ours = truth_of(model, cache, rows), predicted
    else:
        names = tuple(dict.fromkeys([*model.classes, *other.classes]))
        ours, theirs = _in_columns(predicted, model.classes, names), _in_columns(theirs, other.classes, names)
        y = truth_of(model, cache, rows)
        y = _in_columns(y, model.classes, names) if model.task == "multilabel" else y
    return Rival(name, other, scores, paired(model.task, y, ours, theirs, names))


def _in_columns(values: NDArray[Any], has: Sequence[str], wanted: Sequence[str]) -> NDArray[Any]:
    """Columns in another order; nothing, of a class that a model does not know."""
    full = np.zeros((len(values), len(wanted)), values.dtype)
    full[:, [wanted.index(name) for name in has]] = values
    return full


def _open(model: Model, data: Any, labels: Any, cache: str | os.PathLike[str], progress: Tell) -> FeatureCache:
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
