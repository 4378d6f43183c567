"""Labelled embeddings of a cache, selected, encoded and split for training and evaluation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featpipe import splits
from featpipe.cache import SPLIT_NAMES, FeatureCache, FeatureView
from featpipe.errors import CacheError, ConfigError
from featpipe.model import Model
from featpipe.runtime import available_bytes
from featpipe.splits import SplitSeed, find_listed_rows, load_groups, load_times, parse_time
from featpipe.storage import compute_fingerprint, digest_arrays

Split = tuple[NDArray[np.int64], NDArray[np.int64]]

N_FEATURE_COPIES = 4  # in memory during a fit: all rows, a fold of them, and two float64 copies during scaling
KEY_BLOCK_ROWS = 1 << 18
CHECK_BLOCK_VALUES = 1 << 22
MAX_LISTED_ROWS = 3


@dataclass(frozen=True, eq=False)
class EmbeddingDataset:
    """Labelled embeddings in one vocabulary of classes.

    Every method returns a new dataset; features stay in the cache's file until :meth:`to_memory`.

    Attributes
    ----------
    rows : ndarray of shape (m,), int64
        Row numbers in the cache.
    X : ndarray of shape (m, d), float32, or FeatureView
        A view reads the cache's file when it is sliced.
    y : ndarray
        Classification: class codes of shape (m,). Regression: targets of shape (m,) or (m, t). Multilabel: a 0/1
        matrix of shape (m, k).
    classes : tuple of str
        Names of the class codes or columns of `y`; for a regression, of its targets.
    digests : ndarray of shape (m, 32), uint8
        SHA-256 of each sample's bytes.
    groups, times : ndarray of shape (m,), optional
        Rows of a group stay together when rows are split; with times, later rows test what earlier rows train.
    since : number or date, optional
        The earliest time of the rows that a score is reported for.
    task : {"classification", "regression", "multilabel"}
    cache : FeatureCache, optional
        Where the rows come from; None if they come from several caches.
    output : str, optional
        The output of the backbone that `X` holds; the cache's first if None.
    """

    rows: NDArray[np.int64]
    X: NDArray[np.float32] | FeatureView
    y: NDArray[Any]
    classes: tuple[str, ...]
    digests: NDArray[np.uint8]
    groups: NDArray[Any] | None = None
    times: NDArray[Any] | None = None
    since: Any = None
    task: str = "classification"
    cache: FeatureCache | None = None
    output: str | None = None

    @classmethod
    def from_cache(
        cls,
        cache: FeatureCache,
        *,
        rows: NDArray[np.int64] | None = None,
        split: str | None = None,
        output: str | None = None,
    ) -> EmbeddingDataset:
        """Select rows of a cache.

        Parameters
        ----------
        cache : FeatureCache
        rows : ndarray of shape (m,), int64, optional
            Row numbers; the labelled, readable rows if not given.
        split : {"train", "validation", "test"}, optional
            Keep only rows that the labels mark as this split; all rows if the labels have no split.
        output : str, optional
            The cache's first if not given.
        """
        rows = cache.usable if rows is None else rows
        if split is not None and cache.split.any():
            rows = rows[cache.split[rows] == SPLIT_NAMES.index(split)]
        digests = cache.digests if len(rows) == len(cache) else cache.digests[rows]
        labels = cache.label_table.take(rows)
        y = labels.values if cache.task == "classification" else labels.y
        view = cache.view(rows, output)
        return cls(rows, view, y, cache.classes, digests, task=cache.task, cache=cache, output=output)

    def __len__(self) -> int:
        return len(self.rows)

    def __add__(self, other: EmbeddingDataset) -> EmbeddingDataset:
        """The rows of two datasets with the same classes, in memory."""
        if self.classes != other.classes or self.task != other.task:
            raise ConfigError("the datasets have different classes; align both to the same ones first")
        groups, times = (
            None if first is None or second is None else np.concatenate([first, second])
            for first, second in ((self.groups, other.groups), (self.times, other.times))
        )
        return EmbeddingDataset(
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.features, other.features]),
            np.concatenate([self.y, other.y]),
            self.classes,
            np.concatenate([self.digests, other.digests]),
            groups,
            times,
            task=self.task,
            cache=self.cache if self.cache is other.cache else None,
            output=self.output,
        )

    @property
    def ids(self) -> Sequence[str]:
        """The ids of the samples, shape (m,)."""
        if self.cache is None:
            raise ConfigError("rows of several caches have no ids")
        return self.cache.ids.take(self.rows)

    @property
    def labels(self) -> NDArray[Any]:
        """Class names of a classification, shape (m,); `y` of other tasks."""
        return np.array(self.classes, dtype=object)[self.y] if self.task == "classification" else self.y

    @property
    def keys(self) -> NDArray[Any]:
        """The digests as one comparable value per row, shape (m,)."""
        return np.ascontiguousarray(self.digests).view("V32").ravel()

    @property
    def first_occurrences(self) -> NDArray[np.intp]:
        """The position of the first row of each distinct image, ascending."""
        return np.sort(np.unique(self.keys, return_index=True)[1])

    def count_images(self) -> NDArray[np.int64]:
        """How many distinct images each class of a classification has, shape (k,)."""
        return np.bincount(self.y[self.first_occurrences], minlength=len(self.classes))

    @property
    def is_streamed(self) -> bool:
        """Whether the features stay in the file."""
        return isinstance(self.X, FeatureView)

    @property
    def features(self) -> NDArray[np.float32]:
        """The features as an array; read from the file if they are streamed."""
        return np.asarray(self.X[:], np.float32) if isinstance(self.X, FeatureView) else self.X

    def to_memory(self) -> EmbeddingDataset:
        """Read the features into memory."""
        return replace(self, X=self.features)

    def take(self, indices: NDArray[np.integer[Any]] | NDArray[np.bool_]) -> EmbeddingDataset:
        """Select rows by position or mask; the classes stay, `since` does not."""
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

    def marked(self, split: str) -> EmbeddingDataset:
        """Select the rows that the labels mark as ``train``, ``validation`` or ``test``; none without a split."""
        if self.cache is None:
            raise ConfigError("rows of several caches have no common split")
        return self.take(self.cache.split[self.rows] == SPLIT_NAMES.index(split))

    def without(self, rows: NDArray[np.integer[Any]] | str | os.PathLike[str]) -> EmbeddingDataset:
        """Leave out some rows of the cache, by number or as a table of samples."""
        if isinstance(rows, (str, os.PathLike)):
            if self.cache is None:
                raise ConfigError("rows of several caches cannot be matched with a table")
            rows = find_listed_rows(self.cache, rows)
        return self.take(~np.isin(self.rows, rows))

    def exclude_duplicates_of(self, other: EmbeddingDataset) -> EmbeddingDataset:
        """Leave out images that are, byte by byte, also in `other`."""
        return self.take(~np.isin(self.keys, other.keys))

    def unseen_by(self, model: Model) -> EmbeddingDataset:
        """Leave out the samples that a model was trained on."""
        return self.take(~model.was_trained_on(self.digests))

    def subset(self, n: int, seed: int = SplitSeed.TEST) -> EmbeddingDataset:
        """At most n rows, in memory, selected by a seed and the bytes of their images."""
        if len(self) <= n:
            return self.to_memory()
        starts = range(0, len(self), KEY_BLOCK_ROWS)
        keys = np.concatenate(
            [splits.compute_keys(self.digests[start : start + KEY_BLOCK_ROWS], seed) for start in starts]
        )
        return self.take(np.sort(np.argpartition(keys, n)[:n])).to_memory()

    def compute_digest(self) -> str:
        """Digest of the images, labels, classes, groups and times; the cache's fingerprint identifies the features."""
        constraints = {
            name: None if values is None else [str(value) for value in values]
            for name, values in (("groups", self.groups), ("times", self.times))
        }
        y = np.ascontiguousarray(self.y)
        arrays = digest_arrays([("digests", self.digests), ("y", y)])
        return compute_fingerprint([arrays, list(self.classes), constraints])

    def list_present_classes(self) -> tuple[str, ...]:
        """The classes that at least one row has; all targets of a regression."""
        if self.task == "regression":
            return self.classes
        present = np.unique(self.y) if self.task == "classification" else np.flatnonzero(self.y.any(axis=0))
        return tuple(self.classes[int(code)] for code in present)

    def drop_absent_classes(self) -> EmbeddingDataset:
        """Leave out the classes that no row has; only of a classification."""
        if self.task != "classification":
            return self
        present, codes = np.unique(self.y, return_inverse=True)
        return replace(self, y=codes, classes=tuple(self.classes[code] for code in present))

    def aligned_to(self, classes: tuple[str, ...]) -> EmbeddingDataset:
        """Encode the labels in another vocabulary, in its order.

        Raises
        ------
        ConfigError
            If a row has a label that is not among `classes`, or a target of a regression is missing.
        """
        required = classes if self.task == "regression" else self.list_present_classes()
        available = self.classes if self.task == "regression" else classes
        unknown = [name for name in required if name not in available]
        if unknown:
            raise ConfigError(f"there is no class or target {', '.join(map(repr, unknown[:MAX_LISTED_ROWS]))}")
        positions = {name: position for position, name in enumerate(self.classes)}
        if self.task == "classification":
            codes = {name: code for code, name in enumerate(classes)}
            return self.recoded(np.array([codes.get(name, -1) for name in self.classes], np.int64), classes)
        if self.task == "multilabel":
            columns = np.pad(self.y, ((0, 0), (0, 1)))  # the last for classes that no row has
            y = columns[:, [positions.get(name, -1) for name in classes]]
        else:
            y = np.reshape(self.y, (len(self), len(self.classes)))[:, [positions[name] for name in classes]]
            y = y[:, 0] if len(classes) == 1 else y
        return replace(self, y=y, classes=classes)

    def recoded(self, codes: NDArray[np.int64], classes: tuple[str, ...]) -> EmbeddingDataset:
        """Give each class of a classification a code in another vocabulary; leave out rows of negative codes.

        Parameters
        ----------
        codes : ndarray of shape (k,), int64
            For each of `self.classes` its position in `classes`, or a negative number.
        classes : tuple of str
        """
        y = codes[self.y]
        dataset = self if not len(y) or y.min() >= 0 else self.take(y >= 0)
        return replace(dataset, y=y[y >= 0], classes=classes)

    def make_folds(self, k: int, seed: int = SplitSeed.TEST) -> list[Split]:
        """Positions to fit on and positions to score, k times; see :func:`featpipe.splits.make_folds`."""
        return splits.make_folds(self.digests, k=k, seed=seed, **self._split_constraints())

    def make_holdout(self, test: float = 0.2, *, seed: int = SplitSeed.TEST, since: Any = None) -> Split:
        """Positions to fit on and positions to hold out; see :func:`featpipe.splits.make_holdout`."""
        return splits.make_holdout(self.digests, test=test, seed=seed, since=since, **self._split_constraints())

    def make_splits(self, k: int) -> list[Split]:
        """The splits that a score is reported for: k folds, or one at the time `since`."""
        return self.make_folds(k) if self.since is None else [self.make_holdout(since=self.since)]

    def _split_constraints(self) -> dict[str, Any]:
        y, names = (self.y, self.classes) if self.task == "classification" else (None, None)
        return {"y": y, "names": names, "groups": self.groups, "times": self.times}

    def check_finite(self) -> None:
        """Refuse embeddings that contain NaN or infinity although their status is ok.

        Raises
        ------
        ConfigError
        """
        block_rows = max(1, CHECK_BLOCK_VALUES // max(1, self.X.shape[1]))
        bad_rows: list[int] = []
        for start in range(0, len(self), block_rows):
            is_finite = np.isfinite(self.X[start : start + block_rows]).all(axis=1)
            bad_rows += self.rows[start : start + block_rows][~is_finite].tolist()
            if len(bad_rows) > MAX_LISTED_ROWS:
                break
        if bad_rows and self.cache is not None:
            names = ", ".join(self.cache.ids[row] for row in bad_rows[:MAX_LISTED_ROWS])
            raise ConfigError(
                f"{self.cache.path}: embeddings contain NaN or infinity although their status is ok ({names}"
                f"{' and more' * (len(bad_rows) > MAX_LISTED_ROWS)}); `featpipe verify --repair` computes them again"
            )


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
    """Load the rows to train on: labelled, readable and, if the labels came with a split, marked ``train``.

    Parameters
    ----------
    cache : FeatureCache
    output : str, optional
        The cache's first if not given.
    groups, times : str or array-like of shape (n,), optional
        One value per sample of the cache, as :func:`featpipe.splits.make_folds` takes them; or ``TABLE:COLUMN``.
    since : str, number or date, optional
        With `times`: the earliest time of the rows that a score is reported for.
    without : path-like, optional
        A table of samples to leave out.
    memory : int, optional
        Bytes that training may use; if not given, what is available now. Features that need more stay in the file.

    Raises
    ------
    CacheError
        If the cache has no labels, or no row is left to train on.
    ConfigError
        If only one class is left, the output is a feature map, embeddings contain NaN or infinity although their
        status is ok, or a group is on both sides of the split that came with the labels.
    """
    if cache.task == "none":
        raise CacheError(
            f"{cache.path}: has no labels; extract again with --labels TABLE or one folder for each class "
            "(nothing is embedded again)"
        )
    if groups is not None and cache.split.any():
        _check_groups_of_split(cache, groups)
    dataset = EmbeddingDataset.from_cache(cache, split="train", output=output)
    dataset = dataset if without is None else dataset.without(without)
    if not len(dataset):
        raise CacheError(f"{cache.path}: no row is labelled, readable and marked for training")
    if len(dataset.X.shape) != 2:
        raise ConfigError(
            f"{cache.path}: output {output or cache.outputs[0]!r} holds feature maps of shape {dataset.X.shape[1:]}; "
            "heads train on pooled outputs: extract with NODE:avg"
        )
    dataset = dataset.drop_absent_classes()
    if cache.task == "classification" and len(dataset.classes) < 2:
        raise ConfigError(
            f"{cache.path}: all training rows are of class {dataset.classes[0]!r}; a head needs two classes"
        )
    needed_bytes = N_FEATURE_COPIES * len(dataset) * dataset.X.shape[1] * 4
    if needed_bytes <= (available_bytes() if memory is None else memory):
        dataset = dataset.to_memory()
        dataset.check_finite()  # features that stay in the file are checked in the first pass over them
    row_times = load_times(cache, times, dataset.rows) if isinstance(times, str) else _take(cache, times, dataset.rows)
    if since is not None and row_times is None:
        raise ConfigError(f"since is {str(since)!r}, but the images have no times; give times too")
    since_time = parse_time(since, row_times) if isinstance(since, str) and row_times is not None else since
    return replace(dataset, groups=_load_groups(cache, groups, dataset.rows), times=row_times, since=since_time)


def _check_groups_of_split(cache: FeatureCache, groups: str | ArrayLike) -> None:
    """Refuse a split that came with the labels if a group is on both of its sides.

    Exact copies of training samples that are marked for the test are left out when a model is evaluated.
    """
    rows = cache.usable
    is_train = cache.split[rows] == SPLIT_NAMES.index("train")
    is_held_out = (cache.split[rows] != 0) & ~is_train
    if is_train.any() and is_held_out.any():
        is_marked = is_train | is_held_out
        splits.apply_predefined_split(
            cache.digests[rows[is_marked]],
            is_train[is_marked],
            is_held_out[is_marked],
            groups=_load_groups(cache, groups, rows[is_marked]),
        )


def _load_groups(cache: FeatureCache, groups: str | ArrayLike | None, rows: NDArray[np.int64]) -> NDArray[Any] | None:
    return load_groups(cache, groups, rows) if isinstance(groups, str) else _take(cache, groups, rows)


def _take(cache: FeatureCache, values: ArrayLike | None, rows: NDArray[np.int64]) -> NDArray[Any] | None:
    """The values of some rows of an array with one value per sample."""
    if values is None:
        return None
    array = np.asarray(values)
    if array.shape != (len(cache),):
        raise ConfigError(
            f"groups or times have shape {array.shape}, the cache has {len(cache)} samples; give one for each sample"
        )
    return np.asarray(array[rows])
