"""``KEY=VALUE`` settings of the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import date, time
from types import MappingProxyType
from typing import Any

from featpipe.errors import ConfigError

BOOLEANS: Mapping[str, object] = {"true": True, "false": False}
NULLS: Mapping[str, object] = {"none": None, "null": None}


def parse_settings(texts: Iterable[str]) -> dict[str, object]:
    """Parse the settings of a head or a stage from ``KEY=VALUE`` texts: lists become tuples, ``none`` becomes None.

    Raises
    ------
    ConfigError
        If a text has no ``=`` or no key, or a key comes twice.

    Examples
    --------
    >>> parse_settings(["C=1e-2", "hidden=256,128", "early_stopping=true", "optimizer=sgd", "class_weight=none"])
    {'C': 0.01, 'hidden': (256, 128), 'early_stopping': True, 'optimizer': 'sgd', 'class_weight': None}
    """

    def to_tuples(value: Any) -> Any:
        return tuple(map(to_tuples, value)) if isinstance(value, list) else value

    assignments = parse_assignments(texts, example="C=10")
    return {key: to_tuples(parse_value(text, NULLS)) for key, text in assignments.items()}


def parse_assignments(texts: Iterable[str], *, example: str) -> dict[str, str]:
    """Split ``KEY=VALUE`` texts into keys and the texts of their values.

    Parameters
    ----------
    texts : iterable of str
    example : str
        A correct text, for the error message.

    Raises
    ------
    ConfigError
        If a text has no ``=`` or no key, or a key comes twice.
    """
    values: dict[str, str] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not all(key.split(".")):
            raise ConfigError(f"--set {text!r} is not KEY=VALUE; write it as in {example}")
        if key in values:
            raise ConfigError(f"--set {key!r} is given twice; give it once")
        values[key] = value
    return values


def parse_value(text: str, words: Mapping[str, object] = MappingProxyType({})) -> Any:
    """Parse a value: TOML, or text without quotes, or a list of these separated by commas.

    Parameters
    ----------
    text : str
    words : mapping from str to object
        Values of unquoted words, by the word in lower case. ``true`` and ``false`` are always included.

    Examples
    --------
    >>> [parse_value(text) for text in ("1e-2", ".5", "True", "sgd", "'1,2'", "256,128", "256,", "[[256, 128]]")]
    [0.01, 0.5, True, 'sgd', '1,2', [256, 128], [256], [[256, 128]]]
    """
    is_quoted = text[:1] in ('"', "'")
    try:
        if is_quoted or not {"#", "\n"} & set(text):  # these end a value in TOML
            value = tomllib.loads(f"value = {text}")["value"]
            return value.isoformat() if isinstance(value, (date, time)) else value
    except tomllib.TOMLDecodeError:
        pass
    if "," in text and not is_quoted:
        return [parse_value(item.strip(), words) for item in text.strip("()[]").split(",") if item.strip()]
    if text.lower() in BOOLEANS or text.lower() in words:
        return {**BOOLEANS, **words}[text.lower()]
    for number_type in (int, float):  # .5 and 007 are no numbers in TOML
        with suppress(ValueError):
            return number_type(text)
    return text
