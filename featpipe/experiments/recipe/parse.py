"""Parse a TOML file and its overrides into a recipe. Every error names file, table and key."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date, time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from featpipe.config import (
    ExtractionConfig,
    FineTuneConfig,
    Settings,
    check_value,
    get_field_types,
    is_sequence_type,
    unknown_name_error,
)
from featpipe.errors import ConfigError
from featpipe.experiments.recipe.builtin import RECIPES_FOLDER, find_recipe
from featpipe.experiments.recipe.overrides import apply_changes
from featpipe.experiments.recipe.schema import (
    TILES_ARCHIVE,
    EvaluationConfig,
    Recipe,
    RecipeHead,
    RecipeTraining,
    ReportConfig,
    SamplesConfig,
    SplitConfig,
)

BACKBONE_FIELDS = {  # key of a table [[backbones]] → field of ExtractionConfig; these determine the embeddings
    "name": "backbone",
    "weights": "weights",
    "outputs": "outputs",
    "seed": "seed",
    "precision": "precision",
    "min_cosine": "min_cosine",
    "storage": "storage",
}
EXTRACTION_KEYS = ("cache", "device", "engine", "workers", "batch", "max_bad", "check_content", "shard_bytes")
"""Keys of the table [extraction]: how and where the extraction runs."""

STAGE_CLASSES: dict[str, type[Settings]] = {
    "split": SplitConfig,
    "training": RecipeTraining,
    "finetune": FineTuneConfig,
    "evaluation": EvaluationConfig,
    "report": ReportConfig,
}
TABLE_NAMES = ("backbones", "extraction", "heads", *STAGE_CLASSES)

_TYPE_OVERRIDES = {
    "backbone": str,
    "weights": str | None,
    "cache": str,
}  # Python accepts more types than a file can have
_HEAD_KEYS = tuple(field.name for field in fields(RecipeHead) if field.name not in ("settings", "table"))


def read_recipe(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    changes: Mapping[str, Any] | None = None,
    archive: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
) -> Recipe:
    """Read a recipe.

    Parameters
    ----------
    recipe : str, path-like, mapping or Recipe
        The name of a built-in recipe, a file, or the content of one. Paths in a file are relative to its folder, all
        others to the working directory.
    changes : mapping from dotted key to value, optional
        Overrides, such as ``{"heads.0.C": 10}``.
    archive : path-like or sequence of path-like, optional
        The images, instead of the recipe's own.

    Raises
    ------
    ConfigError
        If there is no such recipe, it is not TOML, or a table, key or value is invalid.
    """
    overrides = dict(changes or {})
    if archive is not None:
        archives = [archive] if isinstance(archive, (str, os.PathLike)) else archive
        overrides["archive"] = [os.fspath(path) for path in archives]
    if isinstance(recipe, Recipe):
        if overrides:
            raise ConfigError(
                "changes and archive apply to a recipe given as a name, file or mapping; change a Recipe with "
                "dataclasses.replace"
            )
        return recipe
    if isinstance(recipe, Mapping):
        name, where, document = "recipe", "recipe", dict(recipe)
    else:
        path = find_recipe(recipe)
        name, where = path.stem, str(path) if path.parent != RECIPES_FOLDER else path.name
        is_own_file = path.parent != RECIPES_FOLDER
        document = _resolve_paths(_parse_toml(path), path.absolute().parent if is_own_file else Path.cwd())
    return _RecipeParser(where, frozenset(overrides)).parse_recipe(
        name, _resolve_paths(apply_changes(document, overrides), Path.cwd())
    )


def _parse_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML ({error}); see https://toml.io") from None


def _resolve_paths(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make paths absolute, so that a run does not depend on the working directory."""

    def resolve_path(path: Any) -> Any:
        if isinstance(path, (list, tuple)):
            return [resolve_path(item) for item in path]
        return path if not isinstance(path, str) or path == TILES_ARCHIVE else os.path.normpath(folder / path)

    def resolve_table_column(value: Any) -> Any:
        table, colon, column = value.rpartition(":") if isinstance(value, str) else ("", "", "")
        return f"{resolve_path(table)}:{column}" if colon and table else value

    def resolve_weights(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [resolve_weights(item) for item in value]
        is_file = isinstance(value, str) and (os.sep in value or (folder / value).is_file())
        return resolve_path(value) if is_file else value

    resolved = _convert_values(document, {"archive": resolve_path, "labels": resolve_path})
    resolvers_by_table: dict[str, dict[str, Callable[[Any], Any]]] = {
        "split": {"groups": resolve_table_column, "times": resolve_table_column, "without": resolve_path},
        "evaluation": {"archive": resolve_path, "labels": resolve_path},
        "extraction": {"cache": resolve_path},
    }
    for name, resolvers in resolvers_by_table.items():
        if isinstance(resolved.get(name), dict):
            resolved[name] = _convert_values(resolved[name], resolvers)
    if isinstance(resolved.get("backbones"), list):
        tables = resolved["backbones"]
        resolved["backbones"] = [
            _convert_values(table, {"weights": resolve_weights}) if isinstance(table, dict) else table
            for table in tables
        ]
    return resolved


def _convert_values(table: Mapping[str, Any], converters: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    return {key: converters[key](value) if key in converters else value for key, value in table.items()}


@dataclass(frozen=True)
class _RecipeParser:
    """Parses tables, and names them in messages.

    Attributes
    ----------
    where : str
        The file, for messages.
    changes : frozenset of str
        Dotted keys of the overrides.
    """

    where: str
    changes: frozenset[str]

    def parse_recipe(self, name: str, document: Mapping[str, Any]) -> Recipe:
        top_level = {key: value for key, value in document.items() if key not in TABLE_NAMES}
        sample_keys = [field.name for field in fields(SamplesConfig)]
        self._check_keys("", top_level, ["question", *sample_keys, *TABLE_NAMES])
        question = self._check_value("", "question", top_level.pop("question", ""), str)
        stages = {
            key: self._parse_stage(key, config_class, self._get_table(key, document))
            for key, config_class in STAGE_CLASSES.items()
            if key in document or key != "finetune"
        }
        values = {
            "name": name,
            "where": self.where,
            "question": question,
            "samples": self._parse_stage("", SamplesConfig, top_level),
            "extractions": self._parse_extractions(document),
            "heads": self._parse_heads(document.get("heads", [{}])),
            **stages,
        }
        return self._build("", lambda: Recipe(**values))

    def _get_table(self, name: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
        table = document.get(name, {})
        if not isinstance(table, Mapping):
            raise self._error("", f"{name} is {table!r}; expected a table [{name}]", name)
        return table

    def _iter_tables(self, name: str, tables: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if not isinstance(tables, list) or not tables or not all(isinstance(table, Mapping) for table in tables):
            raise self._error("", f"{name} is {tables!r}; expected tables [[{name}]]", name)
        for position, table in enumerate(tables):
            yield f"{name}.{position}", table

    def _parse_stage(self, name: str, config_class: type[Settings], table: Mapping[str, Any]) -> Any:
        field_types = get_field_types(config_class)
        self._check_keys(name, table, field_types)
        values = {key: self._check_value(name, key, value, field_types[key]) for key, value in table.items()}
        return self._build(name, lambda: config_class.from_settings(values))

    def _parse_extractions(self, document: Mapping[str, Any]) -> tuple[ExtractionConfig, ...]:
        """Make the settings for each backbone and each combination of its listed values."""
        field_types = {**get_field_types(ExtractionConfig), **_TYPE_OVERRIDES}
        common_table = self._get_table("extraction", document)
        self._check_keys("extraction", common_table, EXTRACTION_KEYS)
        common_values = {
            key: self._check_value("extraction", key, value, field_types[key]) for key, value in common_table.items()
        }
        common_values["cache"] = os.path.abspath(common_values.get("cache", ExtractionConfig.cache))
        extractions = []
        for name, table in self._iter_tables("backbones", document.get("backbones", [{}])):
            self._check_keys(name, table, BACKBONE_FIELDS)
            key_types = {key: field_types[field] for key, field in BACKBONE_FIELDS.items()}
            for combination in _iter_combinations(
                table, [key for key in table if not is_sequence_type(key_types[key])]
            ):
                backbone_values = {
                    BACKBONE_FIELDS[key]: self._check_value(name, key, value, key_types[key])
                    for key, value in combination.items()
                }
                settings = {**common_values, **backbone_values}
                extractions.append(self._build(name, partial(ExtractionConfig, **settings)))
        return tuple(extractions)

    def _parse_heads(self, tables: Any) -> tuple[RecipeHead, ...]:
        """Make each head, for each combination of its listed values."""
        field_types, recipe_heads = get_field_types(RecipeHead), []
        for name, table in self._iter_tables("heads", tables):
            for combination in _iter_combinations(table, [key for key in table if key != "grid"]):
                head_values = {
                    key: self._check_value(name, key, combination[key], field_types[key])
                    for key in _HEAD_KEYS
                    if key in combination
                }
                settings = {key: _parse_setting(value) for key, value in combination.items() if key not in _HEAD_KEYS}
                head = partial(RecipeHead, **head_values, settings=settings, table=name)
                recipe_heads.append(self._build(name, head))
        return tuple(recipe_heads)

    def _check_keys(self, table: str, values: Mapping[str, Any], allowed: Sequence[str] | Mapping[str, Any]) -> None:
        for key in values:
            if key not in allowed:
                kind = "table" if isinstance(values[key], Mapping) and not table else "key"
                raise self._error(table, str(unknown_name_error(kind, key, allowed)), key)

    def _check_value(self, table: str, key: str, value: Any, annotation: Any) -> Any:
        try:
            return check_value(key, value.isoformat() if isinstance(value, (date, time)) else value, annotation)
        except ConfigError as error:
            is_sweep = isinstance(value, list) and not is_sequence_type(annotation)
            hint = "; only heads and backbones take several values" if is_sweep else ""
            raise self._error(table, f"{error}{hint}", key) from None

    def _build(self, table: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except ConfigError as error:
            raise self._error(table, str(error), "") from None

    def _error(self, table: str, message: str, key: str) -> ConfigError:
        dotted_key = f"{table}.{key}" if table else key
        source = "--set" if dotted_key in self.changes else self.where
        return ConfigError(f"{source}: [{table}] {message}" if table else f"{source}: {message}")


def _iter_combinations(table: Mapping[str, Any], keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Iterate over the combinations of the values listed under some keys; the first key varies slowest."""
    list_keys = [key for key in keys if isinstance(table[key], list)]
    for values in product(*(table[key] for key in list_keys)):
        yield {**table, **dict(zip(list_keys, values, strict=True))}


def _parse_setting(value: Any) -> Any:
    """Convert a setting of a head: a list within a list is one value, the text "none" is None."""
    if isinstance(value, list):
        return tuple(_parse_setting(item) for item in value)
    return None if value == "none" else value
