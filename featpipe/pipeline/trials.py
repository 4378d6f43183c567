"""What a recipe asks for, as rows of one table: each head with each of its settings on each backbone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from featpipe import heads
from featpipe.errors import ConfigError
from featpipe.fingerprint import fingerprint
from featpipe.recipe import ALL, BACKBONE, Extraction, Head, Recipe

__all__ = ["Trial", "label_of", "resolved", "settings_in_full", "trials_of"]


@dataclass(frozen=True)
class Trial:
    """One head with its settings on the embeddings of one backbone.

    Attributes
    ----------
    backbone : int
        Which of the recipe's.
    head : Head
    per_class : int or None
        Images of each class that it learns from; all if None.
    label : str
        For people: what of it is not the default.
    """

    backbone: int
    head: Head
    per_class: int | None
    label: str

    @property
    def slug(self) -> str:
        """What its files are called."""
        plain = re.sub("[, ]+", "-", self.label)
        if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{,99}", plain):
            return plain
        return f"{re.sub('[^A-Za-z0-9_.=+-]+', '-', plain).strip('-.')[:90]}-{fingerprint(self.label)[:8]}"


def trials_of(recipe: Recipe) -> list[Trial]:
    """The rows of the table, each once: backbones slowest, then heads, then images of each class."""
    several = len(recipe.extractions) > 1
    found: dict[str, Trial] = {}
    for number, extraction in enumerate(recipe.extractions):
        for head in recipe.heads:
            for each in recipe.split.per_class or (None,):
                parts = [label_of(extraction)] if several else []
                parts += [_label_of_head(head)] + ([f"{each} per class"] if each is not None else [])
                label = ", ".join(parts)
                found.setdefault(label, Trial(number, head, each, label))
    return list(found.values())


def label_of(extraction: Extraction) -> str:
    """What to call a backbone: its name, and what of it is not the default."""
    default = Extraction()
    given = {
        key: getattr(extraction, name)
        for key, name in BACKBONE.items()
        if key != "name" and getattr(extraction, name) != getattr(default, name)
    }
    return _labelled(str(extraction.backbone), given)


def _label_of_head(head: Head) -> str:
    own = {name: getattr(head, name) for name in ("output", "tune", "grid", "balance")}
    told = {name: value for name, value in own.items() if value or value is False}
    return _labelled(head.name, {**head.settings, **told})


def _labelled(name: str, given: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{key}={_short(value)}" for key, value in given.items())])


def _short(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "×".join(map(_short, value))
    return repr(value) if isinstance(value, str) and re.search("[ ,]", value) else str(value)


def resolved(recipe: Recipe, task: str) -> Recipe:
    """The recipe for a task: every head by its own name, and of its settings those that are not the default.

    Raises
    ------
    ConfigError
        If a head or a setting is unknown, or does not do the task; it names file, table and key.
    ModelError
        If an estimator of somebody's own cannot be saved.
    """
    found: list[Head] = []
    for head in recipe.heads:
        names = heads.names(task) if head.name == ALL else [head.name]
        found += [_checked(replace(head, name=name), task, recipe) for name in names]
    return replace(recipe, heads=tuple(found))


def _checked(head: Head, task: str, recipe: Recipe) -> Head:
    try:
        grid = {key: values[0] for key, values in head.grid.items()}
        built = heads.build(head.name, task, params={**head.settings, **grid}, random_state=recipe.training.seed)
        if head.name not in heads.TABLE:
            heads.refuse_unsavable(built)
        default = settings_in_full(replace(head, settings={}), task)
    except ConfigError as error:
        raise ConfigError(f"{recipe.where}: [{head.table}] {error}") from None
    except (ValueError, TypeError) as error:  # an estimator of somebody's own
        raise ConfigError(f"{recipe.where}: [{head.table}] head {head.name!r} refuses its settings ({error})") from None
    own = {key: value for key, value in head.settings.items() if key not in default or default[key] != value}
    return replace(head, settings=dict(sorted(own.items())))


def settings_in_full(head: Head, task: str) -> dict[str, Any]:
    """The settings of a head and the defaults of all others but those that are chosen anew in each run.

    What is no text, number or list of them is not among the defaults.
    """
    chosen = set(head.grid)
    if head.tune or (head.tune is None and head.name == "logistic"):
        chosen |= set(heads.spec_of(head.name).grid)
    defaults = heads.settings_of(head.name, task)
    plain = {key: value for key, value in defaults.items() if key not in chosen and _is_plain(value)}
    return {**plain, **head.settings}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))
