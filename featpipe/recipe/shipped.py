"""The recipes that come along, by name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from featpipe.errors import ConfigError
from featpipe.names import unknown

__all__ = ["FOLDER", "find", "question_of", "shipped"]

FOLDER = Path(__file__).parents[1] / "pipelines"
"""A link to the folder ``pipelines`` of the sources, and a folder of its own where featpipe is installed."""

SUFFIX = ".toml"


def shipped() -> list[str]:
    """The names of the recipes that come along.

    Examples
    --------
    >>> "smoke" in shipped()
    True
    """
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def find(recipe: str | os.PathLike[str]) -> Path:
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
    if not isinstance(recipe, str) or text.endswith(SUFFIX) or os.sep in text:
        path = Path(text)
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such recipe; `featpipe run --list` names those that come along")
        return path
    if text not in shipped():
        raise unknown("recipe", text, shipped(), f"(a file of your own ends in {SUFFIX})")
    return FOLDER / f"{text}{SUFFIX}"


def question_of(name: str) -> str:
    """What a recipe that comes along answers: the value of its key ``question``."""
    found = re.search(r'^question = "(.*)"$', (FOLDER / f"{name}{SUFFIX}").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""
