"""Scores from predictions and true labels, by scikit-learn's metrics wherever it has them."""

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

from featpipe.config import unknown_name_error
from featpipe.errors import ConfigError
from featpipe.metrics.intervals import BootstrapMetric, Floats, Statistic, compute_intervals, wilson_interval
from featpipe.metrics.reliability import calibration_error, compute_bin_gaps, compute_confidence
from featpipe.metrics.scores import Scores
from featpipe.metrics.weighted_bootstrap import (
    average_precision,
    make_column_mean_statistic,
    make_mean_statistic,
    mean_of_ratios,
    roc_auc,
    safe_divide,
    spearman_correlation,
    sum_of_squares,
)

# Scores that sort each column get fewer resamples where resamples × rows × columns would exceed this number, and no
# interval where fewer than the minimum remain.
_MAX_RANKED_SCORES = 60_000_000
_MIN_RESAMPLES = 100


def score(task: str, y: ArrayLike, predicted: ArrayLike, names: Sequence[str], **options: int) -> Scores:
    """Compute the scores of a task; see the function for that task.

    Parameters
    ----------
    task : {"classification", "multilabel", "regression"}
    y : array-like
    predicted : array-like
        Probabilities, or numbers for a regression.
    names : sequence of str
        Names of the classes or targets.
    **options
        ``bootstrap`` and ``seed``.
    """
    if task not in _SCORERS:
        raise unknown_name_error("task", task, _SCORERS)
    return _SCORERS[task](y, predicted, names, **options)


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
        If a label is not one of the classes, or shapes or probabilities are not as described.

    Notes
    -----
    The intervals are 2.5 and 97.5 percentiles over resamples of the rows with replacement, the same resamples
    for every score. An interval is extended to its value where the bias of a score (an average over rare classes) would
    leave the value outside. Proportions of rows (accuracy, top 5, precision and recall of a class) have Wilson's
    interval instead. So do other scores that are exactly 0 or 1 in every resample, where the bootstrap cannot estimate
    how rare errors are: they get the interval of a proportion with the same uncertainty. Thus every interval of two or
    more rows has a positive width. ``roc_auc`` and ``pr_auc`` sort each class: beyond 6e7 resamples × rows × classes
    they get fewer resamples, and no interval if fewer than 100 remain. A single row has no interval. Intervals measure
    the uncertainty from the choice of test rows, not from training.

    Examples
    --------
    >>> scores = score_classification(["cat", "dog"], [[0.9, 0.1], [0.4, 0.6]], ["cat", "dog"])
    >>> scores.metrics["accuracy"].value
    1.0
    """
    names = tuple(classes)
    class_codes, probability_matrix = _check_classes(y, probabilities, names)
    predicted = probability_matrix.argmax(axis=1)
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        class_codes, predicted, labels=np.arange(len(names)), zero_division=np.nan
    )
    confusion = _confusion_matrix(class_codes, predicted, len(names))
    return Scores(
        task="classification",
        n=len(class_codes),
        metrics=compute_intervals(
            _classification_metrics(class_codes, probability_matrix, bootstrap), len(class_codes), bootstrap, seed
        ),
        per_class=_make_class_rows(
            names,
            precision=precision,
            recall=recall,
            f1=f1,
            support=support,
            precision_interval=_wilson_intervals(confusion.diagonal(), confusion.sum(axis=0)),
            recall_interval=_wilson_intervals(confusion.diagonal(), confusion.sum(axis=1)),
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
    """Score multi-label probabilities; a label is predicted from a probability of 0.5.

    Parameters
    ----------
    y : array of shape (m, k)
        1 where the row has the label, 0 where not.
    probabilities : array of shape (m, k)
    classes : sequence of k str
    bootstrap, seed : int
        As for `score_classification`, whose notes on intervals apply; the score that sorts is
        ``mean_average_precision``.

    Returns
    -------
    Scores
        ``mean_average_precision`` (over labels that occur), ``micro_f1``, ``macro_f1`` (over labels that occur or
        are predicted), ``exact_match`` and ``calibration_error``.
    """
    names = tuple(classes)
    y_true, probability_matrix = _check_labels(y, probabilities, names)
    predicted_labels = probability_matrix >= 0.5
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        *_add_empty_column(y_true, predicted_labels), labels=np.arange(len(names)), zero_division=np.nan
    )
    true_positives = (y_true & predicted_labels).sum(axis=0)
    return Scores(
        task="multilabel",
        n=len(probability_matrix),
        metrics=compute_intervals(
            _multilabel_metrics(y_true, probability_matrix, bootstrap), len(probability_matrix), bootstrap, seed
        ),
        per_class=_make_class_rows(
            names,
            precision=precision,
            recall=recall,
            f1=f1,
            support=support,
            average_precision=_average_precisions(y_true, probability_matrix),
            precision_interval=_wilson_intervals(true_positives, predicted_labels.sum(axis=0)),
            recall_interval=_wilson_intervals(true_positives, support),
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
        Names of the targets.
    bootstrap, seed : int
        As for `score_classification`, whose notes on intervals apply; all scores here have an interval.

    Returns
    -------
    Scores
        ``mae``, ``rmse``, ``r2`` and ``spearman``, each the mean over the targets for which it is defined: a
        target that never changes has no ``r2``, and a constant prediction no ``spearman``.
    """
    names = tuple(names)
    y_true, y_predicted = _check_numbers(y, predictions, names)
    return Scores(
        task="regression",
        n=len(y_true),
        metrics=compute_intervals(_regression_metrics(y_true, y_predicted), len(y_true), bootstrap, seed),
        per_class=_make_class_rows(names, **_per_target(y_true, y_predicted)),
        confusion=None,
        classes=names,
    )


