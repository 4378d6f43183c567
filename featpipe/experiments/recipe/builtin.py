"""The built-in recipes."""

from __future__ import annotations

import os
import re
from pathlib import Path

from featpipe.config import unknown_name_error
from featpipe.errors import ConfigError

RECIPES_FOLDER = Path(__file__).parents[2] / "pipelines"
"""A link to ``pipelines/`` in the repository; a folder in an installed package."""

RECIPE_SUFFIX = ".toml"


def list_builtin_recipes() -> list[str]:
    """List the names of the built-in recipes.

    Examples
    --------
    >>> "smoke" in list_builtin_recipes()
    True
    """
    return sorted(path.stem for path in RECIPES_FOLDER.glob(f"*{RECIPE_SUFFIX}"))


def find_recipe(recipe: str | os.PathLike[str]) -> Path:
    """Find the file of a recipe.

    Parameters
    ----------
    recipe : str or path-like
        The name of a built-in recipe; or a path, which ends in .toml or contains a slash.

    Raises
    ------
    ConfigError
        If there is no such recipe.
    """
    text = os.fspath(recipe)
    if not isinstance(recipe, str) or text.endswith(RECIPE_SUFFIX) or os.sep in text:
        path = Path(text)
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such recipe; `featpipe run --list` lists the built-in ones")
        return path
    if text not in list_builtin_recipes():
        raise unknown_name_error("recipe", text, list_builtin_recipes(), f"(a recipe file ends in {RECIPE_SUFFIX})")
    return RECIPES_FOLDER / f"{text}{RECIPE_SUFFIX}"


def read_question(name: str) -> str:
    """Read the question of a built-in recipe: the value of its key ``question``."""
    question_match = re.search(
        r'^question = "(.*)"$', (RECIPES_FOLDER / f"{name}{RECIPE_SUFFIX}").read_text(encoding="utf-8"), re.MULTILINE
    )
    return question_match[1] if question_match else ""
