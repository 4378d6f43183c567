"""Labels of samples: classes, regression targets, or label sets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featpipe.errors import ConfigError

LabelTask = Literal["none", "classification", "regression", "multilabel"]


def order_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Sort class names; the order is the same on every machine.

    Names are sorted by Unicode code point, or by value if every name is a plain integer.

    Examples
    --------
    >>> order_classes(["dog", "Cat", "bird"]), order_classes(["10", "9"])
    (('Cat', 'bird', 'dog'), ('9', '10'))
    """
    unique = set(names)
    all_integers = all(name == "0" or re.fullmatch("[1-9][0-9]{0,17}", name) for name in unique)
    return tuple(sorted(unique, key=int if all_integers else None))


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of n samples.

    Attributes
    ----------
    task : {"none", "classification", "regression", "multilabel"}
    values : ndarray
        none: shape (n, 0), uint8. classification: class codes of shape (n,), int32, -1 for unlabelled samples.
        regression: targets of shape (n, t), float64, NaN for missing targets. multilabel: shape (n, k), int8, 1 or 0
        for each class, -1 in the whole row for unlabelled samples.
    classes : tuple of str
        Class names (classification, multilabel) or target names (regression).
    """

    task: LabelTask
    values: NDArray[Any]
    classes: tuple[str, ...] = ()

    @classmethod
    def unlabeled(cls, n: int) -> Labels:
        return cls("none", np.zeros((n, 0), np.uint8))

    @classmethod
    def from_class_names(cls, names: Sequence[str | None], classes: Sequence[str] | None = None) -> Labels:
        """Create from one class name per sample; None means unlabelled."""
        class_order = (
            tuple(classes) if classes is not None else order_classes(name for name in names if name is not None)
        )
        code_by_name = {name: i for i, name in enumerate(class_order)}
        try:
            codes = np.array([-1 if name is None else code_by_name[name] for name in names], np.int32)
        except KeyError as error:
            raise ConfigError(f"label {error.args[0]!r} is not one of the {len(class_order)} classes") from None
        return cls("classification", codes, class_order)

    @classmethod
    def from_label_sets(cls, label_sets: Sequence[Iterable[str] | None]) -> Labels:
        """Create from one set of labels per sample (multi-label); None means unlabelled."""
        unique_label_sets = [None if names is None else set(names) for names in label_sets]
        class_order = order_classes(name for names in unique_label_sets if names is not None for name in names)
        code_by_name = {name: i for i, name in enumerate(class_order)}
        values = np.zeros((len(unique_label_sets), len(class_order)), np.int8)
        for row, names in enumerate(unique_label_sets):
            if names is None:
                values[row] = -1
            else:
                values[row, [code_by_name[name] for name in names]] = 1
        return cls("multilabel", values, class_order)

    @classmethod
    def from_targets(cls, targets: NDArray[np.floating] | Sequence[object], names: Sequence[str]) -> Labels:
        """Create from numeric targets of shape (n,) or (n, t)."""
        values = np.asarray(targets, np.float64)
        return cls("regression", values.reshape(len(values), len(names)), tuple(names))

    def __len__(self) -> int:
        return len(self.values)

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which rows have a label, shape (n,)."""
        if self.task == "none":
            return np.zeros(len(self), bool)
        if self.task == "regression":
            return np.isfinite(self.values).all(axis=1)
        codes = self.values if self.task == "classification" else self.values.min(axis=1, initial=1)
        return np.asarray(codes >= 0)

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_] | Sequence[int]) -> Labels:
        return Labels(self.task, self.values[np.asarray(rows)], self.classes)

    @property
    def y(self) -> NDArray[Any]:
        """The labels in scikit-learn's form: class names (object array, None if unlabelled), targets, or a 0/1 matrix.

        A single target has shape (n,).
        """
        if self.task == "classification":
            names = np.array([*self.classes, None], dtype=object)
            return names[self.values]
        if self.task == "regression" and self.values.shape[1] == 1:
            return self.values[:, 0]
        return self.values

    def same_as(self, other: Labels) -> bool:
        return (
            self.task == other.task
            and self.classes == other.classes
            and np.array_equal(self.values, other.values, equal_nan=self.task == "regression")
        )
