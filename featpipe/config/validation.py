"""Validation of settings: the annotation of a setting gives its check and its error message.

A field of a settings class is annotated with its type, its choices (``Literal``) and its bounds
(``Annotated[int, Range(minimum=1)]``). `check_value` checks a value against that annotation, whether the value comes
from Python, from a recipe or from a command line.
"""

from __future__ import annotations

import math
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

import numpy as np

from featpipe.errors import ConfigError


class Settings:
    """Base of the settings classes, which are frozen dataclasses: every field is checked at construction."""

    def __post_init__(self) -> None:
        for name, annotation in get_field_types(type(self)).items():
            object.__setattr__(self, name, check_value(name, getattr(self, name), annotation))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Make the settings from keyword arguments; the error for an unknown one names the nearest match.

        Raises
        ------
        ConfigError
        """
        check_names("setting", settings, get_field_types(cls))
        return cls(**settings)


@dataclass(frozen=True)
class Range:
    """Bounds of a number, as metadata of an ``Annotated`` type.

    Parameters
    ----------
    minimum, maximum : float, optional
        Inclusive bounds.
    above, below : float, optional
        Exclusive bounds.

    Examples
    --------
    >>> str(Range(minimum=1)), str(Range(above=0, below=1)), str(Range(minimum=0, maximum=1))
    ('of 1 or more', 'above 0 and below 1', 'from 0 to 1')
    """

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.minimum is None or number >= self.minimum)
            and (self.above is None or number > self.above)
            and (self.maximum is None or number <= self.maximum)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        if self.minimum is not None and self.maximum is not None:
            return f"from {self.minimum:g} to {self.maximum:g}"
        bounds = [
            f"of {self.minimum:g} or more" if self.minimum is not None else "",
            f"above {self.above:g}" if self.above is not None else "",
            f"of {self.maximum:g} or less" if self.maximum is not None else "",
            f"below {self.below:g}" if self.below is not None else "",
        ]
        return " and ".join(filter(None, bounds))


def check_value(name: str, value: Any, annotation: Any) -> Any:
    """Check a value against the annotation of a setting.

    Parameters
    ----------
    name : str
        The setting, for the message.
    value : object
    annotation : type
        The metadata of ``Annotated`` is a `Range`, or a function that raises ConfigError for a wrong value.

    Returns
    -------
    object
        The value; for a sequence type a tuple, of one item if the value is a single item.

    Raises
    ------
    ConfigError
        If the value has another type, is out of bounds, or is none of the choices.

    Examples
    --------
    >>> check_value("epochs", 3, Annotated[int, Range(minimum=1)]), check_value("outputs", "pooled", Sequence[str])
    (3, ('pooled',))
    >>> check_value("epochs", 0, Annotated[int, Range(minimum=1)])
    Traceback (most recent call last):
    featpipe.errors.ConfigError: epochs is 0; give a whole number of 1 or more
    >>> check_value("schedule", "cosin", Literal["cosine", "constant"])
    Traceback (most recent call last):
    featpipe.errors.ConfigError: unknown schedule 'cosin'; did you mean 'cosine'?
    """
    alternatives = list(_iter_alternatives(annotation))
    for kind, metadata in alternatives:
        if _matches(value, kind, metadata):
            for check in metadata:
                if not isinstance(check, Range):
                    check(value)
            is_item = is_sequence_type(kind) and not isinstance(value, (list, tuple))
            return (value,) if is_item else tuple(value) if is_sequence_type(kind) else value
    if all(kind is type(None) or get_origin(kind) is Literal for kind, _ in alternatives):
        raise unknown_name_error(name, str(value), get_choices(annotation))
    raise ConfigError(f"{name} is {value!r}; give {_describe(annotation)}")


def get_field_types(settings_class: Any) -> dict[str, Any]:
    """The annotation of each field of a dataclass."""
    return get_type_hints(settings_class, include_extras=True)


def get_range(annotation: Any) -> Range:
    """The bounds of a number's annotation.

    Examples
    --------
    >>> get_range(Annotated[int, Range(minimum=1)] | None).minimum
    1
    """
    metadata = [item for _, items in _iter_alternatives(annotation) for item in items]
    return next((item for item in metadata if isinstance(item, Range)), Range())


def get_choices(annotation: Any) -> tuple[str, ...]:
    """The choices of an annotation.

    Examples
    --------
    >>> get_choices(Literal["over", "under"] | None)
    ('over', 'under')
    """
    kinds = (kind for kind, _ in _iter_alternatives(annotation) if get_origin(kind) is Literal)
    return tuple(str(choice) for kind in kinds for choice in get_args(kind))


def is_integer_type(annotation: Any) -> bool:
    """Whether a setting holds a whole number."""
    return any(kind is int for kind, _ in _iter_alternatives(annotation))


def is_sequence_type(annotation: Any) -> bool:
    """Whether a setting holds several values."""
    return get_origin(annotation) in (tuple, Sequence)


def _iter_alternatives(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The members of a union, each with the metadata that applies to it."""
    if get_origin(annotation) is Annotated:
        yield from _iter_alternatives(annotation.__origin__, (*metadata, *annotation.__metadata__))
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _iter_alternatives(member, metadata)
    else:
        yield annotation, metadata


