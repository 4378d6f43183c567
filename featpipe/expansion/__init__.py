"""Model + more classes → model: without forgetting the old ones, and without the old images where they are gone."""

from __future__ import annotations

from featpipe.expansion.measure import MethodOutcome
from featpipe.expansion.methods import METHODS
from featpipe.expansion.result import Expansion
from featpipe.expansion.verb import expand

__all__ = ["METHODS", "Expansion", "MethodOutcome", "expand"]
