"""What kinds of values the fields of a stage take, as their annotations say, and how that is told to people."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from datetime import date, time
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["convert_value", "describe_type", "get_field_types", "is_sequence_type", "matches_type"]

_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}


@cache
def get_field_types(config_class: type) -> dict[str, Any]:
    """The annotation of each field of a dataclass."""
    return get_type_hints(config_class)


def matches_type(value: object, annotation: Any) -> bool:
    """Whether a value of a TOML file is of the kind of a field.

    Examples
    --------
    >>> fits(3, float), fits(True, int), fits(["a", "b"], tuple[str, ...]), fits("a", int | None)
    (True, False, True, False)
    """
    if get_origin(annotation) in (Union, types.UnionType):
        return any(matches_type(value, member) for member in get_args(annotation))
    if get_origin(annotation) in (tuple, Sequence):
        item_type = get_args(annotation)[0]
        return (
            all(matches_type(item, item_type) for item in value)
            if isinstance(value, (list, tuple))
            else matches_type(value, item_type)
        )
    if get_origin(annotation) is Mapping:
        return isinstance(value, Mapping)
    if annotation is Any:
        return not isinstance(value, (list, Mapping))
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(annotation, type) and isinstance(value, annotation)


def is_sequence_type(annotation: Any) -> bool:
    """Whether a field takes several values by its nature."""
    return get_origin(annotation) in (tuple, Sequence)


def convert_value(value: object, annotation: Any) -> object:
    """The value as the field takes it: one text where several may stand is a tuple of one, dates are texts."""
    if is_sequence_type(annotation):
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return value.isoformat() if isinstance(value, (date, time)) else value


def describe_type(annotation: Any) -> str:
    """What a field takes, in words.

    Examples
    --------
    >>> told(int | None), told(tuple[str, ...])
    ('a whole number', 'text, or a list of it')
    """
    if get_origin(annotation) in (Union, types.UnionType):
        type_names = [
            describe_type(member)
            for member in get_args(annotation)
            if member is not type(None) and member in (str, int, float, bool)
        ]
        return " or ".join(dict.fromkeys(type_names))
    if is_sequence_type(annotation):
        return f"{describe_type(get_args(annotation)[0])}, or a list of it"
    return _TYPE_NAMES.get(dict if get_origin(annotation) is Mapping else annotation, "text")
