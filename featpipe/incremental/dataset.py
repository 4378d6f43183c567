"""The data of an expansion: new rows, rows that the model was trained on, test and calibration rows."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import splits
from featpipe.cache import SPLIT_NAMES, FeatureCache
from featpipe.config import check_names, unknown_name_error
from featpipe.data import order_classes
from featpipe.errors import CacheError, ConfigError
from featpipe.model import Model
from featpipe.runtime import ProgressCallback

TEST_FRACTION = 0.2
MIN_IMAGES_FOR_HOLDOUT = 5  # distinct images of a class, for some of them to be held out


@dataclass(frozen=True, eq=False)
class LabeledEmbeddings:
    """Embeddings with class codes and digests of their images.

    Attributes
    ----------
    X : ndarray of shape (m, d), float32
    y : ndarray of shape (m,), int64
        New class codes.
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
    def first_occurrences(self) -> NDArray[np.intp]:
        """The first row of each distinct image."""
        return np.unique(self.keys, return_index=True)[1]

    def count_distinct(self, k: int) -> NDArray[np.int64]:
        """Distinct images of each class, shape (k,)."""
        return np.bincount(self.y[self.first_occurrences], minlength=k)

    def take(self, indices: NDArray[Any]) -> LabeledEmbeddings:
        return LabeledEmbeddings(self.X[indices], self.y[indices], self.digests[indices])

    def __add__(self, other: LabeledEmbeddings) -> LabeledEmbeddings:
        return LabeledEmbeddings(
            np.concatenate([self.X, other.X]),
            np.concatenate([self.y, other.y]),
            np.concatenate([self.digests, other.digests]),
        )


@dataclass(frozen=True, eq=False)
class ExpansionData:
    """All data of an expansion; no image is in two of its parts.

    Attributes
    ----------
    new : LabeledEmbeddings
        To learn: images that the model was not trained on.
    old : LabeledEmbeddings
        Images that the model was trained on.
    test : LabeledEmbeddings
    excluded_counts : dict
        Numbers of rows that are not used, by reason.
    has_test_set : bool
        Whether the labels or the user's caches give test images, of new classes too.
    calibration : LabeledEmbeddings or None
        For probabilities and prediction sets.
    """

    new: LabeledEmbeddings
    old: LabeledEmbeddings
    test: LabeledEmbeddings
    excluded_counts: dict[str, int] = field(default_factory=dict)
    has_test_set: bool = True
    calibration: LabeledEmbeddings | None = None

    def with_holdout(self) -> ExpansionData:
        """If there is no test set, hold out some new rows for it; which ones depends on the bytes of their images."""
        new = self.new
        if self.has_test_set or not len(new):
            return self
        eligible = np.flatnonzero(new.count_distinct(int(new.y.max()) + 1)[new.y] >= MIN_IMAGES_FOR_HOLDOUT)
        if not len(eligible):
            return self
        candidates = new.take(eligible)
        try:
            test_indices = eligible[splits.make_holdout(candidates.digests, candidates.y, test=TEST_FRACTION)[1]]
        except ConfigError:  # classes that share their few images
            return self
        is_train = ~np.isin(new.keys, new.keys[test_indices])
        return replace(self, new=new.take(is_train), test=self.test + new.take(test_indices), has_test_set=False)


def as_list(data: Any) -> list[Any]:
    """One item or several, as a list."""
    return [data] if isinstance(data, (str, os.PathLike, FeatureCache)) else list(data)


def is_cache(item: Any) -> bool:
    """Whether an item is a cache, open or by its path; otherwise it is an archive."""
    return isinstance(item, FeatureCache) or Path(item).suffix in (".h5", ".hdf5")


