"""Metrics of predictions, their confidence intervals, paired comparisons, and calibration."""

from __future__ import annotations

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
from featpipe.metrics.notes import Note, format_note, format_protocol
from featpipe.metrics.probe_comparison import ProbeComparison, format_stored_interval
from featpipe.metrics.scores import METRICS, SELECTION_METRICS, Metric, Scores
from featpipe.runtime import lazy_imports

if TYPE_CHECKING:
    from featpipe.metrics.metrics import score
    from featpipe.metrics.paired_tests import PairedComparison, compare_paired, mcnemar_test
else:
    __getattr__, __dir__ = lazy_imports(__name__)

__all__ = [
    "METRICS",
    "SELECTION_METRICS",
    "Calibration",
    "Interval",
    "Metric",
    "Note",
    "PairedComparison",
    "ProbeComparison",
    "Scores",
    "calibration_error",
    "compare_paired",
    "compute_confidence",
    "compute_logits",
    "compute_prior_offsets",
    "compute_sigmoid_loss",
    "cross_calibrate",
    "fit_temperature",
    "format_note",
    "format_protocol",
    "format_score",
    "format_stored_interval",
    "mcnemar_test",
    "score",
    "wilson_interval",
]
