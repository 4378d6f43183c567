"""Progress on the terminal, and output shared by commands."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import click

from featpipe.cli.logging import HANDLER, is_json, log_message
from featpipe.runtime import Progress, ProgressBar, nan_to_none

if TYPE_CHECKING:
    from featpipe.cache import FeatureCache

SECONDS_BETWEEN_LINES = 60.0  # a bar would fill a log file


class Terminal:
    """Progress on stderr: a bar on a terminal, one line a minute elsewhere.

    A log record closes the bar before its line is written.
    """

    def __init__(self) -> None:
        self._bar = ProgressBar()
        self._stage = ""
        self._last_line_at = time.monotonic()

    def __enter__(self) -> Terminal:
        HANDLER.before_line = self._bar.close
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        HANDLER.before_line = None

    def __call__(self, progress: Progress) -> None:
        if sys.stderr.isatty() and not is_json():
            self._bar(progress)
        else:
            self._log_periodically(progress)

    def _log_periodically(self, progress: Progress) -> None:
        """Log a line a minute; as JSON also when a stage begins or ends."""
        stage_changes = progress.stage != self._stage or progress.done >= progress.total
        if time.monotonic() - self._last_line_at > SECONDS_BETWEEN_LINES or (is_json() and stage_changes):
            text = f"{progress.stage}: {progress.done} of {progress.total} {progress.unit}"
            log_message(text, event="progress", **asdict(progress))
            self._last_line_at = time.monotonic()
        self._stage = progress.stage


def get_command_line() -> str:
    """The command that the user typed, quoted for a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def print_json(value: object) -> None:
    """Print JSON to stdout; numbers that JSON cannot hold (NaN, infinity) become null."""
    click.echo(json.dumps(nan_to_none(value), indent=2, ensure_ascii=False, default=str, allow_nan=False))


def print_cache(cache: FeatureCache, as_json: bool) -> None:
    """Print the path of a written cache, or its counts as JSON."""
    if not as_json:
        click.echo(cache.path)
        return
    files = [str(file) for file in cache.shard_files]
    counts = {"samples": len(cache), "bad": cache.bad_rows(), "bytes": cache.file_bytes, "shards": files}
    print_json({"cache": str(cache.path), **counts, "merged_from": cache.manifest.get("merged_from")})
