"""The kinds of samples, and what a kind must say of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

__all__ = ["Modality"]


@dataclass(frozen=True)
class Modality:
    """Everything that depends on the kind of the samples and not on the backbone.

    An *item* is a decoded sample in the form that a backbone's transform takes. It must not be ``bytes``.

    Attributes
    ----------
    name : str
        Key of the row; `Index.modality` and the transform's ``modality`` hold it.
    decoded_suffixes : tuple of str
        Suffixes of the files that can be decoded, in lower case, with their dots.
    suffixes : frozenset of str
        All suffixes that make a file a sample. A file that is known to be of this kind but cannot be decoded gets a
        row with a status instead of vanishing.
    decode : callable
        Encoded bytes → a context manager that yields the item. It may wait for memory on entry and gives memory
        back on exit. Raises `SampleError`, with the status of the row, whatever the bytes are. Any number of threads
        call it at once.
    to_item : callable
        A decoded object from a Python caller → the item. Raises `ConfigError` for an object of the wrong type and
        `SampleError` for one whose content cannot be loaded.
    to_list : callable
        The argument of `Model.predict` and the like → a list of paths, bytes and objects for ``to_item``. Raises
        `ConfigError` if it is a single sample, empty or without an order.
    make_probes : callable
        () → at least three items whose statistics differ widely. Self-checks embed them together and one by one, to
        prove that a network is frozen and that a faster engine gives the same embeddings.
    encode_preview : callable
        (encoded bytes, longest side in pixels) → a small WebP that shows a person the sample. Raises `SampleError`.
    make_encoded_samples : callable
        () → some 32 typical samples, encoded, and what messages call them: for benchmarks without an archive.
    """

    name: str
    decoded_suffixes: tuple[str, ...]
    suffixes: frozenset[str]
    decode: Callable[[bytes], AbstractContextManager[Any]]
    to_item: Callable[[Any], Any]
    to_list: Callable[[Any], list[Any]]
    make_probes: Callable[[], Sequence[Any]]
    encode_preview: Callable[[bytes, int], bytes]
    make_encoded_samples: Callable[[], tuple[list[bytes], str]]
