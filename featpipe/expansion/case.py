"""One call of `expand`, with everything read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from featpipe.errors import ConfigError
from featpipe.expansion.arrivals import Arrivals
from featpipe.expansion.growth import Growth, near_names
from featpipe.expansion.memory import within
from featpipe.expansion.step import Settings, Step
from featpipe.kept import Keep
from featpipe.model import KEPT_DIGEST_BYTES, Model
from featpipe.progress import Progress, Tell

__all__ = ["Case"]

ALIKE = 0.9  # the share of a new class that the model calls by one old name, from which that is said
ALIKE_FROM = 5


@dataclass(frozen=True, eq=False)
class Case:
    """What is asked of a model.

    Attributes
    ----------
    model : Model
    growth : Growth
    rows : Arrivals
    settings : Settings
    memory_given : bool
        Whether somebody said how many embeddings to keep.
    budget : int or None
        Bytes that may be kept.
    keep : Keep or None
    tell : callable
    """

    model: Model
    growth: Growth
    rows: Arrivals
    settings: Settings
    memory_given: bool
    budget: int | None
    keep: Keep | None
    tell: Tell

    def note(self, text: str) -> None:
        self.tell(Progress("note", text))

    def step(self, rows: Arrivals) -> Step:
        """What the methods see of some rows."""
        model, kept = self.model, self.model.kept
        if kept is not None:
            kept = kept.regrouped(self.growth.place, len(self.growth.classes))
            whole = np.array_equal(np.bincount(rows.old.y, minlength=len(kept.counts)), kept.counts)
        else:
            known = np.unique(rows.old.digests[:, :KEPT_DIGEST_BYTES].copy().view("V16").ravel())
            whole = len(known) == len(model.trained_on)
        settings = self.settings
        if not self.memory_given and kept is not None and len(kept.rows):
            settings = replace(settings, memory=int(np.bincount(kept.codes).max()))
        if self.budget is not None:
            a_row = 4 * len(self.growth.classes) * rows.new.X.shape[1]
            settings = replace(settings, memory=max(1, min(settings.memory, self.budget // a_row)))
            kept = None if kept is None else within(kept, self.budget)
        T = 1.0 if model.calibration is None else model.calibration.temperature
        return Step(model.head, T, self.growth, kept, rows.new, rows.old, whole, settings)

    def past(self) -> tuple[list[list[str]], list[Mapping[str, Any]]]:
        """The classes of each earlier step, by their names after, and what is known of them."""
        steps = self.model.history.get("steps") or [{"classes": list(self.model.classes)}]
        came: list[list[str]] = []
        seen: set[str] = set()
        for one in steps:
            stays = [name for name in one["classes"] if name not in self.growth.dropped]
            names = {self.growth.names.get(name, name) for name in stays} - seen
            came.append([name for name in self.growth.classes[: self.growth.k_old] if name in names])
            seen |= names
        return came, list(self.model.history.get("judged") or [])

    def refuse_nothing(self) -> None:
        """Refuse what has nothing to learn; say what a person may not have meant."""
        rows, growth = self.rows, self.growth
        if not len(rows.new) and not growth.new and not growth.regroups:
            if len(rows.old):
                raise ConfigError(
                    f"the model was trained on all {len(rows.old):,} images, and no class is new: nothing to learn"
                )
            raise ConfigError("there is no labelled image to learn; give caches or archives, --drop or --merge")
        for new, old in near_names(growth.new, growth.classes[: growth.k_old]):
            text = f"class {new!r} is new beside {old!r}; if they are one, give --merge {old},{new}={old}"
            self.tell(Progress("warning", text))
        if not growth.new and len(rows.new):
            self.note(f"no new class: {len(rows.new):,} new images of {growth.k_old} known ones are learnt")
        self._say_what_looks_alike()

    def _say_what_looks_alike(self) -> None:
        new = self.rows.new
        for code in range(self.growth.k_old, len(self.growth.classes)):
            X = new.X[new.y == code]
            if len(X) < ALIKE_FROM:
                continue
            called, counts = np.unique(self.model.predict_features(X).astype(str), return_counts=True)
            if counts.max() >= ALIKE * len(X):
                share, name, old = counts.max() / len(X), self.growth.classes[code], str(called[counts.argmax()])
                self.note(f"{share:.0%} of the images of {name!r} are {old!r} to the model before")
