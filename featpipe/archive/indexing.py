"""From archives to the ordered index of their samples."""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from featpipe.archive.folders import list_files, list_folder
from featpipe.archive.listing import (
    DECODED,
    LIMITS,
    ArchiveLimits,
    Compression,
    Listing,
    Source,
    is_sample,
    plain,
    shown,
)
from featpipe.archive.marks import Marks, by_folder, by_note, cleaned
from featpipe.archive.matching import keyed, match
from featpipe.archive.patterns import expand
from featpipe.archive.reader import Reader
from featpipe.archive.tables import TABLE_SUFFIXES, Table, read_table
from featpipe.archive.tars import list_tar
from featpipe.archive.zips import list_zip
from featpipe.errors import ArchiveError, ConfigError
from featpipe.labels import Labels
from featpipe.status import Status
from featpipe.strings import Strings

__all__ = ["Index", "index", "index_files"]

PathLike = str | os.PathLike[str]

_MAGIC = {b"PK\3\4": "zip", b"PK\5\6": "zip", b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}
_TAR_MAGIC_AT = 257
_STAMP_BYTES = 16
_ROWS_AT_ONCE = 65536


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
        sound = np.flatnonzero(self.fault == Status.OK)
        for rows in np.array_split(sound, range(_ROWS_AT_ONCE, len(sound), _ROWS_AT_ONCE)):
            stamps[rows] = np.frombuffer(b"".join(self._stamps(rows)), np.uint8).reshape(-1, _STAMP_BYTES)
        return stamps

    def _stamps(self, rows: NDArray[np.int64]) -> Iterator[bytes]:
        """The stamps of some rows; plain numbers and bytes, because reading one number of an array takes longer."""
        paths = [os.fsencode(source.real) for source in self.sources]
        inside = [os.path.join(path, b"") for path in paths]
        kinds = [source.kind for source in self.sources]
        columns = (self.source, self.offset, self.size, self.mtime_ns, self.names.offsets[:-1], self.names.offsets[1:])
        data, sha256, pack = self.names.data, hashlib.sha256, struct.Struct("<4q").pack
        for number, offset, size, mtime_ns, start, stop in zip(*(c[rows].tolist() for c in columns), strict=True):
            path, name = paths[number], data[start:stop].tobytes()
            if kinds[number] == "folder":
                path, name = inside[number] + name, b""
            elif kinds[number] == "files":  # whose names may be absolute
                path, name = os.path.join(path, name), b""
            yield sha256(pack(len(path), offset, size, mtime_ns) + path + name).digest()[:_STAMP_BYTES]

    def take(self, rows: NDArray[np.int64]) -> Index:
        """The index of some of the samples alone."""
        ids = self.ids.take(rows)
        return replace(
            self,
            ids=ids,
            names=ids if self.names is self.ids else self.names.take(rows),
            **{name: getattr(self, name)[rows] for name in ("source", "offset", "size", "mtime_ns", "fault", "split")},
            labels=self.labels.take(rows),
        )

    def raw_name(self, row: int) -> bytes:
        """The bytes of a sample's path within its source, which need not be valid text."""
        start, stop = self.names.offsets[row], self.names.offsets[row + 1]
        return self.names.data[start:stop].tobytes()

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
    gathered = [part for paths in expand(arguments) for part in _parts(paths, limits)]
    listings = [listing for part in gathered for listing in part.listings]
    if not any(map(len, listings)):
        raise _nothing_found(arguments, listings)
    whole = _assembled(listings, limits)
    if labels is not None:
        table = labels if isinstance(labels, Table) else Table(Path(labels))
        rows = read_table(table, need_labels=True)
        of_sample = match(table.path, rows, whole)
        marks, split = rows.marks.take(of_sample), bytes(rows.split[row] if row >= 0 else 0 for row in of_sample)
    else:
        marks, split = Marks.joined(part.marks for part in gathered), b"".join(part.split for part in gathered)
    return replace(whole, labels=marks.labels(), split=np.frombuffer(split, np.uint8))


def index_files(paths: Sequence[PathLike], labels: Labels | None = None, limits: ArchiveLimits = LIMITS) -> Index:
    """Index single files in the order given; one that is not there keeps its row with the fault ``MISSING``.

    Parameters
    ----------
    paths : sequence of n paths
        The same path may come several times.
    labels : Labels of length n, optional
    limits : ArchiveLimits
    """
    if labels is not None and len(labels) != len(paths):
        raise ConfigError(f"{len(labels)} labels for {len(paths)} paths; give one for each, in the same order")
    listing = list_files(_here(), [Path(path).as_posix() for path in paths], limits)
    whole = _assembled([listing], limits)
    return whole if labels is None else replace(whole, labels=labels)


@dataclass(frozen=True)
class _Part:
    """What follows one another in an argument and is labelled by one rule."""

    listings: list[Listing]
    marks: Marks
    split: bytes


def _parts(paths: Sequence[Path], limits: ArchiveLimits) -> Iterator[_Part]:
    for kind, some in groupby(paths, _kind):
        if kind == "table":
            for path in some:
                yield _table_part(path, limits)
            continue
        if kind == "image":
            listings = [list_files(_here(), [path.as_posix() for path in some], limits)]
        else:
            listings = [_list_archive(path, limits) for path in some]
        n = sum(map(len, listings))
        marks = Marks.none(n) if kind == "image" else by_note(listings) or by_folder(listings)
        yield _Part(listings, marks, bytes(n))


def _kind(path: Path) -> str:
    if path.is_dir():
        return "archive"
    if path.suffix.lower() in TABLE_SUFFIXES:
        return "table"
    return "image" if is_sample(path.name) else "archive"


