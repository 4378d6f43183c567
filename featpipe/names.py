"""Unknown names are answered with the nearest ones."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from featpipe.errors import ConfigError

__all__ = ["check_names", "unknown"]


def check_names(kind: str, given: Iterable[str], known: Iterable[str], hint: str = "") -> None:
    """Refuse the first name that is not in a table.

    Raises
    ------
    ConfigError
    """
    names = list(known)
    for name in given:
        if name not in names:
            raise unknown(kind, name, names, hint)


def unknown(kind: str, given: str, known: Iterable[str], hint: str = "") -> ConfigError:
    """The error for a name that is not in a table.

    Examples
    --------
    >>> str(unknown("head", "logistc", ["logistic", "mlp"]))
    "unknown head 'logistc'; did you mean 'logistic'?"
    """
    names = list(known)
    near = get_close_matches(given, names, n=3, cutoff=0.5)
    if near:
        advice = f"did you mean {' or '.join(map(repr, near))}?"
    elif len(names) <= 12:
        advice = f"known: {', '.join(names)}"
    else:
        advice = f"{len(names)} names are known"
    return ConfigError(f"unknown {kind} {given!r}; {advice}{' ' + hint if hint else ''}")