def compute_metrics(
    task: str, y: ArrayLike, predicted: ArrayLike, names: Sequence[str], bootstrap: int
) -> tuple[dict[str, BootstrapMetric], NDArray[np.bool_] | None]:
    """The scores of predictions, with the means to compute their intervals, and which rows are entirely right.

    Parameters as for `score`; the second result is None for a regression.
    """
    columns = tuple(names)
    if task == "regression":
        return _regression_metrics(*_check_numbers(y, predicted, columns)), None
    if task == "multilabel":
        y_true, probability_matrix = _check_labels(y, predicted, columns)
        return _multilabel_metrics(y_true, probability_matrix, bootstrap), (y_true == (probability_matrix >= 0.5)).all(
            axis=1
        )
    class_codes, probability_matrix = _check_classes(y, predicted, columns)
    return _classification_metrics(
        class_codes, probability_matrix, bootstrap
    ), class_codes == probability_matrix.argmax(axis=1)


def _confusion_matrix(class_codes: NDArray[np.intp], predicted: NDArray[np.intp], n_classes: int) -> NDArray[np.int64]:
    # scikit-learn's confusion_matrix warns about a single class even if there is only one.
    return (
        np.bincount(class_codes * n_classes + predicted, minlength=n_classes * n_classes)
        .reshape(n_classes, n_classes)
        .astype(np.int64)
    )


def _check_classes(y: ArrayLike, probabilities: ArrayLike, names: tuple[str, ...]) -> tuple[NDArray[np.intp], Floats]:
    probability_matrix = _check_matrix("probabilities", probabilities, names)
    class_codes = _encode_labels(y, names, len(probability_matrix))
    if probability_matrix.min() < 0 or abs(probability_matrix.sum(axis=1) - 1).max() > 1e-3:
        raise ConfigError("probabilities: a row is negative or does not sum to 1; pass probabilities, not scores")
    return class_codes, probability_matrix


def _check_labels(y: ArrayLike, probabilities: ArrayLike, names: tuple[str, ...]) -> tuple[NDArray[np.bool_], Floats]:
    probability_matrix = _check_matrix("probabilities", probabilities, names)
    y_true = _check_matrix("y", y, names)
    _check_same_length(len(y_true), len(probability_matrix))
    if not np.isin(y_true, (0, 1)).all():
        raise ConfigError("y: found a value that is neither 0 nor 1; leave out rows without labels (-1)")
    if probability_matrix.min() < 0 or probability_matrix.max() > 1:
        raise ConfigError("probabilities: found a value outside 0 to 1; pass probabilities, not scores")
    return y_true.astype(bool), probability_matrix


def _check_numbers(y: ArrayLike, predictions: ArrayLike, names: tuple[str, ...]) -> tuple[Floats, Floats]:
    y_true, y_predicted = _check_matrix("y", y, names), _check_matrix("predictions", predictions, names)
    _check_same_length(len(y_true), len(y_predicted))
    return y_true, y_predicted


