"""The data of an expansion: new rows, rows that the model was trained on, test and calibration rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import FeatureCache
from featpipe.config import check_names, unknown_name_error
from featpipe.data import order_classes
from featpipe.errors import ConfigError
from featpipe.model import Model
from featpipe.training import EmbeddingDataset

HOLDOUT_FRACTION = 0.2
MIN_IMAGES_FOR_HOLDOUT = 5  # distinct images of a class, for some of them to be held out


@dataclass(frozen=True, eq=False)
class ExpansionData:
    """All data of an expansion, in the new classes; no image is in two of its parts.

    Attributes
    ----------
    new : EmbeddingDataset
        To learn: images that the model was not trained on.
    old : EmbeddingDataset
        Images that the model was trained on.
    test : EmbeddingDataset
    calibration : EmbeddingDataset
        For probabilities and prediction sets.
    has_test_set : bool
        Whether the labels or the user's caches give test images, of new classes too.
    excluded_counts : dict
        Numbers of rows that are not used, by reason.
    """

    new: EmbeddingDataset
    old: EmbeddingDataset
    test: EmbeddingDataset
    calibration: EmbeddingDataset
    has_test_set: bool
    excluded_counts: dict[str, int]

    def with_holdout(self) -> ExpansionData:
        """If there is no test set, hold out some of the new rows for it, selected by the bytes of their images."""
        if self.has_test_set:
            return self
        eligible = np.flatnonzero(self.new.count_images()[self.new.y] >= MIN_IMAGES_FOR_HOLDOUT)
        if not len(eligible):
            return self
        try:
            _, test_indices = self.new.take(eligible).make_holdout(HOLDOUT_FRACTION)
        except ConfigError:  # classes that share their few images
            return self
        held_out = self.new.take(eligible[test_indices])
        return replace(self, new=self.new.exclude_duplicates_of(held_out), test=self.test + held_out)


def find_labels(caches: Sequence[FeatureCache]) -> set[str]:
    """The labels of all training rows."""
    return {
        name for cache in caches for name in EmbeddingDataset.from_cache(cache, split="train").list_present_classes()
    }


def load_expansion_data(
    model: Model,
    class_mapping: ClassMapping,
    caches: Sequence[FeatureCache],
    test_caches: Sequence[FeatureCache],
    calibration_caches: Sequence[FeatureCache] = (),
    *,
    reject_renamed: bool,
) -> ExpansionData:
    """Read the rows of caches.

    Parameters
    ----------
    model : Model
    class_mapping : ClassMapping
    caches : sequence of FeatureCache
        To train on. If the labels have a split, only its training rows, and its test rows are test rows.
    test_caches : sequence of FeatureCache
        All rows are test rows; those marked ``test`` if the labels have a split.
    calibration_caches : sequence of FeatureCache
        For calibration alone; in addition to rows that the labels of other caches mark ``validation``.
    reject_renamed : bool
        Whether to refuse a new class if the model was trained on most of its images.
    """
    excluded: Counter[str] = Counter()

    def load(selections: Iterable[tuple[FeatureCache, str | None]]) -> EmbeddingDataset:
        return _load_rows(model, class_mapping, selections, excluded)

    caches_with_split = [cache for cache in caches if cache.split.any()]
    learnable = load((cache, "train") for cache in caches)
    test = load((cache, "test") for cache in [*caches_with_split, *test_caches])
    if reject_renamed:
        _reject_renamed_classes(model, class_mapping, learnable)
    unseen_test = test.unseen_by(model).exclude_duplicates_of(learnable)
    excluded["test images that were trained on"] += len(test) - len(unseen_test)
    tests_new_classes = bool((unseen_test.y >= class_mapping.k_old).any()) or not class_mapping.new_classes
    split_caches = [cache for cache in [*caches, *test_caches] if cache.split.any()]
    calibration = load(
        [*((cache, "validation") for cache in split_caches), *((cache, None) for cache in calibration_caches)]
    )
    is_old = model.was_trained_on(learnable.digests)
    return ExpansionData(
        learnable.take(~is_old),
        learnable.take(is_old),
        unseen_test,
        calibration.unseen_by(model).exclude_duplicates_of(learnable + test),
        bool(caches_with_split) or (bool(test_caches) and tests_new_classes),
        {reason: count for reason, count in excluded.items() if count},
    )


def _load_rows(
    model: Model,
    class_mapping: ClassMapping,
    selections: Iterable[tuple[FeatureCache, str | None]],
    excluded: Counter[str],
) -> EmbeddingDataset:
    """Rows of caches and their splits, in the new classes; an image that is in two caches is used once."""
    classes, d = class_mapping.classes, int(model.head[-1].n_features_in_)
    no_rows, no_digests = np.zeros(0, np.int64), np.zeros((0, 32), np.uint8)
    dataset = EmbeddingDataset(no_rows, np.zeros((0, d), np.float32), no_rows, classes, no_digests)
    for cache, split in selections:
        rows = EmbeddingDataset.from_cache(cache, split=split, output=model.output)
        codes = class_mapping.encode(cache.classes)
        excluded["of dropped classes"] += int((codes[rows.y] == DROPPED).sum())
        excluded["of classes without training images"] += int((codes[rows.y] == UNKNOWN).sum())
        rows = rows.recoded(codes, classes).to_memory()
        rows.check_finite()
        dataset = dataset + rows.exclude_duplicates_of(dataset)
    return dataset


def _reject_renamed_classes(model: Model, class_mapping: ClassMapping, learnable: EmbeddingDataset) -> None:
    """Refuse a new class if the model was trained on most of its images: only the others would be trained on."""
    X, is_old = np.asarray(learnable.X), model.was_trained_on(learnable.digests)
    for code in range(class_mapping.k_old, len(class_mapping.classes)):
        in_class = learnable.y == code
        old_in_class = in_class & is_old
        if 2 * old_in_class.sum() <= in_class.sum() or not old_in_class.any():
            continue
        name = class_mapping.classes[code]
        predicted = Counter(model.predict_features(X[old_in_class]).tolist()).most_common(1)[0]
        n_old, n_all = int(old_in_class.sum()), int(in_class.sum())
        raise ConfigError(
            f"class {name!r} is new, but the model was trained on {n_old} of its {n_all} images and predicts "
            f"{predicted[0]!r} for {predicted[1]} of them; to rename the class, give "
            f"--merge {predicted[0]},{name}={name}; to divide it, --method joint with all its images"
        )


def compute_request_digest(caches: Sequence[FeatureCache], settings: Any) -> str:
    """Digest of all that determines the result besides the model: rows, labels and settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for cache in caches:
        digest.update(cache.fingerprint.encode() + repr(cache.classes).encode())
        for column in (cache.digests, cache.status_codes, cache.label_table.values, cache.split):
            digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


