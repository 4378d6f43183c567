"""What to look at next: from predictions and embeddings to tables of samples. Arrays in, tables out."""

from featpipe.findings.duplicates import NEAR_DUPLICATE_COSINE, DuplicatePairs, find_near_duplicates
from featpipe.findings.forecast import LearningCurve, extrapolate_learning_curve
from featpipe.findings.judgements import LabeledPredictions, make_prediction_findings
from featpipe.findings.neighbours import compute_outlier_scores, find_nearest_neighbors
from featpipe.findings.table import Finding, write_findings

__all__ = [
    "NEAR_DUPLICATE_COSINE",
    "DuplicatePairs",
    "Finding",
    "LabeledPredictions",
    "LearningCurve",
    "compute_outlier_scores",
    "extrapolate_learning_curve",
    "find_near_duplicates",
    "find_nearest_neighbors",
    "make_prediction_findings",
    "write_findings",
]
