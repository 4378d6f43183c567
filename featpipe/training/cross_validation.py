"""Cross-validate a head: score it on rows that neither fitted it nor selected its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.errors import ConfigError
from featpipe.metrics import Calibration, Scores, calibration_error, cross_calibrate, fit_temperature, score
from featpipe.model import ConformalPredictor
from featpipe.runtime import Progress, ProgressCallback
from featpipe.training.dataset import EmbeddingDataset, Split
from featpipe.training.fit import FittedHead, fit_head
from featpipe.training.head_config import HeadConfig
from featpipe.training.search import MAX_TUNING_ROWS

N_CALIBRATION_FOLDS = 3  # for heads without probabilities, if no cross-validation was requested


def get_main_metric(scores: Scores, metric: str | None = None) -> str:
    """The metric that heads are compared by: the requested one if it is defined, else the first."""
    return metric if metric is not None and metric in scores.metrics else next(iter(scores.metrics))


@dataclass(frozen=True, eq=False)
class Estimate:
    """The result of a cross-validation.

    Attributes
    ----------
    scores : Scores
        Of the predictions of all folds together.
    folds : tuple of float
        The main score of each fold.
    calibration : Calibration or None
        Fitted on the predictions of all folds.
    calibration_errors : tuple of two floats, or None
        The calibration error before and after calibration; each fold is calibrated on the others.
    protocol : dict
        How the score was measured, see :func:`featpipe.metrics.format_protocol`.
    conformal : ConformalPredictor or None
        From the predictions of all folds; None for multilabel tasks.
    held_out, predictions : ndarray of shape (h,) and (h, k)
        Positions in the dataset, ascending, and the predictions for them when they were held out.
    """

    scores: Scores
    folds: tuple[float, ...]
    calibration: Calibration | None
    calibration_errors: tuple[float, float] | None
    protocol: dict[str, Any]
    conformal: ConformalPredictor | None = None
    held_out: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    predictions: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))

    @property
    def spread(self) -> float:
        """Standard deviation of the main score over the folds."""
        return float(np.std(self.folds, ddof=1)) if len(self.folds) > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        result = {"how": self.protocol, "folds": len(self.folds), "by_fold": list(self.folds), "spread": self.spread}
        if self.calibration is not None and self.calibration_errors is not None:
            error_before, error_after = self.calibration_errors
            result["calibration"] = {
                "temperature": self.calibration.temperature,
                "error_before": error_before,
                "error_after": error_after,
            }
        return {**result, **self.scores.to_dict()}


def cross_validate(
    config: HeadConfig,
    dataset: EmbeddingDataset,
    k: int,
    *,
    calibrate: bool,
    progress: ProgressCallback,
    metric: str | None = None,
) -> Estimate:
    """Fit k times on all folds but one, searching settings each time; with a cutoff time, fit once on earlier rows."""
    fitted_folds = _fit_folds(config, dataset, dataset.make_splits(k), progress)
    calibrate = calibrate or (config.task != "regression" and not fitted_folds[0].fitted.has_probabilities)
    if calibrate and len(fitted_folds) == 1:
        fitted_folds = _split_in_halves(fitted_folds[0], dataset)
    held_out = np.concatenate([fold.held_out for fold in fitted_folds])
    calibration, calibration_errors = None, None
    if calibrate:
        predictions, calibration, calibration_errors = _calibrate_folds(config, fitted_folds, dataset.y)
    else:
        predictions = [fold.fitted.predict(fold.X) for fold in fitted_folds]
    targets = dataset.labels
    order = np.argsort(held_out, kind="stable")
    all_predictions = np.concatenate(predictions)[order]
    scores = score(config.task, targets[held_out[order]], all_predictions, dataset.classes)
    name = get_main_metric(scores, metric)
    fold_metrics = [
        score(config.task, targets[fold.held_out], fold_predictions, dataset.classes, bootstrap=0).metrics
        for fold, fold_predictions in zip(fitted_folds, predictions, strict=True)
    ]
    fold_scores = tuple(metrics[name].value for metrics in fold_metrics if name in metrics)
    conformal = (
        None
        if config.task == "multilabel"
        else ConformalPredictor.from_predictions(np.concatenate(predictions), dataset.y[held_out])
    )
    return Estimate(
        scores,
        fold_scores,
        calibration,
        calibration_errors,
        _make_protocol(dataset, k, len(held_out)),
        conformal,
        held_out[order],
        all_predictions,
    )


@dataclass(frozen=True, eq=False)
class _Fold:
    """Held-out rows, their features, and the head that was fitted on the other rows."""

    held_out: NDArray[np.int64]
    X: Any
    fitted: FittedHead


def _fit_folds(
    config: HeadConfig, dataset: EmbeddingDataset, splits: Sequence[Split], progress: ProgressCallback
) -> list[_Fold]:
    fitted_folds = []
    for train_rows, held_out in splits:
        fitted_folds.append(_Fold(held_out, dataset.take(held_out).X, fit_head(config, dataset.take(train_rows))))
        progress(Progress("cross-validating", len(fitted_folds), len(splits), "folds"))
    return fitted_folds


def _split_in_halves(fold: _Fold, dataset: EmbeddingDataset) -> list[_Fold]:
    """Split the held-out rows alternately in two, so that each half can be calibrated on the other."""
    halves = (fold.held_out[::2], fold.held_out[1::2])
    return [_Fold(half, dataset.take(half).X, fold.fitted) for half in halves]


def _calibrate_folds(
    config: HeadConfig, folds: Sequence[_Fold], y: NDArray[Any]
) -> tuple[list[NDArray[np.float64]], Calibration, tuple[float, float]]:
    """Predictions of each fold, calibrated on the other folds; the calibration of all; the errors before and after."""
    logits = [fold.fitted.compute_logits(fold.X) for fold in folds]
    targets, multilabel = [y[fold.held_out] for fold in folds], config.task == "multilabel"
    probabilities = cross_calibrate(logits, targets, multilabel=multilabel)
    all_logits, all_targets = np.concatenate(logits), np.concatenate(targets)
    error_before = calibration_error(Calibration().compute_probabilities(all_logits, multilabel), all_targets)
    error_after = calibration_error(np.concatenate(probabilities), all_targets)
    return probabilities, Calibration(fit_temperature(all_logits, all_targets)), (error_before, error_after)


def fit_calibration_on_folds(config: HeadConfig, dataset: EmbeddingDataset, progress: ProgressCallback) -> Calibration:
    """Fit a temperature by cross-validation, for a head without probabilities."""
    dataset = dataset.subset(MAX_TUNING_ROWS) if dataset.is_streamed else dataset  # enough for a single number
    for k in (N_CALIBRATION_FOLDS, 2):
        try:
            splits = dataset.make_folds(k)
        except ConfigError:
            continue
        return _calibrate_folds(config, _fit_folds(config, dataset, splits, progress), dataset.y)[1]
    raise ConfigError(
        f"head {config.head!r} has no probabilities, and its scores cannot be calibrated on held-out rows, because a "
        "class has a single image; use logistic, or add images"
    )


def _make_protocol(dataset: EmbeddingDataset, k: int, n_held_out: int) -> dict[str, Any]:
    if dataset.since is not None:
        protocol = {"kind": "since", "since": _format_time(dataset.since), "n": n_held_out}
    elif dataset.times is not None:
        protocol = {"kind": "time_spans", "folds": k, "n": n_held_out, "n_rows": len(dataset)}
    else:
        protocol = {"kind": "folds", "folds": k, "n": len(dataset)}
    return protocol if dataset.groups is None else {**protocol, "groups": len(np.unique(dataset.groups))}


def _format_time(moment: Any) -> str:
    """Format a time of the data: a date without midnight, or a number."""
    if isinstance(moment, np.datetime64):
        return str(moment.astype("datetime64[s]")).removesuffix("T00:00:00")
    return f"{moment:.15g}" if isinstance(moment, float) else str(moment)
