"""Trials of a recipe: each head with each of its settings on each backbone."""

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


@dataclass(frozen=True)
class TrialSpec:
    """One head with its settings on the embeddings of one backbone.

    Attributes
    ----------
    backbone_index : int
        Index into the backbones of the recipe.
    head : RecipeHead
    per_class : int or None
        Training images of each class; None for all.
    label : str
        Name of the head and the settings that differ from the defaults.
    """

    backbone_index: int
    head: RecipeHead
    per_class: int | None
    label: str

    @property
    def slug(self) -> str:
        """Name of its files."""
        sanitized = re.sub("[, ]+", "-", self.label)
        if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{,99}", sanitized):
            return sanitized
        return f"{re.sub('[^A-Za-z0-9_.=+-]+', '-', sanitized).strip('-.')[:90]}-{compute_fingerprint(self.label)[:8]}"


def list_trials(recipe: Recipe) -> list[TrialSpec]:
    """The distinct trials of a recipe, ordered by backbone, head and images of each class."""
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
    """Name of a backbone and the settings that differ from the defaults."""
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
    """Resolve a recipe for a task: ``all`` becomes the heads of the task, settings equal to defaults are removed.

    Raises
    ------
    ConfigError
        If a head or a setting is unknown, or the head does not support the task; names file, table and key.
    ModelError
        If a custom estimator cannot be saved.
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
    except (ValueError, TypeError) as error:  # a custom estimator
        raise ConfigError(f"{recipe.where}: [{head.table}] head {head.name!r} refuses its settings ({error})") from None
    changed_settings = {
        key: value for key, value in head.settings.items() if key not in defaults or defaults[key] != value
    }
    return replace(head, settings=dict(sorted(changed_settings.items())))


def resolve_settings(head: RecipeHead, task: str) -> dict[str, Any]:
    """Settings of a head, with the defaults of all others except those that are tuned.

    Only defaults that are text, numbers or lists of these are included.
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
