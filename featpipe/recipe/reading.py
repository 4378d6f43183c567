"""A TOML file, with what is changed of it, to a recipe. Every error names file, table and key."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from featpipe.errors import ConfigError
from featpipe.names import unknown
from featpipe.recipe.changes import changed
from featpipe.recipe.kinds import fits, kinds_of, listed, plain, told
from featpipe.recipe.settings import Extraction, FineTuning
from featpipe.recipe.shipped import FOLDER, find
from featpipe.recipe.tables import TILES, Evaluation, Head, Recipe, Report, Samples, Split, Training

__all__ = ["BACKBONE", "EXTRACTION", "TABLES", "read_recipe"]

BACKBONE = {  # key of a table [[backbones]] → field of Extraction: what decides the embeddings
    "name": "backbone",
    "weights": "weights",
    "outputs": "outputs",
    "seed": "seed",
    "precision": "precision",
    "min_cosine": "min_cosine",
    "storage": "storage",
}
EXTRACTION = ("cache", "device", "engine", "workers", "batch", "max_bad", "check_content", "shard_bytes")
"""Keys of the table [extraction]: how and where it runs."""

STAGES: dict[str, type] = {"split": Split, "training": Training, "evaluation": Evaluation, "report": Report}
TABLES = ("backbones", "extraction", "heads", "finetune", *STAGES)

_KINDS = {"backbone": str, "weights": str | None, "cache": str}  # where Python takes more than a file can say
_HEAD = tuple(field.name for field in fields(Head) if field.name not in ("settings", "table"))


def read_recipe(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    changes: Mapping[str, Any] | None = None,
    archive: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
) -> Recipe:
    """Read a recipe.

    Parameters
    ----------
    recipe : str, path-like, mapping or Recipe
        A name of one that comes along, a file, or what such a file holds. Paths in a file are relative to its folder,
        others to where one is.
    changes : mapping from dotted key to value, optional
        What is to be another way, as ``{"heads.0.C": 10}``.
    archive : path-like or sequence of path-like, optional
        The images, in place of the recipe's own.

    Raises
    ------
    ConfigError
        If there is no such recipe, it is no TOML, or a table, key or value is not as it must be.
    """
    wanted = dict(changes or {})
    if archive is not None:
        several = [archive] if isinstance(archive, (str, os.PathLike)) else archive
        wanted["archive"] = [os.fspath(path) for path in several]
    if isinstance(recipe, Recipe):
        if wanted:
            raise ConfigError("a Recipe is changed with dataclasses.replace; changes are of a file or a mapping")
        return recipe
    if isinstance(recipe, Mapping):
        name, where, document = "recipe", "recipe", dict(recipe)
    else:
        path = find(recipe)
        name, where = path.stem, str(path) if path.parent != FOLDER else path.name
        own = path.parent != FOLDER
        document = _placed(_parsed(path), path.absolute().parent if own else Path.cwd())
    return _Reader(where, frozenset(wanted)).recipe(name, _placed(changed(document, wanted), Path.cwd()))


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML ({error}); see https://toml.io") from None


def _placed(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With absolute paths, so that another folder makes no other run."""

    def at(path: Any) -> Any:
        if isinstance(path, (list, tuple)):
            return [at(one) for one in path]
        return path if not isinstance(path, str) or path == TILES else os.path.normpath(folder / path)

    def in_table(text: Any) -> Any:
        table, colon, column = text.rpartition(":") if isinstance(text, str) else ("", "", "")
        return f"{at(table)}:{column}" if colon and table else text

    def weights(given: Any) -> Any:
        if isinstance(given, (list, tuple)):
            return [weights(one) for one in given]
        return at(given) if isinstance(given, str) and (os.sep in given or (folder / given).is_file()) else given

    placed = _replaced(document, {"archive": at, "labels": at})
    places: dict[str, dict[str, Callable[[Any], Any]]] = {
        "split": {"groups": in_table, "times": in_table, "without": at},
        "evaluation": {"archive": at, "labels": at},
        "extraction": {"cache": at},
    }
    for name, keys in places.items():
        if isinstance(placed.get(name), dict):
            placed[name] = _replaced(placed[name], keys)
    if isinstance(placed.get("backbones"), list):
        tables = placed["backbones"]
        placed["backbones"] = [_replaced(one, {"weights": weights}) if isinstance(one, dict) else one for one in tables]
    return placed