DROPPED, UNKNOWN = -1, -2  # codes of labels without a class in the new model


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

    def encode(self, labels: Sequence[str]) -> NDArray[np.int64]:
        """The class code of each label; `DROPPED` or `UNKNOWN` for a label of no class."""
        codes = {name: code for code, name in enumerate(self.classes)}
        codes |= {old_name: codes[name] for old_name, name in self.renames.items()}
        codes |= dict.fromkeys(self.dropped, DROPPED)
        return np.array([codes.get(label, UNKNOWN) for label in labels], np.int64)

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
                f"{len(classes)} classes would remain, {n_old} of them old; keep at least two, one of them old"
            )
        new_codes = [-1 if name in drop else remaining_classes.index(renames.get(name, name)) for name in old_classes]
        return cls(old_classes, classes, np.array(new_codes, np.int64), renames, tuple(drop))


def _resolve_renames(
    merge: Mapping[str, Sequence[str]], known_classes: Sequence[str], old_classes: Sequence[str], drop: Sequence[str]
) -> dict[str, str]:
    renames: dict[str, str] = {}
    for target, sources in merge.items():
        if isinstance(sources, str) or not sources or not target:
            raise ConfigError(f"merge is {sources!r} into {target!r}; give a name and a list of classes")
        for name in sources:
            if name not in known_classes:
                raise unknown_name_error("class", name, known_classes, "(to merge)")
            if name in drop or name in renames:
                raise ConfigError(f"class {name!r} is merged twice, or merged and dropped; name it once")
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
