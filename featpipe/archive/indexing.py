"""From archives to the ordered index of their samples."""

from __future__ import annotations

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featpipe.archive.folders import list_files, list_folder
from featpipe.archive.listing import LIMITS, SUFFIXES, ArchiveLimits, Listing, Source, is_sample, plain, shown
from featpipe.archive.marks import Marks, by_folder, by_note, clean
from featpipe.archive.matching import match
from featpipe.archive.patterns import expand
from featpipe.archive.reader import Reader
from featpipe.archive.tables import TABLE_SUFFIXES, Rows, Table, read_table
from featpipe.archive.tars import list_tar
from featpipe.archive.zips import list_zip
from featpipe.errors import ArchiveError
from featpipe.labels import Labels
from featpipe.status import Status
from featpipe.strings import Strings

__all__ = ["Index", "index", "index_files"]

PathLike = str | os.PathLike[str]

_MAGIC = {b"PK\3\4": "zip", b"PK\5\6": "zip", b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}
_TAR_MAGIC_AT = 257
_STAMP_BYTES = 16


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of some archives; row i is sample i for ever.

    Columns of numbers and text, so that ten million samples fit; it holds no open file and can be pickled.

    Attributes
    ----------
    sources : tuple of Source
    ids : Strings of length n
        Unique; what people and tables call a sample.
    names : Strings of length n
        The bytes of the path within its source.
    source : ndarray of shape (n,), int32
        Which of the sources a sample lies in.
    offset : ndarray of shape (n,), int64
        In a tar where its bytes begin, in a zip where its local header begins, else 0.
    size : ndarray of shape (n,), int64
        Bytes, decompressed.
    mtime_ns : ndarray of shape (n,), int64
        Time of change of the file that holds the bytes: the image, or the archive.
    fault : ndarray of shape (n,), uint8
        The `Status` as far as listing can tell.
    labels : Labels
    split : ndarray of shape (n,), uint8
        0 none, 1 train, 2 validation, 3 test.
    ignored : dict of str to int
        What was there and is no sample.
    limits : ArchiveLimits
    """

    sources: tuple[Source, ...]
    ids: Strings
    names: Strings
    source: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    mtime_ns: NDArray[np.int64]
    fault: NDArray[np.uint8]
    labels: Labels
    split: NDArray[np.uint8]
    ignored: dict[str, int]
    limits: ArchiveLimits = LIMITS

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sequential(self) -> bool:
        """Whether some source can only be read front to back, so that rows are best read in order."""
        return any(source.compression for source in self.sources)

    def stamps(self) -> NDArray[np.uint8]:
        """What stays the same while a sample's bytes do, as far as can be told without reading them.

        Returns
        -------
        ndarray of shape (n, 16), uint8
            A digest of real path, name, offset, size and time of change; zero where there is a fault. Equal
            stamps are trusted to mean unchanged bytes.
        """
        stamps = np.zeros((len(self), _STAMP_BYTES), np.uint8)
        real = [os.fsencode(source.real) for source in self.sources]
        single = [source.kind in ("folder", "files") for source in self.sources]
        for row in np.flatnonzero(self.fault == Status.OK):
            which = self.source[row]
            path, name = real[which], self.names.raw(row) if False else _raw(self.names, int(row))
            if single[which]:
                path, name = os.path.join(path, name), b""
            facts = struct.pack("<4q", len(path), self.offset[row], self.size[row], self.mtime_ns[row])
            digest = hashlib.sha256(facts + path + name).digest()
            stamps[row] = np.frombuffer(digest, np.uint8, _STAMP_BYTES)
        return stamps

    def open(self) -> Reader:
        """A reader of the samples' bytes; open it where it is used."""
        return Reader(self)


def index(
    archives: PathLike | Sequence[PathLike],
    *,
    labels: PathLike | Table | None = None,
    limits: ArchiveLimits = LIMITS,
) -> Index:
    """List and order the samples of archives, by the rules of `featpipe.archive`.

    Parameters
    ----------
    archives : path or sequence of paths
        Folders, .tar, .zip, tables of paths and single images; globs and braces are expanded.
    labels : path or Table, optional
        A table that labels the samples in place of folders and sidecar files.
    limits : ArchiveLimits

    Raises
    ------
    ArchiveError
        If an archive is missing, damaged, hostile or without any sample, or does not fit its labels.
    """
    arguments = [archives] if isinstance(archives, (str, os.PathLike)) else list(archives)
    groups = [_list_argument(paths, limits) for paths in expand(arguments)]
    listings = [listing for group in groups for listing in group.listings]
    if not any(map(len, listings)):
        raise _nothing_found(arguments, listings)
    marks = Marks.joined(group.marks for group in groups) if labels is None else Marks.none(0)
    split = b"".join(group.split for group in groups)
    whole = _assembled(listings, limits)
    if labels is not None:
        table = labels if isinstance(labels, Table) else Table(Path(labels))
        rows = match(table, read_table(table, need_labels=True), whole.sources, whole.source, whole.names, whole.ids)
        table_rows = read_table(table, need_labels=True)
        marks = table_rows.marks.take(rows)
        split = bytes(table_rows.split[row] if row >= 0 else 0 for row in rows)
    return replace(whole, labels=marks.labels(), split=np.frombuffer(split, np.uint8))


def index_files(
    paths: Sequence[PathLike], labels: Labels | None = None, limits: ArchiveLimits = LIMITS
) -> Index:
    """Index single files in the order given; one that is not there keeps its row with the fault ``MISSING``.

    Parameters
    ----------
    paths : sequence of n paths
        The same path may come several times.
    labels : Labels of length n, optional
    limits : ArchiveLimits
    """
    listing = list_files(_single_files(Path()), [Path(path).as_posix() for path in paths], limits)
    return replace(_assembled([listing], limits), labels=Labels.none(len(paths)) if labels is None else labels)