def _table_part(path: Path, limits: ArchiveLimits) -> _Part:
    rows = read_table(Table(path), need_labels=False)
    keyed(path, rows)
    source = Source(path, "files", os.path.realpath(path.parent))
    listing = list_files(source, [os.fspath(Path(name)) for name in rows.paths], limits)
    absent = [name for name, fault in zip(listing.names, listing.fault, strict=True) if fault == Status.MISSING]
    if absent:
        first = ", ".join(map(shown, absent[:3]))
        raise ArchiveError(
            f"{path}: {len(absent)} of its files do not exist: {first}; paths are relative to {source.real}"
        )
    return _Part([listing], rows.marks, rows.split)


def _here() -> Source:
    """The source of images that are named one by one."""
    return Source(Path(), "files", os.path.realpath("."))


def _list_archive(path: Path, limits: ArchiveLimits) -> Listing:
    real = os.path.realpath(path)
    if os.path.isdir(real):
        return list_folder(Source(path, "folder", real), limits)
    if not os.path.isfile(real):
        raise ArchiveError(f"{path}: neither a folder nor a file; expected an archive")
    try:
        found = os.stat(real)
        with open(real, "rb") as file:
            head = file.read(_TAR_MAGIC_AT + 5)
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {error.strerror}; grant access to it") from error
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")
    compression = cast(Compression, "" if kind == "zip" else kind)
    if kind == "zip":
        return list_zip(Source(path, "zip", real, "", found.st_size, found.st_mtime_ns), limits)
    if kind or head[_TAR_MAGIC_AT:] == b"ustar" or path.suffix.lower() == ".tar":
        return list_tar(Source(path, "tar", real, compression, found.st_size, found.st_mtime_ns), limits)
    raise ArchiveError(
        f"{path}: begins with {head[:8]!r}; expected a folder, a .tar (also .gz, .bz2, .xz), a .zip, or a table of "
        "paths as .csv, .tsv or .parquet"
    )


def _nothing_found(arguments: Sequence[PathLike], listings: Sequence[Listing]) -> ArchiveError:
    where = ", ".join(os.fspath(argument) for argument in arguments[:3]) or "no archive"
    others = sum((listing.ignored for listing in listings), Counter[str]()).most_common(6)
    found = ", ".join(f"{count} {what}" for what, count in others) or "nothing at all"
    return ArchiveError(f"{where}: no image; found {found}; an image is a file whose name ends in {', '.join(DECODED)}")


def _assembled(listings: Sequence[Listing], limits: ArchiveLimits) -> Index:
    """The listings one after the other, still without labels."""
    sources = tuple(dict.fromkeys(listing.source for listing in listings))
    prefixes = _prefixes([listing.source for listing in listings])
    ids: list[str] = []
    for listing in listings:
        prefix = prefixes.get(listing.source, "")
        plain_names = map(plain, listing.names if listing.source.kind == "files" else cleaned(listing))
        ids += (prefix + name for name in plain_names) if prefix else plain_names
    n, names = len(ids), [name for listing in listings for name in listing.names]
    if not (len(listings) == 1 and listings[0].source.kind == "folder" and ids == names):  # unique by nature
        ids = _unique(ids)
    column = Strings.of(ids)
    number = {source: i for i, source in enumerate(sources)}
    return Index(
        sources=sources,
        ids=column,
        names=column if ids == names else _raw_names(names),  # mostly equal, and then kept once
        source=np.repeat(
            np.array([number[listing.source] for listing in listings], np.int32), list(map(len, listings))
        ),
        offset=_column(listing.offset for listing in listings),
        size=_column(listing.size for listing in listings),
        mtime_ns=_column(listing.mtime_ns for listing in listings),
        fault=np.frombuffer(b"".join(listing.fault for listing in listings), np.uint8),
        labels=Labels.none(n),
        split=np.zeros(n, np.uint8),
        ignored=dict(sum((listing.ignored for listing in listings), Counter[str]())),
        limits=limits,
    )


def _column(parts: Iterable[array[int]]) -> NDArray[np.int64]:
    return np.concatenate([np.frombuffer(part, np.int64) for part in parts])


def _raw_names(names: Iterable[str]) -> Strings:
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(name) for name in encoded], out=offsets[1:])
    return Strings(np.frombuffer(b"".join(encoded), np.uint8), offsets)


def _prefixes(given: Sequence[Source]) -> dict[Source, str]:
    """What goes before the ids of each archive when there are several; single images have no archive."""
    paths = [(source, Path(os.path.abspath(source.path)).parts) for source in given if source != _here()]
    double = next((parts for parts, count in Counter(parts for _, parts in paths).items() if count > 1), None)
    if double is not None:
        raise ArchiveError(f"{Path(*double)}: given twice; give each archive once")
    if len(paths) < 2:
        return {}
    deepest = max(len(parts) for _, parts in paths)
    for depth in range(1, deepest + 1):
        names = ["/".join(parts[-depth:]) for _, parts in paths]
        if len(set(names)) == len(names):
            break
    return {source: plain(name) + "/" for (source, _), name in zip(paths, names, strict=True)}


def _unique(ids: list[str]) -> list[str]:
    """The ids with ``#2``, ``#3``, … behind those that were there before."""
    hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
    if len(np.unique(hashes)) == len(ids):  # the common case, without a set of millions of strings
        return ids
    taken: set[str] = set()
    following: Counter[str] = Counter()
    for row, name in enumerate(ids):
        unique = name
        while unique in taken:
            following[name] += 1
            unique = f"{name}#{following[name] + 1}"
        taken.add(unique)
        ids[row] = unique
    return ids
