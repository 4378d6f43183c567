"""Claim the output files of a command before any work: no command replaces what it did not write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from featpipe.diagnostics import FINDING_NAMES
from featpipe.errors import ConfigError
from featpipe.storage import compute_fingerprint, find_writer, is_same_file, record_output

# Options that decide where results go, how they are shown or how fast they are computed, but not what they are
PLACE_OPTIONS = ("cache", "findings", "out", "overwrite", "report", "resume", "tensorboard", "yes")
SPEED_OPTIONS = ("check_content", "device", "engine", "jobs", "memory", "time_limit", "workers")
DISPLAY_OPTIONS = ("as_json", "log_format")


@dataclass
class OutputClaim:
    """The right of a command to write some files.

    Parameters
    ----------
    command : str
        Digest of the command, see :func:`digest_command`.
    inputs : sequence of str or Path
        Files that the command reads.
    overwrite : bool
        Whether the user permits the command to replace any file that is not an input.
    """

    command: str
    inputs: tuple[str | os.PathLike[str], ...]
    overwrite: bool = False
    paths: list[Path] = field(default_factory=list)

    def add(self, path: str | os.PathLike[str], option: str = "--out") -> Path:
        """Claim a file.

        Raises
        ------
        ConfigError
            If the file is an input, or exists and was not written by this command, or its folder does not exist.
        """
        target = Path(path)
        self.reject_input(target, option)
        if not target.parent.exists() and not target.absolute().parent.parent.exists():
            raise ConfigError(
                f"{target}: the folder {target.parent} does not exist; create it, or choose another {option}"
            )
        if target.is_file() and not self.overwrite and find_writer(target) != self.command:
            raise ConfigError(
                f"{target}: exists and was not written by this command with these settings, or was changed since; "
                f"choose another {option}, or pass --overwrite"
            )
        self.paths.append(target)
        return target

    def reject_input(self, path: str | os.PathLike[str], option: str = "--out") -> None:
        """Raise a ConfigError if an output is an input."""
        if any(is_same_file(Path(path), source) for source in self.inputs):
            raise ConfigError(f"{path}: is an input of this command; choose another {option}")

    def add_findings(self, folder: str | os.PathLike[str] | None) -> None:
        """Claim the tables of ``--findings``."""
        if folder is not None:
            for name in FINDING_NAMES:
                self.add(Path(folder) / f"{name}.csv", "--findings")

    def record(self) -> None:
        """Record that this command wrote the claimed files that exist now."""
        for path in self.paths:
            with suppress(OSError):  # without a receipt, the next run only asks for --overwrite
                if path.is_file():
                    record_output(path, self.command)


def claim_outputs(*inputs: str | os.PathLike[str] | None, overwrite: bool) -> OutputClaim:
    """Start the claim of the running command.

    Parameters
    ----------
    *inputs : path-like or None
        The files that the command reads; other texts, such as URLs, are ignored.
    overwrite : bool
    """
    sources = tuple(source for source in inputs if source is not None)
    return OutputClaim(digest_command(click.get_current_context()), sources, overwrite)


def digest_command(context: click.Context) -> str:
    """Digest of a command: its name and all parameters that decide its results; paths count as absolute ones."""
    options = {parameter.name for parameter in context.command.params if isinstance(parameter, click.Option)}
    ignored = options & {*PLACE_OPTIONS, *SPEED_OPTIONS, *DISPLAY_OPTIONS}
    settings = {name: list(_normalize(value)) for name, value in context.params.items() if name not in ignored}
    return compute_fingerprint({"command": context.info_name, "settings": settings})


def _normalize(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in sorted(value.items()):
            yield f"{key}="
            yield from _normalize(item)
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes, os.PathLike)):
        for item in value:
            yield from _normalize(item)
    elif isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        yield os.path.abspath(text) if text and os.path.exists(text) else str(text)
    else:
        yield repr(value)
