"""Log output on stderr: text, or one JSON object per line."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import click

from featpipe.runtime import printable

LOG_FORMATS = ("text", "json")
LOG_FORMAT_VARIABLE = "FEATPIPE_LOG_FORMAT"

LogLevel = Literal["info", "warning", "error"]

_log_settings = {"format": "text"}  # a process has one stderr


def make_log_format_option(*, for_group: bool = False) -> click.Option:
    """Make ``--log-format`` for the group or for a command; the value of the command takes precedence."""
    return click.Option(
        ["--log-format"],
        type=click.Choice(LOG_FORMATS),
        envvar=LOG_FORMAT_VARIABLE if for_group else None,
        expose_value=False,
        is_eager=True,  # errors in later options are already printed in this format
        callback=_set_log_format,
        help=f"Log format on stderr: text, or one JSON object per line; also {LOG_FORMAT_VARIABLE}.  [default: text]",
    )


def is_json() -> bool:
    """Whether log output is JSON."""
    return _log_settings["format"] == "json"


def log_message(text: str, *, level: LogLevel = "info", event: str = "note", **fields: Any) -> None:
    """Write a line to stderr.

    Parameters
    ----------
    text : str
        The message; the caller escapes control characters in names from archives.
    level : {"info", "warning", "error"}
    event : str
        ``note``, ``warning``, ``progress`` or ``table``; at the end of a command ``error``, ``usage``, ``interrupted``,
        ``time-limit`` or ``bug``.
    **fields
        Further fields of the JSON object.
    """
    if not is_json():
        click.echo(text, err=True)
        return
    timestamp = datetime.now(UTC).isoformat(timespec="milliseconds")
    click.echo(json.dumps({"time": timestamp, "level": level, "event": event, "text": text, **fields}), err=True)


class LogHandler(logging.Handler):
    """Writes the log records of the package to stderr.

    Attributes
    ----------
    before_line : callable or None
        Called before a record is written; closes a progress bar.
    """

    before_line: Callable[[], None] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, with control characters escaped."""
        if self.before_line is not None:
            self.before_line()
        text = printable(record.getMessage())
        if record.levelno < logging.WARNING:
            log_message(text, event="note")
        else:
            log_message(text if is_json() else f"warning: {text}", level="warning", event="warning")


HANDLER = LogHandler()


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Send notes and warnings of the package to stderr, in the format of the command line."""
    logger = logging.getLogger("featpipe")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(HANDLER)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library may have configured the root logger
    try:
        yield
    finally:
        logger.removeHandler(HANDLER)
        logger.setLevel(level)
        logger.propagate = propagate


def _set_log_format(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None or context.parent is None:  # the value of the group applies to the command
        _log_settings["format"] = value or "text"
    if is_json():
        warnings.showwarning = _log_warning


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Log a library's Python warning as JSON."""
    log_message(f"{category.__name__}: {message}", level="warning", event="warning", where=f"{filename}:{lineno}")