def _matches(value: Any, kind: Any, metadata: Sequence[Any] = ()) -> bool:
    """Whether a value has a type, which is not a union, and lies within the bounds in the metadata."""
    origin = get_origin(kind)
    if origin is Literal:
        return any(value is choice or (isinstance(value, str) and value == choice) for choice in get_args(kind))
    if origin in (tuple, Sequence):
        item_types = list(_iter_alternatives(get_args(kind)[0]))
        items = value if isinstance(value, (list, tuple)) else [value]
        return all(any(_matches(item, *item_type) for item_type in item_types) for item in items)
    if kind in (int, float):
        is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, (bool, np.bool_))
        return is_number and all(float(value) in item for item in metadata if isinstance(item, Range))
    if kind is bool:
        return isinstance(value, (bool, np.bool_))
    return kind is Any or isinstance(value, origin or kind)


_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Mapping: "a table"}


def _describe(annotation: Any) -> str:
    """Describe the values of a setting, for error messages.

    Examples
    --------
    >>> _describe(Annotated[int, Range(minimum=1)] | None), _describe(tuple[str, ...])
    ('a whole number of 1 or more', 'text or a list of such values')
    """
    descriptions: list[str] = []
    for kind, metadata in _iter_alternatives(annotation):
        if get_origin(kind) is Literal:
            descriptions.extend(map(str, get_args(kind)))
        elif is_sequence_type(kind):
            descriptions.append(f"{_describe(get_args(kind)[0])} or a list of such values")
        elif (kind_name := _TYPE_NAMES.get(get_origin(kind) or kind)) is not None:
            ranges = [str(item) for item in metadata if isinstance(item, Range)]
            descriptions.append(" ".join([kind_name, *ranges]))
    return " or ".join(dict.fromkeys(descriptions))


def check_number(
    name: str, value: object, *, above: float | None = None, minimum: float | None = None, below: float | None = None
) -> None:
    """Check that a value is a finite number within bounds.

    Raises
    ------
    ConfigError
    """
    check_value(name, value, Annotated[float, Range(above=above, minimum=minimum, below=below)])


def check_integer(name: str, value: object, *, minimum: int) -> None:
    """Check that a value is a whole number of at least `minimum`.

    Raises
    ------
    ConfigError
    """
    check_value(name, value, Annotated[int, Range(minimum=minimum)])


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Check that a value is one of the choices.

    Raises
    ------
    ConfigError
    """
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; give one of {', '.join(choices)}")


def check_bool(name: str, value: object) -> None:
    """Check that a value is a bool.

    Raises
    ------
    ConfigError
    """
    check_value(name, value, bool)


def check_names(kind: str, requested: Iterable[str], allowed: Iterable[str], hint: str = "") -> None:
    """Check that all names are allowed.

    Raises
    ------
    ConfigError
        For the first name that is not.
    """
    allowed_names = list(allowed)
    for name in requested:
        if name not in allowed_names:
            raise unknown_name_error(kind, name, allowed_names, hint)


def unknown_name_error(kind: str, name: str, allowed: Iterable[str], hint: str = "") -> ConfigError:
    """Make the error for a name that is not allowed; it suggests the nearest names.

    Examples
    --------
    >>> str(unknown_name_error("head", "logistc", ["logistic", "mlp"]))
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
