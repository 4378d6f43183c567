"""What kinds of values the fields of a stage take, as their annotations say, and how that is told to people."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from datetime import date, time
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["fits", "kinds_of", "listed", "plain", "told"]

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}


@cache
def kinds_of(stage: type) -> dict[str, Any]:
    """The annotation of each field of a dataclass."""
    return get_type_hints(stage)


def fits(value: object, kind: Any) -> bool:
    """Whether a value of a TOML file is of the kind of a field.

    Examples
    --------
    >>> fits(3, float), fits(True, int), fits(["a", "b"], tuple[str, ...]), fits("a", int | None)
    (True, False, True, False)
    """
    if get_origin(kind) in (Union, types.UnionType):
        return any(fits(value, one) for one in get_args(kind))
    if get_origin(kind) in (tuple, Sequence):
        each = get_args(kind)[0]
        return all(fits(one, each) for one in value) if isinstance(value, (list, tuple)) else fits(value, each)
    if get_origin(kind) is Mapping:
        return isinstance(value, Mapping)
    if kind is Any:
        return not isinstance(value, (list, Mapping))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def listed(kind: Any) -> bool:
    """Whether a field takes several values by its nature."""
    return get_origin(kind) in (tuple, Sequence)


def plain(value: object, kind: Any) -> object:
    """The value as the field takes it: one text where several may stand is a tuple of one, dates are texts."""
    if listed(kind):
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return value.isoformat() if isinstance(value, (date, time)) else value


def told(kind: Any) -> str:
    """What a field takes, in words.

    Examples
    --------
    >>> told(int | None), told(tuple[str, ...])
    ('a whole number', 'text, or a list of it')
    """
    if get_origin(kind) in (Union, types.UnionType):
        words = [told(one) for one in get_args(kind) if one is not type(None) and one in (str, int, float, bool)]
        return " or ".join(dict.fromkeys(words))
    if listed(kind):
        return f"{told(get_args(kind)[0])}, or a list of it"
    return _WORDS.get(dict if get_origin(kind) is Mapping else kind, "text")
