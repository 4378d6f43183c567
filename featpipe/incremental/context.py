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
    """A model, the data to train on, and the settings.

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
        """The input of the methods, for some data."""
        model, settings, k = self.model, self.settings, len(self.class_mapping.classes)
        memory = None if model.kept is None else model.kept.remap_classes(self.class_mapping.new_codes, k)
        if memory is not None:
            has_all_old_rows = np.array_equal(np.bincount(data.old.y, minlength=k), memory.counts)
        else:
            old_digests = data.old.digests[:, :STORED_DIGEST_BYTES].copy().view("V16")
            has_all_old_rows = len(np.unique(old_digests)) == len(model.trained_on)
        if not self.has_explicit_memory and memory is not None and len(memory.rows):
            settings = replace(settings, memory=int(np.bincount(memory.codes).max()))
        if self.budget is not None:
            max_exemplars = self.budget // (4 * k * data.new.X.shape[1])
            settings = replace(settings, memory=max(1, min(settings.memory, max_exemplars)))
            memory = None if memory is None else fit_to_budget(memory, self.budget)
        temperature = 1.0 if model.calibration is None else model.calibration.temperature
        return IncrementalStep(
            model.head, temperature, self.class_mapping, memory, data.new, data.old, has_all_old_rows, settings
        )

    def resolve_policy(self, method: str) -> RetentionPolicy:
        """The requested policy; else that of the old model, with the number of exemplars of the settings."""
        memory = self.model.kept
        if self.policy is not None:
            return self.policy
        if memory is None:
            return RetentionPolicy()
        n_rows = int(np.bincount(memory.codes).max(initial=0))
        if self.has_explicit_memory and (n_rows or method == "replay"):
            n_rows = self.settings.memory
        parts = (memory.statistics, memory.importances, memory.network)
        statistics, importances, network = (part is not None for part in parts)
        return RetentionPolicy(statistics, importances, n_rows, network)

    def get_past_steps(self) -> tuple[list[list[str]], list[Mapping[str, Any]]]:
        """The classes of each earlier step, by their new names, and the accuracies recorded for it."""
        steps, mapping = self.model.history.get("steps") or [{"classes": list(self.model.classes)}], self.class_mapping
        classes_by_step: list[list[str]] = []
        seen_names: set[str] = set()
        for step in steps:
            names = {mapping.renames.get(name, name) for name in step["classes"] if name not in mapping.dropped}
            names -= seen_names
            classes_by_step.append([name for name in mapping.classes[: mapping.k_old] if name in names])
            seen_names |= names
        return classes_by_step, list(self.model.history.get("judged") or [])

    def validate(self) -> None:
        """Raise if there is nothing to learn; warn about class names that look like mistakes."""
        data, class_mapping = self.data, self.class_mapping
        if not len(data.new) and not class_mapping.new_classes and not class_mapping.changes_old_classes:
            if len(data.old):
                raise ConfigError(
                    f"the model was trained on all {len(data.old):,} images, and no class is new; give new images"
                )
            raise ConfigError("there are no labelled images to train on; give caches or archives, --drop or --merge")
        for new, old in find_similar_names(class_mapping.new_classes, class_mapping.classes[: class_mapping.k_old]):
            text = f"new class {new!r} looks like {old!r}; if they are the same, give --merge {old},{new}={old}"
            logger.warning(text)
        if not class_mapping.new_classes and len(data.new):
            logger.info(
                f"no new class: training on {len(data.new):,} new images of the {class_mapping.k_old} known classes"
            )
        self._note_similar_classes()

    def _note_similar_classes(self) -> None:
        new, mapping = self.data.new, self.class_mapping
        for code in range(mapping.k_old, len(mapping.classes)):
            X = new.features[new.y == code]
            if len(X) < MIN_IMAGES_TO_COMPARE:
                continue
            names, counts = np.unique(self.model.predict_features(X).astype(str), return_counts=True)
            share, old_name = counts.max() / len(X), str(names[counts.argmax()])
            if share >= MIN_SIMILAR_SHARE:
                text = f"{share:.0%} of the images of the new class {mapping.classes[code]!r}"
                logger.info(f"the model predicts {old_name!r} for {text}")
