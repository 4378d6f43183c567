"""How good predictions are, and how sure one can be of it: scores with bootstrap intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.stats import spearmanr
from sklearn import metrics as sk

from featpipe.errors import ConfigError
from featpipe.names import unknown

__all__ = [
    "METRICS",
    "Interval",
    "Scores",
    "number",
    "score_classification",
    "score_multilabel",
    "score_regression",
]

METRICS: dict[str, tuple[str, str]] = {
    "accuracy": ("Accuracy", "share of rows whose most probable class is the right one"),
    "balanced_accuracy": ("Balanced accuracy", "mean recall; every class counts the same"),
    "macro_f1": ("Macro F1", "mean F1; every class counts the same"),
    "top5_accuracy": ("Top-5 accuracy", "share of rows whose class is among the five most probable"),
    "log_loss": ("Log loss", "how much the probabilities are worth; lower is better"),
    "roc_auc": ("ROC AUC", "chance that a row of a class is ranked above one of another class"),
    "mean_average_precision": (
        "Mean average precision",
        "mean over labels; 1 when each ranks its rows first",
    ),
    "micro_f1": ("Micro F1", "F1 over all decisions at probability 0.5"),
    "exact_match": ("Exact match", "share of rows with every label right at probability 0.5"),
    "mae": ("Mean absolute error", "in the units of the target; lower is better"),
    "rmse": ("Root mean squared error", "in the units of the target; lower is better"),
    "r2": ("R²", "share of the variance explained; 0 is as good as always saying the mean"),
    "spearman": ("Spearman correlation", "whether the order is right, whatever the scale"),
}
"""What each score is called and what it means, for people."""

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]  # how often each row was drawn, (m, b) -> one value a resample, (b,)

# Draws that are held at once: m rows × b resamples of float64, some 16 MB.
_BLOCK = 2_000_000
# Beyond this many resamples × rows × columns, scores that sort each column go without an interval.
_RANKED = 400_000_000


@dataclass(frozen=True)
class Interval:
    """A score and its 95 % interval; ``low`` and ``high`` are NaN where there is none.

    Examples
    --------
    >>> print(Interval(0.92, 0.901, 0.9384))
    0.920 [0.901, 0.938]
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        """Whether there is an interval, not the value alone."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def __str__(self) -> str:
        bounds = f" [{number(self.low)}, {number(self.high)}]" if self.known else ""
        return number(self.value) + bounds


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of m predictions.

    Attributes
    ----------
    task : {"classification", "multilabel", "regression"}
    n : int
        Rows scored.
    metrics : dict of str to Interval
        By the names in `METRICS`, the most telling first. A score that these rows leave undefined is not
        there.
    per_class : list of dict
        For each class, in the order of `classes`: ``name``, ``precision``, ``recall``, ``f1``, ``support``,
        and ``average_precision`` for several labels. For each target of a regression: ``name``, ``mae``,
        ``rmse``, ``r2``, ``spearman``. NaN where undefined: the precision of a class never predicted.
    confusion : ndarray of shape (k, k), int64, or None
        Rows are true, columns predicted classes; for classification alone.
    classes : tuple of str
        Class or target names.
    """

    task: str
    n: int
    metrics: dict[str, Interval]
    per_class: list[dict[str, Any]]
    confusion: NDArray[np.int64] | None
    classes: tuple[str, ...]

    def confused(self, limit: int) -> list[tuple[str, str, int]]:
        """The pairs (true, predicted, rows) that are mixed up most often, at most `limit` of them."""
        if self.confusion is None:
            return []
        true, predicted = np.nonzero(self.confusion)
        pairs = [(self.confusion[t, p], t, p) for t, p in zip(true, predicted, strict=True) if t != p]
        pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
        return [(self.classes[t], self.classes[p], int(rows)) for rows, t, p in pairs[:limit]]

    def weakest(self) -> list[dict[str, Any]]:
        """`per_class` from the weakest to the strongest by F1 (R² of targets), the larger class first.

        Classes that have no rows, or no such score, come last.
        """
        score = "r2" if self.task == "regression" else "f1"

        def weakness(row: dict[str, Any]) -> tuple[bool, float, int]:
            rows = row.get("support", self.n)
            judged = rows > 0 and math.isfinite(row[score])
            return not judged, row[score] if judged else 0.0, -rows

        return sorted(self.per_class, key=weakness)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; what is undefined is None.

        The keys are stable: ``task``, ``n``, ``metrics`` (name to ``{"value", "low", "high"}``),
        ``per_class`` (as the attribute), ``confusion`` (list of rows, or None) and ``classes``.
        """
        return {
            "task": self.task,
            "n": self.n,
            "metrics": {
                name: {"value": _finite(s.value), "low": _finite(s.low), "high": _finite(s.high)}
                for name, s in self.metrics.items()
            },
            "per_class": [{key: _finite(value) for key, value in row.items()} for row in self.per_class],
            "confusion": None if self.confusion is None else self.confusion.tolist(),
            "classes": list(self.classes),
        }

    def table(self, limit: int = 20) -> str:
        """For the terminal: the scores with their intervals, then the `limit` weakest classes."""
        scores = [
            (METRICS[name][0], number(s.value), f"[{number(s.low)}, {number(s.high)}]" if s.known else "")
            for name, s in self.metrics.items()
        ]
        lines = [
            f"{_count(self.n, 'row')}, {_count(len(self.classes), _COLUMNS[self.task])}",
            "",
            *_aligned(scores),
        ]
        if len(self.classes) > 1:
            weakest = self.weakest()[:limit]
            header = tuple(_HEADINGS.get(key, key) for key in weakest[0])
            cells = [tuple(_cell(value) for value in row.values()) for row in weakest]
            lines += ["", *_aligned([header, *cells])]
            if len(self.classes) > limit:
                lines.append(f"the {limit} weakest of {len(self.classes):,}")
        return "\n".join(lines)


def score(task: str, y: ArrayLike, predicted: ArrayLike, names: Sequence[str], **how: int) -> Scores:
    """The scores that a task has; parameters as in the function for that task.

    Parameters
    ----------
    task : {"classification", "multilabel", "regression"}
    y : array-like
    predicted : array-like
        Probabilities, or numbers for a regression.
    names : sequence of str
        Of classes or targets.
    **how
        ``bootstrap`` and ``seed``.
    """
    if task not in _SCORERS:
        raise unknown("task", task, _SCORERS)
    return _SCORERS[task](y, predicted, names, **how)


def score_classification(
    y: ArrayLike,
    probabilities: ArrayLike,
    classes: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Scores:
    """Score class probabilities.

    Parameters
    ----------
    y : array of shape (m,)
        Class names.
    probabilities : array of shape (m, k)
        Each row sums to one; columns in the order of `classes`.
    classes : sequence of k str
    bootstrap : int
        Resamples for the intervals; 0 for none.
    seed : int

    Returns
    -------
    Scores
        ``accuracy``, ``balanced_accuracy``, ``macro_f1``, ``top5_accuracy`` (more than five classes),
        ``log_loss`` and ``roc_auc`` (one class against the rest). Averages run over the classes for which
        they are defined.

    Raises
    ------
    ConfigError
        If labels are none of the classes, or shapes or probabilities are not as described.

    Notes
    -----
    The intervals are 2.5 and 97.5 percentiles over resamples of the rows with replacement, the same resamples
    for every score; one is widened to its value where a biased score (an average over rare classes) would
    leave it outside. All scores have one, but for ``roc_auc`` when resamples × rows × classes exceed 4e8. A
    single row has none. They tell the chance in the choice of test rows, not the one in training; and when
    nothing is wrong the resamples cannot tell how rare mistakes are, so read an accuracy of exactly 1
    together with `Scores.n`.

    Examples
    --------
    >>> scores = score_classification(["cat", "dog"], [[0.9, 0.1], [0.4, 0.6]], ["cat", "dog"])
    >>> scores.metrics["accuracy"].value
    1.0
    """
    names = tuple(classes)
    p = _matrix("probabilities", probabilities, names)
    codes = _codes(y, names, len(p))
    if p.min() < 0 or abs(p.sum(axis=1) - 1).max() > 1e-3:
        raise ConfigError("probabilities: a row is negative or does not sum to 1; pass probabilities, not scores")
    predicted = p.argmax(axis=1)
    columns = np.arange(len(names))
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        codes, predicted, labels=columns, zero_division=np.nan
    )
    return Scores(
        task="classification",
        n=len(codes),
        metrics=_intervals(
            {
                **_decision_measures(codes, predicted, len(names)),
                **_probability_measures(codes, p),
                **_auc_measure(codes, p, bootstrap),
            },
            len(codes),
            bootstrap,
            seed,
        ),
        per_class=_per_class(names, precision=precision, recall=recall, f1=f1, support=support),
        confusion=_confusion(codes, predicted, len(names)),
        classes=names,
    )


def score_multilabel(
    y: ArrayLike,
    probabilities: ArrayLike,
    classes: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Scores:
    """Score the probabilities of several labels a row; a label is given from a probability of 0.5.

    Parameters
    ----------
    y : array of shape (m, k)
        1 where the row has the label, 0 where not.
    probabilities : array of shape (m, k)
    classes : sequence of k str
    bootstrap, seed : int
        As for `score_classification`, whose notes on intervals hold; here it is ``mean_average_precision``
        that goes without one when resamples × rows × labels exceed 4e8.

    Returns
    -------
    Scores
        ``mean_average_precision`` (over labels that some row has), ``micro_f1``, ``macro_f1`` (over labels
        that some row has or was given) and ``exact_match``.
    """
    names = tuple(classes)
    p = _matrix("probabilities", probabilities, names)
    true = _matrix("y", y, names)
    _same_length(len(true), len(p))
    if not np.isin(true, (0, 1)).all():
        raise ConfigError("y: found a value that is neither 0 nor 1; leave out rows without labels (-1)")
    if p.min() < 0 or p.max() > 1:
        raise ConfigError("probabilities: found a value outside 0 to 1; pass probabilities, not scores")
    truth, given = true.astype(bool), p >= 0.5
    # A column that nobody has keeps scikit-learn from reading a single label as a binary problem.
    padded = [np.pad(array, ((0, 0), (0, 1))) for array in (truth, given)]
    columns = np.arange(len(names))
    precision, recall, f1, support = sk.precision_recall_fscore_support(*padded, labels=columns, zero_division=np.nan)
    precisions = np.array(
        [sk.average_precision_score(truth[:, c], p[:, c]) if truth[:, c].any() else np.nan for c in columns]
    )
    micro = sk.f1_score(*padded, labels=columns, average="micro", zero_division=np.nan)
    both, either = csr_array((truth & given).astype(float)), csr_array(truth.astype(float) + given)
    exact = (truth == given).all(axis=1)
    measures = {
        "mean_average_precision": (
            _mean(precisions),
            _over_columns(_average_precision, truth, p) if p.size * bootstrap <= _RANKED else None,
        ),
        "micro_f1": (float(micro), lambda drawn: _ratio(2 * (both.sum(1) @ drawn), either.sum(1) @ drawn)),
        "macro_f1": (_mean(f1), lambda drawn: _mean_ratio(2 * (both.T @ drawn), either.T @ drawn)),
        "exact_match": (sk.accuracy_score(truth, given), _mean_of(exact)),
    }
    return Scores(
        task="multilabel",
        n=len(p),
        metrics=_intervals(measures, len(p), bootstrap, seed),
        per_class=_per_class(
            names, precision=precision, recall=recall, f1=f1, support=support, average_precision=precisions
        ),
        confusion=None,
        classes=names,
    )


def score_regression(
    y: ArrayLike,
    predictions: ArrayLike,
    names: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Scores:
    """Score predicted numbers.

    Parameters
    ----------
    y, predictions : array of shape (m,) or (m, t)
    names : sequence of t str
        Of the targets.
    bootstrap, seed : int
        As for `score_classification`, whose notes on intervals hold; all scores here have one.

    Returns
    -------
    Scores
        ``mae``, ``rmse``, ``r2`` and ``spearman``, each the mean over the targets for which it is defined: a
        target that never changes has no ``r2``, and a constant prediction no ``spearman``.
    """
    names = tuple(names)
    true, predicted = _matrix("y", y, names), _matrix("predictions", predictions, names)
    _same_length(len(true), len(predicted))
    error = true - predicted
    centred = true - true.mean(axis=0)
    varies = np.ptp(true, axis=0) > 0
    ranked = varies & (np.ptp(predicted, axis=0) > 0)
    columns = range(len(names))
    per_target = {
        "mae": sk.mean_absolute_error(true, predicted, multioutput="raw_values"),
        "rmse": sk.root_mean_squared_error(true, predicted, multioutput="raw_values"),
        "r2": np.array([sk.r2_score(true[:, c], predicted[:, c]) if varies[c] else np.nan for c in columns]),
        "spearman": np.array(
            [spearmanr(true[:, c], predicted[:, c]).statistic if ranked[c] else np.nan for c in columns]
        ),
    }
    m = len(true)
    statistics: dict[str, Statistic] = {
        "mae": _mean_of(abs(error).mean(axis=1)),
        "rmse": lambda drawn: np.sqrt((error**2).T @ drawn / m).mean(axis=0),
        "r2": lambda drawn: 1 - _mean_ratio((error**2).T @ drawn, _scatter(centred, drawn)),
        "spearman": _over_columns(_rank_correlation, true, predicted),
    }
    return Scores(
        task="regression",
        n=m,
        metrics=_intervals(
            {name: (_mean(per_target[name]), statistics[name]) for name in statistics}, m, bootstrap, seed
        ),
        per_class=_per_class(names, **per_target),
        confusion=None,
        classes=names,
    )


def _confusion(codes: NDArray[np.intp], predicted: NDArray[np.intp], k: int) -> NDArray[np.int64]:
    # scikit-learn's own warns of a single class, even where that is all there is.
    return np.bincount(codes * k + predicted, minlength=k * k).reshape(k, k).astype(np.int64)


Measure = tuple[float, Statistic | None]


def _decision_measures(codes: NDArray[np.intp], predicted: NDArray[np.intp], k: int) -> dict[str, Measure]:
    rows = np.arange(len(codes))
    right = (codes == predicted).astype(float)
    hits = csr_array((right, (codes, rows)), shape=(k, len(rows)))
    true = csr_array((np.ones(len(rows)), (codes, rows)), shape=(k, len(rows)))
    either = true + csr_array((np.ones(len(rows)), (predicted, rows)), shape=(k, len(rows)))
    return {
        "accuracy": (sk.accuracy_score(codes, predicted), _mean_of(right)),
        "balanced_accuracy": (
            sk.recall_score(codes, predicted, labels=np.unique(codes), average="macro"),
            lambda drawn: _mean_ratio(hits @ drawn, true @ drawn),
        ),
        "macro_f1": (
            sk.f1_score(codes, predicted, average="macro"),
            lambda drawn: _mean_ratio(2 * (hits @ drawn), either @ drawn),
        ),
    }


def _probability_measures(codes: NDArray[np.intp], p: Floats) -> dict[str, Measure]:
    columns = np.arange(p.shape[1])
    own = np.take_along_axis(p, codes[:, None], axis=1)
    measures: dict[str, Measure] = {}
    if len(columns) > 5:
        # Of equal probabilities the later class comes first, as in scikit-learn.
        above = ((p > own) | ((p == own) & (columns > codes[:, None]))).sum(axis=1)
        measures["top5_accuracy"] = (
            sk.top_k_accuracy_score(codes, p, k=5, labels=columns),
            _mean_of(above < 5),
        )
    if len(columns) > 1:
        # Only here, as the last bits of a division would break ties that the ranking scores must see.
        sums = p.sum(axis=1, keepdims=True)
        loss = -np.log(np.maximum(own / sums, np.finfo(p.dtype).eps))[:, 0]
        measures["log_loss"] = (sk.log_loss(codes, p / sums, labels=columns), _mean_of(loss))
    return measures


def _auc_measure(codes: NDArray[np.intp], p: Floats, bootstrap: int) -> dict[str, Measure]:
    present = np.unique(codes)
    if len(present) < 2:
        return {}
    member, scores = codes[:, None] == present, p[:, present]
    value = np.mean([sk.roc_auc_score(member[:, c], scores[:, c]) for c in range(len(present))])
    cheap = scores.size * bootstrap <= _RANKED
    return {"roc_auc": (float(value), _over_columns(_area, member, scores) if cheap else None)}


def _intervals(measures: Mapping[str, Measure], m: int, bootstrap: int, seed: int) -> dict[str, Interval]:
    """Percentile intervals of all scores over the same resamples."""
    if bootstrap < 0:
        raise ConfigError(f"bootstrap: found {bootstrap}, expected 0 (no intervals) or more")
    defined = {name: measure for name, measure in measures.items() if math.isfinite(measure[0])}
    found: dict[str, list[Floats]] = {name: [] for name in defined}
    for drawn in _resamples(m, bootstrap if m > 1 else 0, seed):
        for name, (_, statistic) in defined.items():
            if statistic is not None:
                found[name].append(statistic(drawn))
    return {name: _interval(float(value), found[name]) for name, (value, _) in defined.items()}


def _interval(value: float, found: list[Floats]) -> Interval:
    values = np.concatenate(found) if found else np.empty(0)
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(value)
    low, high = np.percentile(values, (2.5, 97.5))
    return Interval(value, min(float(low), value), max(float(high), value))


def _resamples(m: int, bootstrap: int, seed: int) -> Iterator[Floats]:
    """How often each of m rows is drawn, for b resamples at a time: arrays of shape (m, b)."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // m)
    for start in range(0, bootstrap, block):
        b = min(block, bootstrap - start)
        draws = rng.integers(0, m, (b, m)) + m * np.arange(b)[:, None]
        counts = np.bincount(draws.ravel(), minlength=b * m).reshape(b, m)
        yield np.ascontiguousarray(counts.T, np.float64)


