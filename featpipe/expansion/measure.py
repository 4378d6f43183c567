"""What an expansion did to old and to new classes, on images that were never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn.pipeline import Pipeline

from featpipe.calibration import logits_of
from featpipe.expansion.arrivals import Side
from featpipe.expansion.step import Step
from featpipe.heads.layer import LastLayer
from featpipe.scores import Interval

__all__ = ["Curves", "Judge", "Outcome"]

Array = NDArray[np.float64]

RESAMPLES = 1000
POINTS = 60  # of a curve, as it is stored


@dataclass(eq=False)
class Curves:
    """Old and new classes, epoch by epoch, as a method trains; before the offset that some methods add at the end.

    Attributes
    ----------
    epochs : list of int
        0 is before the first step.
    train_loss, old_loss, new_loss, old_accuracy, new_accuracy : list of float
        The first on the rows that are trained on, with what the method adds to it; NaN where there is no test row.
    """

    epochs: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    old_loss: list[float] = field(default_factory=list)
    new_loss: list[float] = field(default_factory=list)
    old_accuracy: list[float] = field(default_factory=list)
    new_accuracy: list[float] = field(default_factory=list)

    def add(self, loss: float, scores: Array, y: NDArray[np.int64], k_old: int) -> None:
        losses = -log_softmax(scores, axis=1)[np.arange(len(y)), y]
        right = scores.argmax(axis=1) == y
        self.epochs.append(len(self.epochs))
        self.train_loss.append(loss)
        for rows, name in ((y < k_old, "old"), (y >= k_old, "new")):
            getattr(self, f"{name}_loss").append(_mean(losses[rows]))
            getattr(self, f"{name}_accuracy").append(_mean(right[rows]))

    def thinned(self) -> Curves:
        """At most so many points, more of the first epochs, with the last."""
        n = len(self.epochs)
        if n <= POINTS:
            return self
        at = np.unique(np.rint(np.geomspace(1, n, POINTS)).astype(int) - 1).tolist()
        return Curves(**{name: [values[i] for i in at] for name, values in vars(self).items()})


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one method did.

    Attributes
    ----------
    method : str
    old, new, all : Interval or None
        Accuracy on test rows of old, of new and of all classes; None where there are none.
    forgetting : Interval or None
        How much accuracy the old classes lost, averaged over the steps in which they came: of each step the best that
        it ever had, less what it has now.
    backward : Interval or None
        Backward transfer: what each earlier step has now, less what it had when it was learnt.
    steps : list of float
        Accuracy on the classes of each step.
    bytes : int
        Of what the method needs the model to keep.
    seconds : float
    curves : dict
        Of :class:`Curves`, for methods that have epochs.
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
        """As JSON can hold it."""
        return _plain(asdict(self))

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """From `to_dict`."""
        found = dict(facts)
        for name in ("old", "new", "all", "forgetting", "backward"):
            value = found[name]
            found[name] = (
                None if value is None else Interval(*(_number(value[key]) for key in ("value", "low", "high")))
            )
        return cls(**found)


@dataclass(frozen=True, eq=False)
class Judge:
    """Test rows, and what was known of them before.

    Attributes
    ----------
    test : Side
    step : Step
    before : ndarray of shape (m,), bool
        Which the model had right before; false for rows of new classes.
    step_of : ndarray of shape (m,), int
        In which step each row's class came; new classes in the last.
    past : sequence of mapping
        For earlier steps what is known from when they were learnt: ``rows``, a digest of the test rows, and the
        ``best`` and ``learnt`` accuracy on them.
    """

    test: Side
    step: Step
    before: NDArray[np.bool_]
    step_of: NDArray[np.int64]
    past: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, test: Side, step: Step, came: Sequence[Sequence[str]], past: Sequence[Mapping[str, Any]]) -> Judge:
        """For the classes that came in each of the earlier steps."""
        k_old = step.k_old
        number = np.full(step.k, len(came), np.int64)
        for i, names in enumerate(came):
            number[[step.growth.classes.index(name) for name in names]] = i
        before = np.zeros(len(test), bool)
        old = test.y < k_old
        if old.any():
            before[old] = step.old_scores(test.X[old]).argmax(axis=1) == test.y[old]
        return cls(test, step, before, number[test.y], past)

    def watch(self, curves: Curves) -> Any:
        """A function that notes each epoch, for :func:`featpipe.expansion.objective.minimise`."""
        Z, fixed = self.step.features(self.test.X), self.step.old_scores(self.test.X) / self.step.temperature

        def note(layer: LastLayer, loss: float) -> None:
            scores = layer.scores(Z)
            if scores.shape[1] < self.step.k:
                scores = np.concatenate([fixed, scores], axis=1)
            curves.add(loss, scores, self.test.y, self.step.k_old)

        return note

    def right(self, pipeline: Pipeline) -> NDArray[np.bool_]:
        """Which test rows a head has right, shape (m,)."""
        return np.asarray(logits_of(pipeline, self.test.X).argmax(axis=1) == self.test.y)

    def outcome(self, method: str, right: NDArray[np.bool_], **more: Any) -> Outcome:
        """The row of the table for a method."""
        old = self.test.y < self.step.k_old
        drawn = _drawn(len(right))
        forgetting = backward = None
        if old.any():
            forgetting = self._over_steps(right, drawn, "best", -1.0)
            backward = self._over_steps(right, drawn, "learnt", 1.0)
        return Outcome(
            method,
            _accuracy(right, old, drawn),
            _accuracy(right, ~old, drawn),
            _accuracy(right, np.ones(len(right), bool), drawn),
            forgetting,
            backward,
            [_mean(right[self.step_of == number]) for number in range(int(self.step_of.max(initial=-1)) + 1)],
            **more,
        )

    def _over_steps(self, right: NDArray[np.bool_], drawn: Array, since: str, sign: float) -> Interval:
        """The mean over earlier steps of the change since then, on the same rows; with a paired interval."""
        values, samples = [], []
        for number in np.unique(self.step_of[self.test.y < self.step.k_old]).tolist():
            rows = self.step_of == number
            before = _mean(self.before[rows])
            known = self._known(number)
            since_then = 0.0 if known is None else before - known[since]
            if since == "best":
                since_then = min(since_then, 0.0)  # the best is at least what it had before this step
            change = right[rows].astype(float) - self.before[rows]
            values.append(sign * (change.mean() + since_then))
            weight = drawn[rows].sum(axis=0)
            mean = np.divide(change @ drawn[rows], weight, out=np.full(weight.shape, np.nan), where=weight > 0)
            samples.append(sign * (mean + since_then))
        drawn_at_all = np.isfinite(samples)
        total = np.where(drawn_at_all, samples, 0.0).sum(axis=0)
        return _interval(float(np.mean(values)), total / np.maximum(drawn_at_all.sum(axis=0), 1))

    def _known(self, number: int) -> Mapping[str, Any] | None:
        known = self.past[number] if number < len(self.past) else {}
        return known if known.get("rows") == self.rows_of(number) and known.get("best") is not None else None

    def rows_of(self, number: int) -> str:
        """A digest of the test rows of a step: accuracies on other rows cannot be compared."""
        digests = np.sort(self.test.keys[self.step_of == number])
        return hashlib.sha256(digests.tobytes()).hexdigest()[:16]

    def record(self, outcome: Outcome) -> list[dict[str, Any]]:
        """What is to be known later of each step."""
        found: list[dict[str, Any]] = []
        for number, now in enumerate(outcome.steps):
            rows, known = self.step_of == number, self._known(number)
            if not rows.any():
                found.append({"rows": "", "learnt": None, "best": None, "now": None})
                continue
            before = _mean(self.before[rows]) if (self.test.y[rows] < self.step.k_old).any() else now
            learnt = before if known is None else known["learnt"]
            best = max(now, before, learnt, 0.0 if known is None else known["best"])
            found.append({"rows": self.rows_of(number), "learnt": learnt, "best": best, "now": now})
        return _plain(found)

    def difference(self, one: NDArray[np.bool_], other: NDArray[np.bool_]) -> Interval:
        """Accuracy of one method less that of another, over all rows, paired."""
        drawn = _drawn(len(one))
        change = one.astype(float) - other
        return _interval(float(change.mean()), change @ drawn / len(change))


def _drawn(m: int) -> Array:
    """How often each of m rows is drawn in each resample, shape (m, b)."""
    rng = np.random.default_rng(0)
    return rng.multinomial(m, np.full(m, 1 / m), RESAMPLES).T.astype(float) if m > 1 else np.zeros((m, 0))


def _accuracy(right: NDArray[np.bool_], rows: NDArray[np.bool_], drawn: Array) -> Interval | None:
    if not rows.any():
        return None
    weight = drawn[rows].sum(axis=0)
    sampled = np.divide(
        right[rows].astype(float) @ drawn[rows], weight, out=np.full(weight.shape, np.nan), where=weight > 0
    )
    return _interval(_mean(right[rows]), sampled)


def _interval(value: float, sampled: Array) -> Interval:
    sampled = sampled[np.isfinite(sampled)]
    if not len(sampled):
        return Interval(value)
    low, high = np.percentile(sampled, (2.5, 97.5))
    return Interval(value, min(float(low), value), max(float(high), value))


def _mean(values: NDArray[Any]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _plain(value: Any) -> Any:
    """With None in the place of what is no number."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value
