"""The definition of a modality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Modality:
    """The properties and functions that depend on the modality of the samples and not on the backbone.

    An *item* is a decoded sample in the form that the backbone's transform expects. It must not be ``bytes``.

    Attributes
    ----------
    name : str
        Key in `MODALITIES`; equal to `Index.modality` and the transform's ``modality``.
    decoded_suffixes : tuple of str
        Suffixes of the files that can be decoded, in lower case, with their dots.
    suffixes : frozenset of str
        All suffixes that make a file a sample. A file of this modality in a format that cannot be decoded gets a row
        with a status; it is not ignored.
    decode : callable
        Encoded bytes → a context manager that yields the item. It may block on entry until memory is available, and
        releases the memory on exit. For invalid bytes it raises only `SampleError`, with the status of the row. It
        must be thread-safe.
    to_item : callable
        A decoded object from a Python caller → the item. Raises `ConfigError` for an object of the wrong type and
        `SampleError` for one whose content cannot be loaded.
    to_list : callable
        The argument of `Model.predict` and similar methods → a list of paths, bytes and objects for ``to_item``.
        Raises `ConfigError` for a single sample, an empty collection or an unordered one.
    make_probes : callable
        () → at least three items whose statistics differ widely. Self-checks embed them as a batch and one by one, to
        verify that a network is frozen and that a faster engine gives the same embeddings.
    encode_preview : callable
        (encoded bytes, longest side in pixels) → a small WebP preview of the sample. Raises `SampleError`.
    make_encoded_samples : callable
        () → about 32 typical encoded samples and a description of them for messages: for benchmarks without an archive.
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
