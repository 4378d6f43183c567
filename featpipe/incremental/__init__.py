"""Class-incremental learning: add classes to a model without forgetting the old ones, even without the old images."""

from __future__ import annotations

from featpipe.incremental.expand import expand
from featpipe.incremental.methods import METHODS
from featpipe.incremental.metrics import MethodOutcome
from featpipe.incremental.result import Expansion

__all__ = ["METHODS", "Expansion", "MethodOutcome", "expand"]
