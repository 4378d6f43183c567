"""Settings are refused before any data are read, one line for each."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real

import numpy as np

__all__ = ["check_bool", "check_choice", "check_integer", "check_number"]


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
