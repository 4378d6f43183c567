"""Model + rows → scores with their uncertainty, on images that the model was not trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import SPLITS, FeatureCache
from featpipe.errors import CacheError, ConfigError
from featpipe.model import Model
from featpipe.progress import Progress, Tell, quiet
from featpipe.scores import Scores, score

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model says of some rows of a cache, and how right it is.

    Attributes
    ----------
    scores : Scores
    cache : FeatureCache
    rows : ndarray of shape (m,), int64
        The rows that were scored, ascending.
    predicted : ndarray of shape (m, k) or (m,) or (m, t)
        Probabilities in the order of the model's classes, or numbers.
    left_out : dict
        How many rows were not scored, by reason.
    """

    scores: Scores
    cache: FeatureCache
    rows: NDArray[np.int64]
    predicted: NDArray[np.float64]
    left_out: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: ``cache``, ``rows``, ``left_out`` and the scores."""
        return {
            "cache": str(self.cache.path),
            "rows": len(self.rows),
            "left_out": self.left_out,
            **self.scores.to_dict(),
        }

    def table(self) -> str:
        """The scores for the terminal, and what they do not cover."""
        left = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return self.scores.table() + (f"\n\nleft out: {left}" if left else "")


def evaluate(
    model: Model,
    data: FeatureCache | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    labels: Any = None,
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
    labels : path-like or Table, optional
        Labels of the archives.
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
    opened = _open(model, data, labels, cache, progress)
    model.check_cache(opened)
    if opened.task != model.task:
        found = "no labels" if opened.task == "none" else f"labels for {opened.task}"
        raise ConfigError(f"{opened.path}: has {found}, the model does {model.task}; give fitting labels with --labels")
    rows, left_out = _rows(model, opened)
    if left_out:
        text = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        progress(Progress("note", f"{len(rows)} rows are scored; left out: {text}"))
    X = np.asarray(opened.features(model.output)[rows], np.float32)
    predicted = model.predict_features(X) if model.task == "regression" else model.predict_proba_features(X)
    scores = score(model.task, _truth(model, opened, rows), predicted, model.classes)
    return Evaluation(scores, opened, rows, predicted, left_out)


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

    return extract(
        paths,
        backbone=model.backbone,
        labels=labels,
        device=model.device,
        precision=model.facts["precision"],
        storage=model.facts["storage"],
        cache=cache,
        progress=progress,
    )


def _rows(model: Model, cache: FeatureCache) -> tuple[NDArray[np.int64], dict[str, int]]:
    """The rows to score, and how many are left out for which reason."""
    rows = cache.usable
    left_out = dict(cache.bad_rows())
    unlabelled = int(np.count_nonzero(cache.ok)) - len(rows)
    if cache.split.any():
        test = cache.split[rows] == SPLITS.index("test")
        left_out["not in the test split"] = int(np.count_nonzero(~test))
        rows = rows[test]
    seen = model.was_trained_on(cache.digests[rows])
    left_out |= {"without a label": unlabelled, "trained on": int(np.count_nonzero(seen))}
    rows = rows[~seen]
    left_out = {reason: count for reason, count in left_out.items() if count}
    if not len(rows):
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise CacheError(
            f"{cache.path}: no row is left to score ({reasons}); evaluate on other images, "
            "or read the cross-validated scores that `featpipe info MODEL` shows"
        )
    return rows.astype(np.int64), left_out


def _truth(model: Model, cache: FeatureCache, rows: NDArray[np.int64]) -> NDArray[Any]:
    """The labels of the rows in the model's terms: class names, or columns in the order of its labels or targets."""
    labels = cache.label_table.take(rows)
    if model.task == "classification":
        _refuse_strange(model, cache, [cache.classes[code] for code in np.unique(labels.values)])
        return labels.y
    if model.task == "multilabel":
        _refuse_strange(model, cache, [cache.classes[column] for column in np.flatnonzero(labels.values.any(axis=0))])
        column = {name: i for i, name in enumerate(cache.classes)}
        absent = np.zeros(len(rows), np.int8)
        return np.column_stack([labels.values[:, column[name]] if name in column else absent for name in model.classes])
    missing = [name for name in model.classes if name not in cache.classes]
    if missing:
        raise ConfigError(
            f"{cache.path}: has no target {', '.join(map(repr, missing[:3]))}, which the model predicts; "
            f"it has {', '.join(map(repr, cache.classes[:5]))}: give fitting labels with --labels"
        )
    y = labels.values[:, [cache.classes.index(name) for name in model.classes]]
    return y[:, 0] if len(model.classes) == 1 else y


def _refuse_strange(model: Model, cache: FeatureCache, found: Sequence[str]) -> None:
    strange = [name for name in found if name not in model.classes]
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise ConfigError(
            f"{cache.path}: has labels that the model does not know: {', '.join(map(repr, strange[:3]))}{more}; "
            "leave those images out, or train a model that has them"
        )
