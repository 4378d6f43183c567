"""What a person sees while a command works, and the tables at its end."""

from __future__ import annotations

import json
import sys
import time
import unicodedata
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import click

from featpipe.cli.logging import is_json, log_message
from featpipe.runtime import Progress

__all__ = ["Terminal", "format_duration", "format_size", "format_table", "in_notebook", "print_json", "printable"]

MAX_CELL_CHARACTERS = 110
SECONDS_BETWEEN_LINES = 60.0  # where stderr is a file, a bar would fill it


class Terminal:
    """Progress on stderr: bars with rate and time left on a terminal, a line a minute elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""
        self._last_line_at = time.monotonic()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, progress: Progress) -> None:
        if progress.kind == "bar":
            self._advance(progress)
            return
        self._close()
        is_warning = progress.kind == "warning"
        text = f"{'warning: ' if is_warning and not is_json() else ''}{printable(progress.text)}"
        log_message(text, level="warning" if is_warning else "info", event=progress.kind)

    def _advance(self, progress: Progress) -> None:
        if is_json() or not (sys.stderr.isatty() or in_notebook()):
            self._log_periodically(progress)
            return
        if self._stage != progress.text:
            self._close()
        if self._bar is None:
            from tqdm.auto import tqdm

            self._stage = progress.text
            self._bar = tqdm(
                total=progress.total, desc=progress.text, unit=f" {progress.unit}", leave=False, smoothing=0.1
            )
        self._bar.update(progress.done - self._bar.n)
        if progress.done >= progress.total:
            self._close()

    def _log_periodically(self, progress: Progress) -> None:
        """A line a minute; as JSON also where a stage begins and ends."""
        stage_changes = progress.text != self._stage or progress.done >= progress.total
        if time.monotonic() - self._last_line_at > SECONDS_BETWEEN_LINES or (is_json() and stage_changes):
            done, total, unit = progress.done, progress.total, progress.unit
            text = f"{progress.text}: {done} of {total} {unit}"
            log_message(text, event="progress", stage=progress.text, done=done, total=total, unit=unit)
            self._last_line_at = time.monotonic()
        self._stage = progress.text

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._stage = ""
        self._bar = None


def in_notebook() -> bool:
    """Whether this is a notebook's kernel, which shows bars although its stderr is no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def format_table(rows: Sequence[Sequence[object]], header: Sequence[str], right_aligned: Sequence[int] = ()) -> str:
    """Columns of text, aligned by what a terminal shows.

    Examples
    --------
    >>> print(table([["mlp", 0.91]], ["head", "score"], right=[1]))
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
    """Bytes as people read them.

    Examples
    --------
    >>> size(900), size(66_600_000)
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
    """Seconds as people read them.

    Examples
    --------
    >>> duration(0.24), duration(200), duration(60 * 60 * 5), duration(86400 * 3)
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


def print_json(value: object) -> None:
    """JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def printable(text: str) -> str:
    """One line without control characters: names from archives are not trusted."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


def _truncate_cell(text: str) -> str:
    clean = printable(text)
    return clean if len(clean) <= MAX_CELL_CHARACTERS else clean[: MAX_CELL_CHARACTERS - 1] + "…"


def _get_display_width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in text)
