"""Formatting: sizes, durations, aligned tables, errors, printable names, and values that JSON can hold."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

MAX_CELL_CHARACTERS = 110


def format_table(rows: Sequence[Sequence[object]], header: Sequence[str], right_aligned: Sequence[int] = ()) -> str:
    """Format a table with columns aligned by their display width in a terminal.

    Examples
    --------
    >>> print(format_table([["mlp", 0.91]], ["head", "score"], right_aligned=[1]))
    head  score
    mlp    0.91
    """
    lines = [[_truncate_cell(str(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(_get_display_width(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            (" " * (widths[i] - _get_display_width(cell)) + cell)
            if i in right_aligned
            else cell + " " * (widths[i] - _get_display_width(cell))
            for i, cell in enumerate(line)
        ).rstrip()
        for line in lines
    )


def format_size(nbytes: float) -> str:
    """Format a number of bytes in binary units.

    Examples
    --------
    >>> format_size(900), format_size(66_600_000)
    ('900 bytes', '63.5 MiB')
    """
    if nbytes < 1024:
        return f"{nbytes:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1024:.1f} TiB"


def format_duration(seconds: float) -> str:
    """Format a duration given in seconds.

    Examples
    --------
    >>> format_duration(0.24), format_duration(200), format_duration(60 * 60 * 5), format_duration(86400 * 3)
    ('0.2 s', '3 min 20 s', '5 h', '3 days')
    """
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole_seconds = round(seconds)
    if whole_seconds < 600:
        return f"{whole_seconds // 60} min" + (f" {whole_seconds % 60} s" if whole_seconds % 60 else "")
    if whole_seconds < 7200:
        return f"{whole_seconds // 60} min"
    return f"{whole_seconds // 3600} h" if whole_seconds < 2 * 86400 else f"{whole_seconds // 86400:,} days"


def format_error(error: BaseException) -> str:
    """Format the message of an error on one line of at most 200 characters; the type if there is no message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def printable(text: str) -> str:
    """Replace control characters and join lines; use it for names from archives, which are not trusted."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


def _truncate_cell(text: str) -> str:
    clean = printable(text)
    return clean if len(clean) <= MAX_CELL_CHARACTERS else clean[: MAX_CELL_CHARACTERS - 1] + "…"


def _get_display_width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in text)


def nan_to_none(value: Any) -> Any:
    """A value with None in the place of NaN and infinity, which JSON lacks; lists and mappings item by item."""
    if isinstance(value, Mapping):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
