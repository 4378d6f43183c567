"""What goes to stderr: text for people, or one JSON object a line for those who collect logs."""

from __future__ import annotations

import json
import warnings
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import click

__all__ = ["FORMATS", "VARIABLE", "Level", "is_json", "option", "say"]

FORMATS = ("text", "json")
VARIABLE = "FEATPIPE_LOG_FORMAT"

Level = Literal["info", "warning", "error"]

_chosen = {"format": "text"}  # of this process, which has one stderr


def option(*, of_group: bool = False) -> click.Option:
    """``--log-format``, of the group or of a command, which says it last; the environment is asked once."""
    return click.Option(
        ["--log-format"],
        type=click.Choice(FORMATS),
        envvar=VARIABLE if of_group else None,
        expose_value=False,
        is_eager=True,  # errors in what follows are told so already
        callback=_choose,
        help=f"Of stderr: text, or a JSON object a line; also by {VARIABLE}.  [default: text]",
    )


def is_json() -> bool:
    """Whether machines read along."""
    return _chosen["format"] == "json"


def say(text: str, *, level: Level = "info", event: str = "note", **facts: Any) -> None:
    """Put a line on stderr.

    Parameters
    ----------
    text : str
        For people; what comes from archives is made printable by the caller.
    level : {"info", "warning", "error"}
    event : str
        ``note``, ``warning``, ``progress``, ``table``; of an end ``error``, ``usage``, ``interrupted``, ``time-limit``
        or ``bug``.
    **facts
        More for machines alone.
    """
    if not is_json():
        click.echo(text, err=True)
        return
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    click.echo(json.dumps({"time": now, "level": level, "event": event, "text": text, **facts}), err=True)


def _choose(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None or context.parent is None:  # what is given to the group holds for the command
        _chosen["format"] = value or "text"
    if is_json():
        warnings.showwarning = _warned


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A library's warning, which would be lines of text."""
    say(f"{category.__name__}: {message}", level="warning", event="warning", where=f"{filename}:{lineno}")
