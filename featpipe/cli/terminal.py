"""What a person sees while a command works, and the tables at its end."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.logging import is_json, log_message
from featpipe.runtime import Progress, printable

if TYPE_CHECKING:
    from featpipe.cache import FeatureCache

__all__ = ["Terminal", "get_command_line", "in_notebook", "print_cache", "print_json"]

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


def get_command_line() -> str:
    """The command that the user typed, quoted for a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def in_notebook() -> bool:
    """Whether this is a notebook's kernel, which shows bars although its stderr is no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def print_json(value: object) -> None:
    """JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_cache(cache: FeatureCache, as_json: bool) -> None:
    """The path of a cache that was written, or its counts as JSON."""
    if not as_json:
        click.echo(cache.path)
        return
    files = [str(file) for file in cache.shard_files]
    counts = {"samples": len(cache), "bad": cache.bad_rows(), "bytes": cache.file_bytes, "shards": files}
    print_json({"cache": str(cache.path), **counts, "merged_from": cache.manifest.get("merged_from")})
