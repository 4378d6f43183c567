"""From what folders, sidecar files and tables say to the labels of samples."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from featpipe.archive.listing import Listing, plain
from featpipe.archive.notes import Note, Value, key_of
from featpipe.errors import ArchiveError
from featpipe.labels import Labels, Task

__all__ = ["Marks", "by_folder", "by_note", "clean", "cleaned", "interpret", "number"]

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NUMERIC_COLUMNS = ("target", "targets", "y")

Mark = str | tuple[str, ...] | tuple[float, ...] | None


@dataclass
class Marks:
    """The labels of some samples, before classes are ordered.

    Attributes
    ----------
    task : {"none", "classification", "regression", "multilabel"}
    values : list
        For each sample a class name, a tuple of class names, a tuple of t targets, or None.
    targets : tuple of str
        Names of the t targets.
    """

    task: Task
    values: list[Mark]
    targets: tuple[str, ...] = ()

    @classmethod
    def none(cls, n: int) -> Marks:
        return cls("none", [None] * n)

    @classmethod
    def joined(cls, several: Iterable[Marks]) -> Marks:
        """One after the other. Unlabelled ones adapt; two different tasks cannot be joined."""
        whole = cls.none(0)
        for marks in several:
            if marks.task != "none" and whole.task != "none":
                if (marks.task, marks.targets) != (whole.task, whole.targets):
                    raise ArchiveError(
                        f"labels of different kinds: {whole.task} {list(whole.targets) or ''} and {marks.task} "
                        f"{list(marks.targets) or ''}; give one table for all archives"
                    )
            elif marks.task != "none":
                whole.task, whole.targets = marks.task, marks.targets
            whole.values += marks.values
        return whole

    def take(self, rows: Sequence[int]) -> Marks:
        """The marks of some rows; row -1 has none."""
        return Marks(self.task, [self.values[row] if row >= 0 else None for row in rows], self.targets)

    def labels(self) -> Labels:
        if self.task == "none" or all(value is None for value in self.values):
            return Labels.none(len(self.values))
        if self.task == "classification":
            return Labels.of_classes([value if isinstance(value, str) else None for value in self.values])
        if self.task == "multilabel":
            return Labels.of_sets([map(str, value) if isinstance(value, tuple) else None for value in self.values])
        unknown = (np.nan,) * len(self.targets)
        return Labels.of_targets([unknown if value is None else value for value in self.values], self.targets)


def clean(name: str) -> str:
    """A member's name without leading ``./`` and ``/`` and without empty parts; ``..`` stays, as text.

    Examples
    --------
    >>> clean("./cat//a.jpg"), clean("/../cat/./a.jpg")
    ('cat/a.jpg', '../cat/a.jpg')
    """
    if name.startswith((".", "/")) or "//" in name or "/./" in name:
        return "/".join(part for part in name.split("/") if part not in ("", "."))
    return name


def cleaned(listing: Listing) -> Iterable[str]:
    """The names of a listing as paths within its source; those of a folder are clean as they are."""
    return listing.names if listing.source.kind in ("folder", "files") else map(clean, listing.names)


def by_folder(listings: Sequence[Listing]) -> Marks:
    """Classes from the first folder level of one argument's archives."""
    top = _one_top(listings) if all(listing.source.kind in ("tar", "zip") for listing in listings) else ""
    classes: dict[str, str] = {}  # millions of samples share the text of their few classes
    values: list[Mark] = []
    for listing in listings:
        for name in cleaned(listing):
            folder, slash, _ = name[len(top) :].partition("/")
            values.append((classes.get(folder) or classes.setdefault(folder, plain(folder))) if slash else None)
    return Marks("classification" if classes else "none", values)


def _one_top(listings: Sequence[Listing]) -> str:
    """The one top folder that holds everything and itself holds folders of images, with its ``/``; else nothing."""
    top, nested = "", False
    for row, name in enumerate(name for listing in listings for name in cleaned(listing)):
        if row == 0:
            top = name[: name.find("/") + 1]
        if not (top and name.startswith(top)):
            return ""
        nested = nested or "/" in name[len(top) :]
    return top if nested else ""


def by_note(listings: Sequence[Listing]) -> Marks | None:
    """Labels from sidecar files; None where no sample has one."""
    if not any(listing.notes for listing in listings):
        return None
    notes: list[Note | None] = []
    for listing in listings:
        used: set[str] = set()
        for name in listing.names:
            key = key_of(name)
            note = listing.notes.get(key)
            if isinstance(note, ArchiveError):
                raise note
            used.add(key)
            notes.append(note)
        for key, stray in listing.notes.items():
            if key not in used:
                listing.ignore(f"x{stray.suffix}" if isinstance(stray, Note) else "x.json")
        listing.notes.clear()
    if not any(notes):
        return None
    where = str(listings[0].source.path)
    numeric = any(note is not None and note.numeric for note in notes)
    return interpret(
        [None if note is None else note.value for note in notes], "target" if numeric else "label", where=where
    )


def interpret(values: Sequence[Value], column: str, *, where: str, task: Task | None = None) -> Marks:
    """Decide what one column of labels means, by the rules of `featpipe.archive`."""
    several = any(isinstance(value, tuple) for value in values)
    if task == "multilabel" or (task is None and (several or column.lower() == "labels")):
        return Marks("multilabel", [_several(value, where) for value in values])
    if several:
        raise ArchiveError(f"{where}: column {column!r} holds lists of labels, which is multilabel, not {task}")
    numbers = [number(value) for value in values]
    wrong = next((v for v, n in zip(values, numbers, strict=True) if n is None and v is not None), None)
    if task is None and wrong is None and any(value is not None for value in values):
        whole = all(n is None or n == int(n) for n in numbers)
        task = "regression" if column.lower() in _NUMERIC_COLUMNS or not whole else "classification"
    if task == "regression":
        if wrong is not None:
            raise ArchiveError(f"{where}: column {column!r} holds {str(wrong)[:60]!r}, expected numbers")
        return Marks("regression", [None if n is None else (n,) for n in numbers], (column,))
    if task == "none":
        return Marks.none(len(values))
    numeric = sum(n is not None for n in numbers)
    if task is None and numeric and wrong is not None and column.lower() in _NUMERIC_COLUMNS:
        raise ArchiveError(
            f"{where}: column {column!r} has {numeric} numbers and also {str(wrong)[:60]!r}; leave the cells empty "
            "that have no number, or name the column label if its values are classes"
        )
    return Marks("classification", [None if value is None else _class_name(value) for value in values])


def number(value: Value) -> float | None:
    """The finite number that a value is or spells, else None."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    return None


def _several(value: Value, where: str) -> tuple[str, ...] | None:
    if value is None or isinstance(value, tuple):
        return value
    if isinstance(value, float):
        raise ArchiveError(f"{where}: found the number {value} among lists of labels")
    names = (name.strip() for name in re.split("[;|]", str(value)))
    return tuple(name for name in names if name)


def _class_name(value: Value) -> str:
    whole = isinstance(value, float) and value == int(value)
    return plain(str(int(value) if whole and isinstance(value, float) else value))
