"""Accuracy on old and new classes, forgetting and backward transfer, on test images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn.pipeline import Pipeline

from featpipe.heads import LastLayer
from featpipe.incremental.last_layer_loss import Array
from featpipe.incremental.problem import IncrementalStep
from featpipe.metrics import Interval, compute_logits
from featpipe.runtime import nan_to_none
from featpipe.training import EmbeddingDataset

N_RESAMPLES = 1000
MAX_CURVE_POINTS = 60  # of a stored curve


@dataclass(eq=False)
class TrainingCurves:
    """Loss and accuracy on old and new classes by epoch, before the bias correction of some methods.

    Attributes
    ----------
    epochs : list of int
        0 is before the first step.
    train_loss : list of float
        On the training rows, with the loss terms of the method.
    old_loss, new_loss, old_accuracy, new_accuracy : list of float
        On test rows; NaN without test rows.
    """

    epochs: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    old_loss: list[float] = field(default_factory=list)
    new_loss: list[float] = field(default_factory=list)
    old_accuracy: list[float] = field(default_factory=list)
    new_accuracy: list[float] = field(default_factory=list)

    def add(self, loss: float, scores: Array, y: NDArray[np.int64], k_old: int) -> None:
        losses, is_correct = -log_softmax(scores, axis=1)[np.arange(len(y)), y], scores.argmax(axis=1) == y
        self.epochs.append(len(self.epochs))
        self.train_loss.append(loss)
        for rows, name in ((y < k_old, "old"), (y >= k_old, "new")):
            getattr(self, f"{name}_loss").append(_compute_mean(losses[rows]))
            getattr(self, f"{name}_accuracy").append(_compute_mean(is_correct[rows]))

    def downsample(self) -> TrainingCurves:
        """At most `MAX_CURVE_POINTS` epochs, denser at the beginning, the last included."""
        n = len(self.epochs)
        if n <= MAX_CURVE_POINTS:
            return self
        indices = np.unique(np.rint(np.geomspace(1, n, MAX_CURVE_POINTS)).astype(int) - 1).tolist()
        return TrainingCurves(**{name: [values[i] for i in indices] for name, values in vars(self).items()})


@dataclass(frozen=True, eq=False)
class MethodOutcome:
    """The scores of one method.

    Attributes
    ----------
    method : str
    old, new, all : Interval or None
        Accuracy on test rows of old, of new and of all classes; None without test rows.
    forgetting : Interval or None
        The best accuracy that the classes of an earlier step ever had, minus their accuracy now; mean over these steps.
    backward : Interval or None
        Backward transfer: the accuracy of the classes of an earlier step now, minus their accuracy right after that
        step; mean over these steps.
    steps : list of float
        Accuracy on the classes of each step.
    bytes : int
        Size of the retained data that the method needs.
    seconds : float
    curves : dict
        As in :class:`TrainingCurves`, for methods that have epochs.
    """

    method: str
    old: Interval | None
    new: Interval | None
    all: Interval | None
    forgetting: Interval | None
    backward: Interval | None
    steps: list[float] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0
    curves: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(nan_to_none(asdict(self)))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        intervals = {name: read_interval(record[name]) for name in ("old", "new", "all", "forgetting", "backward")}
        return cls(**{**record, **intervals})


def read_interval(record: Mapping[str, float | None] | None) -> Interval | None:
    """An interval from JSON, where None stands for NaN."""
    if record is None:
        return None
    return Interval(*(math.nan if (value := record[key]) is None else value for key in ("value", "low", "high")))


@dataclass(frozen=True, eq=False)
class MethodEvaluator:
    """Scores methods on test rows.

    Attributes
    ----------
    test : EmbeddingDataset
    step : IncrementalStep
    correct_before : ndarray of shape (m,), bool
        Which rows the old model predicts correctly; false for rows of new classes.
    step_numbers : ndarray of shape (m,), int
        The step in which each row's class was added; new classes have the last.
    step_records : sequence of mapping
        For each earlier step ``rows``, a digest of its test rows, and the ``best`` and ``learnt`` accuracy on them.
    """

    test: EmbeddingDataset
    step: IncrementalStep
    correct_before: NDArray[np.bool_]
    step_numbers: NDArray[np.int64]
    step_records: Sequence[Mapping[str, Any]]

    @classmethod
    def from_step(
        cls,
        test: EmbeddingDataset,
        step: IncrementalStep,
        classes_by_step: Sequence[Sequence[str]],
        step_records: Sequence[Mapping[str, Any]],
    ) -> MethodEvaluator:
        """From the classes that each earlier step added, and the records of these steps."""
        step_numbers = np.full(step.k, len(classes_by_step), np.int64)
        for number, names in enumerate(classes_by_step):
            step_numbers[np.isin(step.class_mapping.classes, names)] = number
        correct_before, is_old = np.zeros(len(test), bool), test.y < step.k_old
        if is_old.any():
            correct_before[is_old] = step.compute_old_scores(test.features[is_old]).argmax(axis=1) == test.y[is_old]
        return cls(test, step, correct_before, step_numbers[test.y], step_records)

    def make_epoch_callback(self, curves: TrainingCurves) -> Any:
        """A function that adds each epoch to ``curves``, for `fit_last_layer`."""
        X, step = self.test.features, self.step
        Z, old_scores = step.compute_features(X), step.compute_old_scores(X) / step.temperature

        def on_epoch(layer: LastLayer, loss: float) -> None:
            scores = layer.compute_scores(Z)
            if scores.shape[1] < step.k:
                scores = np.concatenate([old_scores, scores], axis=1)
            curves.add(loss, scores, self.test.y, step.k_old)

        return on_epoch

    def predict_correct(self, pipeline: Pipeline) -> NDArray[np.bool_]:
        """Which test rows a head predicts correctly, shape (m,)."""
        return np.asarray(compute_logits(pipeline, self.test.features).argmax(axis=1) == self.test.y)

    def make_outcome(self, method: str, is_correct: NDArray[np.bool_], **extra: Any) -> MethodOutcome:
        """The scores of a method with their intervals."""
        is_old, draws = self.test.y < self.step.k_old, _draw_bootstrap_counts(len(is_correct))
        return MethodOutcome(
            method,
            _make_accuracy_interval(is_correct, is_old, draws),
            _make_accuracy_interval(is_correct, ~is_old, draws),
            _make_accuracy_interval(is_correct, np.ones(len(is_correct), bool), draws),
            self._compute_mean_change(is_correct, draws, "best", -1.0) if is_old.any() else None,
            self._compute_mean_change(is_correct, draws, "learnt", 1.0) if is_old.any() else None,
            [
                _compute_mean(is_correct[self.step_numbers == number])
                for number in range(self.step_numbers.max(initial=-1) + 1)
            ],
            **extra,
        )

    def _compute_mean_change(
        self, is_correct: NDArray[np.bool_], draws: Array, reference: str, sign: float
    ) -> Interval:
        """Mean over earlier steps of the change in accuracy since then, on the same rows, with a paired interval."""
        values, samples = [], []
        for number in np.unique(self.step_numbers[self.test.y < self.step.k_old]).tolist():
            rows = self.step_numbers == number
            accuracy_before, record = _compute_mean(self.correct_before[rows]), self._find_step_record(number)
            earlier_change = 0.0 if record is None else accuracy_before - record[reference]
            if reference == "best":
                earlier_change = min(earlier_change, 0.0)  # the best is at least what it had before this step
            change = is_correct[rows].astype(float) - self.correct_before[rows]
            values.append(sign * (change.mean() + earlier_change))
            samples.append(sign * (_compute_resampled_means(change, draws[rows]) + earlier_change))
        is_defined = np.isfinite(samples)
        total = np.where(is_defined, samples, 0.0).sum(axis=0)
        return _make_percentile_interval(float(np.mean(values)), total / np.maximum(is_defined.sum(axis=0), 1))

    def _find_step_record(self, number: int) -> Mapping[str, Any] | None:
        record = self.step_records[number] if number < len(self.step_records) else {}
        is_comparable = record.get("best") is not None and record.get("rows") == self.digest_test_rows(number)
        return record if is_comparable else None

    def digest_test_rows(self, number: int) -> str:
        """A digest of the test rows of a step: accuracies are comparable only on the same rows."""
        digests = np.sort(self.test.keys[self.step_numbers == number])
        return hashlib.sha256(digests.tobytes()).hexdigest()[:16]

    def make_step_records(self, outcome: MethodOutcome) -> list[dict[str, Any]]:
        """The records of all steps, for later expansions."""
        records: list[dict[str, Any]] = []
        for number, accuracy in enumerate(outcome.steps):
            rows, record = self.step_numbers == number, self._find_step_record(number)
            if not rows.any():
                records.append({"rows": "", "learnt": None, "best": None, "now": None})
                continue
            is_earlier = (self.test.y[rows] < self.step.k_old).any()
            learnt = before = _compute_mean(self.correct_before[rows]) if is_earlier else accuracy
            best = max(accuracy, before)
            if record is not None:
                learnt, best = record["learnt"], max(best, record["learnt"], record["best"])
            digest = self.digest_test_rows(number)
            records.append({"rows": digest, "learnt": learnt, "best": best, "now": accuracy})
        return list(nan_to_none(records))

    def paired_difference(self, first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Interval:
        """Accuracy of one method minus that of another on all test rows, with a paired interval."""
        change, draws = first.astype(float) - second, _draw_bootstrap_counts(len(first))
        return _make_percentile_interval(float(change.mean()), change @ draws / len(change))


def _draw_bootstrap_counts(m: int) -> Array:
    """How often each of m rows is drawn in each of b resamples, shape (m, b)."""
    rng = np.random.default_rng(0)
    return rng.multinomial(m, np.full(m, 1 / m), N_RESAMPLES).T.astype(float) if m > 1 else np.zeros((m, 0))


def _make_accuracy_interval(is_correct: NDArray[np.bool_], rows: NDArray[np.bool_], draws: Array) -> Interval | None:
    if not rows.any():
        return None
    return _make_percentile_interval(
        _compute_mean(is_correct[rows]), _compute_resampled_means(is_correct[rows].astype(float), draws[rows])
    )


def _compute_resampled_means(values: Array, draws: Array) -> Array:
    """The mean of m values in each of b resamples, shape (b,); NaN for a resample without any of them."""
    sizes = draws.sum(axis=0)
    return np.divide(values @ draws, sizes, out=np.full(sizes.shape, np.nan), where=sizes > 0)


def _make_percentile_interval(value: float, samples: Array) -> Interval:
    samples = samples[np.isfinite(samples)]
    if not len(samples):
        return Interval(value)
    low, high = np.percentile(samples, (2.5, 97.5))
    return Interval(value, min(float(low), value), max(float(high), value))


def _compute_mean(values: NDArray[Any]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
