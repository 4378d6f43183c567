"""Canonical JSON and digests: of facts, of weights, of images. Identity is by content, never by name or path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

__all__ = ["canonical", "differences", "digest", "digest_arrays", "fingerprint"]


def canonical(facts: object) -> bytes:
    """The one JSON text of some facts: keys sorted, no spaces, UTF-8, no NaN.

    Examples
    --------
    >>> canonical({"b": 1, "a": [0.5, None]})
    b'{"a":[0.5,null],"b":1}'
    """
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def fingerprint(facts: object) -> str:
    """The SHA-256 of the canonical JSON of some facts, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(facts)).hexdigest()


def digest(data: bytes) -> bytes:
    """The SHA-256 of an image's bytes, 32 bytes."""
    return hashlib.sha256(data).digest()


def digest_arrays(arrays: Iterable[tuple[str, NDArray[np.generic]]]) -> str:
    """The SHA-256 of named arrays: names, dtypes, shapes and bytes, in the order of their names."""
    state = hashlib.sha256()
    for name, array in sorted(arrays, key=lambda item: item[0]):
        state.update(canonical([name, array.dtype.str, list(array.shape)]))
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


def differences(
    found: Mapping[str, object], wanted: Mapping[str, object], prefix: str = "", *, other: str = "asked for"
) -> list[str]:
    """The facts that differ, one line each, nested facts by their dotted name.

    ``other`` says where the second ones come from.

    Examples
    --------
    >>> differences({"precision": "fp32", "net": {"name": "a"}}, {"precision": "bf16", "net": {"name": "a"}})
    ["precision is 'fp32', asked for 'bf16'"]
    """
    lines = []
    for key in sorted(found.keys() | wanted.keys()):
        here, there = found.get(key), wanted.get(key)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            lines += differences(here, there, f"{prefix}{key}.", other=other)
        elif here != there:
            lines.append(f"{prefix}{key} is {_short(here)}, {other} {_short(there)}")
    return lines


def _short(value: object) -> str:
    text = repr(value)
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return text if len(text) <= 60 else text[:57] + "…"
