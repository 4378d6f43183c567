"""Receipts: records of the inputs of finished work, so that a repeated request reuses its output.

Names, paths and times are ignored. An output is current if the digests of the request and of the inputs are unchanged,
and the output has the bytes that were written. A cache needs no receipt: its manifest holds the facts, its sample table
holds the digest of every sample, and :class:`featpipe.extraction.ExtractionPlan` decides for each row.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featpipe.storage.atomic import atomic_write
from featpipe.storage.hashing import compute_fingerprint

RACY_NANOSECONDS = 2 * 10**9  # a file modified this shortly before a read may change again with the same mtime


@dataclass(frozen=True)
class Receipt:
    """A record of the inputs and the output of finished work.

    Attributes
    ----------
    request : str
        Digest of the request: settings, versions, methods.
    inputs : str
        Digest of the input data; empty if the request covers them.
    output_sha256 : str or None
        SHA-256 of the output file; None if the output is stored with the receipt.
    output_bytes : int or None
        Size of the output file; None if it was not recorded.
    """

    request: str
    inputs: str = ""
    output_sha256: str | None = None
    output_bytes: int | None = None

    def with_output(self, path: Path) -> Receipt:
        """Return a copy of the receipt with the size and the digest of an output file.

        Raises
        ------
        OSError
        """
        return replace(self, output_sha256=hash_file(path), output_bytes=path.stat().st_size)

    def is_current(self, request: str, inputs: str = "", output: Path | None = None) -> bool:
        """Whether the output is up to date.

        Parameters
        ----------
        request, inputs : str
            Digests of the present request and of the present inputs.
        output : Path, optional
            The output file; it must have the bytes that were written.
        """
        return (self.request, self.inputs) == (request, inputs) and (output is None or self.describes(output))

    def describes(self, path: Path) -> bool:
        """Whether a file has the size and the digest of the recorded output."""
        try:
            has_size = self.output_bytes is None or path.stat().st_size == self.output_bytes
            return has_size and self.output_sha256 is not None and hash_file(path) == self.output_sha256
        except OSError:
            return False


class RecordStore:
    """Results of finished work with their receipts: a folder with one JSON file for each.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, name: str, inputs: Any, file: Path | None = None) -> dict[str, Any] | None:
        """Find the result recorded under a name; None if its inputs differ or its file has changed."""
        try:
            record = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            receipt = Receipt(record["made_from"], output_sha256=record["sha256"])
            result: dict[str, Any] = record["found"]
        except (OSError, ValueError, LookupError, TypeError):  # damaged, or not a record
            return None
        return result if receipt.is_current(compute_fingerprint(_to_json_value(inputs)), output=file) else None

    def write(self, name: str, inputs: Any, result: dict[str, Any], file: Path | None = None) -> None:
        """Record a result after its file was written."""
        receipt = Receipt(compute_fingerprint(_to_json_value(inputs)))
        if file is not None:
            receipt = receipt.with_output(file)
        record = {
            "made_from": receipt.request,
            "facts": _to_json_value(inputs),
            "sha256": receipt.output_sha256,
            "found": result,
        }
        with atomic_write(self.folder / f"{name}.json", text=True) as out:
            json.dump(record, out, indent=1, ensure_ascii=False)


def _to_json_value(value: Any) -> Any:
    """Convert a value by a round trip through JSON; other types become text."""
    return json.loads(json.dumps(value, default=repr))


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
