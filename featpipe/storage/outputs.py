"""Receipts of output files: which command wrote a file, so that no other command replaces it unasked.

The receipt is a small hidden file beside the output. It goes with the folder, not with the file: a copy elsewhere has
none, and is never replaced unasked.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from featpipe.errors import ConfigError
from featpipe.storage.atomic import atomic_write, make_writable_folder
from featpipe.storage.provenance import hash_file

OUTPUT_RECEIPT_FORMAT = "featpipe-output/1"
MAX_OUTPUT_RECEIPT_BYTES = 2**20
COMMAND_FILE_NAME = ".command"  # in a folder of results: the digest of the command that writes them


def make_receipt_path(path: Path) -> Path:
    """Path of the receipt of a file: hidden, so that globs and readers of whole folders skip it."""
    return path.with_name(f".{path.name}.made.json")


def record_output(path: Path, command: str) -> None:
    """Record which command wrote a file, with the size, the digest and the modification time of the file.

    Parameters
    ----------
    path : Path
        The finished file.
    command : str
        Digest of the command.

    Notes
    -----
    Other entries of a receipt that exists are kept: a file of predictions has more of them.

    Raises
    ------
    OSError
    """
    recorded = _read_receipt(path)
    stat = path.stat()
    document = {"format": OUTPUT_RECEIPT_FORMAT, **recorded, "command": command}
    if document.get("bytes") != stat.st_size or document.get("mtime_ns") != stat.st_mtime_ns:
        document |= {"bytes": stat.st_size, "sha256": hash_file(path), "mtime_ns": stat.st_mtime_ns}
    if document == recorded:
        return
    with atomic_write(make_receipt_path(path), text=True) as file:
        json.dump(document, file, indent=1)


def find_writer(path: Path) -> str | None:
    """Digest of the command that wrote a file; None if it is unknown, or the file was changed since.

    The bytes are hashed only if the modification time differs from the recorded one.
    """
    document = _read_receipt(path)
    command = document.get("command")
    if not isinstance(command, str):
        return None
    with suppress(OSError):
        stat = path.stat()
        if document.get("bytes") != stat.st_size:
            return None
        if document.get("mtime_ns") == stat.st_mtime_ns or document.get("sha256") == hash_file(path):
            return command
    return None


def claim_folder(folder: Path, command: str, *, overwrite: bool = False) -> None:
    """Claim a folder for the results of a command; recorded at once, so that an interrupted command can resume.

    Parameters
    ----------
    folder : Path
    command : str
        Digest of the command.
    overwrite : bool
        Claim the folder whatever is in it.

    Raises
    ------
    ConfigError
        If the folder cannot be written, or has files that another command, or none, wrote.
    """
    make_writable_folder(folder, ConfigError, "--out")
    command_file = folder / COMMAND_FILE_NAME
    with suppress(OSError):
        if command_file.read_text(encoding="utf-8").strip() == command:
            return
    if not overwrite and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ConfigError(
            f"{folder}: has files that this command did not write, or wrote with other settings; choose another --out, "
            "or pass --overwrite"
        )
    with atomic_write(command_file, text=True) as file:
        file.write(f"{command}\n")


def is_same_file(path: Path, other: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to the same file, also by links; False if one of them does not exist."""
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):
        return False


def _read_receipt(path: Path) -> dict[str, Any]:
    try:
        with open(make_receipt_path(path), "rb") as file:
            document = json.loads(file.read(MAX_OUTPUT_RECEIPT_BYTES))
    except (OSError, ValueError, RecursionError):  # missing or damaged
        return {}
    return document if isinstance(document, dict) else {}
