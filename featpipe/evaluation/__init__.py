"""Model + rows → scores with their uncertainty, and what to look at next."""

from __future__ import annotations

from featpipe.evaluation.error_analysis import NOVELTY_THRESHOLD, Coverage, Duplicates, summarize_novelty
from featpipe.evaluation.evaluate import evaluate
from featpipe.evaluation.result import SCHEMA, BaselineModel, Evaluation
from featpipe.evaluation.to_json import describe_protocol

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
