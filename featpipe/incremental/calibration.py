"""Probabilities, prediction sets and the out-of-distribution score of an expanded model, from held-out rows."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.incremental.context import ExpansionContext
from featpipe.incremental.last_layer_loss import Array
from featpipe.incremental.methods import METHODS
from featpipe.incremental.problem import IncrementalStep
from featpipe.incremental.select_method import SelectedMethod
from featpipe.metrics import Calibration, compute_logits, cross_calibrate, fit_temperature
from featpipe.model import ConformalPredictor, Model, NoveltyScorer, Uncertainty
from featpipe.training import EmbeddingDataset, fit_novelty, update_novelty

logger = logging.getLogger(__name__)

N_CROSS_FITTING_FOLDS = 3
MIN_CALIBRATION_ROWS = 10  # to fit a temperature
DEFAULT_RIDGE_TEMPERATURE = 0.25  # with too few rows to fit it; fits gave 0.2 on tiles and 0.3 on emoji


def calibrate(context: ExpansionContext, selected: SelectedMethod) -> tuple[Calibration | None, Uncertainty]:
    """The temperature of the new model, its out-of-distribution score and its predictor of prediction sets."""
    held_out_scores = _score_held_out(context, selected)
    calibration = _fit_calibration(context.model, selected, held_out_scores)
    conformal = _fit_conformal(context, selected, held_out_scores, calibration)
    return calibration, Uncertainty(_update_novelty(context, selected), conformal)


def _score_held_out(context: ExpansionContext, selected: SelectedMethod) -> HeldOutScores:
    """Logits of held-out rows, if temperature or prediction sets need them."""
    method, old_model = selected.method, context.model
    if len(context.data.calibration):
        return score_halves(selected.pipeline, context.data.calibration)
    needs_sets = method == "joint" and old_model.trust.conformal is not None
    needs_temperature = method != "frozen-old" and _needs_temperature(old_model, selected)  # frozen-old keeps its own
    if method not in METHODS or not (needs_sets or needs_temperature):
        return HeldOutScores()
    logger.info("calibrating by cross-fitting")
    return cross_fit_scores(selected.step, method)


def _needs_temperature(model: Model, selected: SelectedMethod) -> bool:
    had_temperature = model.calibration is not None and model.calibration.temperature != 1
    return had_temperature or not hasattr(selected.pipeline, "predict_proba")


def _fit_calibration(model: Model, selected: SelectedMethod, held_out_scores: HeldOutScores) -> Calibration | None:
    """A temperature from held-out rows, else that of the old head; prior corrections were for the old classes."""
    if not _needs_temperature(model, selected):
        return None
    if held_out_scores.temperature is not None:
        return Calibration(held_out_scores.temperature)
    if model.calibration is not None and selected.get_head_name(model) == model.head_name:
        return Calibration(model.calibration.temperature)
    return None if hasattr(selected.pipeline, "predict_proba") else Calibration(DEFAULT_RIDGE_TEMPERATURE)


def _fit_conformal(
    context: ExpansionContext, selected: SelectedMethod, held_out_scores: HeldOutScores, calibration: Calibration | None
) -> ConformalPredictor | None:
    if len(held_out_scores):
        return held_out_scores.make_conformal(selected.step.k, calibrate=calibration is not None)
    # A merged class has at least the probability of each of its parts, so the coverage of the sets does not fall.
    is_regrouping = selected.method == "regroup" and not context.class_mapping.dropped
    return context.model.trust.conformal if is_regrouping and context.model.calibration == calibration else None


def _update_novelty(context: ExpansionContext, selected: SelectedMethod) -> NoveltyScorer | None:
    """Update the out-of-distribution score with the new images; images of dropped classes remain in distribution."""
    novelty, step = context.model.trust.novelty, selected.step
    if novelty is None:
        return None
    if selected.method == "joint" and step.has_all_old_rows:
        return fit_novelty(step.old + step.new, "classification")
    return update_novelty(novelty, len(context.model.trained_on), step.new)


@dataclass(frozen=True, eq=False)
class HeldOutScores:
    """Logits of held-out rows, in parts.

    Attributes
    ----------
    logits : tuple of ndarray of shape (m, k)
    labels : tuple of ndarray of shape (m,)
        Class codes.
    """

    logits: tuple[Array, ...] = ()
    labels: tuple[NDArray[np.int64], ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.labels))

    @cached_property
    def temperature(self) -> float | None:
        """The temperature with the lowest log loss; None for too few rows."""
        if len(self) < MIN_CALIBRATION_ROWS:
            return None
        return fit_temperature(np.concatenate(self.logits), np.concatenate(self.labels))

    def make_conformal(self, k: int, *, calibrate: bool) -> ConformalPredictor | None:
        """The predictor of sets of k classes, each part calibrated on the others; None if a class has no row."""
        labels = np.concatenate(self.labels)
        if len(np.unique(labels)) < k or len(self.labels) < 2:
            return None
        if calibrate:
            probabilities = cross_calibrate(self.logits, self.labels)
        else:
            probabilities = [Calibration().compute_probabilities(logits) for logits in self.logits]
        return ConformalPredictor.from_predictions(np.concatenate(probabilities), labels)


def score_halves(pipeline: Any, dataset: EmbeddingDataset) -> HeldOutScores:
    """Logits of rows that the head was not fitted on, in two parts of every other row."""
    halves = [dataset.take(np.arange(start, len(dataset), 2)) for start in (0, 1) if len(dataset) > start]
    return HeldOutScores(
        tuple(compute_logits(pipeline, half.features) for half in halves), tuple(half.y for half in halves)
    )


def cross_fit_scores(step: IncrementalStep, method: str) -> HeldOutScores:
    """Logits by cross-fitting: each third of the rows is scored by a head that was fitted on the rest.

    ``joint`` does not use the old head, so its old rows are held out too. Rows of classes with fewer images than
    folds are never held out, since no training image might remain.
    """
    dataset = step.old + step.new if method == "joint" else step.new
    candidates = dataset.take(dataset.count_images()[dataset.y] >= N_CROSS_FITTING_FOLDS)
    if len(candidates) < MIN_CALIBRATION_ROWS:
        return HeldOutScores()
    logits, labels = [], []
    for _, test_rows in candidates.drop_absent_classes().make_folds(N_CROSS_FITTING_FOLDS):
        held_out = candidates.take(test_rows)
        old = step.old.exclude_duplicates_of(held_out) if method == "joint" else step.old
        pipeline = METHODS[method].fit(replace(step, old=old, new=step.new.exclude_duplicates_of(held_out)), None)
        logits.append(compute_logits(pipeline, held_out.features))
        labels.append(held_out.y)
    return HeldOutScores(tuple(logits), tuple(labels))
