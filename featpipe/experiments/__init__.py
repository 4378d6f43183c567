"""Experiments: a recipe is run stage by stage, finished work is reused, and a page reports the results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featpipe.experiments.recipe.builtin import list_builtin_recipes, read_question
from featpipe.experiments.recipe.overrides import parse_changes
from featpipe.experiments.recipe.parse import BACKBONE_FIELDS, EXTRACTION_KEYS, read_recipe
from featpipe.experiments.recipe.schema import (
    ALL_HEADS,
    TILES_ARCHIVE,
    EvaluationConfig,
    Recipe,
    RecipeHead,
    RecipeTraining,
    ReportConfig,
    SamplesConfig,
    SplitConfig,
)
from featpipe.runtime import lazy_imports

if TYPE_CHECKING:
    from featpipe.experiments.dry_run import DryRun, plan_run
    from featpipe.experiments.result import EmbeddingSummary, RunResult, TrialResult
    from featpipe.experiments.runner import run
else:
    __getattr__, __dir__ = lazy_imports(__name__)

__all__ = [
    "ALL_HEADS",
    "BACKBONE_FIELDS",
    "EXTRACTION_KEYS",
    "TILES_ARCHIVE",
    "DryRun",
    "EmbeddingSummary",
    "EvaluationConfig",
    "Recipe",
    "RecipeHead",
    "RecipeTraining",
    "ReportConfig",
    "RunResult",
    "SamplesConfig",
    "SplitConfig",
    "TrialResult",
    "list_builtin_recipes",
    "parse_changes",
    "plan_run",
    "read_question",
    "read_recipe",
    "run",
]
