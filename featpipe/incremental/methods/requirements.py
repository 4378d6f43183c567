"""What a method needs, and the reason if a step lacks it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from featpipe.heads import get_base_head
from featpipe.incremental.problem import IncrementalStep

Requirement = Callable[[IncrementalStep], str | None]  # the reason why a method is unavailable, None if it is available


def missing_last_layer(step: IncrementalStep) -> str | None:
    """For methods that train a last layer."""
    if step.layer is None:
        kind = type(get_base_head(step.pipeline[-1])).__name__
        return f"is for heads that end in a softmax layer (logistic, linear, mlp, keras), and this one is a {kind}"
    return missing_new_rows(step)


def missing_new_rows(step: IncrementalStep) -> str | None:
    """For methods that train on new images."""
    return None if len(step.new) else "learns from new images, and there are none"


def missing_new_class(step: IncrementalStep) -> str | None:
    """For methods that train new classes only."""
    return None if step.class_mapping.new_classes else "trains new classes alone, and there are none"


def missing_old_images(step: IncrementalStep) -> str | None:
    """For methods that train on old images: some of each class."""
    present = np.unique(step.old.y)
    missing_names = [name for code, name in enumerate(step.class_mapping.classes[: step.k_old]) if code not in present]
    if not missing_names:
        return None
    names = ", ".join(map(repr, missing_names[:3]))
    return f"needs the images that the model was trained on, and there are none of {names}; give the old cache too"


def missing_memory(part: str, keep_option: str) -> Requirement:
    """For methods that use a part of the model's retained data, or old images instead."""

    def find_missing(step: IncrementalStep) -> str | None:
        value = getattr(step.replay_memory, part, None)
        if value is not None and (part != "rows" or len(value)):
            return None
        if missing_old_images(step) is None and (step.has_all_old_rows or part == "rows"):
            return None
        return (
            f"needs {part} of the old classes, and the model keeps none: train it with --keep {keep_option}, "
            "or give the cache that it was trained on too"
        )

    return find_missing


def first_missing(*checks: Requirement) -> Requirement:
    """The first reason of several requirements."""
    return lambda step: next((reason for reason in (check(step) for check in checks) if reason), None)
