"""The recipes that come along, by name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from featpipe.config import unknown_name_error
from featpipe.errors import ConfigError

__all__ = ["RECIPES_FOLDER", "find_recipe", "list_builtin_recipes", "read_question"]

RECIPES_FOLDER = Path(__file__).parents[2] / "pipelines"
"""A link to the folder ``pipelines`` of the sources, and a folder of its own where featpipe is installed."""

RECIPE_SUFFIX = ".toml"


def list_builtin_recipes() -> list[str]:
    """The names of the recipes that come along.

    Examples
    --------
    >>> "smoke" in list_builtin_recipes()
    True
    """
    return sorted(path.stem for path in RECIPES_FOLDER.glob(f"*{RECIPE_SUFFIX}"))


def find_recipe(recipe: str | os.PathLike[str]) -> Path:
    """The file of a recipe.

    Parameters
    ----------
    recipe : str or path-like
        A name, or a path: what ends in .toml or has a slash in it.

    Raises
    ------
    ConfigError
        If there is none.
    """
    text = os.fspath(recipe)
    if not isinstance(recipe, str) or text.endswith(RECIPE_SUFFIX) or os.sep in text:
        path = Path(text)
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such recipe; `featpipe run --list` names those that come along")
        return path
    if text not in list_builtin_recipes():
        raise unknown_name_error(
            "recipe", text, list_builtin_recipes(), f"(a file of your own ends in {RECIPE_SUFFIX})"
        )
    return RECIPES_FOLDER / f"{text}{RECIPE_SUFFIX}"


def read_question(name: str) -> str:
    """What a recipe that comes along answers: the value of its key ``question``."""
    question_match = re.search(
        r'^question = "(.*)"$', (RECIPES_FOLDER / f"{name}{RECIPE_SUFFIX}").read_text(encoding="utf-8"), re.MULTILINE
    )
    return question_match[1] if question_match else ""
