"""Metrics of predictions, their confidence intervals, paired comparisons, and calibration."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from featpipe.metrics.calibration import (
    Calibration,
    calibration_error,
    compute_confidence,
    compute_logits,
    compute_prior_offsets,
    compute_sigmoid_loss,
    cross_calibrate,
    fit_temperature,
)
from featpipe.metrics.intervals import Interval, format_score, wilson_interval
from featpipe.metrics.protocol import format_protocol
from featpipe.metrics.scores import METRICS, SELECTION_METRICS, Metric, Scores, nan_to_none

if TYPE_CHECKING:
    from featpipe.metrics.metrics import score
    from featpipe.metrics.paired_tests import PairedComparison, compare_paired, mcnemar_test

__all__ = [
    "METRICS",
    "SELECTION_METRICS",
    "Calibration",
    "Interval",
    "Metric",
    "PairedComparison",
    "Scores",
    "calibration_error",
    "compare_paired",
    "compute_confidence",
    "compute_logits",
    "compute_prior_offsets",
    "compute_sigmoid_loss",
    "cross_calibrate",
    "fit_temperature",
    "format_protocol",
    "format_score",
    "mcnemar_test",
    "nan_to_none",
    "score",
    "wilson_interval",
]

_LAZY_MODULES = {  # imported when first used: they need torch or scikit-learn
    "PairedComparison": "paired_tests",
    "compare_paired": "paired_tests",
    "mcnemar_test": "paired_tests",
    "score": "metrics",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
