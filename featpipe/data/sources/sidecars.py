"""Sidecar label files: ``key.cls`` and ``key.json`` beside ``key.jpg``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from featpipe.errors import ArchiveError

MAX_SIDECAR_BYTES = 2**20

_SIDECAR_SUFFIXES = (".cls", ".json")
_LABEL_KEYS = ("label", "class", "cls", "target", "labels")

LabelValue = str | int | float | tuple[str, ...] | None


@dataclass(frozen=True)
class SidecarLabel:
    """The label in one sidecar file.

    Attributes
    ----------
    suffix : {".cls", ".json"}
    value : str, int, float, tuple of str, or None
        A class, a number, several labels, or explicitly no label.
    is_target : bool
        Whether a number is a regression target.
    """

    suffix: str
    value: LabelValue
    is_target: bool = False

    @classmethod
    def parse(cls, suffix: str, data: bytes) -> SidecarLabel | None:
        """Parse a sidecar file; None if it holds no label. Raises ValueError if it is malformed."""
        return _parse_cls(data) if suffix == ".cls" else _parse_json(data)

    def resolve_conflict(self, other: SidecarLabel | ArchiveError | None, where: str) -> SidecarLabel | ArchiveError:
        """Choose between two sidecar labels of one sample: ``.cls`` has priority; two of the same kind must agree."""
        if other is None or self == other:
            return self
        if isinstance(other, ArchiveError):
            return other
        if self.suffix != other.suffix:
            return self if self.suffix == ".cls" else other
        return ArchiveError(f"{where}: a second label for one sample, {other.value!r} and {self.value!r}")


def is_sidecar(name: str) -> bool:
    """Whether a file may hold the label of a sample beside it."""
    return name.lower().endswith(_SIDECAR_SUFFIXES)


def may_hold_sidecars(names: Iterable[str]) -> bool:
    """Whether any of the names may be a sidecar; a fast test without false negatives."""
    joined_names = "\n".join(names).lower()
    return any(suffix in joined_names for suffix in _SIDECAR_SUFFIXES)


def get_sample_key(name: str) -> str:
    """The key that the files of one sample share: the path up to the first dot of the file name.

    Examples
    --------
    >>> get_sample_key("a.b/000.left.jpg")
    'a.b/000'
    """
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _parse_cls(data: bytes) -> SidecarLabel:
    text = data.decode("utf-8-sig").strip()
    if "\n" in text or "\0" in text:
        raise ValueError("expected one class name on one line")
    return SidecarLabel(".cls", text or None)


def _parse_json(data: bytes) -> SidecarLabel | None:
    try:
        content = json.loads(data)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(content, dict):
        return None
    key = next((key for key in _LABEL_KEYS if key in content), None)
    if key is None:
        return None
    value = content[key]
    if isinstance(value, list):
        return SidecarLabel(".json", tuple(_parse_class_name(key, item) for item in value))
    if value is None:
        return SidecarLabel(".json", None)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key!r} is {value}, expected a finite number")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return SidecarLabel(".json", value, is_target=key == "target")
    return SidecarLabel(".json", _parse_class_name(key, value))


def _parse_class_name(key: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int)):
        return str(value)
    raise ValueError(f"{key!r} holds {type(value).__name__}, expected a class name, a number or a list of names")
