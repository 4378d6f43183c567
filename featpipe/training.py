"""Cache + head → model; with an honest estimate of its quality from rows that it was not fitted on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import heads, split
from featpipe.cache import SPLITS, FeatureCache
from featpipe.errors import CacheError, ConfigError
from featpipe.model import KEPT_DIGEST_BYTES, Model
from featpipe.names import unknown
from featpipe.progress import Progress, Tell, quiet
from featpipe.scores import Scores, score

__all__ = ["Rows", "train", "training_rows"]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a cache that a head is fitted on.

    Attributes
    ----------
    rows : ndarray of shape (m,), int64
        Row numbers, ascending.
    X : ndarray of shape (m, d), float32
    y : ndarray
        Class numbers of shape (m,) that count the classes of these rows alone, targets, or a 0/1 matrix.
    classes : tuple of str
    digests : ndarray of shape (m, 32), uint8
    """

    rows: NDArray[np.int64]
    X: NDArray[np.float32]
    y: NDArray[Any]
    classes: tuple[str, ...]
    digests: NDArray[np.uint8]


def training_rows(cache: FeatureCache, output: str | None = None) -> Rows:
    """The labelled, readable rows; those marked ``train``, if the labels came with a split.

    Raises
    ------
    CacheError
        If the cache has no labels, or no row is left to train on.
    ConfigError
        If only one class is left, or the output is a feature map.
    """
    if cache.task == "none":
        raise CacheError(
            f"{cache.path}: has no labels; extract again with --labels TABLE or one folder for each class "
            "(nothing is embedded again)"
        )
    rows = cache.usable
    if cache.split.any():
        rows = rows[cache.split[rows] == SPLITS.index("train")]
    if not len(rows):
        raise CacheError(f"{cache.path}: no row is labelled, readable and marked for training")
    features = cache.features(output)
    if features.ndim != 2:
        raise ConfigError(
            f"{cache.path}: output {output or cache.outputs[0]!r} holds feature maps of shape {features.shape[1:]}; "
            "heads train on pooled outputs: extract with NODE:avg"
        )
    labels = cache.label_table.take(rows)
    y, classes = labels.values, cache.classes
    if cache.task == "classification":
        present, y = np.unique(y, return_inverse=True)
        classes = tuple(classes[code] for code in present)
        if len(classes) < 2:
            raise ConfigError(f"{cache.path}: all training rows are of class {classes[0]!r}; a head needs two classes")
    elif cache.task == "regression":
        y = labels.y
    return Rows(rows, np.asarray(features[rows], np.float32), y, classes, cache.digests[rows])


def train(
    cache: FeatureCache,
    head: str = "logistic",
    *,
    cv: int | None = None,
    params: Mapping[str, object] | None = None,
    output: str | None = None,
    random_state: int | None = 0,
    progress: Tell = quiet,
) -> Model:
    """Fit a head on the embeddings of a cache.

    Parameters
    ----------
    cache : FeatureCache
    head : str
        A name that ``featpipe heads`` lists.
    cv : int, optional
        Estimate the quality by so many folds of the training rows before fitting on all of them. Images with the same
        bytes never lie on both sides of a fold.
    params : mapping, optional
        Settings of the head, such as ``{"C": 10}``.
    output : str, optional
        Which of the cache's outputs; the first if not given.
    random_state : int or None
    progress : callable

    Returns
    -------
    Model
        ``model.scores`` holds the estimate, ``model.history`` what it was trained on and how long that took.

    Raises
    ------
    ConfigError
        If head or setting is unknown, or a class has fewer images than there are folds.
    CacheError
        If the cache has no labels.

    Examples
    --------
    >>> model = train(FeatureCache("cache/photos.h5"), head="mlp", cv=5)        # doctest: +SKIP
    """
    if output is not None and output not in cache.outputs:
        raise unknown("output", output, cache.outputs)
    rows = training_rows(cache, output)

    settings = _by_code(params or {}, rows.classes) if cache.task == "classification" else params

    def build() -> Any:
        return heads.build(head, cache.task, params=settings, random_state=random_state)

    estimator, where = build(), f"{cache.path}: head {head!r}"
    scores: dict[str, Any] = {}
    if cv:
        estimate = _cross_validate(build, rows, cache.task, cv, progress, where)
        how = f"{cv}-fold cross-validation on the {len(rows.X)} training images"
        scores["cross_validation"] = {"how": how, "folds": cv, **estimate.to_dict()}
    started = perf_counter()
    progress(Progress("note", f"fitting {head} on {len(rows.X)} images"))
    _fit(estimator, rows.X, rows.y, where)
    seconds = perf_counter() - started
    return Model(
        head=estimator,
        head_name=head,
        task=cache.task,
        classes=rows.classes,
        output=output or cache.outputs[0],
        facts=cache.facts,
        request=dict(cache.manifest["backbone"]),
        trained_on=np.unique(rows.digests[:, :KEPT_DIGEST_BYTES], axis=0),
        scores=scores,
        history=_history(cache, rows, params, random_state, seconds),
    )


