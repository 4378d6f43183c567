"""A column of strings stored in two arrays: each string costs its UTF-8 bytes and eight bytes of offset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray


class StringColumn(Sequence[str]):
    """An immutable sequence of strings.

    Parameters
    ----------
    data : ndarray of shape (total,), uint8
        The UTF-8 bytes of all strings, concatenated.
    offsets : ndarray of shape (n + 1,), int64
        String ``i`` is ``data[offsets[i]:offsets[i + 1]]``.
    """

    __slots__ = ("data", "offsets")

    def __init__(self, data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.data = data
        self.offsets = offsets

    @classmethod
    def from_strings(cls, texts: Iterable[str], errors: str = "backslashreplace") -> StringColumn:
        """Build a column. By default lone surrogates (undecodable file names) become backslash escapes."""
        encoded = [text.encode("utf-8", errors) for text in texts]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(text) for text in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def take(self, rows: NDArray[np.intp] | Sequence[int]) -> StringColumn:
        """Select rows as a new column. The bytes are copied and not decoded, so invalid UTF-8 is accepted."""
        rows = np.asarray(rows, np.intp)
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(self.offsets[rows + 1] - self.offsets[rows], out=offsets[1:])
        bounds = zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), strict=True)
        data = b"".join(self.data[start:stop].tobytes() for start, stop in bounds)
        return StringColumn(np.frombuffer(data, np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        n = len(self)
        if not -n <= row < n:
            raise IndexError(row)
        row %= n
        return bytes(self.data[self.offsets[row] : self.offsets[row + 1]]).decode("utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 65536):
            offsets = self.offsets[start : start + 65537]
            block = bytes(self.data[offsets[0] : offsets[-1]])
            boundaries = (offsets - offsets[0]).tolist()
            for begin, end in pairwise(boundaries):
                yield block[begin:end].decode("utf-8", "replace")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringColumn):
            return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.data, other.data)
        return isinstance(other, (list, tuple)) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash((self.data.tobytes(), self.offsets.tobytes()))

    def __repr__(self) -> str:
        preview = ", ".join(repr(text) for text in self[:3])
        return f"StringColumn([{preview}{', …' if len(self) > 3 else ''}], n={len(self)})"
