"""What is changed of a recipe for one run: ``heads.0.C=10``."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from featpipe.errors import ConfigError

__all__ = ["changed", "parse_changes"]


def parse_changes(texts: Iterable[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` pairs.

    A value is written as in TOML, or as text without quotes; several with commas are a list. An empty one takes the key
    out of the recipe.

    Raises
    ------
    ConfigError
        If there is no ``=`` or no key, or a key comes twice.

    Examples
    --------
    >>> parse_changes(["heads.0.C=0.1,1", "archive=photos/", "heads.0.hidden=[[256, 128]]", "split.groups="])
    {'heads.0.C': [0.1, 1], 'archive': 'photos/', 'heads.0.hidden': [[256, 128]], 'split.groups': None}
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key or not all(key.split(".")):
            raise ConfigError(f"--set {text!r} is not KEY=VALUE; write it as in heads.0.C=10")
        if key in found:
            raise ConfigError(f"--set {key!r} is given twice; give it once")
        found[key] = _value(value) if value else None
    return found


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return [_value(part.strip()) for part in text.split(",") if part.strip()] if "," in text else text


def changed(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's document with some of its values replaced; it is not changed itself.

    Parameters
    ----------
    document : mapping
        As TOML gives it.
    changes : mapping from dotted key to value
        A number in a key counts the tables of an array, and one more than there are adds a table. None removes.

    Raises
    ------
    ConfigError
        If a key leads through a value that is no table.

    Examples
    --------
    >>> changed({"heads": [{"name": "knn"}]}, {"heads.0.n_neighbors": 3, "heads.1.name": "lda"})
    {'heads': [{'name': 'knn', 'n_neighbors': 3}, {'name': 'lda'}]}
    """
    result = _copied(document)
    for key, value in changes.items():
        *path, last = key.split(".")
        place: Any = result
        for depth, part in enumerate(path):
            following = [*path, last][depth + 1]
            place = _entered(place, part, [] if following.isdigit() else {}, key)
        _put(place, last, value, key)
    return result


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _entered(place: Any, part: str, empty: Any, key: str) -> Any:
    """The table or array of this name in a table or array, which is made if there is none."""
    if isinstance(place, dict) and not part.isdigit():
        return place.setdefault(part, empty)
    if isinstance(place, list) and part.isdigit() and int(part) <= len(place):
        if int(part) == len(place):
            place.append(empty)
        return place[int(part)]
    raise _no_way(key, part)


def _put(place: Any, last: str, value: Any, key: str) -> None:
    if isinstance(place, list) and last.isdigit() and int(last) <= len(place):
        place[int(last) : int(last) + 1] = [] if value is None else [value]
    elif not isinstance(place, dict):
        raise _no_way(key, last)
    elif value is None:
        place.pop(last, None)
    else:
        place[last] = value


def _no_way(key: str, part: str) -> ConfigError:
    return ConfigError(f"--set {key}: there is no {part!r} there; tables are named and counted as in heads.0.C=10")
