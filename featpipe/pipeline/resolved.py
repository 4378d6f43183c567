"""The recipe of a run with every default, as TOML: running that file gives the same numbers again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import tomli_w

from featpipe.pipeline.trials import settings_in_full
from featpipe.recipe import BACKBONE, EXTRACTION, Extraction, Head, Recipe

__all__ = ["text_of"]


def text_of(recipe: Recipe, task: str, made_with: Mapping[str, str]) -> str:
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
    prints = [f"#   {key} {value}" for key, value in made_with.items()]
    parts = ["\n".join([f"# {recipe.name}, with every default. Made with:", *prints]) + "\n"]
    parts += [tomli_w.dumps({"question": recipe.question, **_given(recipe.samples)}) + _unset(recipe.samples)]
    parts += [f"[extraction]\n{tomli_w.dumps(_of(recipe.extractions[0], {key: key for key in EXTRACTION}))}"]
    parts += [_array("backbones", _of(extraction, BACKBONE)) for extraction in recipe.extractions]
    parts += [_array("heads", _of_head(one, task)) for one in recipe.heads]
    parts += [_stage(name, stage) for name, stage in stages.items()]
    return "\n".join(parts)


def _stage(name: str, stage: Any) -> str:
    """One table, and in a comment the keys that are not set, which TOML has no value for."""
    head = f"[{name}]\n"
    return tomli_w.dumps({name: _given(stage)}).replace(head, head + _unset(stage), 1)


def _given(stage: Any) -> dict[str, Any]:
    values = _set({field.name: getattr(stage, field.name) for field in fields(stage)})
    return {name: value for name, value in values.items() if value != {}}


def _unset(stage: Any) -> str:
    given = _given(stage)
    names = [field.name for field in fields(stage) if field.name not in given]
    return f"# not set: {', '.join(names)}\n" if names else ""


def _set(values: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {key: value for key, value in plain.items() if value is not None}


def _of(extraction: Extraction, keys: Mapping[str, str]) -> dict[str, Any]:
    return _set({key: getattr(extraction, name) for key, name in keys.items()})


def _of_head(head: Head, task: str) -> dict[str, Any]:
    own = _set({name: getattr(head, name) for name in ("name", "output", "tune", "balance")})
    own |= {"grid": {key: list(values) for key, values in head.grid.items()}} if head.grid else {}
    return {**own, **{key: _setting(value) for key, value in settings_in_full(head, task).items()}}


def _setting(value: Any) -> Any:
    """As it is read again: a list is one value within another list, and no value is a word."""
    if isinstance(value, (tuple, list)):
        return [_inner(value)]
    return "none" if value is None else value


def _inner(value: Any) -> Any:
    return [_inner(one) for one in value] if isinstance(value, (tuple, list)) else value


def _array(name: str, table: Mapping[str, Any]) -> str:
    """One table of an array, and the tables within it."""
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    own = {key: value for key, value in table.items() if key not in inner}
    below = [f"\n[{name}.{key}]\n{tomli_w.dumps(value)}" for key, value in inner.items()]
    return "".join([f"[[{name}]]\n{tomli_w.dumps(own)}", *below])
