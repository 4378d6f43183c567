"""What every stage can be asked for, the one home of the defaults; and recipes: TOML files that ask for a whole run."""

from __future__ import annotations

from featpipe.recipe.changes import parse_changes
from featpipe.recipe.reading import BACKBONE, EXTRACTION, read_recipe
from featpipe.recipe.settings import AUTO, ENGINES, PRECISIONS, STORAGES, Extraction, FineTuning
from featpipe.recipe.shipped import question_of, shipped
from featpipe.recipe.tables import ALL, TILES, Evaluation, Head, Recipe, Report, Samples, Split, Training

__all__ = [
    "ALL",
    "AUTO",
    "BACKBONE",
    "ENGINES",
    "EXTRACTION",
    "PRECISIONS",
    "STORAGES",
    "TILES",
    "Evaluation",
    "Extraction",
    "FineTuning",
    "Head",
    "Recipe",
    "Report",
    "Samples",
    "Split",
    "Training",
    "parse_changes",
    "question_of",
    "read_recipe",
    "shipped",
]
