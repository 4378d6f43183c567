"""Unknown names are answered with the nearest ones."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from featpipe.errors import ConfigError

__all__ = ["check_names", "unknown_name_error"]


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
