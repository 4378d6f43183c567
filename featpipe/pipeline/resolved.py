"""The recipe of a run with every default, as TOML: running that file gives the same numbers again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import tomli_w

from featpipe.pipeline.trials import resolve_settings
from featpipe.recipe import BACKBONE_FIELDS, EXTRACTION_KEYS, ExtractionConfig, Recipe, RecipeHead

__all__ = ["recipe_to_toml"]


def recipe_to_toml(recipe: Recipe, task: str, provenance: Mapping[str, str]) -> str:
    """The file.

    Parameters
    ----------
    recipe : Recipe
        Resolved, for this task.
    task : str
    made_with : mapping
        Versions and fingerprints, as comments at its head.
    """
    stages: dict[str, Any] = {"split": recipe.split, "training": recipe.training}
    stages |= {} if recipe.finetune is None else {"finetune": recipe.finetune}
    stages |= {"evaluation": recipe.evaluation, "report": recipe.report}
    comments = [f"#   {key} {value}" for key, value in provenance.items()]
    sections = ["\n".join([f"# {recipe.name}, with every default. Made with:", *comments]) + "\n"]
    sections += [
        tomli_w.dumps({"question": recipe.question, **_get_set_fields(recipe.samples)})
        + _list_unset_fields(recipe.samples)
    ]
    sections += [
        f"[extraction]\n{tomli_w.dumps(_select_fields(recipe.extractions[0], {key: key for key in EXTRACTION_KEYS}))}"
    ]
    sections += [
        _array_to_toml("backbones", _select_fields(extraction, BACKBONE_FIELDS)) for extraction in recipe.extractions
    ]
    sections += [_array_to_toml("heads", _head_to_dict(head, task)) for head in recipe.heads]
    sections += [_stage_to_toml(name, stage) for name, stage in stages.items()]
    return "\n".join(sections)


def _stage_to_toml(name: str, stage: Any) -> str:
    """One table, and in a comment the keys that are not set, which TOML has no value for."""
    header = f"[{name}]\n"
    return tomli_w.dumps({name: _get_set_fields(stage)}).replace(header, header + _list_unset_fields(stage), 1)


def _get_set_fields(stage: Any) -> dict[str, Any]:
    values = _drop_none({field.name: getattr(stage, field.name) for field in fields(stage)})
    return {name: value for name, value in values.items() if value != {}}


def _list_unset_fields(stage: Any) -> str:
    set_fields = _get_set_fields(stage)
    names = [field.name for field in fields(stage) if field.name not in set_fields]
    return f"# not set: {', '.join(names)}\n" if names else ""


def _drop_none(values: Mapping[str, Any]) -> dict[str, Any]:
    toml_values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {key: value for key, value in toml_values.items() if value is not None}


def _select_fields(extraction: ExtractionConfig, keys: Mapping[str, str]) -> dict[str, Any]:
    return _drop_none({key: getattr(extraction, name) for key, name in keys.items()})


def _head_to_dict(head: RecipeHead, task: str) -> dict[str, Any]:
    table = _drop_none({name: getattr(head, name) for name in ("name", "output", "tune", "balance")})
    table |= {"grid": {key: list(values) for key, values in head.grid.items()}} if head.grid else {}
    return {**table, **{key: _setting_to_toml(value) for key, value in resolve_settings(head, task).items()}}


def _setting_to_toml(value: Any) -> Any:
    """As it is read again: a list is one value within another list, and no value is a word."""
    if isinstance(value, (tuple, list)):
        return [_nested_to_lists(value)]
    return "none" if value is None else value


def _nested_to_lists(value: Any) -> Any:
    return [_nested_to_lists(item) for item in value] if isinstance(value, (tuple, list)) else value


def _array_to_toml(name: str, table: Mapping[str, Any]) -> str:
    """One table of an array, and the tables within it."""
    subtables = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    scalars = {key: value for key, value in table.items() if key not in subtables}
    subtable_texts = [f"\n[{name}.{key}]\n{tomli_w.dumps(value)}" for key, value in subtables.items()]
    return "".join([f"[[{name}]]\n{tomli_w.dumps(scalars)}", *subtable_texts])
