"""Cache + head → model; with an honest estimate of its quality from rows that it was not fitted on."""

from __future__ import annotations

from featpipe.training.comparison import Comparison, compare
from featpipe.training.rows import Rows, training_rows
from featpipe.training.selection import METRICS, Choice
from featpipe.training.verb import train

__all__ = ["METRICS", "Choice", "Comparison", "Rows", "compare", "train", "training_rows"]
