"""Canonical JSON and digests of facts, weights and images. Identity is by content, never by name or path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray


def canonical_json(value: object) -> bytes:
    """Serialize a value as canonical JSON: sorted keys, no spaces, UTF-8, no NaN.

    Examples
    --------
    >>> canonical_json({"b": 1, "a": [0.5, None]})
    b'{"a":[0.5,null],"b":1}'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def compute_fingerprint(value: object) -> str:
    """SHA-256 of the canonical JSON of a value, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest(data: bytes) -> bytes:
    """SHA-256 of the bytes of an image, as 32 bytes."""
    return hashlib.sha256(data).digest()


def digest_arrays(arrays: Iterable[tuple[str, NDArray[np.generic]]]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of named arrays, sorted by name."""
    hasher = hashlib.sha256()
    for name, array in sorted(arrays, key=lambda item: item[0]):
        hasher.update(canonical_json([name, array.dtype.str, list(array.shape)]))
        hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()


def describe_differences(
    actual: Mapping[str, object], expected: Mapping[str, object], prefix: str = "", *, expected_label: str = "asked for"
) -> list[str]:
    """List the facts that differ, one line each. Nested facts have dotted names.

    ``expected_label`` introduces the expected value in each line.

    Examples
    --------
    >>> describe_differences({"precision": "fp32", "net": {"name": "a"}}, {"precision": "bf16", "net": {"name": "a"}})
    ["precision is 'fp32', asked for 'bf16'"]
    """
    lines = []
    for key in sorted(actual.keys() | expected.keys()):
        actual_value, expected_value = actual.get(key), expected.get(key)
        if isinstance(actual_value, Mapping) and isinstance(expected_value, Mapping):
            lines += describe_differences(
                actual_value, expected_value, f"{prefix}{key}.", expected_label=expected_label
            )
        elif actual_value != expected_value:
            lines.append(f"{prefix}{key} is {_shorten(actual_value)}, {expected_label} {_shorten(expected_value)}")
    return lines


def _shorten(value: object) -> str:
    text = repr(value)
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return text if len(text) <= 60 else text[:57] + "…"
