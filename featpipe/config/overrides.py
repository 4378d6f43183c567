"""Settings as people type them: ``--set C=10 --set hidden=256,128``."""

from __future__ import annotations

from collections.abc import Iterable

from featpipe.errors import ConfigError

__all__ = ["parse_settings"]

LITERALS = {"true": True, "false": False, "none": None, "null": None}


def parse_settings(settings: Iterable[str]) -> dict[str, object]:
    """Read ``KEY=VALUE`` pairs.

    A value is a whole number, a number, true, false, none, several of these separated by commas (a tuple; a comma
    at the end makes a tuple of one), or else text. Quotes keep text that looks like something else.

    Raises
    ------
    ConfigError
        If there is no ``=``, no key, or a key comes twice.

    Examples
    --------
    >>> parse_settings(["C=1e-2", "hidden=256,128", "early_stopping=true", "optimizer=sgd"])
    {'C': 0.01, 'hidden': (256, 128), 'early_stopping': True, 'optimizer': 'sgd'}
    """
    parsed: dict[str, object] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"setting {setting!r} is not KEY=VALUE; write it as in C=10")
        if key in parsed:
            raise ConfigError(f"setting {key!r} is given twice; give it once")
        parsed[key] = _parse_value(value.strip())
    return parsed


def _parse_value(text: str) -> object:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if "," in text:
        items = text.strip("()[]").split(",")
        return tuple(_parse_scalar(item.strip()) for item in items if item.strip())
    return _parse_scalar(text)


def _parse_scalar(text: str) -> object:
    if text.lower() in LITERALS:
        return LITERALS[text.lower()]
    for number_type in (int, float):
        try:
            return number_type(text)
        except ValueError:
            continue
    return text