def _by_code(params: Mapping[str, object], classes: tuple[str, ...]) -> dict[str, object]:
    """The settings for a head that is fitted on class numbers: weights of classes are given by name."""
    translated = dict(params)
    weights = params.get("class_weight")
    if isinstance(weights, Mapping):
        strange = [name for name in weights if name not in classes]
        if strange:
            raise unknown("class", str(strange[0]), classes, "(in class_weight)")
        translated["class_weight"] = {classes.index(name): weight for name, weight in weights.items()}
    return translated


def _fit(estimator: Any, X: NDArray[np.float32], y: NDArray[Any], where: str) -> Any:
    try:
        return estimator.fit(X, y)
    except ConfigError:
        raise
    except ValueError as error:  # how estimators refuse data, in scikit-learn's world
        raise ConfigError(f"{where} cannot be fitted: {' '.join(str(error).split())}") from error


def _cross_validate(build: Callable[[], Any], rows: Rows, task: str, k: int, progress: Tell, where: str) -> Scores:
    """Scores of predictions for each row by a head that was fitted on the other folds."""
    predicted: NDArray[Any] | None = None
    stratify = rows.y if task == "classification" else None
    names = rows.classes if task == "classification" else None
    folds = split.folds(rows.digests, stratify, k=k, names=names)
    for number, (fit, held) in enumerate(folds, 1):
        estimator = _fit(build(), rows.X[fit], rows.y[fit], where)
        X = rows.X[held]
        values = estimator.predict(X) if task == "regression" else estimator.predict_proba(X)
        if task == "classification" and values.shape[1] < len(rows.classes):
            full = np.zeros((len(X), len(rows.classes)))
            full[:, estimator.classes_] = values
            values = full
        if predicted is None:
            predicted = np.zeros((len(rows.X), *values.shape[1:]))
        predicted[held] = values
        progress(Progress("bar", "cross-validating", number, k, "folds"))
    assert predicted is not None
    truth = np.array(rows.classes, dtype=object)[rows.y] if task == "classification" else rows.y
    return score(task, truth, predicted, rows.classes)


def _history(
    cache: FeatureCache, rows: Rows, params: Mapping[str, object] | None, random_state: int | None, seconds: float
) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "trained_on": {
            "cache": cache.path.name,
            "fingerprint": cache.fingerprint,
            "rows": len(rows.X),
            "of": len(cache),
            "split": "given" if cache.split.any() else "all labelled rows",
            "bad": cache.bad_rows(),
        },
        "params": {name: _plain(value) for name, value in (params or {}).items()},
        "random_state": random_state,
        "seconds_to_fit": round(seconds, 3),
        "versions": {name: version(name) for name in ("featpipe", "scikit-learn", "numpy")},
    }


def _plain(value: object) -> object:
    """A setting as JSON can hold it; by its own words what JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return " ".join(repr(value).split())