def _classification_metrics(
    class_codes: NDArray[np.intp], probabilities: Floats, bootstrap: int
) -> dict[str, BootstrapMetric]:
    return {
        **_decision_metrics(class_codes, probabilities.argmax(axis=1), probabilities.shape[1]),
        **_probability_metrics(class_codes, probabilities),
        **_ranking_metrics(class_codes, probabilities, bootstrap),
    }


def _decision_metrics(
    class_codes: NDArray[np.intp], predicted: NDArray[np.intp], n_classes: int
) -> dict[str, BootstrapMetric]:
    rows = np.arange(len(class_codes))
    correct = (class_codes == predicted).astype(float)
    correct_by_class = csr_array((correct, (class_codes, rows)), shape=(n_classes, len(rows)))
    rows_by_class = csr_array((np.ones(len(rows)), (class_codes, rows)), shape=(n_classes, len(rows)))
    true_and_predicted_by_class = rows_by_class + csr_array(
        (np.ones(len(rows)), (predicted, rows)), shape=(n_classes, len(rows))
    )
    n_effective_rows = (
        _effective_rows(np.bincount(class_codes, minlength=n_classes)) if n_classes > 1 else 0.0
    )  # of a single class nothing can be wrong
    return {
        "accuracy": BootstrapMetric(
            sk.accuracy_score(class_codes, predicted),
            make_mean_statistic(correct),
            float(len(class_codes)) if n_classes > 1 else 0.0,
            is_share=n_classes > 1,
        ),
        "balanced_accuracy": BootstrapMetric(
            sk.recall_score(class_codes, predicted, labels=np.unique(class_codes), average="macro"),
            lambda counts: mean_of_ratios(correct_by_class @ counts, rows_by_class @ counts),
            n_effective_rows,
        ),
        "macro_f1": BootstrapMetric(
            sk.f1_score(class_codes, predicted, average="macro"),
            lambda counts: mean_of_ratios(2 * (correct_by_class @ counts), true_and_predicted_by_class @ counts),
            n_effective_rows,
        ),
    }


def _effective_rows(support: NDArray[np.integer[Any]]) -> float:
    """The number of rows of a proportion that is as uncertain as the mean of one proportion per class.

    The mean over k classes of n_c rows each has the variance of a proportion of ``k² / Σ 1/n_c`` rows, if all classes
    have the same error rate.
    """
    present_support = support[support > 0].astype(float)
    return float(len(present_support) ** 2 / (1 / present_support).sum()) if len(present_support) else 0.0


def _probability_metrics(class_codes: NDArray[np.intp], probabilities: Floats) -> dict[str, BootstrapMetric]:
    columns = np.arange(probabilities.shape[1])
    true_class_probability = np.take_along_axis(probabilities, class_codes[:, None], axis=1)
    metrics: dict[str, BootstrapMetric] = {}
    if len(columns) > 5:
        # Among equal probabilities the later class ranks first, as in scikit-learn.
        n_ranked_above = (
            (probabilities > true_class_probability)
            | ((probabilities == true_class_probability) & (columns > class_codes[:, None]))
        ).sum(axis=1)
        top5 = sk.top_k_accuracy_score(class_codes, probabilities, k=5, labels=columns)
        metrics["top5_accuracy"] = BootstrapMetric(
            top5, make_mean_statistic(n_ranked_above < 5), float(len(class_codes)), is_share=True
        )
    if len(columns) > 1:
        # Normalised only here: rounding in the division would break ties between scores that are ranked.
        row_sums = probabilities.sum(axis=1, keepdims=True)
        loss = -np.log(np.maximum(true_class_probability / row_sums, np.finfo(probabilities.dtype).eps))[:, 0]
        metrics["log_loss"] = BootstrapMetric(
            sk.log_loss(class_codes, probabilities / row_sums, labels=columns), make_mean_statistic(loss)
        )
        metrics["calibration_error"] = _calibration_metric(probabilities, class_codes)
    return metrics


def _calibration_metric(probabilities: Floats, y: NDArray[Any]) -> BootstrapMetric:
    confidence, correct = compute_confidence(probabilities, y)
    gaps = compute_bin_gaps(confidence, correct)
    return BootstrapMetric(
        calibration_error(probabilities, y), lambda counts: abs(gaps.T @ counts).sum(axis=0) / confidence.size
    )


