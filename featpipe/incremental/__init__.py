"""Model + more classes → model: without forgetting the old ones, and without the old images where they are gone."""

from __future__ import annotations

from featpipe.incremental.expand import expand
from featpipe.incremental.methods import METHODS
from featpipe.incremental.metrics import MethodOutcome
from featpipe.incremental.result import Expansion

__all__ = ["METHODS", "Expansion", "MethodOutcome", "expand"]
