"""Receipts: what finished work was made from, so that the same request is answered without doing the work again.

Names, paths and times decide nothing. Work is current if the digest of the request and the digest of the inputs are the
same, and the output has the bytes that were written. A cache needs no receipt of this kind: its manifest holds the
facts and its table the digest of every sample, and :class:`featpipe.extraction.ExtractionPlan` decides row by row.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["RACY_NANOSECONDS", "Receipt", "hash_file"]

RACY_NANOSECONDS = 2 * 10**9  # a file changed this shortly before it is read may change again under the same time


@dataclass(frozen=True)
class Receipt:
    """What a piece of finished work was made from, and what came of it.

    Attributes
    ----------
    request : str
        Digest of what was requested: settings, versions, methods.
    inputs : str
        Digest of what the work read; empty where the request covers it.
    output_sha256 : str or None
        Of the file that was written; None where the output is stored with the receipt.
    output_bytes : int or None
        Its size, where it was recorded.
    """

    request: str
    inputs: str = ""
    output_sha256: str | None = None
    output_bytes: int | None = None

    def with_output(self, path: Path) -> Receipt:
        """The receipt of the same work with the size and the digest of a finished file.

        Raises
        ------
        OSError
        """
        return replace(self, output_sha256=hash_file(path), output_bytes=path.stat().st_size)

    def is_current(self, request: str, inputs: str = "", output: Path | None = None) -> bool:
        """Whether the work need not be done again.

        Parameters
        ----------
        request, inputs : str
            Digests of what is requested now, and of the inputs as they are now.
        output : Path, optional
            The file; it must have the bytes that were written.
        """
        return (self.request, self.inputs) == (request, inputs) and (output is None or self.describes(output))

    def describes(self, path: Path) -> bool:
        """Whether a file has the size and the bytes of the recorded output."""
        try:
            has_size = self.output_bytes is None or path.stat().st_size == self.output_bytes
            return has_size and self.output_sha256 is not None and hash_file(path) == self.output_sha256
        except OSError:
            return False


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
