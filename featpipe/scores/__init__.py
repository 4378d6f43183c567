"""How good predictions are, and how sure one can be of it."""

from featpipe.scores.interval import Interval, format_score, wilson_interval
from featpipe.scores.measuring import score, score_classification, score_multilabel, score_regression
from featpipe.scores.paired import PairedComparison, ScoreDifference, compare_paired
from featpipe.scores.table import METRICS, Scores

__all__ = [
    "METRICS",
    "Interval",
    "PairedComparison",
    "ScoreDifference",
    "Scores",
    "compare_paired",
    "format_score",
    "score",
    "score_classification",
    "score_multilabel",
    "score_regression",
    "wilson_interval",
]