def _replaced(table: Mapping[str, Any], keys: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    return {key: keys[key](value) if key in keys else value for key, value in table.items()}


@dataclass(frozen=True)
class _Reader:
    """Reads tables, and knows what to call them in messages.

    Attributes
    ----------
    where : str
        The file.
    changes : frozenset of str
        Dotted keys that do not come from it.
    """

    where: str
    changes: frozenset[str]

    def recipe(self, name: str, document: Mapping[str, Any]) -> Recipe:
        tops = {key: value for key, value in document.items() if key not in TABLES}
        known = [field.name for field in fields(Samples)]
        self._known("", tops, ["question", *known, *TABLES])
        question = self._value("", "question", tops.pop("question", ""), str)
        stages = {key: self._stage(key, stage, self._table(key, document)) for key, stage in STAGES.items()}
        several = {"extractions": self._extractions(document), "heads": self._heads(document.get("heads", [{}]))}
        told = {"name": name, "where": self.where, "question": question, "samples": self._stage("", Samples, tops)}
        tuning = self._finetuning(document) if "finetune" in document else None
        return self._made("", Recipe, {**told, **several, **stages, "finetune": tuning})

    def _finetuning(self, document: Mapping[str, Any]) -> FineTuning:
        table, kinds = self._table("finetune", document), kinds_of(FineTuning)
        self._known("finetune", table, [field.name for field in fields(FineTuning)])
        given = {key: self._value("finetune", key, value, kinds[key]) for key, value in table.items()}
        return self._made("finetune", lambda **values: FineTuning.of(values), given)

    def _table(self, name: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
        table = document.get(name, {})
        if not isinstance(table, Mapping):
            raise self._error("", f"{name} is {table!r}; expected a table [{name}]", name)
        return table

    def _tables(self, name: str, tables: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if not isinstance(tables, list) or not tables or not all(isinstance(table, Mapping) for table in tables):
            raise self._error("", f"{name} is {tables!r}; expected tables [[{name}]]", name)
        for number, table in enumerate(tables):
            yield f"{name}.{number}", table

    def _stage(self, name: str, stage: type, table: Mapping[str, Any]) -> Any:
        """A stage of one table, every key of the kind that its field is."""
        kinds = kinds_of(stage)
        self._known(name, table, [field.name for field in fields(stage)])
        return self._made(name, stage, {key: self._value(name, key, value, kinds[key]) for key, value in table.items()})

    def _extractions(self, document: Mapping[str, Any]) -> tuple[Extraction, ...]:
        """One for each backbone, and for each combination of what is listed of it."""
        kinds = {**kinds_of(Extraction), **_KINDS}
        common = self._table("extraction", document)
        self._known("extraction", common, EXTRACTION)
        how = {key: self._value("extraction", key, value, kinds[key]) for key, value in common.items()}
        how["cache"] = os.path.abspath(how.get("cache", Extraction.cache))
        found = []
        for name, table in self._tables("backbones", document.get("backbones", [{}])):
            self._known(name, table, BACKBONE)
            of = {key: kinds[field] for key, field in BACKBONE.items()}
            for point in _swept(table, [key for key in table if not listed(of[key])]):
                given = {BACKBONE[key]: self._value(name, key, value, of[key]) for key, value in point.items()}
                found.append(self._made(name, Extraction, {**how, **given}))
        return tuple(found)

    def _heads(self, tables: Any) -> tuple[Head, ...]:
        """One for each head, and for each combination of what is listed of it."""
        kinds, found = kinds_of(Head), []
        for name, table in self._tables("heads", tables):
            for point in _swept(table, [key for key in table if key != "grid"]):
                own = {key: self._value(name, key, point[key], kinds[key]) for key in _HEAD if key in point}
                settings = {key: _setting(value) for key, value in point.items() if key not in _HEAD}
                found.append(self._made(name, Head, {**own, "settings": settings, "table": name}))
        return tuple(found)

    def _known(self, table: str, given: Mapping[str, Any], known: Sequence[str] | Mapping[str, Any]) -> None:
        for key in given:
            if key not in known:
                kind = "table" if isinstance(given[key], Mapping) and not table else "key"
                raise self._error(table, str(unknown(kind, key, known)), key)

    def _value(self, table: str, key: str, value: Any, kind: Any) -> Any:
        value = value if listed(kind) else plain(value, kind)
        if not fits(value, kind):
            hint = "; only heads and backbones take several values" if isinstance(value, list) else ""
            raise self._error(table, f"{key} is {value!r}; expected {told(kind)}{hint}", key)
        return plain(value, kind)

    def _made(self, table: str, stage: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        try:
            return stage(**values)
        except ConfigError as error:
            raise self._error(table, str(error), "") from None

    def _error(self, table: str, text: str, key: str) -> ConfigError:
        dotted = f"{table}.{key}" if table else key
        source = "--set" if dotted in self.changes else self.where
        return ConfigError(f"{source}: [{table}] {text}" if table else f"{source}: {text}")


def _swept(table: Mapping[str, Any], keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The table once for each combination of what is listed under some keys, the first key slowest."""
    several = [key for key in keys if isinstance(table[key], list)]
    for values in product(*(table[key] for key in several)):
        yield {**table, **dict(zip(several, values, strict=True))}


def _setting(value: Any) -> Any:
    """A setting of a head: a list within a list is one value, and the text "none" is no value."""
    if isinstance(value, list):
        return tuple(_setting(one) for one in value)
    return None if value == "none" else value
