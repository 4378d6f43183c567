"""The inputs of one call of `expand`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from featpipe.errors import ConfigError
from featpipe.incremental.dataset import ClassMapping, ExpansionData, find_similar_names
from featpipe.incremental.problem import ExpansionConfig, IncrementalStep
from featpipe.incremental.retention import fit_to_budget
from featpipe.model import STORED_DIGEST_BYTES, Model, RetentionPolicy
from featpipe.runtime import ProgressCallback

logger = logging.getLogger(__name__)

MIN_SIMILAR_SHARE = 0.9  # of the images of a new class that the model predicts as one old class, for a note
MIN_IMAGES_TO_COMPARE = 5


@dataclass(frozen=True, eq=False)
class ExpansionContext:
    """A model, the data to learn, and the settings.

    Attributes
    ----------
    model : Model
    class_mapping : ClassMapping
    data : ExpansionData
    settings : ExpansionConfig
    has_explicit_memory : bool
        Whether the user set the number of exemplars.
    budget : int or None
        Bytes that the new model may retain.
    policy : RetentionPolicy or None
        As the user requested; None for that of the old model.
    progress : callable
    """

    model: Model
    class_mapping: ClassMapping
    data: ExpansionData
    settings: ExpansionConfig
    has_explicit_memory: bool
    budget: int | None
    policy: RetentionPolicy | None
    progress: ProgressCallback

    def make_step(self, data: ExpansionData) -> IncrementalStep:
        """The problem that the methods solve, for some data."""
        model, replay_memory = self.model, self.model.kept
        if replay_memory is not None:
            replay_memory = replay_memory.remap_classes(self.class_mapping.new_codes, len(self.class_mapping.classes))
            has_all_old_rows = np.array_equal(
                np.bincount(data.old.y, minlength=len(replay_memory.counts)), replay_memory.counts
            )
        else:
            known_digests = np.unique(data.old.digests[:, :STORED_DIGEST_BYTES].copy().view("V16").ravel())
            has_all_old_rows = len(known_digests) == len(model.trained_on)
        settings = self.settings
        if not self.has_explicit_memory and replay_memory is not None and len(replay_memory.rows):
            settings = replace(settings, memory=int(np.bincount(replay_memory.codes).max()))
        if self.budget is not None:
            bytes_per_exemplar = 4 * len(self.class_mapping.classes) * data.new.X.shape[1]
            settings = replace(settings, memory=max(1, min(settings.memory, self.budget // bytes_per_exemplar)))
            replay_memory = None if replay_memory is None else fit_to_budget(replay_memory, self.budget)
        temperature = 1.0 if model.calibration is None else model.calibration.temperature
        return IncrementalStep(
            model.head, temperature, self.class_mapping, replay_memory, data.new, data.old, has_all_old_rows, settings
        )

    def get_past_steps(self) -> tuple[list[list[str]], list[Mapping[str, Any]]]:
        """The classes of each earlier step, by their new names, and the accuracies recorded for it."""
        steps = self.model.history.get("steps") or [{"classes": list(self.model.classes)}]
        classes_by_step: list[list[str]] = []
        seen_names: set[str] = set()
        for step in steps:
            remaining = [name for name in step["classes"] if name not in self.class_mapping.dropped]
            names = {self.class_mapping.renames.get(name, name) for name in remaining} - seen_names
            classes_by_step.append(
                [name for name in self.class_mapping.classes[: self.class_mapping.k_old] if name in names]
            )
            seen_names |= names
        return classes_by_step, list(self.model.history.get("judged") or [])

    def validate(self) -> None:
        """Raise if there is nothing to learn; warn about class names that look like mistakes."""
        data, class_mapping = self.data, self.class_mapping
        if not len(data.new) and not class_mapping.new_classes and not class_mapping.changes_old_classes:
            if len(data.old):
                raise ConfigError(
                    f"the model was trained on all {len(data.old):,} images, and no class is new: nothing to learn"
                )
            raise ConfigError("there is no labelled image to learn; give caches or archives, --drop or --merge")
        for new, old in find_similar_names(class_mapping.new_classes, class_mapping.classes[: class_mapping.k_old]):
            text = f"new class {new!r} looks like {old!r}; if they are the same, give --merge {old},{new}={old}"
            logger.warning(text)
        if not class_mapping.new_classes and len(data.new):
            logger.info(f"no new class: learning {len(data.new):,} new images of {class_mapping.k_old} known ones")
        self._note_similar_classes()

    def _note_similar_classes(self) -> None:
        new = self.data.new
        for code in range(self.class_mapping.k_old, len(self.class_mapping.classes)):
            X = new.X[new.y == code]
            if len(X) < MIN_IMAGES_TO_COMPARE:
                continue
            predicted, counts = np.unique(self.model.predict_features(X).astype(str), return_counts=True)
            if counts.max() >= MIN_SIMILAR_SHARE * len(X):
                share, name, old_name = (
                    counts.max() / len(X),
                    self.class_mapping.classes[code],
                    str(predicted[counts.argmax()]),
                )
                logger.info(f"the model predicts {old_name!r} for {share:.0%} of the images of the new class {name!r}")