def _mean_of(values: NDArray[Any]) -> Statistic:
    """The mean of one value for each row."""
    return lambda drawn: values.astype(float) @ drawn / len(values)


def _scatter(centred: Floats, drawn: Floats) -> Floats:
    """The sum of squares about the mean of each resample, shape (t, b); exactly zero where nothing varies."""
    squares = (centred**2).T @ drawn
    scatter = squares - (centred.T @ drawn) ** 2 / len(centred)
    return np.where(scatter > 1e-12 * squares, scatter, 0)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """The quotient; NaN where the denominator is zero."""
    nan = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=nan, where=denominator > 0)


def _mean_ratio(numerators: Floats, denominators: Floats) -> Floats:
    """The mean over classes, of shape (k, b), of the quotients that are defined."""
    defined = denominators > 0
    ratios = np.divide(numerators, denominators, out=np.zeros_like(numerators), where=defined)
    return _ratio(ratios.sum(axis=0), defined.sum(axis=0).astype(float))


def _over_columns(
    statistic: Callable[[NDArray[Any], Floats, Floats], Floats], true: NDArray[Any], scores: Floats
) -> Statistic:
    """The mean over columns of a statistic of one column, where it is defined."""

    def resampled(drawn: Floats) -> Floats:
        total, defined = np.zeros(drawn.shape[1]), np.zeros(drawn.shape[1])
        for column in range(scores.shape[1]):
            values = statistic(true[:, column], scores[:, column], drawn)
            total += np.nan_to_num(values)
            defined += np.isfinite(values)
        return _ratio(total, defined)

    return resampled


