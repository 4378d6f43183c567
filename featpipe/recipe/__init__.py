"""What every stage can be asked for, the one home of the defaults; and recipes: TOML files that ask for a whole run."""

from __future__ import annotations

from featpipe.recipe.changes import parse_changes
from featpipe.recipe.reading import BACKBONE_FIELDS, EXTRACTION_KEYS, read_recipe
from featpipe.recipe.settings import AUTO, ENGINES, PRECISIONS, STORAGES, ExtractionConfig, FineTuneConfig
from featpipe.recipe.shipped import list_builtin_recipes, read_question
from featpipe.recipe.tables import (
    ALL_HEADS,
    TILES_ARCHIVE,
    EvaluationConfig,
    Recipe,
    RecipeHead,
    ReportConfig,
    SamplesConfig,
    SplitConfig,
    TrainingConfig,
)

__all__ = [
    "ALL_HEADS",
    "AUTO",
    "BACKBONE_FIELDS",
    "ENGINES",
    "EXTRACTION_KEYS",
    "PRECISIONS",
    "STORAGES",
    "TILES_ARCHIVE",
    "EvaluationConfig",
    "ExtractionConfig",
    "FineTuneConfig",
    "Recipe",
    "RecipeHead",
    "ReportConfig",
    "SamplesConfig",
    "SplitConfig",
    "TrainingConfig",
    "list_builtin_recipes",
    "parse_changes",
    "read_question",
    "read_recipe",
]