def open_caches(
    model: Model, data: Any, labels: Any, cache_folder: str | os.PathLike[str], progress: ProgressCallback
) -> list[FeatureCache]:
    """Open caches, or extract archives into one.

    Raises
    ------
    ConfigError
        If archives and caches are mixed.
    CacheMismatchError
        If the embeddings of a cache are not those of the model's backbone.
    """
    items = as_list(data)
    are_caches = [is_cache(item) for item in items]
    if all(are_caches):
        if labels is not None:
            raise ConfigError("--labels is for archives; a cache has its own labels: extract again with --labels")
        caches = [item if isinstance(item, FeatureCache) else FeatureCache(item) for item in items]
    elif any(are_caches):
        raise ConfigError("caches and archives are mixed; extract the archives first, and give the caches")
    else:
        caches = [_extract_cache(model, items, labels, cache_folder, progress)]
    for feature_cache in caches:
        model.check_cache(feature_cache)
        if feature_cache.task != "classification":
            label_problem = "no labels" if feature_cache.task == "none" else f"labels for {feature_cache.task}"
            raise CacheError(
                f"{feature_cache.path}: has {label_problem}; give one class for each image, with folders or --labels"
            )
    return caches


def _extract_cache(
    model: Model, archives: Any, labels: Any, cache_folder: Any, progress: ProgressCallback
) -> FeatureCache:
    from featpipe.extraction import extract

    return extract(archives, labels=labels, cache=cache_folder, progress=progress, **model.extraction())


def find_labels(caches: Sequence[FeatureCache]) -> set[str]:
    """The labels of all training rows."""
    labels: set[str] = set()
    for cache in caches:
        codes = cache.label_table.values[_training_rows(cache)]
        labels |= {cache.classes[code] for code in np.unique(codes)}
    return labels


def load_expansion_data(
    model: Model,
    class_mapping: ClassMapping,
    caches: Sequence[FeatureCache],
    test_caches: Sequence[FeatureCache],
    reject_renamed: bool,
    calibration_caches: Sequence[FeatureCache] = (),
) -> ExpansionData:
    """Read the rows of caches.

    Parameters
    ----------
    model : Model
    class_mapping : ClassMapping
    caches : sequence of FeatureCache
        To learn from; if the labels have a split, from the training rows, and its test rows are test rows.
    test_caches : sequence of FeatureCache
        All rows are test rows; those marked ``test`` if the labels have a split.
    reject_renamed : bool
        Whether to refuse a new class of which most images are known by another name.
    calibration_caches : sequence of FeatureCache
        For calibration alone; in addition to rows that the labels of other caches mark ``validation``.
    """
    excluded: Counter[str] = Counter()
    learnable, test = _make_empty(model), _make_empty(model)
    for cache in caches:
        learnable = _concat_unique(
            learnable, _load_embeddings(model, class_mapping, cache, _training_rows(cache), excluded)
        )
        if cache.split.any():
            test = _concat_unique(
                test, _load_embeddings(model, class_mapping, cache, _rows_in_split(cache, "test"), excluded)
            )
    for cache in test_caches:
        rows = _rows_in_split(cache, "test") if cache.split.any() else cache.usable
        test = _concat_unique(test, _load_embeddings(model, class_mapping, cache, rows, excluded))
    is_old = model.was_trained_on(learnable.digests)
    if reject_renamed:
        _reject_renamed_classes(model, class_mapping, learnable, is_old)
    is_seen = model.was_trained_on(test.digests) | _is_in(test, learnable)
    excluded["test images that were trained on"] += int(is_seen.sum())
    has_new_classes = bool((test.y[~is_seen] >= class_mapping.k_old).any()) or not class_mapping.new_classes
    has_test_set = (bool(test_caches) and has_new_classes) or any(cache.split.any() for cache in caches)
    calibration_rows = _load_calibration_rows(
        model, class_mapping, [*caches, *test_caches], calibration_caches, excluded
    )
    calibration_rows = calibration_rows.take(
        ~(model.was_trained_on(calibration_rows.digests) | _is_in(calibration_rows, learnable + test))
    )
    excluded_counts = {reason: count for reason, count in excluded.items() if count}
    return ExpansionData(
        learnable.take(~is_old),
        learnable.take(is_old),
        test.take(~is_seen),
        excluded_counts,
        has_test_set,
        calibration_rows,
    )


def _load_calibration_rows(
    model: Model,
    class_mapping: ClassMapping,
    split_caches: Sequence[FeatureCache],
    whole_caches: Sequence[FeatureCache],
    excluded: Counter[str],
) -> LabeledEmbeddings:
    calibration_rows = _make_empty(model)
    for cache in (*split_caches, *whole_caches):
        rows = cache.usable if cache in whole_caches else _rows_in_split(cache, "validation")
        calibration_rows = _concat_unique(
            calibration_rows, _load_embeddings(model, class_mapping, cache, rows, excluded)
        )
    return calibration_rows


