"""Which classes a model has before and after, and which is which."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from featpipe.errors import ConfigError
from featpipe.labels import order_classes
from featpipe.names import check_names, unknown

__all__ = ["Growth", "near_names"]


@dataclass(frozen=True, eq=False)
class Growth:
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

    before: tuple[str, ...]
    classes: tuple[str, ...]
    place: NDArray[np.int64]
    names: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @property
    def k_old(self) -> int:
        """How many of the classes the model knew, by whatever name."""
        return int(self.place.max()) + 1

    @property
    def new(self) -> tuple[str, ...]:
        return self.classes[self.k_old :]

    @property
    def regroups(self) -> bool:
        """Whether old classes were left out, joined or renamed."""
        return self.classes[: self.k_old] != self.before

    def code(self, label: str) -> int:
        """The class of a label; -1 for one that is left out."""
        return -1 if label in self.dropped else self.classes.index(self.names.get(label, label))

    @classmethod
    def of(
        cls,
        before: tuple[str, ...],
        found: Iterable[str] = (),
        drop: Sequence[str] = (),
        merge: Mapping[str, Sequence[str]] | None = None,
    ) -> Growth:
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
        labels = set(found)
        known = [*before, *order_classes(labels - set(before))]
        names = _names(merge or {}, known, before, drop)
        check_names("class", drop, known, "(to drop)")
        kept = [names.get(name, name) for name in before if name not in drop]
        after = list(dict.fromkeys(kept))
        new = order_classes({names.get(name, name) for name in labels if name not in drop} - set(after))
        classes = (*after, *new)
        if len(classes) < 2 or not after:
            raise ConfigError(
                f"{len(classes)} classes would be left, {len(after)} of them old; leave two, one of them old"
            )
        place = [-1 if name in drop else after.index(names.get(name, name)) for name in before]
        return cls(before, classes, np.array(place, np.int64), names, tuple(drop))


def _names(
    merge: Mapping[str, Sequence[str]], known: Sequence[str], before: Sequence[str], drop: Sequence[str]
) -> dict[str, str]:
    """What each class that is merged is called after."""
    names: dict[str, str] = {}
    for target, sources in merge.items():
        if isinstance(sources, str) or not sources or not target:
            raise ConfigError(f"merge of {sources!r} into {target!r}; give a name and a list of classes")
        for name in sources:
            if name not in known:
                raise unknown("class", name, known, "(to merge)")
            if name in drop or name in names:
                raise ConfigError(f"class {name!r} is merged, and dropped or merged again; name it once")
            names[name] = target
        if target in before and target not in sources:
            raise ConfigError(
                f"{target!r} is a class already; merge {','.join((*sources, target))}={target} joins the others with it"
            )
    return names


def near_names(new: Iterable[str], old: Collection[str]) -> list[tuple[str, str]]:
    """New classes whose names differ from an old one in case, spaces and punctuation alone: (new, old).

    Examples
    --------
    >>> near_names(["Red fox", "owl"], ["red_fox", "bear"])
    [('Red fox', 'red_fox')]
    """
    plain = {_plain(name): name for name in old}
    return [(name, plain[_plain(name)]) for name in new if name not in old and _plain(name) in plain]


def _plain(name: str) -> str:
    letters = "".join(c for c in name.casefold() if c.isalnum())
    return letters or name
