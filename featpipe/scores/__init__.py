"""How good predictions are, and how sure one can be of it."""

from featpipe.scores.interval import Interval, number, share_interval
from featpipe.scores.measuring import score, score_classification, score_multilabel, score_regression
from featpipe.scores.paired import Contrast, Paired, paired
from featpipe.scores.table import METRICS, Scores

__all__ = [
    "METRICS",
    "Contrast",
    "Interval",
    "Paired",
    "Scores",
    "number",
    "paired",
    "score",
    "score_classification",
    "score_multilabel",
    "score_regression",
    "share_interval",
]
