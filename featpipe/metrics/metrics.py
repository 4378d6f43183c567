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

from featpipe.config import TASKS, unknown_name_error
from featpipe.errors import ConfigError
from featpipe.metrics.calibration import calibration_error, compute_bin_gaps, compute_confidence
from featpipe.metrics.intervals import BootstrapMetric, Floats, Statistic, compute_intervals, wilson_interval
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


def score(
    task: str,
    y: ArrayLike,
    predicted: ArrayLike,
    names: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Scores:
    """Compute the scores of predictions, with confidence intervals.

    Parameters
    ----------
    task : {"classification", "multilabel", "regression"}
    y : array-like
        Class names of shape (m,); or 0 and 1 for each label, shape (m, k); or targets of shape (m,) or (m, t).
    predicted : array-like
        Probabilities of shape (m, k), for classes with rows that sum to one; or numbers of the shape of y. A label is
        predicted from a probability of 0.5.
    names : sequence of str
        Names of the k classes or labels, or of the t targets, in the order of the columns.
    bootstrap : int
        Resamples for the intervals; 0 for none.
    seed : int

    Returns
    -------
    Scores
        - classification: ``accuracy``, ``balanced_accuracy``, ``macro_f1``, ``top5_accuracy`` (more than five classes),
          ``log_loss``, ``calibration_error``, and ``roc_auc`` and ``pr_auc`` (one class against the rest).
        - multilabel: ``mean_average_precision`` (over labels that occur), ``micro_f1``, ``macro_f1`` (over labels that
          occur or are predicted), ``exact_match`` and ``calibration_error``.
        - regression: ``mae``, ``rmse``, ``r2`` and ``spearman``. A target that never changes has no ``r2``, and a
          constant prediction no ``spearman``.

        Averages run over the classes or targets for which they are defined.

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
    more rows has a positive width. Scores that sort each class (``roc_auc``, ``pr_auc``, ``mean_average_precision``)
    get fewer resamples beyond 6e7 resamples × rows × classes, and no interval if fewer than 100 remain. A single row
    has no interval. Intervals measure the uncertainty from the choice of test rows, not from training.

    Examples
    --------
    >>> scores = score("classification", ["cat", "dog"], [[0.9, 0.1], [0.4, 0.6]], ["cat", "dog"])
    >>> scores.metrics["accuracy"].value
    1.0
    """
    columns = tuple(names)
    y_true, y_predicted = _check_predictions(task, y, predicted, columns)
    confusion = None
    if task == "regression":
        class_scores = _score_targets(y_true, y_predicted)
    elif task == "multilabel":
        class_scores = _score_labels(y_true, y_predicted)
    else:
        confusion = _count_confusions(y_true, y_predicted)
        class_scores = _score_classes(y_true, y_predicted, confusion)
    metrics = _make_metrics(task, y_true, y_predicted, bootstrap)
    rows = zip(*(np.asarray(values).tolist() for values in class_scores.values()), strict=True)
    return Scores(
        task=task,
        n=len(y_true),
        metrics=compute_intervals(metrics, len(y_true), bootstrap, seed),
        per_class=[
            {"name": name, **dict(zip(class_scores, row, strict=True))} for name, row in zip(columns, rows, strict=True)
        ],
        confusion=confusion,
        classes=columns,
    )


def compute_metrics(
    task: str, y: ArrayLike, predicted: ArrayLike, names: Sequence[str], bootstrap: int
) -> tuple[dict[str, BootstrapMetric], NDArray[np.bool_] | None]:
    """The scores of predictions, with the statistics for their intervals, and which rows are predicted correctly.

    Parameters as for `score`; the second result is None for a regression.
    """
    y_true, y_predicted = _check_predictions(task, y, predicted, tuple(names))
    is_correct: NDArray[np.bool_] | None = None
    if task == "classification":
        is_correct = y_true == y_predicted.argmax(axis=1)
    elif task == "multilabel":
        is_correct = (y_true == (y_predicted >= 0.5)).all(axis=1)
    return _make_metrics(task, y_true, y_predicted, bootstrap), is_correct


def _make_metrics(task: str, y: NDArray[Any], predicted: Floats, bootstrap: int) -> dict[str, BootstrapMetric]:
    if task == "regression":
        return _make_regression_metrics(y, predicted)
    if task == "multilabel":
        return _make_multilabel_metrics(y, predicted, bootstrap)
    return {
        **_make_decision_metrics(y, predicted.argmax(axis=1), predicted.shape[1]),
        **_make_probability_metrics(y, predicted),
        **_make_ranking_metrics(y, predicted, bootstrap),
    }


def _check_predictions(
    task: str, y: ArrayLike, predicted: ArrayLike, names: tuple[str, ...]
) -> tuple[NDArray[Any], Floats]:
    """Class codes, a 0/1 matrix of type bool, or targets; and the predictions as a matrix."""
    if task not in TASKS:
        raise unknown_name_error("task", task, TASKS)
    if task == "regression":
        y_true, y_predicted = _check_matrix("y", y, names), _check_matrix("predictions", predicted, names)
        _check_same_length(len(y_true), len(y_predicted))
        return y_true, y_predicted
    probabilities = _check_matrix("probabilities", predicted, names)
    if task == "classification":
        class_codes = _encode_labels(y, names, len(probabilities))
        if probabilities.min() < 0 or abs(probabilities.sum(axis=1) - 1).max() > 1e-3:
            raise ConfigError(
                "probabilities: found a row that is negative or does not sum to 1; pass probabilities, not scores"
            )
        return class_codes, probabilities
    y_true = _check_matrix("y", y, names)
    _check_same_length(len(y_true), len(probabilities))
    if not np.isin(y_true, (0, 1)).all():
        raise ConfigError("y: found a value that is neither 0 nor 1; leave out rows without labels (-1)")
    if probabilities.min() < 0 or probabilities.max() > 1:
        raise ConfigError("probabilities: found a value outside 0 to 1; pass probabilities, not scores")
    return y_true.astype(bool), probabilities


def _count_confusions(class_codes: NDArray[np.intp], probabilities: Floats) -> NDArray[np.int64]:
    # scikit-learn's confusion_matrix warns about a single class even if there is only one.
    k = probabilities.shape[1]
    counts = np.bincount(class_codes * k + probabilities.argmax(axis=1), minlength=k * k)
    return counts.reshape(k, k).astype(np.int64)


def _score_classes(
    class_codes: NDArray[np.intp], probabilities: Floats, confusion: NDArray[np.int64]
) -> dict[str, Any]:
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        class_codes, probabilities.argmax(axis=1), labels=np.arange(len(confusion)), zero_division=np.nan
    )
    return {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "support": support,
        "precision_interval": np.column_stack(wilson_interval(confusion.diagonal(), confusion.sum(axis=0))),
        "recall_interval": np.column_stack(wilson_interval(confusion.diagonal(), confusion.sum(axis=1))),
    }