def _is_in(embeddings: LabeledEmbeddings, others: LabeledEmbeddings) -> NDArray[np.bool_]:
    """Which rows are of images that are among others, shape (m,)."""
    return np.isin(embeddings.keys, others.keys)


def _concat_unique(first: LabeledEmbeddings, second: LabeledEmbeddings) -> LabeledEmbeddings:
    """Rows of two caches; an image that is in both is taken once."""
    return first + second.take(~_is_in(second, first))


def _make_empty(model: Model) -> LabeledEmbeddings:
    d = int(model.head[-1].n_features_in_)
    return LabeledEmbeddings(np.zeros((0, d), np.float32), np.zeros(0, np.int64), np.zeros((0, 32), np.uint8))


def _rows_in_split(cache: FeatureCache, split_name: str) -> NDArray[np.intp]:
    rows = cache.usable
    return rows[cache.split[rows] == SPLIT_NAMES.index(split_name)]


def _training_rows(cache: FeatureCache) -> NDArray[np.intp]:
    return _rows_in_split(cache, "train") if cache.split.any() else cache.usable


def _load_embeddings(
    model: Model, class_mapping: ClassMapping, cache: FeatureCache, rows: NDArray[np.intp], excluded: Counter[str]
) -> LabeledEmbeddings:
    codes = cache.label_table.values[rows]
    known_labels = {*class_mapping.classes, *class_mapping.renames, *class_mapping.dropped}
    new_codes = np.array(
        [class_mapping.get_code(name) if name in known_labels else -2 for name in cache.classes], np.int64
    )
    y = new_codes[codes]
    excluded["of dropped classes"] += int((y == -1).sum())
    excluded["of classes without training images"] += int((y == -2).sum())
    rows, y = rows[y >= 0], y[y >= 0]
    X = np.asarray(cache.features(model.output)[rows], np.float32)
    bad_rows = np.flatnonzero(~np.isfinite(X).all(axis=1))
    if len(bad_rows):
        raise ConfigError(
            f"{cache.path}: embeddings contain NaN or infinity although their status is ok "
            f"({cache.ids[int(rows[bad_rows[0]])]}); `featpipe verify --repair` computes them again"
        )
    return LabeledEmbeddings(X, y, np.ascontiguousarray(cache.digests[rows]))


def _reject_renamed_classes(
    model: Model, class_mapping: ClassMapping, learnable: LabeledEmbeddings, is_old: NDArray[np.bool_]
) -> None:
    """Raise for a new class of which most images are known by another name: it would be learnt from the rest alone."""
    for code in range(class_mapping.k_old, len(class_mapping.classes)):
        in_class = learnable.y == code
        old_in_class = in_class & is_old
        if 2 * old_in_class.sum() <= in_class.sum() or not old_in_class.any():
            continue
        name = class_mapping.classes[code]
        predicted = Counter(model.predict_features(learnable.X[old_in_class]).tolist()).most_common(1)[0]
        n_old, n_all = int(old_in_class.sum()), int(in_class.sum())
        raise ConfigError(
            f"class {name!r} is new, but the model was trained on {n_old} of its {n_all} images and predicts "
            f"{predicted[0]!r} for {predicted[1]} of them; to rename the class, give "
            f"--merge {predicted[0]},{name}={name}; to divide it, --method joint with all its images"
        )


