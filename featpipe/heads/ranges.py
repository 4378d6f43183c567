"""Settings are refused before any data are read, one line for each."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real

import numpy as np

__all__ = ["choice", "number", "switch", "whole"]


def number(
    name: str, value: object, *, above: float | None = None, least: float | None = None, below: float = np.inf
) -> None:
    """Refuse what is not a finite number in ``above < value < below`` or ``least <= value < below``."""
    low = f"above {above:g}" if above is not None else f"of {least:g} or more" if least is not None else ""
    high = f"below {below:g}" if np.isfinite(below) else ""
    fits = isinstance(value, Real) and not isinstance(value, (bool, np.bool_)) and bool(np.isfinite(float(value)))
    if fits and isinstance(value, Real):
        found = float(value)
        fits = (above is None or found > above) and (least is None or found >= least) and found < below
    if not fits:
        raise ValueError(f"{name} is {value!r}; give a number {' and '.join(filter(None, [low, high]))}")


def whole(name: str, value: object, *, least: int) -> None:
    """Refuse what is not a whole number of ``least`` or more."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; give a whole number of {least} or more")


def choice(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse what is not one of a few words."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; give one of {', '.join(choices)}")


def switch(name: str, value: object) -> None:
    """Refuse what is not true or false."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {value!r}; give true or false")
