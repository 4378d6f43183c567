"""Unknown names are answered with the nearest ones."""

from __future__ import annotations

import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import date, time
from difflib import get_close_matches
from functools import cache
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from featpipe.errors import ConfigError

__all__ = [
    "check_bool",
    "check_choice",
    "check_integer",
    "check_names",
    "check_number",
    "convert_value",
    "describe_type",
    "get_field_types",
    "is_sequence_type",
    "matches_type",
    "unknown_name_error",
]


def check_names(kind: str, requested: Iterable[str], allowed: Iterable[str], hint: str = "") -> None:
    """Refuse the first name that is not in a table.

    Raises
    ------
    ConfigError
    """
    allowed_names = list(allowed)
    for name in requested:
        if name not in allowed_names:
            raise unknown_name_error(kind, name, allowed_names, hint)


def unknown_name_error(kind: str, name: str, allowed: Iterable[str], hint: str = "") -> ConfigError:
    """The error for a name that is not in a table.

    Examples
    --------
    >>> str(unknown("head", "logistc", ["logistic", "mlp"]))
    "unknown head 'logistc'; did you mean 'logistic'?"
    """
    allowed_names = list(allowed)
    matches = get_close_matches(name, allowed_names, n=3, cutoff=0.5)
    if matches:
        advice = f"did you mean {' or '.join(map(repr, matches))}?"
    elif len(allowed_names) <= 12:
        advice = f"known: {', '.join(allowed_names)}"
    else:
        advice = f"{len(allowed_names)} names are known"
    return ConfigError(f"unknown {kind} {name!r}; {advice}{' ' + hint if hint else ''}")


def check_number(
    name: str, value: object, *, above: float | None = None, minimum: float | None = None, below: float = np.inf
) -> None:
    """Refuse what is not a finite number in ``above < value < below`` or ``least <= value < below``."""
    lower_bound = f"above {above:g}" if above is not None else f"of {minimum:g} or more" if minimum is not None else ""
    upper_bound = f"below {below:g}" if np.isfinite(below) else ""
    is_valid = isinstance(value, Real) and not isinstance(value, (bool, np.bool_)) and bool(np.isfinite(float(value)))
    if is_valid and isinstance(value, Real):
        float_value = float(value)
        is_valid = (
            (above is None or float_value > above)
            and (minimum is None or float_value >= minimum)
            and float_value < below
        )
    if not is_valid:
        raise ValueError(f"{name} is {value!r}; give a number {' and '.join(filter(None, [lower_bound, upper_bound]))}")


def check_integer(name: str, value: object, *, minimum: int) -> None:
    """Refuse what is not a whole number of ``least`` or more."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} is {value!r}; give a whole number of {minimum} or more")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse what is not one of a few words."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; give one of {', '.join(choices)}")


def check_bool(name: str, value: object) -> None:
    """Refuse what is not true or false."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {value!r}; give true or false")


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