def _score_labels(y_true: NDArray[np.bool_], probabilities: Floats) -> dict[str, Any]:
    predicted_labels = probabilities >= 0.5
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        *_add_empty_column(y_true, predicted_labels), labels=np.arange(y_true.shape[1]), zero_division=np.nan
    )
    true_positives = (y_true & predicted_labels).sum(axis=0)
    return {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "support": support,
        "average_precision": _score_columns(sk.average_precision_score, y_true, probabilities, y_true.any(axis=0)),
        "precision_interval": np.column_stack(wilson_interval(true_positives, predicted_labels.sum(axis=0))),
        "recall_interval": np.column_stack(wilson_interval(true_positives, support)),
    }


def _score_targets(y_true: Floats, y_predicted: Floats) -> dict[str, Any]:
    true_varies = np.ptp(y_true, axis=0) > 0
    is_rankable = true_varies & (np.ptp(y_predicted, axis=0) > 0)
    return {
        "mae": sk.mean_absolute_error(y_true, y_predicted, multioutput="raw_values"),
        "rmse": sk.root_mean_squared_error(y_true, y_predicted, multioutput="raw_values"),
        "r2": _score_columns(sk.r2_score, y_true, y_predicted, true_varies),
        "spearman": _score_columns(lambda a, b: spearmanr(a, b).statistic, y_true, y_predicted, is_rankable),
    }


def _score_columns(metric: Callable[..., float], y_true: NDArray[Any], predicted: Floats, is_defined: Any) -> Floats:
    """A score of each column; NaN where it is not defined."""
    return np.array(
        [
            metric(y_true[:, column], predicted[:, column]) if is_defined[column] else np.nan
            for column in range(predicted.shape[1])
        ]
    )


