"""Infer the labels of samples from folders, sidecar files and table columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from featpipe.data.labels.labels import Labels, LabelTask
from featpipe.data.sources.listing import Listing, escape_name
from featpipe.data.sources.sidecars import LabelValue, SidecarLabel, get_sample_key
from featpipe.errors import ArchiveError

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_REGRESSION_COLUMNS = ("target", "targets", "y")

RawLabel = str | tuple[str, ...] | tuple[float, ...] | None


@dataclass
class RawLabels:
    """Labels of samples, before classes are ordered.

    Attributes
    ----------
    task : {"none", "classification", "regression", "multilabel"}
    values : list
        For each sample a class name, a tuple of class names, a tuple of t targets, or None.
    targets : tuple of str
        Names of the t targets.
    """

    task: LabelTask
    values: list[RawLabel]
    targets: tuple[str, ...] = ()

    @classmethod
    def unlabeled(cls, n: int) -> RawLabels:
        return cls("none", [None] * n)

    @classmethod
    def concatenate(cls, parts: Iterable[RawLabels]) -> RawLabels:
        """Concatenate labels. Unlabelled parts take the task of the others; different tasks are an error."""
        combined = cls.unlabeled(0)
        for part in parts:
            if part.task != "none" and combined.task != "none":
                if (part.task, part.targets) != (combined.task, combined.targets):
                    raise ArchiveError(
                        f"labels of different kinds: {combined.task} {list(combined.targets) or ''} and {part.task} "
                        f"{list(part.targets) or ''}; pass one table of labels for all archives"
                    )
            elif part.task != "none":
                combined.task, combined.targets = part.task, part.targets
            combined.values += part.values
        return combined

    def take(self, rows: Sequence[int]) -> RawLabels:
        """Select the labels of some rows; row -1 has no label."""
        return RawLabels(self.task, [self.values[row] if row >= 0 else None for row in rows], self.targets)

    def to_labels(self) -> Labels:
        if self.task == "none" or all(value is None for value in self.values):
            return Labels.unlabeled(len(self.values))
        if self.task == "classification":
            return Labels.from_class_names([value if isinstance(value, str) else None for value in self.values])
        if self.task == "multilabel":
            return Labels.from_label_sets(
                [map(str, value) if isinstance(value, tuple) else None for value in self.values]
            )
        missing_targets = (np.nan,) * len(self.targets)
        return Labels.from_targets([missing_targets if value is None else value for value in self.values], self.targets)


def normalize_name(name: str) -> str:
    """Remove leading ``./`` and ``/`` and empty parts from a member's name; ``..`` is kept as text.

    Examples
    --------
    >>> normalize_name("./cat//a.jpg"), normalize_name("/../cat/./a.jpg")
    ('cat/a.jpg', '../cat/a.jpg')
    """
    if name.startswith((".", "/")) or "//" in name or "/./" in name:
        return "/".join(part for part in name.split("/") if part not in ("", "."))
    return name


def iter_normalized_names(listing: Listing) -> Iterable[str]:
    """Normalize the names of a listing; names in a folder are normalized already."""
    return listing.names if listing.source.kind in ("folder", "files") else map(normalize_name, listing.names)


def labels_from_folders(listings: Sequence[Listing]) -> RawLabels:
    """Read classes from the first folder level of the archives of one argument."""
    root = _find_common_root(listings) if all(listing.source.kind in ("tar", "zip") for listing in listings) else ""
    class_names: dict[str, str] = {}  # one string object per class, shared by millions of samples
    values: list[RawLabel] = []
    for listing in listings:
        for name in iter_normalized_names(listing):
            folder, slash, _ = name[len(root) :].partition("/")
            values.append(
                (class_names.get(folder) or class_names.setdefault(folder, escape_name(folder))) if slash else None
            )
    return RawLabels("classification" if class_names else "none", values)


def _find_common_root(listings: Sequence[Listing]) -> str:
    """Find the single top folder, with ``/``, if it holds all samples in subfolders; else return an empty string."""
    root, has_subfolders = "", False
    for i, name in enumerate(name for listing in listings for name in iter_normalized_names(listing)):
        if i == 0:
            root = name[: name.find("/") + 1]
        if not (root and name.startswith(root)):
            return ""
        has_subfolders = has_subfolders or "/" in name[len(root) :]
    return root if has_subfolders else ""


def labels_from_sidecars(listings: Sequence[Listing]) -> RawLabels | None:
    """Read labels from sidecar files; None if no sample has one."""
    if not any(listing.sidecars for listing in listings):
        return None
    sidecars: list[SidecarLabel | None] = []
    for listing in listings:
        sample_keys: set[str] = set()
        for name in listing.names:
            key = get_sample_key(name)
            sidecar = listing.sidecars.get(key)
            if isinstance(sidecar, ArchiveError):
                raise sidecar
            sample_keys.add(key)
            sidecars.append(sidecar)
        for key, unused_sidecar in listing.sidecars.items():
            if key not in sample_keys:
                listing.count_ignored(
                    f"x{unused_sidecar.suffix}" if isinstance(unused_sidecar, SidecarLabel) else "x.json"
                )
        listing.sidecars.clear()
    if not any(sidecars):
        return None
    where = str(listings[0].source.path)
    has_targets = any(sidecar is not None and sidecar.is_target for sidecar in sidecars)
    return parse_label_column(
        [None if sidecar is None else sidecar.value for sidecar in sidecars],
        "target" if has_targets else "label",
        where=where,
    )


def parse_label_column(
    values: Sequence[LabelValue], column: str, *, where: str, task: LabelTask | None = None
) -> RawLabels:
    """Interpret one column of labels by the rules of `featpipe.data`."""
    has_lists = any(isinstance(value, tuple) for value in values)
    if task == "multilabel" or (task is None and (has_lists or column.lower() == "labels")):
        return RawLabels("multilabel", [_split_labels(value, where) for value in values])
    if has_lists:
        raise ArchiveError(f"{where}: column {column!r} holds lists of labels, which is multilabel, not {task}")
    numbers = [parse_number(value) for value in values]
    non_number = next((v for v, n in zip(values, numbers, strict=True) if n is None and v is not None), None)
    if task is None and non_number is None and any(value is not None for value in values):
        all_integers = all(n is None or n == int(n) for n in numbers)
        task = "regression" if column.lower() in _REGRESSION_COLUMNS or not all_integers else "classification"
    if task == "regression":
        if non_number is not None:
            raise ArchiveError(f"{where}: column {column!r} holds {str(non_number)[:60]!r}, expected numbers")
        return RawLabels("regression", [None if n is None else (n,) for n in numbers], (column,))
    if task == "none":
        return RawLabels.unlabeled(len(values))
    n_numbers = sum(n is not None for n in numbers)
    if task is None and n_numbers and non_number is not None and column.lower() in _REGRESSION_COLUMNS:
        raise ArchiveError(
            f"{where}: column {column!r} has {n_numbers} numbers and also {str(non_number)[:60]!r}; "
            "leave the cells empty that have no number, or name the column label if its values are classes"
        )
    return RawLabels("classification", [None if value is None else _to_class_name(value) for value in values])


def parse_number(value: LabelValue) -> float | None:
    """Convert a value to a finite number; None if it is not one."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    return None


def _split_labels(value: LabelValue, where: str) -> tuple[str, ...] | None:
    if value is None or isinstance(value, tuple):
        return value
    if isinstance(value, float):
        raise ArchiveError(f"{where}: found the number {value} among lists of labels")
    names = (name.strip() for name in re.split("[;|]", str(value)))
    return tuple(name for name in names if name)


def _to_class_name(value: LabelValue) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return escape_name(str(value))
