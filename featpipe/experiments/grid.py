"""What a recipe asks for, as rows of one table: each head with each of its settings on each backbone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from featpipe import heads
from featpipe.config import ExtractionConfig
from featpipe.errors import ConfigError
from featpipe.experiments.recipe.parse import BACKBONE_FIELDS
from featpipe.experiments.recipe.schema import ALL_HEADS, Recipe, RecipeHead
from featpipe.storage import compute_fingerprint

__all__ = ["TrialSpec", "list_trials", "make_backbone_label", "resolve_recipe", "resolve_settings"]


@dataclass(frozen=True)
class TrialSpec:
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

    backbone_index: int
    head: RecipeHead
    per_class: int | None
    label: str

    @property
    def slug(self) -> str:
        """What its files are called."""
        sanitized = re.sub("[, ]+", "-", self.label)
        if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{,99}", sanitized):
            return sanitized
        return f"{re.sub('[^A-Za-z0-9_.=+-]+', '-', sanitized).strip('-.')[:90]}-{compute_fingerprint(self.label)[:8]}"


def list_trials(recipe: Recipe) -> list[TrialSpec]:
    """The rows of the table, each once: backbones slowest, then heads, then images of each class."""
    has_many_backbones = len(recipe.extractions) > 1
    trials: dict[str, TrialSpec] = {}
    for backbone_index, extraction in enumerate(recipe.extractions):
        for head in recipe.heads:
            for n_per_class in recipe.split.per_class or (None,):
                parts = [make_backbone_label(extraction)] if has_many_backbones else []
                parts += [_make_head_label(head)] + ([f"{n_per_class} per class"] if n_per_class is not None else [])
                label = ", ".join(parts)
                trials.setdefault(label, TrialSpec(backbone_index, head, n_per_class, label))
    return list(trials.values())


def make_backbone_label(extraction: ExtractionConfig) -> str:
    """What to call a backbone: its name, and what of it is not the default."""
    default = ExtractionConfig()
    changed_settings = {
        key: getattr(extraction, name)
        for key, name in BACKBONE_FIELDS.items()
        if key != "name" and getattr(extraction, name) != getattr(default, name)
    }
    return _format_label(str(extraction.backbone), changed_settings)


def _make_head_label(head: RecipeHead) -> str:
    options = {name: getattr(head, name) for name in ("output", "tune", "grid", "balance")}
    set_options = {name: value for name, value in options.items() if value or value is False}
    return _format_label(head.name, {**head.settings, **set_options})


def _format_label(name: str, settings: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{key}={_format_value(value)}" for key, value in settings.items())])


def _format_value(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "×".join(map(_format_value, value))
    return repr(value) if isinstance(value, str) and re.search("[ ,]", value) else str(value)


def resolve_recipe(recipe: Recipe, task: str) -> Recipe:
    """The recipe for a task: every head by its own name, and of its settings those that are not the default.

    Raises
    ------
    ConfigError
        If a head or a setting is unknown, or does not do the task; it names file, table and key.
    ModelError
        If an estimator of somebody's own cannot be saved.
    """
    resolved_heads: list[RecipeHead] = []
    for head in recipe.heads:
        names = heads.list_heads(task) if head.name == ALL_HEADS else [head.name]
        resolved_heads += [_resolve_head(replace(head, name=name), task, recipe) for name in names]
    return replace(recipe, heads=tuple(resolved_heads))


def _resolve_head(head: RecipeHead, task: str, recipe: Recipe) -> RecipeHead:
    try:
        grid = {key: values[0] for key, values in head.grid.items()}
        estimator = heads.build(head.name, task, params={**head.settings, **grid}, random_state=recipe.training.seed)
        if head.name not in heads.HEAD_REGISTRY:
            heads.check_savable(estimator)
        defaults = resolve_settings(replace(head, settings={}), task)
    except ConfigError as error:
        raise ConfigError(f"{recipe.where}: [{head.table}] {error}") from None
    except (ValueError, TypeError) as error:  # an estimator of somebody's own
        raise ConfigError(f"{recipe.where}: [{head.table}] head {head.name!r} refuses its settings ({error})") from None
    changed_settings = {
        key: value for key, value in head.settings.items() if key not in defaults or defaults[key] != value
    }
    return replace(head, settings=dict(sorted(changed_settings.items())))


def resolve_settings(head: RecipeHead, task: str) -> dict[str, Any]:
    """The settings of a head and the defaults of all others but those that are chosen anew in each run.

    What is no text, number or list of them is not among the defaults.
    """
    tuned_names = set(head.grid)
    if head.tune or (head.tune is None and head.name == "logistic"):
        tuned_names |= set(heads.get_spec(head.name).grid)
    defaults = heads.get_settings(head.name, task)
    plain_defaults = {key: value for key, value in defaults.items() if key not in tuned_names and _is_plain(value)}
    return {**plain_defaults, **head.settings}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))
