"""What twice the labels would bring: the learning curve of a model on the rows that it is judged by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe.errors import ConfigError
from featpipe.findings import LearningCurve, extrapolate_learning_curve
from featpipe.training.learning import compute_errors_by_size

if TYPE_CHECKING:
    from featpipe.evaluation.result import Evaluation

__all__ = ["compute_learning_curve"]

MIN_CURVE_SIZES = 3  # sizes, the whole included

Floats = NDArray[np.float64]


def compute_learning_curve(evaluation: Evaluation) -> LearningCurve | None:
    """None where the training images are not at hand, too few, or cannot be fitted anew as they were."""
    reference, model = evaluation.reference, evaluation.model
    if reference is None or model.history.get("streamed"):
        return None

    def row_errors(predicted: Floats) -> Floats:
        return _compute_row_errors(model.task, evaluation.truth, predicted, model.classes)

    try:
        sizes, errors = compute_errors_by_size(model, reference.cache, reference.rows, evaluation.features, row_errors)
    except (ConfigError, ValueError):  # scikit-learn's own refusals of few rows are ValueErrors
        return None
    if len(sizes) + 1 < MIN_CURVE_SIZES:
        return None
    full_size_errors = row_errors(evaluation.predicted)
    return extrapolate_learning_curve([*sizes, len(reference.rows)], np.vstack([errors, full_size_errors]))


def _compute_row_errors(task: str, truth: NDArray[Any], predicted: Floats, classes: tuple[str, ...]) -> Floats:
    """One error for each row: 0 or 1; the share of labels that are wrong; or the mean absolute error of the targets."""
    if task == "regression":
        shape = (len(truth), -1)
        return np.asarray(abs(np.reshape(truth, shape) - np.reshape(predicted, shape)).mean(axis=1), np.float64)
    if task == "multilabel":
        return np.asarray(((predicted >= 0.5) != (truth > 0)).mean(axis=1), np.float64)
    class_names = np.array(classes, dtype=object)
    return np.asarray(class_names[predicted.argmax(axis=1)] != truth, np.float64)
