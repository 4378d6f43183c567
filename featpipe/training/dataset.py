"""The rows of a cache that a head is fitted on."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featpipe import splits
from featpipe.cache import SPLIT_NAMES, FeatureCache, FeatureView
from featpipe.errors import CacheError, ConfigError
from featpipe.runtime import available_bytes
from featpipe.splits import find_listed_rows, load_groups, load_times, parse_time

__all__ = ["EmbeddingDataset", "check_finite", "load_training_data"]

Split = tuple[NDArray[np.int64], NDArray[np.int64]]

N_FEATURE_COPIES = (
    4  # of the features while a head is fitted: the rows, a fold of them, and float64 copies while it is scaled
)


@dataclass(frozen=True, eq=False)
class EmbeddingDataset:
    """The rows of a cache that a head is fitted on.

    Attributes
    ----------
    rows : ndarray of shape (m,), int64
        Row numbers, ascending.
    X : ndarray of shape (m, d), float32, or View
        A view where they do not fit into memory.
    y : ndarray
        Class numbers of shape (m,) that count the classes of these rows alone, targets, or a 0/1 matrix.
    classes : tuple of str
    digests : ndarray of shape (m, 32), uint8
    groups, times : ndarray of shape (m,), optional
        What keeps rows together, or orders them, when they are split.
    since : number or date, optional
        The earliest time of the rows that all others are judged by.
    """

    rows: NDArray[np.int64]
    X: NDArray[np.float32] | FeatureView
    y: NDArray[Any]
    classes: tuple[str, ...]
    digests: NDArray[np.uint8]
    groups: NDArray[Any] | None = None
    times: NDArray[Any] | None = None
    since: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_streamed(self) -> bool:
        """Whether the features stay in the file."""
        return isinstance(self.X, FeatureView)

    def take(self, indices: NDArray[np.integer[Any]]) -> EmbeddingDataset:
        """Some of the rows, of the same classes; to be split anew."""
        return replace(
            self,
            rows=self.rows[indices],
            X=self.X.take(indices) if isinstance(self.X, FeatureView) else self.X[indices],
            y=self.y[indices],
            digests=self.digests[indices],
            groups=None if self.groups is None else self.groups[indices],
            times=None if self.times is None else self.times[indices],
            since=None,
        )

    def to_memory(self) -> EmbeddingDataset:
        """With the features in memory."""
        return replace(self, X=np.asarray(self.X[:], np.float32)) if isinstance(self.X, FeatureView) else self

    def make_splits(self, task: str, k: int) -> list[Split]:
        """What a score is reported for: k folds, or what is earlier and what is later than ``since``."""
        if self.since is None:
            return self.make_folds(task, k)
        y, names = (self.y, self.classes) if task == "classification" else (None, None)
        constraints = {"groups": self.groups, "times": self.times, "since": self.since}
        return [splits.make_holdout(self.digests, y, names=names, **constraints)]

    def make_folds(self, task: str, k: int, seed: int = 0) -> list[Split]:
        """Rows to fit on and rows to judge by, k times; see :func:`featpipe.splits.splits.folds`."""
        y, names = (self.y, self.classes) if task == "classification" else (None, None)
        return splits.make_folds(self.digests, y, k=k, seed=seed, groups=self.groups, times=self.times, names=names)


def load_training_data(
    cache: FeatureCache,
    output: str | None = None,
    *,
    groups: str | ArrayLike | None = None,
    times: str | ArrayLike | None = None,
    since: Any = None,
    without: str | os.PathLike[str] | None = None,
    memory: int | None = None,
) -> EmbeddingDataset:
    """The labelled, readable rows; those marked ``train``, if the labels came with a split.

    Parameters
    ----------
    cache : FeatureCache
    output : str, optional
        Which of the cache's outputs; the first if not given.
    groups, times : str or array-like of shape (n,), optional
        For each sample of the cache, as :func:`featpipe.splits.splits.folds` takes them; or ``TABLE:COLUMN``.
    since : str, number or date, optional
        With times: the earliest of the rows that the others are judged by.
    without : path-like, optional
        A table of images to leave out.
    memory : int, optional
        Bytes that training may use; what is available now, if not given. Features that need more stay in the file.

    Raises
    ------
    CacheError
        If the cache has no labels, or no row is left to train on.
    ConfigError
        If only one class is left, the output is a feature map, rows that are ok hold NaN or infinity, or groups are on
        both sides of a split that came with the labels.
    """
    if cache.task == "none":
        raise CacheError(
            f"{cache.path}: has no labels; extract again with --labels TABLE or one folder for each class "
            "(nothing is embedded again)"
        )
    rows = cache.usable
    if cache.split.any():
        rows = _select_training_rows(cache, rows, groups)
    if without is not None:
        rows = rows[~np.isin(rows, find_listed_rows(cache, without))]
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
        present_codes, y = np.unique(y, return_inverse=True)
        classes = tuple(classes[code] for code in present_codes)
        if len(classes) < 2:
            raise ConfigError(f"{cache.path}: all training rows are of class {classes[0]!r}; a head needs two classes")
    elif cache.task == "regression":
        y = labels.y
    needed_bytes = N_FEATURE_COPIES * len(rows) * features.shape[1] * 4
    is_streamed = needed_bytes > (available_bytes() if memory is None else memory)
    X = cache.view(rows, output) if is_streamed else np.asarray(features[rows], np.float32)
    if not is_streamed:  # others are looked at in the first pass that the head takes
        check_finite(cache, rows, X)
    sample_times = (
        load_times(cache, times, rows) if isinstance(times, str) else _select_sample_values(cache, times, rows)
    )
    if since is not None and sample_times is None:
        raise ConfigError(f"since={since} cuts by time, and nothing says when images were made; give times too")
    since_time = parse_time(since, sample_times) if isinstance(since, str) and sample_times is not None else since
    digests = cache.digests if len(rows) == len(cache) else cache.digests[rows]
    return EmbeddingDataset(rows, X, y, classes, digests, _load_groups(cache, groups, rows), sample_times, since_time)


def _select_training_rows(
    cache: FeatureCache, rows: NDArray[np.int64], groups: str | ArrayLike | None
) -> NDArray[np.int64]:
    """Those rows, of a split that keeps each group on one side.

    A copy, byte by byte, of a training image that is marked for the test is left out by what evaluates.
    """
    split_codes = cache.split[rows]
    is_train = split_codes == SPLIT_NAMES.index("train")
    is_held_out = (split_codes == SPLIT_NAMES.index("validation")) | (split_codes == SPLIT_NAMES.index("test"))
    if groups is not None and is_train.any() and is_held_out.any():
        is_marked = is_train | is_held_out
        marked_groups = _load_groups(cache, groups, rows[is_marked])
        splits.apply_predefined_split(
            cache.digests[rows[is_marked]], is_train[is_marked], is_held_out[is_marked], groups=marked_groups
        )
    return rows[is_train]


def _load_groups(cache: FeatureCache, groups: str | ArrayLike | None, rows: NDArray[np.int64]) -> NDArray[Any] | None:
    return load_groups(cache, groups, rows) if isinstance(groups, str) else _select_sample_values(cache, groups, rows)


def _select_sample_values(
    cache: FeatureCache, values: ArrayLike | None, rows: NDArray[np.int64]
) -> NDArray[Any] | None:
    if values is None:
        return None
    array = np.asarray(values)
    if array.shape != (len(cache),):
        raise ConfigError(f"groups or times of shape {array.shape} for {len(cache)} samples; give one for each sample")
    return np.asarray(array[rows])


def check_finite(cache: FeatureCache, rows: NDArray[np.int64], X: NDArray[np.float32] | FeatureView) -> None:
    """Rows that are ok and hold NaN: a stranger's cache, or a damaged one."""
    block_rows = max(1, 2**22 // max(1, X.shape[1]))
    bad_rows: list[int] = []
    for start in range(0, len(rows), block_rows):
        bad_rows += (rows[start : start + block_rows][~np.isfinite(X[start : start + block_rows]).all(axis=1)]).tolist()
        if len(bad_rows) > 3:
            break
    if bad_rows:
        names = ", ".join(cache.ids[row] for row in bad_rows[:3])
        raise ConfigError(
            f"{cache.path}: rows that are ok hold NaN or infinity ({names}{' and more' * (len(bad_rows) > 3)}); "
            "`featpipe verify --repair` computes them again"
        )
