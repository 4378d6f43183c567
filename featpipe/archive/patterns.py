"""Globs and braces in the names of archives."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from featpipe.archive.listing import shown
from featpipe.errors import ArchiveError

__all__ = ["expand"]

_BRACE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}|\{([^{}]*,[^{}]*)\}")
_MOST_PATHS = 1_000_000


def expand(archives: Sequence[str | os.PathLike[str]]) -> list[list[Path]]:
    """Turn arguments into paths.

    ``{000..099}`` counts with the width of its bounds, ``{a,b}`` lists, and ``*``, ``?``, ``[...]`` and ``**`` match
    what is there, in code point order. A name that exists as it stands is taken as it stands.

    Returns
    -------
    list of list of Path
        One inner list for each argument.

    Raises
    ------
    ArchiveError
        If a path does not exist, or a pattern matches nothing.
    """
    return [_expand(os.path.expanduser(os.fspath(argument))) for argument in archives]


def _expand(argument: str) -> list[Path]:
    if os.path.lexists(argument):
        return [Path(argument)]
    paths: list[Path] = []
    missing: list[str] = []
    for pattern in _braces(argument):
        if os.path.lexists(pattern):
            paths.append(Path(pattern))
        elif glob.has_magic(pattern) and (found := glob.glob(pattern, recursive=True)):
            paths += sorted(map(Path, found), key=lambda path: path.parts)
        else:
            missing.append(pattern)
        if len(paths) + len(missing) > _MOST_PATHS:
            raise ArchiveError(f"{shown(argument)}: stands for more than {_MOST_PATHS} paths; narrow it")
    if missing == [argument]:
        found_what = "nothing matches" if glob.has_magic(argument) else "does not exist"
        raise ArchiveError(f"{argument}: {found_what}; expected a folder, a .tar, a .zip or a table of paths")
    if missing:
        first = ", ".join(map(shown, missing[:3]))
        raise ArchiveError(f"{argument}: {len(missing)} of its paths do not exist: {first}; complete the archive")
    return paths


def _braces(pattern: str) -> Iterator[str]:
    found = _BRACE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last, words = found.groups()
    if words is None:
        step = 1 if int(first) <= int(last) else -1
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        choices: Iterator[str] = (f"{i:0{width}d}" for i in range(int(first), int(last) + step, step))
    else:
        choices = iter(words.split(","))
    for choice in choices:
        yield from _braces(pattern[: found.start()] + choice + pattern[found.end() :])
