"""Overrides of a recipe for one run: ``heads.0.C=10``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from featpipe.config import parse_assignments, parse_value
from featpipe.errors import ConfigError


def parse_changes(texts: Iterable[str]) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` pairs.

    A value is TOML, or text without quotes; values separated by commas are a list. An empty value removes the key from
    the recipe.

    Raises
    ------
    ConfigError
        If there is no ``=`` or no key, or a key comes twice.

    Examples
    --------
    >>> parse_changes(["heads.0.C=0.1,1", "archive=photos/", "heads.0.hidden=[[256, 128]]", "split.groups="])
    {'heads.0.C': [0.1, 1], 'archive': 'photos/', 'heads.0.hidden': [[256, 128]], 'split.groups': None}
    """
    assignments = parse_assignments(texts, example="heads.0.C=10")
    return {key: parse_value(text) if text else None for key, text in assignments.items()}


def apply_changes(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Replace values of a recipe's document; returns a copy.

    Parameters
    ----------
    document : mapping
        The parsed TOML.
    changes : mapping from dotted key to value
        A number in a key is the index of a table in an array; the length of the array adds a table. None removes the
        key.

    Raises
    ------
    ConfigError
        If a part of a key before the last one is not a table.

    Examples
    --------
    >>> apply_changes({"heads": [{"name": "knn"}]}, {"heads.0.n_neighbors": 3, "heads.1.name": "lda"})
    {'heads': [{'name': 'knn', 'n_neighbors': 3}, {'name': 'lda'}]}
    """
    changed_document = deepcopy(dict(document))
    for key, value in changes.items():
        *parents, last_part = key.split(".")
        container: Any = changed_document
        for depth, part in enumerate(parents):
            next_part = [*parents, last_part][depth + 1]
            container = _get_or_create(container, part, [] if next_part.isdigit() else {}, key)
        _set_value(container, last_part, value, key)
    return changed_document


def _get_or_create(container: Any, part: str, default: Any, key: str) -> Any:
    """Get the table or array with this name from a table or array; create it if missing."""
    if isinstance(container, dict) and not part.isdigit():
        return container.setdefault(part, default)
    if isinstance(container, list) and part.isdigit() and int(part) <= len(container):
        if int(part) == len(container):
            container.append(default)
        return container[int(part)]
    raise _make_key_error(key, part)


def _set_value(container: Any, last_part: str, value: Any, key: str) -> None:
    if isinstance(container, list) and last_part.isdigit() and int(last_part) <= len(container):
        container[int(last_part) : int(last_part) + 1] = [] if value is None else [value]
    elif not isinstance(container, dict):
        raise _make_key_error(key, last_part)
    elif value is None:
        container.pop(last_part, None)
    else:
        container[last_part] = value


def _make_key_error(key: str, part: str) -> ConfigError:
    return ConfigError(
        f"--set {key}: the recipe has no {part!r} here; write keys as in heads.0.C=10, with tables counted from 0"
    )
