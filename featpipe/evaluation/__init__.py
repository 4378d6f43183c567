"""Score a model on rows on which it was not trained: intervals, comparisons, error analysis, learning curve."""

from __future__ import annotations

from featpipe.evaluation.error_analysis import Duplicates
from featpipe.evaluation.evaluate import evaluate
from featpipe.evaluation.result import SCHEMA, BaselineModel, Evaluation, describe_protocol
from featpipe.evaluation.uncertainty import NOVELTY_THRESHOLD, Coverage, summarize_novelty

__all__ = [
    "NOVELTY_THRESHOLD",
    "SCHEMA",
    "BaselineModel",
    "Coverage",
    "Duplicates",
    "Evaluation",
    "describe_protocol",
    "evaluate",
    "summarize_novelty",
]
