"""Model + rows → scores with their uncertainty, and what to look at next."""

from __future__ import annotations

from featpipe.evaluation.looking import Duplicates
from featpipe.evaluation.result import SCHEMA, BaselineModel, Evaluation
from featpipe.evaluation.trusting import Coverage
from featpipe.evaluation.verb import evaluate

__all__ = ["SCHEMA", "BaselineModel", "Coverage", "Duplicates", "Evaluation", "evaluate"]
