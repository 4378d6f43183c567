"""Expand globs and braces in archive paths."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from featpipe.data.sources.listing import format_name
from featpipe.errors import ArchiveError

_BRACE_PATTERN = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}|\{([^{}]*,[^{}]*)\}")
_MAX_PATHS = 1_000_000


def expand_paths(archives: Sequence[str | os.PathLike[str]]) -> list[list[Path]]:
    """Expand arguments to paths.

    ``{000..099}`` is a zero-padded range, ``{a,b}`` a list of alternatives. ``*``, ``?``, ``[...]`` and ``**`` match
    existing paths, in code point order. A path that exists literally is not expanded.

    Returns
    -------
    list of list of Path
        One inner list for each argument.

    Raises
    ------
    ArchiveError
        If a path does not exist, or a pattern matches nothing.
    """
    return [_expand_argument(os.path.expanduser(os.fspath(argument))) for argument in archives]


def _expand_argument(argument: str) -> list[Path]:
    if os.path.lexists(argument):
        return [Path(argument)]
    paths: list[Path] = []
    missing: list[str] = []
    for pattern in _expand_braces(argument):
        if os.path.lexists(pattern):
            paths.append(Path(pattern))
        elif glob.has_magic(pattern) and (matches := glob.glob(pattern, recursive=True)):
            paths += sorted(map(Path, matches), key=lambda path: path.parts)
        else:
            missing.append(pattern)
        if len(paths) + len(missing) > _MAX_PATHS:
            raise ArchiveError(f"{format_name(argument)}: expands to more than {_MAX_PATHS} paths; narrow the pattern")
    if missing == [argument]:
        problem = "nothing matches" if glob.has_magic(argument) else "does not exist"
        raise ArchiveError(f"{argument}: {problem}; expected a folder, a .tar, a .zip or a table of paths")
    if missing:
        first_patterns = ", ".join(map(format_name, missing[:3]))
        raise ArchiveError(
            f"{argument}: {len(missing)} of its paths do not exist: {first_patterns}; complete the archive"
        )
    return paths


def _expand_braces(pattern: str) -> Iterator[str]:
    match = _BRACE_PATTERN.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, alternatives = match.groups()
    if alternatives is None:
        step = 1 if int(first) <= int(last) else -1
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        choices: Iterator[str] = (f"{i:0{width}d}" for i in range(int(first), int(last) + step, step))
    else:
        choices = iter(alternatives.split(","))
    for choice in choices:
        yield from _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