def compute_request_digest(caches: Sequence[FeatureCache], settings: Any) -> str:
    """A digest of what determines the result besides the model: rows, labels and settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for cache in caches:
        digest.update(cache.fingerprint.encode() + repr(cache.classes).encode())
        for column in (cache.digests, cache.status_codes, cache.label_table.values, cache.split):
            digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ClassMapping:
    """How the classes of a model change.

    Attributes
    ----------
    old_classes : tuple of str
    classes : tuple of str
        The new ones: first the old classes in their order, merged ones at the position of the first of them; then the
        classes that were added.
    new_codes : ndarray of shape (k_before,), int64
        The index in ``classes`` of each old class; -1 for a dropped one.
    renames : dict
        New names of labels that are renamed or merged.
    dropped : tuple of str
    """

    old_classes: tuple[str, ...]
    classes: tuple[str, ...]
    new_codes: NDArray[np.int64]
    renames: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @property
    def k_old(self) -> int:
        """How many of ``classes`` come from old ones."""
        return int(self.new_codes.max()) + 1

    @property
    def new_classes(self) -> tuple[str, ...]:
        return self.classes[self.k_old :]

    @property
    def changes_old_classes(self) -> bool:
        """Whether old classes were dropped, merged or renamed."""
        return self.classes[: self.k_old] != self.old_classes

    def get_code(self, label: str) -> int:
        """The class code of a label; -1 for a dropped one."""
        return -1 if label in self.dropped else self.classes.index(self.renames.get(label, label))

    @classmethod
    def from_labels(
        cls,
        old_classes: tuple[str, ...],
        labels: Iterable[str] = (),
        drop: Sequence[str] = (),
        merge: Mapping[str, Sequence[str]] | None = None,
    ) -> ClassMapping:
        """From the labels of the images to learn.

        Parameters
        ----------
        old_classes : tuple of str
        labels : iterable of str
        drop : sequence of str
            Classes to remove, old or new ones.
        merge : mapping from class to classes, optional
            Classes that become one, by its new name; with a single class this is renaming.

        Raises
        ------
        ConfigError
            If a class to drop or to merge is unknown or named twice, or fewer than two classes remain.
        """
        label_set = set(labels)
        known_classes = [*old_classes, *order_classes(label_set - set(old_classes))]
        renames = _resolve_renames(merge or {}, known_classes, old_classes, drop)
        check_names("class", drop, known_classes, "(to drop)")
        remaining = [renames.get(name, name) for name in old_classes if name not in drop]
        remaining_classes = list(dict.fromkeys(remaining))
        new_classes = order_classes(
            {renames.get(name, name) for name in label_set if name not in drop} - set(remaining_classes)
        )
        classes = (*remaining_classes, *new_classes)
        if len(classes) < 2 or not remaining_classes:
            n_old = len(remaining_classes)
            raise ConfigError(
                f"{len(classes)} classes would remain, {n_old} of them old; two must remain, one of them old"
            )
        new_codes = [-1 if name in drop else remaining_classes.index(renames.get(name, name)) for name in old_classes]
        return cls(old_classes, classes, np.array(new_codes, np.int64), renames, tuple(drop))


def _resolve_renames(
    merge: Mapping[str, Sequence[str]], known_classes: Sequence[str], old_classes: Sequence[str], drop: Sequence[str]
) -> dict[str, str]:
    """The new name of each class that is merged."""
    renames: dict[str, str] = {}
    for target, sources in merge.items():
        if isinstance(sources, str) or not sources or not target:
            raise ConfigError(f"merge of {sources!r} into {target!r}; give a name and a list of classes")
        for name in sources:
            if name not in known_classes:
                raise unknown_name_error("class", name, known_classes, "(to merge)")
            if name in drop or name in renames:
                raise ConfigError(f"class {name!r} is merged, and dropped or merged again; name it once")
            renames[name] = target
        if target in old_classes and target not in sources:
            raise ConfigError(
                f"{target!r} is an existing class; to merge the others into it, give "
                f"{','.join((*sources, target))}={target}"
            )
    return renames


def find_similar_names(new: Iterable[str], old: Collection[str]) -> list[tuple[str, str]]:
    """Pairs (new, old) of names that differ only in case, spaces and punctuation.

    Examples
    --------
    >>> find_similar_names(["Red fox", "owl"], ["red_fox", "bear"])
    [('Red fox', 'red_fox')]
    """
    normalized = {_normalize_name(name): name for name in old}
    return [
        (name, normalized[_normalize_name(name)])
        for name in new
        if name not in old and _normalize_name(name) in normalized
    ]


def _normalize_name(name: str) -> str:
    letters = "".join(c for c in name.casefold() if c.isalnum())
    return letters or name
