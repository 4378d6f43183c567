"""Diagnostics of predictions and embeddings: likely label errors, near duplicates, outliers, learning curves."""

from __future__ import annotations

from featpipe.diagnostics.extrapolation import LearningCurve, extrapolate_learning_curve
from featpipe.diagnostics.finding import FINDING_NAMES, PREDICTION_COLUMNS, Finding, write_findings
from featpipe.diagnostics.label_errors import (
    MAX_FINDING_ROWS,
    LabeledPredictions,
    count_extreme_rows,
    make_prediction_findings,
)
from featpipe.diagnostics.near_duplicates import NEAR_DUPLICATE_COSINE, DuplicatePairs, find_near_duplicates
from featpipe.diagnostics.nearest_neighbors import CenteredNormalizer, compute_outlier_scores, find_nearest_neighbors

__all__ = [
    "FINDING_NAMES",
    "MAX_FINDING_ROWS",
    "NEAR_DUPLICATE_COSINE",
    "PREDICTION_COLUMNS",
    "CenteredNormalizer",
    "DuplicatePairs",
    "Finding",
    "LabeledPredictions",
    "LearningCurve",
    "compute_outlier_scores",
    "count_extreme_rows",
    "extrapolate_learning_curve",
    "find_near_duplicates",
    "find_nearest_neighbors",
    "make_prediction_findings",
    "write_findings",
]
