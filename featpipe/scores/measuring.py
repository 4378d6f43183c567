"""Predictions and what is true → scores. Scikit-learn's metrics, wherever it has one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.stats import spearmanr
from sklearn import metrics as sk

from featpipe.errors import ConfigError
from featpipe.names import unknown
from featpipe.reliability import bin_gaps, calibration_error, judged
from featpipe.scores.interval import Floats, Measure, Statistic, intervals, share_interval
from featpipe.scores.resampled import (
    area,
    average_precision,
    mean_of,
    mean_ratio,
    over_columns,
    rank_correlation,
    ratio,
    scatter,
)
from featpipe.scores.table import Scores

__all__ = ["measures", "score", "score_classification", "score_multilabel", "score_regression"]

# Resamples × rows × columns of scores that sort each column: beyond it they get fewer, and none below the least.
_RANKED = 60_000_000
_LEAST_RESAMPLES = 100


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
        ``log_loss``, ``calibration_error``, and ``roc_auc`` and ``pr_auc`` (one class against the rest). Averages run
        over the classes for which they are defined.

    Raises
    ------
    ConfigError
        If labels are none of the classes, or shapes or probabilities are not as described.

    Notes
    -----
    The intervals are 2.5 and 97.5 percentiles over resamples of the rows with replacement, the same resamples
    for every score; one is widened to its value where a biased score (an average over rare classes) would
    leave it outside. Shares of rows (accuracy, top 5, precision and recall of a class) have Wilson's interval instead.
    So have other scores that are exactly 0 or 1 in every resample, which cannot tell how rare mistakes are: that of a
    share of as many rows as would leave the score as uncertain. Thus no interval of several rows has no width.
    ``roc_auc`` and ``pr_auc`` sort each class: beyond 6e7 resamples × rows × classes they get fewer resamples, and
    below 100 none. A single row has no interval. Intervals tell the chance in the choice of test rows, not the one in
    training.

    Examples
    --------
    >>> scores = score_classification(["cat", "dog"], [[0.9, 0.1], [0.4, 0.6]], ["cat", "dog"])
    >>> scores.metrics["accuracy"].value
    1.0
    """
    names = tuple(classes)
    codes, p = _checked_classes(y, probabilities, names)
    predicted = p.argmax(axis=1)
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        codes, predicted, labels=np.arange(len(names)), zero_division=np.nan
    )
    confusion = _confusion(codes, predicted, len(names))
    return Scores(
        task="classification",
        n=len(codes),
        metrics=intervals(_of_classes(codes, p, bootstrap), len(codes), bootstrap, seed),
        per_class=_per_class(
            names,
            precision=precision,
            recall=recall,
            f1=f1,
            support=support,
            precision_interval=_bounds(confusion.diagonal(), confusion.sum(axis=0)),
            recall_interval=_bounds(confusion.diagonal(), confusion.sum(axis=1)),
        ),
        confusion=confusion,
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
        As for `score_classification`, whose notes on intervals hold; here it is ``mean_average_precision`` that sorts.

    Returns
    -------
    Scores
        ``mean_average_precision`` (over labels that some row has), ``micro_f1``, ``macro_f1`` (over labels
        that some row has or was given), ``exact_match`` and ``calibration_error``.
    """
    names = tuple(classes)
    truth, p = _checked_labels(y, probabilities, names)
    given = p >= 0.5
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        *_padded(truth, given), labels=np.arange(len(names)), zero_division=np.nan
    )
    hits = (truth & given).sum(axis=0)
    return Scores(
        task="multilabel",
        n=len(p),
        metrics=intervals(_of_labels(truth, p, bootstrap), len(p), bootstrap, seed),
        per_class=_per_class(
            names,
            precision=precision,
            recall=recall,
            f1=f1,
            support=support,
            average_precision=_precisions(truth, p),
            precision_interval=_bounds(hits, given.sum(axis=0)),
            recall_interval=_bounds(hits, support),
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
    true, predicted = _checked_numbers(y, predictions, names)
    return Scores(
        task="regression",
        n=len(true),
        metrics=intervals(_of_numbers(true, predicted), len(true), bootstrap, seed),
        per_class=_per_class(names, **_per_target(true, predicted)),
        confusion=None,
        classes=names,
    )


def measures(
    task: str, y: ArrayLike, predicted: ArrayLike, names: Sequence[str], bootstrap: int
) -> tuple[dict[str, Measure], NDArray[np.bool_] | None]:
    """The scores of some predictions with what is needed for their intervals, and which rows are right as a whole.

    Parameters as for `score`; which rows are right is None for a regression.
    """
    columns = tuple(names)
    if task == "regression":
        return _of_numbers(*_checked_numbers(y, predicted, columns)), None
    if task == "multilabel":
        truth, p = _checked_labels(y, predicted, columns)
        return _of_labels(truth, p, bootstrap), (truth == (p >= 0.5)).all(axis=1)
    codes, p = _checked_classes(y, predicted, columns)
    return _of_classes(codes, p, bootstrap), codes == p.argmax(axis=1)


def _confusion(codes: NDArray[np.intp], predicted: NDArray[np.intp], k: int) -> NDArray[np.int64]:
    # scikit-learn's own warns of a single class, even where that is all there is.
    return np.bincount(codes * k + predicted, minlength=k * k).reshape(k, k).astype(np.int64)


def _checked_classes(y: ArrayLike, probabilities: ArrayLike, names: tuple[str, ...]) -> tuple[NDArray[np.intp], Floats]:
    p = _matrix("probabilities", probabilities, names)
    codes = _codes(y, names, len(p))
    if p.min() < 0 or abs(p.sum(axis=1) - 1).max() > 1e-3:
        raise ConfigError("probabilities: a row is negative or does not sum to 1; pass probabilities, not scores")
    return codes, p


def _checked_labels(y: ArrayLike, probabilities: ArrayLike, names: tuple[str, ...]) -> tuple[NDArray[np.bool_], Floats]:
    p = _matrix("probabilities", probabilities, names)
    true = _matrix("y", y, names)
    _same_length(len(true), len(p))
    if not np.isin(true, (0, 1)).all():
        raise ConfigError("y: found a value that is neither 0 nor 1; leave out rows without labels (-1)")
    if p.min() < 0 or p.max() > 1:
        raise ConfigError("probabilities: found a value outside 0 to 1; pass probabilities, not scores")
    return true.astype(bool), p


def _checked_numbers(y: ArrayLike, predictions: ArrayLike, names: tuple[str, ...]) -> tuple[Floats, Floats]:
    true, predicted = _matrix("y", y, names), _matrix("predictions", predictions, names)
    _same_length(len(true), len(predicted))
    return true, predicted


def _of_classes(codes: NDArray[np.intp], p: Floats, bootstrap: int) -> dict[str, Measure]:
    return {
        **_decisions(codes, p.argmax(axis=1), p.shape[1]),
        **_probabilities(codes, p),
        **_areas(codes, p, bootstrap),
    }


def _decisions(codes: NDArray[np.intp], predicted: NDArray[np.intp], k: int) -> dict[str, Measure]:
    rows = np.arange(len(codes))
    right = (codes == predicted).astype(float)
    hits = csr_array((right, (codes, rows)), shape=(k, len(rows)))
    true = csr_array((np.ones(len(rows)), (codes, rows)), shape=(k, len(rows)))
    either = true + csr_array((np.ones(len(rows)), (predicted, rows)), shape=(k, len(rows)))
    alike = _trials(np.bincount(codes, minlength=k)) if k > 1 else 0.0  # of a single class nothing can be wrong
    return {
        "accuracy": Measure(
            sk.accuracy_score(codes, predicted), mean_of(right), float(len(codes)) if k > 1 else 0.0, share=k > 1
        ),
        "balanced_accuracy": Measure(
            sk.recall_score(codes, predicted, labels=np.unique(codes), average="macro"),
            lambda drawn: mean_ratio(hits @ drawn, true @ drawn),
            alike,
        ),
        "macro_f1": Measure(
            sk.f1_score(codes, predicted, average="macro"),
            lambda drawn: mean_ratio(2 * (hits @ drawn), either @ drawn),
            alike,
        ),
    }


def _trials(support: NDArray[np.integer[Any]]) -> float:
    """Rows that would leave a share as uncertain as the mean of the shares of some classes is.

    The variance of the mean over k classes of n rows each is that of ``k² / Σ 1/n`` rows, all being right as often.
    """
    present = support[support > 0].astype(float)
    return float(len(present) ** 2 / (1 / present).sum()) if len(present) else 0.0


def _probabilities(codes: NDArray[np.intp], p: Floats) -> dict[str, Measure]:
    columns = np.arange(p.shape[1])
    own = np.take_along_axis(p, codes[:, None], axis=1)
    found: dict[str, Measure] = {}
    if len(columns) > 5:
        # Of equal probabilities the later class comes first, as in scikit-learn.
        above = ((p > own) | ((p == own) & (columns > codes[:, None]))).sum(axis=1)
        top5 = sk.top_k_accuracy_score(codes, p, k=5, labels=columns)
        found["top5_accuracy"] = Measure(top5, mean_of(above < 5), float(len(codes)), share=True)
    if len(columns) > 1:
        # Only here, as the last bits of a division would break ties that the ranking scores must see.
        sums = p.sum(axis=1, keepdims=True)
        loss = -np.log(np.maximum(own / sums, np.finfo(p.dtype).eps))[:, 0]
        found["log_loss"] = Measure(sk.log_loss(codes, p / sums, labels=columns), mean_of(loss))
        found["calibration_error"] = _calibration(p, codes)
    return found


def _calibration(p: Floats, y: NDArray[Any]) -> Measure:
    confidence, right = judged(p, y)
    gaps = bin_gaps(confidence, right)
    return Measure(calibration_error(p, y), lambda drawn: abs(gaps.T @ drawn).sum(axis=0) / confidence.size)


def _areas(codes: NDArray[np.intp], p: Floats, bootstrap: int) -> dict[str, Measure]:
    present, support = np.unique(codes, return_counts=True)
    if len(present) < 2:
        return {}
    member, scores = codes[:, None] == present, p[:, present]
    return {
        "roc_auc": _ranking(sk.roc_auc_score, area, member, scores, bootstrap, _trials(support)),
        "pr_auc": _ranking(sk.average_precision_score, average_precision, member, scores, bootstrap, _trials(support)),
    }


def _ranking(value: Any, resampled: Any, member: Any, scores: Floats, bootstrap: int, trials: float) -> Measure:
    """The mean over columns of a score that sorts each, with as many resamples as can be afforded."""
    values = np.array([value(member[:, c], scores[:, c]) if member[:, c].any() else np.nan for c in _columns(scores)])
    most = min(bootstrap, _RANKED // max(1, scores.size))
    statistic = over_columns(resampled, member, scores) if most >= min(bootstrap, _LEAST_RESAMPLES) else None
    return Measure(_mean(values), statistic, trials, resamples=most)


def _columns(values: NDArray[Any]) -> range:
    return range(values.shape[1])


def _of_labels(truth: NDArray[np.bool_], p: Floats, bootstrap: int) -> dict[str, Measure]:
    given = p >= 0.5
    padded = _padded(truth, given)
    columns = np.arange(truth.shape[1])
    f1 = sk.f1_score(*padded, labels=columns, average=None, zero_division=np.nan)
    micro = sk.f1_score(*padded, labels=columns, average="micro", zero_division=np.nan)
    both, either = csr_array((truth & given).astype(float)), csr_array(truth.astype(float) + given)
    support = truth.sum(axis=0)
    alike = _trials(support)
    return {
        "mean_average_precision": _ranking(sk.average_precision_score, average_precision, truth, p, bootstrap, alike),
        "micro_f1": Measure(
            float(micro), lambda drawn: ratio(2 * (both.sum(1) @ drawn), either.sum(1) @ drawn), float(support.sum())
        ),
        "macro_f1": Measure(_mean(f1), lambda drawn: mean_ratio(2 * (both.T @ drawn), either.T @ drawn), alike),
        "exact_match": Measure(
            sk.accuracy_score(truth, given), mean_of((truth == given).all(axis=1)), float(len(truth)), share=True
        ),
        "calibration_error": _calibration(p, truth),
    }


def _padded(*arrays: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """With a column that nobody has, which keeps scikit-learn from reading a single label as a binary problem."""
    return [np.pad(array, ((0, 0), (0, 1))) for array in arrays]


def _precisions(truth: NDArray[np.bool_], p: Floats) -> Floats:
    return np.array(
        [sk.average_precision_score(truth[:, c], p[:, c]) if truth[:, c].any() else np.nan for c in _columns(p)]
    )


def _per_target(true: Floats, predicted: Floats) -> dict[str, NDArray[Any]]:
    varies = np.ptp(true, axis=0) > 0
    ranked = varies & (np.ptp(predicted, axis=0) > 0)
    columns = _columns(true)
    return {
        "mae": sk.mean_absolute_error(true, predicted, multioutput="raw_values"),
        "rmse": sk.root_mean_squared_error(true, predicted, multioutput="raw_values"),
        "r2": np.array([sk.r2_score(true[:, c], predicted[:, c]) if varies[c] else np.nan for c in columns]),
        "spearman": np.array(
            [spearmanr(true[:, c], predicted[:, c]).statistic if ranked[c] else np.nan for c in columns]
        ),
    }


def _of_numbers(true: Floats, predicted: Floats) -> dict[str, Measure]:
    error = true - predicted
    centred = true - true.mean(axis=0)
    m = len(true)
    statistics: dict[str, Statistic] = {
        "mae": mean_of(abs(error).mean(axis=1)),
        "rmse": lambda drawn: np.sqrt((error**2).T @ drawn / m).mean(axis=0),
        "r2": lambda drawn: 1 - mean_ratio((error**2).T @ drawn, scatter(centred, drawn)),
        "spearman": over_columns(rank_correlation, true, predicted),
    }
    values = _per_target(true, predicted)
    return {name: Measure(_mean(values[name]), statistic) for name, statistic in statistics.items()}


def _bounds(right: NDArray[Any], trials: NDArray[Any]) -> Floats:
    """The intervals of some shares, shape (k, 2)."""
    return np.column_stack(share_interval(right, trials))


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


_SCORERS: dict[str, Callable[..., Scores]] = {
    "classification": score_classification,
    "multilabel": score_multilabel,
    "regression": score_regression,
}