def _by_threshold(positive: NDArray[np.bool_], scores: Floats, drawn: Floats) -> tuple[Floats, Floats]:
    """Positive and all draws at each distinct score, the highest first: two arrays of shape (g, b)."""
    order = np.argsort(-scores, kind="stable")
    every = drawn[order]
    hits = every * positive[order, None]
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
    if len(starts) < len(order):
        return np.add.reduceat(hits, starts, axis=0), np.add.reduceat(every, starts, axis=0)
    return hits, every


def _area(positive: NDArray[np.bool_], scores: Floats, drawn: Floats) -> Floats:
    """The area under the ROC curve of each resample, shape (b,)."""
    hits, every = _by_threshold(positive, scores, drawn)
    held = hits.any(axis=1)
    misses = every - hits
    above = (np.cumsum(misses, axis=0) - misses / 2)[held]
    total_hits, total_misses = hits.sum(axis=0), misses.sum(axis=0)
    outranked = np.einsum("gb,gb->b", hits[held], above)
    return 1 - _ratio(outranked, total_hits * total_misses)


def _average_precision(positive: NDArray[np.bool_], scores: Floats, drawn: Floats) -> Floats:
    """The average precision of each resample, shape (b,)."""
    hits, every = _by_threshold(positive, scores, drawn)
    held = hits.any(axis=1)
    found, seen = np.cumsum(hits, axis=0)[held], np.cumsum(every, axis=0)[held]
    precision = np.divide(found, seen, out=np.zeros_like(found), where=seen > 0)
    return _ratio(np.einsum("gb,gb->b", hits[held], precision), hits.sum(axis=0))


