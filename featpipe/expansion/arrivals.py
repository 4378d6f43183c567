"""The rows that come to a model: what is new to it, what it was trained on, and what it is judged by."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import split
from featpipe.cache import SPLITS, FeatureCache
from featpipe.errors import CacheError, ConfigError
from featpipe.expansion.growth import Growth
from featpipe.model import Model
from featpipe.progress import Tell

__all__ = ["Arrivals", "Side", "arrivals", "caches_of", "digest_of_request", "each_of", "is_cache", "labels_of"]

TEST_SHARE = 0.2
JUDGED_FROM = 5  # distinct images that a class must have for some of them to be held out


@dataclass(frozen=True, eq=False)
class Side:
    """Some rows.

    Attributes
    ----------
    X : ndarray of shape (m, d), float32
    y : ndarray of shape (m,), int64
        Codes of the classes after.
    digests : ndarray of shape (m, 32), uint8
    """

    X: NDArray[np.float32]
    y: NDArray[np.int64]
    digests: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.y)

    @property
    def keys(self) -> NDArray[Any]:
        """The digests as one value each, shape (m,)."""
        return self.digests.view("V32").ravel()

    @property
    def first(self) -> NDArray[np.intp]:
        """A row of each image: of copies the first."""
        return np.unique(self.keys, return_index=True)[1]

    def distinct(self, k: int) -> NDArray[np.int64]:
        """How many different images each of k classes has, shape (k,)."""
        return np.bincount(self.y[self.first], minlength=k)

    def take(self, which: NDArray[Any]) -> Side:
        return Side(self.X[which], self.y[which], self.digests[which])

    def __add__(self, other: Side) -> Side:
        return Side(
            np.concatenate([self.X, other.X]),
            np.concatenate([self.y, other.y]),
            np.concatenate([self.digests, other.digests]),
        )


@dataclass(frozen=True, eq=False)
class Arrivals:
    """All rows that are at hand.

    Attributes
    ----------
    new : Side
        To learn: the model was not trained on their bytes.
    old : Side
        The model was trained on them.
    test : Side
        To judge by, and never trained on.
    left_out : dict
        How many rows are of no use, by reason.
    given : bool
        Whether test rows came with the labels, or with caches of their own, of new classes too.
    calibration : Side or None
        By which probabilities and sets are calibrated: neither trained on, nor learnt, nor judged by.
    """

    new: Side
    old: Side
    test: Side
    left_out: dict[str, int] = field(default_factory=dict)
    given: bool = True
    calibration: Side | None = None

    def held_out(self) -> Arrivals:
        """With some of the new rows to judge by, where none came with the labels: decided by their bytes."""
        new = self.new
        if self.given or not len(new):
            return self
        enough = np.flatnonzero(new.distinct(int(new.y.max()) + 1)[new.y] >= JUDGED_FROM)
        if not len(enough):
            return self
        some = new.take(enough)
        try:
            held = enough[split.holdout(some.digests, some.y, test=TEST_SHARE)[1]]
        except ConfigError:  # classes that share their few images
            return self
        stays = ~np.isin(new.keys, new.keys[held])
        return replace(self, new=new.take(stays), test=self.test + new.take(held), given=False)


def each_of(data: Any) -> list[Any]:
    """What is given, one or several, one by one."""
    return [data] if isinstance(data, (str, os.PathLike, FeatureCache)) else list(data)


def is_cache(one: Any) -> bool:
    """Whether it is a cache, open or by its path, and not an archive."""
    return isinstance(one, FeatureCache) or Path(one).suffix in (".h5", ".hdf5")


def caches_of(
    model: Model, data: Any, labels: Any, cache: str | os.PathLike[str], progress: Tell
) -> list[FeatureCache]:
    """Caches, opened; of archives the one that is made of them.

    Raises
    ------
    ConfigError
        If archives and caches are mixed.
    CacheMismatchError
        If a cache holds other embeddings than the model was trained on.
    """
    given = each_of(data)
    are_caches = [is_cache(one) for one in given]
    if all(are_caches):
        if labels is not None:
            raise ConfigError("--labels goes with archives; a cache has labels of its own: extract again with --labels")
        caches = [one if isinstance(one, FeatureCache) else FeatureCache(one) for one in given]
    elif any(are_caches):
        raise ConfigError("caches and archives are mixed; extract the archives first, and give the caches")
    else:
        caches = [_extracted(model, given, labels, cache, progress)]
    for one in caches:
        model.check_cache(one)
        if one.task != "classification":
            found = "no labels" if one.task == "none" else f"labels for {one.task}"
            raise CacheError(f"{one.path}: has {found}; give one class for each image, with folders or --labels")
    return caches


def _extracted(model: Model, archives: Any, labels: Any, cache: Any, progress: Tell) -> FeatureCache:
    from featpipe.extraction import extract

    return extract(archives, labels=labels, cache=cache, progress=progress, **model.extraction())


def labels_of(caches: Sequence[FeatureCache]) -> set[str]:
    """The labels of the rows that there is something to learn from."""
    found: set[str] = set()
    for cache in caches:
        codes = cache.label_table.values[_rows_to_learn(cache)]
        found |= {cache.classes[code] for code in np.unique(codes)}
    return found


def arrivals(
    model: Model,
    growth: Growth,
    caches: Sequence[FeatureCache],
    tests: Sequence[FeatureCache],
    strict: bool,
    calibration: Sequence[FeatureCache] = (),
) -> Arrivals:
    """Read the rows of caches.

    Parameters
    ----------
    model : Model
    growth : Growth
    caches : sequence of FeatureCache
        To learn from; of labels that came with a split the training rows, by whose test rows it is judged.
    tests : sequence of FeatureCache
        To judge by alone.
    strict : bool
        Whether a class that consists of known images under a new name is refused.
    calibration : sequence of FeatureCache
        To calibrate by alone; as are rows that the labels of the others mark ``validation``.
    """
    left: Counter[str] = Counter()
    learn, test = _none(model), _none(model)
    for cache in caches:
        learn = _joined(learn, _side(model, growth, cache, _rows_to_learn(cache), left))
        if cache.split.any():
            test = _joined(test, _side(model, growth, cache, _marked(cache, "test"), left))
    for cache in tests:
        rows = _marked(cache, "test") if cache.split.any() else cache.usable
        test = _joined(test, _side(model, growth, cache, rows, left))
    known = model.was_trained_on(learn.digests)
    if strict:
        _refuse_renamed(model, growth, learn, known)
    seen = model.was_trained_on(test.digests) | _among(test, learn)
    left["trained on, and so not judged by"] += int(seen.sum())
    of_new = bool((test.y[~seen] >= growth.k_old).any()) or not growth.new
    given = (bool(tests) and of_new) or any(cache.split.any() for cache in caches)
    checked = _to_calibrate(model, growth, [*caches, *tests], calibration, left)
    checked = checked.take(~(model.was_trained_on(checked.digests) | _among(checked, learn + test)))
    left_out = {reason: count for reason, count in left.items() if count}
    return Arrivals(learn.take(~known), learn.take(known), test.take(~seen), left_out, given, checked)


def _to_calibrate(
    model: Model, growth: Growth, marked: Sequence[FeatureCache], whole: Sequence[FeatureCache], left: Counter[str]
) -> Side:
    found = _none(model)
    for cache in (*marked, *whole):
        rows = cache.usable if cache in whole else _marked(cache, "validation")
        found = _joined(found, _side(model, growth, cache, rows, left))
    return found


def _among(some: Side, others: Side) -> NDArray[np.bool_]:
    """Which rows are of images that others are of too."""
    return np.isin(some.keys, others.keys)


def _joined(first: Side, more: Side) -> Side:
    """Rows of two caches, an image that is in both once."""
    return first + more.take(~_among(more, first))


def _none(model: Model) -> Side:
    d = int(model.head[-1].n_features_in_)
    return Side(np.zeros((0, d), np.float32), np.zeros(0, np.int64), np.zeros((0, 32), np.uint8))


def _marked(cache: FeatureCache, name: str) -> NDArray[np.intp]:
    rows = cache.usable
    return rows[cache.split[rows] == SPLITS.index(name)]


def _rows_to_learn(cache: FeatureCache) -> NDArray[np.intp]:
    return _marked(cache, "train") if cache.split.any() else cache.usable


def _side(model: Model, growth: Growth, cache: FeatureCache, rows: NDArray[np.intp], left: Counter[str]) -> Side:
    codes = cache.label_table.values[rows]
    known = {*growth.classes, *growth.names, *growth.dropped}
    by_code = np.array([growth.code(name) if name in known else -2 for name in cache.classes], np.int64)
    y = by_code[codes]
    left["of classes that are dropped"] += int((y == -1).sum())
    left["of classes that there is nothing to learn of"] += int((y == -2).sum())
    rows, y = rows[y >= 0], y[y >= 0]
    X = np.asarray(cache.features(model.output)[rows], np.float32)
    bad = np.flatnonzero(~np.isfinite(X).all(axis=1))
    if len(bad):
        raise ConfigError(
            f"{cache.path}: rows that are ok hold NaN or infinity ({cache.ids[int(rows[bad[0]])]}); "
            "`featpipe verify --repair` computes them again"
        )
    return Side(X, y, np.ascontiguousarray(cache.digests[rows]))


def _refuse_renamed(model: Model, growth: Growth, learn: Side, known: NDArray[np.bool_]) -> None:
    """A class of which most images are known by another name would be learnt from what is left of it."""
    for code in range(growth.k_old, len(growth.classes)):
        of_class = learn.y == code
        again = of_class & known
        if 2 * again.sum() <= of_class.sum() or not again.any():
            continue
        name = growth.classes[code]
        called = Counter(model.predict_features(learn.X[again]).tolist()).most_common(1)[0]
        raise ConfigError(
            f"class {name!r} is new, but the model was trained on {int(again.sum())} of its {int(of_class.sum())} "
            f"images and calls {called[1]} of them {called[0]!r}; if that is its new name, give "
            f"--merge {called[0]},{name}={name}, and to divide a class, --method joint with all its images"
        )


def digest_of_request(caches: Sequence[FeatureCache], asked: Any) -> str:
    """What a result follows from beside the model: the rows and labels, and the settings."""
    digest = hashlib.sha256(repr(asked).encode())
    for cache in caches:
        digest.update(cache.fingerprint.encode() + repr(cache.classes).encode())
        for column in (cache.digests, cache.status_codes, cache.label_table.values, cache.split):
            digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()
