"""One expansion as the methods see it: the head before, what is remembered, and the rows that are new."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.pipeline import Pipeline

from featpipe.calibration import logits_of
from featpipe.errors import ConfigError
from featpipe.expansion.arrivals import Side
from featpipe.expansion.growth import Growth
from featpipe.heads import ranges
from featpipe.heads.grown import innermost, joined, layer_of, regrouped
from featpipe.heads.layer import LastLayer, penalty
from featpipe.kept import SELECTIONS, Kept, features_of
from featpipe.names import check_names

__all__ = ["Settings", "Step", "Watch"]

Array = NDArray[np.float64]
Watch = Callable[[LastLayer, float], None]


@dataclass(frozen=True)
class Settings:
    """What a person can set.

    Attributes
    ----------
    memory : int
        Embeddings of each old class that ``replay`` trains on.
    selection : {"herding", "random"}
        How they are chosen.
    epochs : int
        Most passes over the rows.
    temperature : float
        Of the soft targets of ``distill``.
    strength : float or None
        How much ``distill`` weighs the soft targets, or ``ewc`` the importances; each has a default.
    """

    memory: int = 20
    selection: str = "herding"
    epochs: int = 200
    temperature: float = 2.0
    strength: float | None = None

    @classmethod
    def of(cls, given: Mapping[str, object]) -> Self:
        """Checked.

        Raises
        ------
        ConfigError
            If a setting is unknown or out of range.
        """
        check_names("setting", given, [field.name for field in fields(cls)], "(of expand)")
        settings = cls(**given)  # type: ignore[arg-type]
        try:
            ranges.whole("memory", settings.memory, least=1)
            ranges.choice("selection", settings.selection, SELECTIONS)
            ranges.whole("epochs", settings.epochs, least=1)
            ranges.number("temperature", settings.temperature, above=0)
            if settings.strength is not None:
                ranges.number("strength", settings.strength, least=0)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return settings


@dataclass(frozen=True, eq=False)
class Step:
    """What a method is given.

    Attributes
    ----------
    pipeline : Pipeline
        The head before, with its scaler.
    temperature : float
        What its scores are divided by before they become probabilities.
    growth : Growth
    kept : Kept or None
        What is remembered of the rows it was trained on, in the classes after.
    new, old : Side
        Rows to learn, and rows that it was trained on, which may be none or some of them.
    whole : bool
        Whether ``old`` are all rows that it was trained on.
    settings : Settings
    """

    pipeline: Pipeline
    temperature: float
    growth: Growth
    kept: Kept | None
    new: Side
    old: Side
    whole: bool
    settings: Settings

    @property
    def k(self) -> int:
        return len(self.growth.classes)

    @property
    def k_old(self) -> int:
        return self.growth.k_old

    @cached_property
    def layer(self) -> LastLayer | None:
        """The last layer of the head before, in the classes after; None if it has none."""
        found = layer_of(self.pipeline[-1])
        return None if found is None else joined(found, self.growth.place, self.k_old)

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many images of each class the model was trained on, as far as that is known, shape (k,)."""
        return np.bincount(self.old.y, minlength=self.k) if self.kept is None else self.kept.counts

    def features(self, X: NDArray[Any]) -> Array:
        """What the last layer sees."""
        if not len(X):
            return np.zeros((0, X.shape[1] if self.layer is None else self.layer.W.shape[1]))
        return np.asarray(features_of(self.pipeline, X), np.float64)

    def old_scores(self, X: NDArray[Any]) -> Array:
        """What the head before says of rows, in the classes after, shape (m, k_old)."""
        if not len(X):
            return np.zeros((0, self.k_old))
        return regrouped(logits_of(self.pipeline, X), self.growth.place, self.k_old)

    @cached_property
    def ridge(self) -> float:
        return penalty(innermost(self.pipeline[-1]))

    def fresh(self) -> Pipeline:
        """An unfitted copy of the scaler and of the head that was trained first."""
        scaler, head = self.pipeline[0], clone(innermost(self.pipeline[-1]))
        weights = getattr(head, "class_weight", None)
        if isinstance(weights, Mapping):
            place = self.growth.place
            moved = {int(place[code]): weight for code, weight in weights.items() if place[code] >= 0}
            head.set_params(class_weight=moved)
        return Pipeline([("scale", scaler if scaler == "passthrough" else clone(scaler)), ("head", head)])

    def without(self, held: NDArray[np.bool_]) -> Step:
        """With fewer new rows."""
        return replace(self, new=self.new.take(~held))