def _rank_correlation(true: Floats, predicted: Floats, drawn: Floats) -> Floats:
    """Spearman's correlation of each resample, shape (b,)."""
    middle = (len(true) + 1) / 2
    a, b = _ranks(true, drawn) - middle, _ranks(predicted, drawn) - middle
    covariance = np.einsum("mb,mb,mb->b", drawn, a, b)
    return _ratio(covariance, np.sqrt((drawn * a * a).sum(axis=0) * (drawn * b * b).sum(axis=0)))


def _ranks(values: Floats, drawn: Floats) -> Floats:
    """The rank of each row within each resample, ties sharing their mean, shape (m, b)."""
    _, group = np.unique(values, return_inverse=True)
    member = csr_array((np.ones(len(values)), (group, np.arange(len(values)))))
    size = member @ drawn
    return (np.cumsum(size, axis=0) - (size - 1) / 2)[group]


def _matrix(what: str, values: ArrayLike, names: tuple[str, ...]) -> Floats:
    """A copy of shape (m, columns), finite, with at least one row and a name for each column."""
    array = np.array(values, dtype=np.float64)
    if array.ndim == 1 and len(names) == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] != len(names) or not array.size:
        raise ConfigError(
            f"{what}: found shape {array.shape}, expected at least one row and a column for each of the "
            f"{len(names)} names"
        )
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ConfigError(
            f"{what}: {len(bad)} of {len(array)} rows are not finite, the first is row {bad[0]}; leave them out"
        )
    return array


