"""Which classes a model has before and after, and which is which."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from featpipe.errors import ConfigError
from featpipe.labels import order_classes
from featpipe.names import check_names, unknown_name_error

__all__ = ["ClassMapping", "find_similar_names"]


@dataclass(frozen=True, eq=False)
class ClassMapping:
    """How the classes of a model change.

    Attributes
    ----------
    before : tuple of str
    classes : tuple of str
        After: the old ones in their order, joined ones in the place of the first of them; then the new ones.
    place : ndarray of shape (k_before,), int64
        Which of ``classes`` each old one is; -1 for one that is left out.
    names : dict
        What labels are called after, where that is something else.
    dropped : tuple of str
    """

    old_classes: tuple[str, ...]
    classes: tuple[str, ...]
    new_codes: NDArray[np.int64]
    renames: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @property
    def k_old(self) -> int:
        """How many of the classes the model knew, by whatever name."""
        return int(self.new_codes.max()) + 1

    @property
    def new_classes(self) -> tuple[str, ...]:
        return self.classes[self.k_old :]

    @property
    def changes_old_classes(self) -> bool:
        """Whether old classes were left out, joined or renamed."""
        return self.classes[: self.k_old] != self.old_classes

    def get_code(self, label: str) -> int:
        """The class of a label; -1 for one that is left out."""
        return -1 if label in self.dropped else self.classes.index(self.renames.get(label, label))

    @classmethod
    def from_labels(
        cls,
        old_classes: tuple[str, ...],
        labels: Iterable[str] = (),
        drop: Sequence[str] = (),
        merge: Mapping[str, Sequence[str]] | None = None,
    ) -> ClassMapping:
        """From the labels that are found.

        Parameters
        ----------
        before : tuple of str
        found : iterable of str
            Labels of the images to learn.
        drop : sequence of str
            Classes, old or found, that are left out.
        merge : mapping from class to classes, optional
            What becomes one class, by its new name; of a single class this is renaming.

        Raises
        ------
        ConfigError
            If a class to drop or to merge is unknown or named twice, or fewer than two classes are left.
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
            raise ConfigError(
                f"{len(classes)} classes would be left, {len(remaining_classes)} of them old; leave two, one of them old"
            )
        new_codes = [-1 if name in drop else remaining_classes.index(renames.get(name, name)) for name in old_classes]
        return cls(old_classes, classes, np.array(new_codes, np.int64), renames, tuple(drop))


def _resolve_renames(
    merge: Mapping[str, Sequence[str]], known_classes: Sequence[str], old_classes: Sequence[str], drop: Sequence[str]
) -> dict[str, str]:
    """What each class that is merged is called after."""
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
                f"{target!r} is a class already; merge {','.join((*sources, target))}={target} joins the others with it"
            )
    return renames


def find_similar_names(new: Iterable[str], old: Collection[str]) -> list[tuple[str, str]]:
    """New classes whose names differ from an old one in case, spaces and punctuation alone: (new, old).

    Examples
    --------
    >>> near_names(["Red fox", "owl"], ["red_fox", "bear"])
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