def _make_decision_metrics(
    class_codes: NDArray[np.intp], predicted: NDArray[np.intp], n_classes: int
) -> dict[str, BootstrapMetric]:
    rows = np.arange(len(class_codes))
    correct = (class_codes == predicted).astype(float)
    correct_by_class = csr_array((correct, (class_codes, rows)), shape=(n_classes, len(rows)))
    rows_by_class = csr_array((np.ones(len(rows)), (class_codes, rows)), shape=(n_classes, len(rows)))
    true_and_predicted_by_class = rows_by_class + csr_array(
        (np.ones(len(rows)), (predicted, rows)), shape=(n_classes, len(rows))
    )
    # With a single class no error is possible.
    n_trials, n_effective_rows = 0.0, 0.0
    if n_classes > 1:
        n_trials, n_effective_rows = (
            float(len(rows)),
            _count_effective_rows(np.bincount(class_codes, minlength=n_classes)),
        )
    return {
        "accuracy": BootstrapMetric(
            sk.accuracy_score(class_codes, predicted), make_mean_statistic(correct), n_trials, is_share=n_classes > 1
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


def _count_effective_rows(support: NDArray[np.integer[Any]]) -> float:
    """The number of rows of a proportion that is as uncertain as the mean of one proportion per class.

    The mean over k classes of n_c rows each has the variance of a proportion of ``k² / Σ 1/n_c`` rows, if all classes
    have the same error rate.
    """
    present_support = support[support > 0].astype(float)
    return float(len(present_support) ** 2 / (1 / present_support).sum()) if len(present_support) else 0.0


def _make_probability_metrics(class_codes: NDArray[np.intp], probabilities: Floats) -> dict[str, BootstrapMetric]:
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
        metrics["calibration_error"] = _make_calibration_metric(probabilities, class_codes)
    return metrics


def _make_calibration_metric(probabilities: Floats, y: NDArray[Any]) -> BootstrapMetric:
    confidence, correct = compute_confidence(probabilities, y)
    gaps = compute_bin_gaps(confidence, correct)
    return BootstrapMetric(
        calibration_error(probabilities, y), lambda counts: abs(gaps.T @ counts).sum(axis=0) / confidence.size
    )


def _make_ranking_metrics(
    class_codes: NDArray[np.intp], probabilities: Floats, bootstrap: int
) -> dict[str, BootstrapMetric]:
    present_classes, support = np.unique(class_codes, return_counts=True)
    if len(present_classes) < 2:
        return {}
    is_member, scores = class_codes[:, None] == present_classes, probabilities[:, present_classes]
    rows = (is_member, scores, bootstrap, _count_effective_rows(support))
    return {
        "roc_auc": _make_ranking_metric(sk.roc_auc_score, roc_auc, *rows),
        "pr_auc": _make_ranking_metric(sk.average_precision_score, average_precision, *rows),
    }


def _make_ranking_metric(
    metric: Any, bootstrap_statistic: Any, is_member: Any, scores: Floats, bootstrap: int, n_trials: float
) -> BootstrapMetric:
    """The mean over columns of a score that sorts each column, with a limited number of resamples."""
    column_values = _score_columns(metric, is_member, scores, is_member.any(axis=0))
    max_resamples = min(bootstrap, _MAX_RANKED_SCORES // max(1, scores.size))
    statistic = (
        make_column_mean_statistic(bootstrap_statistic, is_member, scores)
        if max_resamples >= min(bootstrap, _MIN_RESAMPLES)
        else None
    )
    return BootstrapMetric(_average_finite(column_values), statistic, n_trials, max_resamples=max_resamples)


def _make_multilabel_metrics(
    y_true: NDArray[np.bool_], probabilities: Floats, bootstrap: int
) -> dict[str, BootstrapMetric]:
    predicted_labels = probabilities >= 0.5
    padded = _add_empty_column(y_true, predicted_labels)
    columns = np.arange(y_true.shape[1])
    f1_by_label = sk.f1_score(*padded, labels=columns, average=None, zero_division=np.nan)
    micro_f1 = sk.f1_score(*padded, labels=columns, average="micro", zero_division=np.nan)
    true_positives = csr_array((y_true & predicted_labels).astype(float))
    true_and_predicted = csr_array(y_true.astype(float) + predicted_labels)
    support = y_true.sum(axis=0)
    n_effective_rows = _count_effective_rows(support)
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
            _average_finite(f1_by_label),
            lambda counts: mean_of_ratios(2 * (true_positives.T @ counts), true_and_predicted.T @ counts),
            n_effective_rows,
        ),
        "exact_match": BootstrapMetric(
            sk.accuracy_score(y_true, predicted_labels),
            make_mean_statistic((y_true == predicted_labels).all(axis=1)),
            float(len(y_true)),
            is_share=True,
        ),
        "calibration_error": _make_calibration_metric(probabilities, y_true),
    }


def _add_empty_column(*arrays: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Append an empty column, so that scikit-learn does not treat a single label as a binary problem."""
    return [np.pad(array, ((0, 0), (0, 1))) for array in arrays]


def _make_regression_metrics(y_true: Floats, y_predicted: Floats) -> dict[str, BootstrapMetric]:
    error = y_true - y_predicted
    y_centered = y_true - y_true.mean(axis=0)
    n_rows = len(y_true)
    statistics: dict[str, Statistic] = {
        "mae": make_mean_statistic(abs(error).mean(axis=1)),
        "rmse": lambda counts: np.sqrt((error**2).T @ counts / n_rows).mean(axis=0),
        "r2": lambda counts: 1 - mean_of_ratios((error**2).T @ counts, sum_of_squares(y_centered, counts)),
        "spearman": make_column_mean_statistic(spearman_correlation, y_true, y_predicted),
    }
    values = _score_targets(y_true, y_predicted)
    return {name: BootstrapMetric(_average_finite(values[name]), statistic) for name, statistic in statistics.items()}


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
        raise ConfigError(f"found {n_labels} labels and {n_predictions} predictions; give one of each per row")


def _average_finite(values: NDArray[Any]) -> float:
    finite_values = values[np.isfinite(values)]
    return float(finite_values.mean()) if len(finite_values) else math.nan