def _codes(y: ArrayLike, names: tuple[str, ...], m: int) -> NDArray[np.intp]:
    labels = np.asarray(y, dtype=object).ravel().tolist()
    _same_length(len(labels), m)
    code = {name: column for column, name in enumerate(names)}
    codes = np.array([code.get(str(label), -1) if label is not None else -1 for label in labels], np.intp)
    strange = Counter(repr(labels[row]) for row in np.flatnonzero(codes < 0))
    if strange == {"None": (codes < 0).sum()} and strange:
        raise ConfigError(f"y: {strange['None']} of {m} rows have no label; leave them out")
    if len(strange) == 1:
        raise unknown("class", str(labels[int(np.argmin(codes))]), names, f"({strange.total()} rows of y)")
    if strange:
        shown = ", ".join(name[:60] for name in list(strange)[:5])
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        raise ConfigError(f"y: {strange.total()} of {m} labels are none of the {len(names)} classes: {shown}{more}")
    return codes


def _same_length(rows: int, m: int) -> None:
    if rows != m:
        raise ConfigError(f"found {rows} labels and {m} predictions, expected one for each row")


def _per_class(names: tuple[str, ...], **columns: NDArray[Any]) -> list[dict[str, Any]]:
    rows = zip(*(np.asarray(column).tolist() for column in columns.values()), strict=True)
    return [{"name": name, **dict(zip(columns, row, strict=True))} for name, row in zip(names, rows, strict=True)]


def _mean(values: NDArray[Any]) -> float:
    """The mean of what is defined, NaN where nothing is."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else math.nan


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


_HEADINGS = {"name": "", "support": "rows", "average_precision": "avg. precision"}


_COLUMNS = {"classification": "class", "multilabel": "label", "regression": "target"}


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun.endswith("s") else "s")


def number(value: float) -> str:
    """A score as people read it: three decimals, or five digits of a large one.

    Examples
    --------
    >>> number(0.92), number(12345.6), number(math.nan)
    ('0.920', '12,346', '–')
    """
    if not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.5g}"


def _cell(value: object) -> str:
    """As the terminal may show it: control characters and direction marks of a name become escapes."""
    if isinstance(value, str):
        plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value[:60])
        return plain if len(plain) <= 32 and len(value) <= 32 else plain[:31] + "…"
    return number(value) if isinstance(value, float) else f"{value:,}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]).rstrip()
        for first, *rest in rows
    ]


_SCORERS: dict[str, Callable[..., Scores]] = {
    "classification": score_classification,
    "multilabel": score_multilabel,
    "regression": score_regression,
}