def _ranking_metrics(
    class_codes: NDArray[np.intp], probabilities: Floats, bootstrap: int
) -> dict[str, BootstrapMetric]:
    present_classes, support = np.unique(class_codes, return_counts=True)
    if len(present_classes) < 2:
        return {}
    is_member, scores = class_codes[:, None] == present_classes, probabilities[:, present_classes]
    return {
        "roc_auc": _make_ranking_metric(
            sk.roc_auc_score, roc_auc, is_member, scores, bootstrap, _effective_rows(support)
        ),
        "pr_auc": _make_ranking_metric(
            sk.average_precision_score, average_precision, is_member, scores, bootstrap, _effective_rows(support)
        ),
    }


def _make_ranking_metric(
    metric: Any, bootstrap_statistic: Any, is_member: Any, scores: Floats, bootstrap: int, n_trials: float
) -> BootstrapMetric:
    """The mean over columns of a score that sorts each column, with a limited number of resamples."""
    column_values = np.array(
        [
            metric(is_member[:, column], scores[:, column]) if is_member[:, column].any() else np.nan
            for column in range(scores.shape[1])
        ]
    )
    max_resamples = min(bootstrap, _MAX_RANKED_SCORES // max(1, scores.size))
    statistic = (
        make_column_mean_statistic(bootstrap_statistic, is_member, scores)
        if max_resamples >= min(bootstrap, _MIN_RESAMPLES)
        else None
    )
    return BootstrapMetric(_mean_of_finite(column_values), statistic, n_trials, max_resamples=max_resamples)


def _multilabel_metrics(y_true: NDArray[np.bool_], probabilities: Floats, bootstrap: int) -> dict[str, BootstrapMetric]:
    predicted_labels = probabilities >= 0.5
    padded = _add_empty_column(y_true, predicted_labels)
    columns = np.arange(y_true.shape[1])
    f1_by_label = sk.f1_score(*padded, labels=columns, average=None, zero_division=np.nan)
    micro_f1 = sk.f1_score(*padded, labels=columns, average="micro", zero_division=np.nan)
    true_positives, true_and_predicted = (
        csr_array((y_true & predicted_labels).astype(float)),
        csr_array(y_true.astype(float) + predicted_labels),
    )
    support = y_true.sum(axis=0)
    n_effective_rows = _effective_rows(support)
    return {
        "mean_average_precision": _make_ranking_metric(
            sk.average_precision_score, average_precision, y_true, probabilities, bootstrap, n_effective_rows
        ),
        "micro_f1": BootstrapMetric(
            float(micro_f1),
            lambda counts: safe_divide(2 * (true_positives.sum(1) @ counts), true_and_predicted.sum(1) @ counts),
            float(support.sum()),
        ),
        "macro_f1": BootstrapMetric(
            _mean_of_finite(f1_by_label),
            lambda counts: mean_of_ratios(2 * (true_positives.T @ counts), true_and_predicted.T @ counts),
            n_effective_rows,
        ),
        "exact_match": BootstrapMetric(
            sk.accuracy_score(y_true, predicted_labels),
            make_mean_statistic((y_true == predicted_labels).all(axis=1)),
            float(len(y_true)),
            is_share=True,
        ),
        "calibration_error": _calibration_metric(probabilities, y_true),
    }


def _add_empty_column(*arrays: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Append an empty column, so that scikit-learn does not treat a single label as a binary problem."""
    return [np.pad(array, ((0, 0), (0, 1))) for array in arrays]


def _average_precisions(y_true: NDArray[np.bool_], probabilities: Floats) -> Floats:
    return np.array(
        [
            sk.average_precision_score(y_true[:, column], probabilities[:, column])
            if y_true[:, column].any()
            else np.nan
            for column in range(probabilities.shape[1])
        ]
    )


def _per_target(y_true: Floats, y_predicted: Floats) -> dict[str, NDArray[Any]]:
    true_varies = np.ptp(y_true, axis=0) > 0
    is_rankable = true_varies & (np.ptp(y_predicted, axis=0) > 0)
    columns = range(y_true.shape[1])
    return {
        "mae": sk.mean_absolute_error(y_true, y_predicted, multioutput="raw_values"),
        "rmse": sk.root_mean_squared_error(y_true, y_predicted, multioutput="raw_values"),
        "r2": np.array(
            [
                sk.r2_score(y_true[:, column], y_predicted[:, column]) if true_varies[column] else np.nan
                for column in columns
            ]
        ),
        "spearman": np.array(
            [
                spearmanr(y_true[:, column], y_predicted[:, column]).statistic if is_rankable[column] else np.nan
                for column in columns
            ]
        ),
    }


def _regression_metrics(y_true: Floats, y_predicted: Floats) -> dict[str, BootstrapMetric]:
    error = y_true - y_predicted
    y_centered = y_true - y_true.mean(axis=0)
    n_rows = len(y_true)
    statistics: dict[str, Statistic] = {
        "mae": make_mean_statistic(abs(error).mean(axis=1)),
        "rmse": lambda counts: np.sqrt((error**2).T @ counts / n_rows).mean(axis=0),
        "r2": lambda counts: 1 - mean_of_ratios((error**2).T @ counts, sum_of_squares(y_centered, counts)),
        "spearman": make_column_mean_statistic(spearman_correlation, y_true, y_predicted),
    }
    values = _per_target(y_true, y_predicted)
    return {name: BootstrapMetric(_mean_of_finite(values[name]), statistic) for name, statistic in statistics.items()}


def _wilson_intervals(n_correct: NDArray[Any], n_trials: NDArray[Any]) -> Floats:
    """The intervals of k proportions, shape (k, 2)."""
    return np.column_stack(wilson_interval(n_correct, n_trials))


def _check_matrix(argument: str, values: ArrayLike, names: tuple[str, ...]) -> Floats:
    """Copy to float64 of shape (m, columns); refuse other shapes, no rows, and values that are not finite."""
    array = np.array(values, dtype=np.float64)
    if array.ndim == 1 and len(names) == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] != len(names) or not array.size:
        raise ConfigError(
            f"{argument}: found shape {array.shape}, expected at least one row and a column for each of the "
            f"{len(names)} names"
        )
    nonfinite_rows = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(nonfinite_rows):
        raise ConfigError(
            f"{argument}: {len(nonfinite_rows)} of {len(array)} rows are not finite, "
            f"the first is row {nonfinite_rows[0]}; leave them out"
        )
    return array


def _encode_labels(y: ArrayLike, names: tuple[str, ...], n_rows: int) -> NDArray[np.intp]:
    labels = np.asarray(y, dtype=object).ravel().tolist()
    _check_same_length(len(labels), n_rows)
    class_codes = {name: column for column, name in enumerate(names)}
    codes = np.array([class_codes.get(str(label), -1) if label is not None else -1 for label in labels], np.intp)
    unknown_labels = Counter(repr(labels[row]) for row in np.flatnonzero(codes < 0))
    if unknown_labels == {"None": (codes < 0).sum()} and unknown_labels:
        raise ConfigError(f"y: {unknown_labels['None']} of {n_rows} rows have no label; leave them out")
    if len(unknown_labels) == 1:
        raise unknown_name_error(
            "class", str(labels[int(np.argmin(codes))]), names, f"({unknown_labels.total()} rows of y)"
        )
    if unknown_labels:
        listed_labels = ", ".join(name[:60] for name in list(unknown_labels)[:5])
        remainder_text = f" and {len(unknown_labels) - 5} more" if len(unknown_labels) > 5 else ""
        raise ConfigError(
            f"y: {unknown_labels.total()} of {n_rows} labels are not among the {len(names)} classes: "
            f"{listed_labels}{remainder_text}"
        )
    return codes


def _check_same_length(n_labels: int, n_predictions: int) -> None:
    if n_labels != n_predictions:
        raise ConfigError(f"found {n_labels} labels and {n_predictions} predictions, expected one for each row")


def _make_class_rows(names: tuple[str, ...], **columns: NDArray[Any]) -> list[dict[str, Any]]:
    rows = zip(*(np.asarray(column).tolist() for column in columns.values()), strict=True)
    return [{"name": name, **dict(zip(columns, row, strict=True))} for name, row in zip(names, rows, strict=True)]


def _mean_of_finite(values: NDArray[Any]) -> float:
    """The mean of the finite values; NaN if there are none."""
    finite_values = values[np.isfinite(values)]
    return float(finite_values.mean()) if len(finite_values) else math.nan


_SCORERS: dict[str, Callable[..., Scores]] = {
    "classification": score_classification,
    "multilabel": score_multilabel,
    "regression": score_regression,
}
