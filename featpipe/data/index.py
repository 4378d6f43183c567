"""List archives into an ordered index of samples."""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from featpipe.data.labels.infer import RawLabels, iter_normalized_names, labels_from_folders, labels_from_sidecars
from featpipe.data.labels.labels import Labels
from featpipe.data.labels.table import TABLE_SUFFIXES, LabelTable, map_paths_to_rows, match_table_rows, read_table
from featpipe.data.modalities import DEFAULT_MODALITY, Modality, get_modality
from featpipe.data.sources.folder import list_files, list_folder, read_file
from featpipe.data.sources.glob import expand_paths
from featpipe.data.sources.listing import (
    DEFAULT_LIMITS,
    ArchiveLimits,
    ArchiveSource,
    Compression,
    Listing,
    escape_name,
    format_name,
    get_suffix,
)
from featpipe.data.sources.tar import PlainTarReader, TarReader, list_tar
from featpipe.data.sources.zip import ZipReader, list_zip
from featpipe.errors import ArchiveError, ConfigError, SampleError
from featpipe.status import Status
from featpipe.storage import StringColumn

PathLike = str | os.PathLike[str]

_MAGIC_BYTES = {b"PK\3\4": "zip", b"PK\5\6": "zip", b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}
_TAR_MAGIC_OFFSET = 257
_STAMP_BYTES = 16
_STAMP_BLOCK_ROWS = 65536


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of one or more archives; row numbers never change.

    The columns are arrays, so that ten million samples fit in memory. An index holds no open file and can be pickled.

    Attributes
    ----------
    sources : tuple of ArchiveSource
    ids : StringColumn of length n
        Unique ids; tables and reports identify samples by them.
    names : StringColumn of length n
        The path within the source, as bytes.
    source : ndarray of shape (n,), int32
        Position in ``sources``.
    offset : ndarray of shape (n,), int64
        In a tar the offset of the sample's bytes, in a zip the offset of its local header, else 0.
    size : ndarray of shape (n,), int64
        Decompressed size in bytes.
    mtime_ns : ndarray of shape (n,), int64
        Modification time of the file that holds the bytes: the image, or the archive.
    fault : ndarray of shape (n,), uint8
        The `Status` as far as it is known from listing.
    labels : Labels
    split : ndarray of shape (n,), uint8
        0 none, 1 train, 2 validation, 3 test.
    ignored : dict of str to int
        Number of ignored files by kind.
    limits : ArchiveLimits
    modality : str
        Key of `featpipe.data.MODALITIES`.
    """

    sources: tuple[ArchiveSource, ...]
    ids: StringColumn
    names: StringColumn
    source: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    mtime_ns: NDArray[np.int64]
    fault: NDArray[np.uint8]
    labels: Labels
    split: NDArray[np.uint8]
    ignored: dict[str, int]
    limits: ArchiveLimits = DEFAULT_LIMITS
    modality: str = DEFAULT_MODALITY

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sequential(self) -> bool:
        """Whether a source can only be read sequentially, so that rows should be read in order."""
        return any(source.compression for source in self.sources)

    def compute_stamps(self) -> NDArray[np.uint8]:
        """Compute digests that detect changed samples without reading their bytes.

        Returns
        -------
        ndarray of shape (n, 16), uint8
            A digest of real path, name, offset, size and modification time; zero for rows with a fault. Equal stamps
            are taken to mean unchanged bytes.
        """
        stamps = np.zeros((len(self), _STAMP_BYTES), np.uint8)
        ok_rows = np.flatnonzero(self.fault == Status.OK)
        for start in range(0, len(ok_rows), _STAMP_BLOCK_ROWS):
            rows = ok_rows[start : start + _STAMP_BLOCK_ROWS]
            stamps[rows] = np.frombuffer(b"".join(self._iter_stamps(rows)), np.uint8).reshape(-1, _STAMP_BYTES)
        return stamps

    def _iter_stamps(self, rows: NDArray[np.int64]) -> Iterator[bytes]:
        """Yield the stamps of some rows in order; works on Python numbers, because indexing arrays is slower."""
        paths = [os.fsencode(source.real_path) for source in self.sources]
        folder_prefixes = [os.path.join(path, b"") for path in paths]
        kinds = [source.kind for source in self.sources]
        first_byte, last_byte = self.names.offsets[rows[0]], self.names.offsets[rows[-1] + 1]
        names, sha256, pack = self.names.data[first_byte:last_byte].tobytes(), hashlib.sha256, struct.Struct("<4q").pack
        starts, stops = self.names.offsets[rows] - first_byte, self.names.offsets[rows + 1] - first_byte
        columns = (self.source[rows], self.offset[rows], self.size[rows], self.mtime_ns[rows], starts, stops)
        for source_number, offset, size, mtime_ns, start, stop in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            path, name = paths[source_number], names[start:stop]
            if kinds[source_number] == "folder":
                path, name = folder_prefixes[source_number] + name, b""
            elif kinds[source_number] == "files":  # whose names may be absolute
                path, name = os.path.join(path, name), b""
            yield sha256(pack(len(path), offset, size, mtime_ns) + path + name).digest()[:_STAMP_BYTES]

    def take(self, rows: NDArray[np.int64]) -> Index:
        """Return the index of a subset of the samples."""
        ids = self.ids.take(rows)
        return replace(
            self,
            ids=ids,
            names=ids if self.names is self.ids else self.names.take(rows),
            **{name: getattr(self, name)[rows] for name in ("source", "offset", "size", "mtime_ns", "fault", "split")},
            labels=self.labels.take(rows),
        )

    def raw_name(self, row: int) -> bytes:
        """The path of a sample within its source, as bytes; it may be invalid as text."""
        start, stop = self.names.offsets[row], self.names.offsets[row + 1]
        return self.names.data[start:stop].tobytes()

    def open(self) -> SampleReader:
        """Open a reader of the samples' bytes; open it in the process that uses it."""
        return SampleReader(self)


def index(
    archives: PathLike | Sequence[PathLike],
    *,
    labels: PathLike | LabelTable | None = None,
    limits: ArchiveLimits = DEFAULT_LIMITS,
    modality: str = DEFAULT_MODALITY,
) -> Index:
    """List and order the samples of archives by the rules of `featpipe.data`.

    Parameters
    ----------
    archives : path or sequence of paths
        Folders, .tar, .zip, tables of paths and single images; globs and braces are expanded.
    labels : path or LabelTable, optional
        A table of labels; it replaces labels from folders and sidecar files.
    limits : ArchiveLimits
    modality : str
        Modality of the backbone that will embed the samples; it decides which files are samples.

    Raises
    ------
    ArchiveError
        If an archive is missing, damaged, exceeds the limits, contains no sample, or does not match its labels.
    """
    kind = get_modality(modality)
    arguments = [archives] if isinstance(archives, (str, os.PathLike)) else list(archives)
    groups = [group for paths in expand_paths(arguments) for group in _iter_groups(paths, limits, kind)]
    listings = [listing for group in groups for listing in group.listings]
    if not any(map(len, listings)):
        raise _no_samples_error(arguments, listings, kind)
    unlabeled_index = _combine_listings(listings, limits, kind)
    if labels is not None:
        table = labels if isinstance(labels, LabelTable) else LabelTable(Path(labels))
        table_rows = read_table(table, require_labels=True)
        row_by_sample = match_table_rows(table.path, table_rows, unlabeled_index)
        raw_labels = table_rows.raw_labels.take(row_by_sample)
        split = bytes(table_rows.split[row] if row >= 0 else 0 for row in row_by_sample)
    else:
        raw_labels = RawLabels.concatenate(group.raw_labels for group in groups)
        split = b"".join(group.split for group in groups)
    return replace(unlabeled_index, labels=raw_labels.to_labels(), split=np.frombuffer(split, np.uint8))


def index_files(
    paths: Sequence[PathLike],
    labels: Labels | None = None,
    limits: ArchiveLimits = DEFAULT_LIMITS,
    modality: str = DEFAULT_MODALITY,
) -> Index:
    """Index single files in the order given; a missing file keeps its row with the fault ``MISSING``.

    Parameters
    ----------
    paths : sequence of n paths
        Duplicates are allowed.
    labels : Labels of length n, optional
    limits : ArchiveLimits
    modality : str
        Modality of the files, whatever their suffixes.
    """
    if labels is not None and len(labels) != len(paths):
        raise ConfigError(f"{len(labels)} labels for {len(paths)} paths; give one for each, in the same order")
    listing = list_files(_make_current_folder_source(), [Path(path).as_posix() for path in paths], limits, frozenset())
    unlabeled_index = _combine_listings([listing], limits, get_modality(modality))
    return unlabeled_index if labels is None else replace(unlabeled_index, labels=labels)


@dataclass(frozen=True)
class _LabeledGroup:
    """Consecutive listings of one argument that are labelled by the same rule."""

    listings: list[Listing]
    raw_labels: RawLabels
    split: bytes


def _iter_groups(paths: Sequence[Path], limits: ArchiveLimits, modality: Modality) -> Iterator[_LabeledGroup]:
    for kind, group_paths in groupby(paths, partial(_get_path_kind, modality=modality)):
        if kind == "table":
            for path in group_paths:
                yield _list_table(path, limits, modality)
            continue
        if kind == "sample":
            names = [path.as_posix() for path in group_paths]
            listings = [list_files(_make_current_folder_source(), names, limits, modality.suffixes)]
        else:
            listings = [_list_archive(path, limits, modality.suffixes) for path in group_paths]
        n = sum(map(len, listings))
        raw_labels = (
            RawLabels.unlabeled(n)
            if kind == "sample"
            else labels_from_sidecars(listings) or labels_from_folders(listings)
        )
        yield _LabeledGroup(listings, raw_labels, bytes(n))


def _get_path_kind(path: Path, modality: Modality) -> str:
    if path.is_dir():
        return "archive"
    if path.suffix.lower() in TABLE_SUFFIXES:
        return "table"
    return "sample" if get_suffix(path.name) in modality.suffixes else "archive"


def _list_table(path: Path, limits: ArchiveLimits, modality: Modality) -> _LabeledGroup:
    table_rows = read_table(LabelTable(path), require_labels=False)
    map_paths_to_rows(path, table_rows)
    source = ArchiveSource(path, "files", os.path.realpath(path.parent))
    listing = list_files(source, [os.fspath(Path(name)) for name in table_rows.paths], limits, modality.suffixes)
    missing_names = [name for name, fault in zip(listing.names, listing.fault, strict=True) if fault == Status.MISSING]
    if missing_names:
        first_names = ", ".join(map(format_name, missing_names[:3]))
        raise ArchiveError(
            f"{path}: {len(missing_names)} of its files do not exist: {first_names}; "
            f"paths are relative to {source.real_path}"
        )
    return _LabeledGroup([listing], table_rows.raw_labels, table_rows.split)


def _make_current_folder_source() -> ArchiveSource:
    """Make the source of images that are passed as single paths."""
    return ArchiveSource(Path(), "files", os.path.realpath("."))


def _list_archive(path: Path, limits: ArchiveLimits, suffixes: frozenset[str]) -> Listing:
    real_path = os.path.realpath(path)
    if os.path.isdir(real_path):
        return list_folder(ArchiveSource(path, "folder", real_path), limits, suffixes)
    if not os.path.isfile(real_path):
        raise ArchiveError(f"{path}: neither a folder nor a file; expected an archive")
    try:
        file_stat = os.stat(real_path)
        with open(real_path, "rb") as file:
            header = file.read(_TAR_MAGIC_OFFSET + 5)
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {error.strerror}; grant access to it") from error
    kind = next((kind for magic, kind in _MAGIC_BYTES.items() if header.startswith(magic)), "")
    compression = cast(Compression, "" if kind == "zip" else kind)
    if kind == "zip":
        source = ArchiveSource(path, "zip", real_path, "", file_stat.st_size, file_stat.st_mtime_ns)
        return list_zip(source, limits, suffixes)
    if kind or header[_TAR_MAGIC_OFFSET:] == b"ustar" or path.suffix.lower() == ".tar":
        source = ArchiveSource(path, "tar", real_path, compression, file_stat.st_size, file_stat.st_mtime_ns)
        return list_tar(source, limits, suffixes)
    raise ArchiveError(
        f"{path}: begins with {header[:8]!r}; expected a folder, a .tar (also .gz, .bz2, .xz), a .zip, or a table of "
        "paths as .csv, .tsv or .parquet"
    )


def _no_samples_error(arguments: Sequence[PathLike], listings: Sequence[Listing], modality: Modality) -> ArchiveError:
    where = ", ".join(os.fspath(argument) for argument in arguments[:3]) or "no archive"
    ignored_counts = sum((listing.ignored for listing in listings), Counter[str]()).most_common(6)
    ignored_text = ", ".join(f"{count} {ignored_kind}" for ignored_kind, count in ignored_counts) or "nothing at all"
    return ArchiveError(
        f"{where}: no {modality.name}; found {ignored_text}; an {modality.name} is a file whose name ends in "
        f"{', '.join(modality.decoded_suffixes)}"
    )


def _combine_listings(listings: Sequence[Listing], limits: ArchiveLimits, modality: Modality) -> Index:
    """Concatenate listings into an index without labels."""
    sources = tuple(dict.fromkeys(listing.source for listing in listings))
    prefixes = _make_id_prefixes([listing.source for listing in listings])
    ids: list[str] = []
    for listing in listings:
        prefix = prefixes.get(listing.source, "")
        escaped_names = map(
            escape_name, listing.names if listing.source.kind == "files" else iter_normalized_names(listing)
        )
        ids += (prefix + name for name in escaped_names) if prefix else escaped_names
    n, names = len(ids), [name for listing in listings for name in listing.names]
    if not (len(listings) == 1 and listings[0].source.kind == "folder" and ids == names):  # unique by nature
        ids = _make_ids_unique(ids)
    id_column = StringColumn.from_strings(ids)
    source_numbers = {source: i for i, source in enumerate(sources)}
    return Index(
        sources=sources,
        ids=id_column,
        names=id_column if ids == names else StringColumn.from_strings(names, "surrogateescape"),  # usually equal
        source=np.repeat(
            np.array([source_numbers[listing.source] for listing in listings], np.int32), list(map(len, listings))
        ),
        offset=_concatenate_column(listing.offset for listing in listings),
        size=_concatenate_column(listing.size for listing in listings),
        mtime_ns=_concatenate_column(listing.mtime_ns for listing in listings),
        fault=np.concatenate([listing.compute_faults() for listing in listings]),
        labels=Labels.unlabeled(n),
        split=np.zeros(n, np.uint8),
        ignored=dict(sum((listing.ignored for listing in listings), Counter[str]())),
        limits=limits,
        modality=modality.name,
    )


def _concatenate_column(columns: Iterable[array[int]]) -> NDArray[np.int64]:
    return np.concatenate([np.frombuffer(column, np.int64) for column in columns])


def _make_id_prefixes(sources: Sequence[ArchiveSource]) -> dict[ArchiveSource, str]:
    """Make the id prefix of each archive; no prefix for a single archive or for single images."""
    source_parts = [
        (source, Path(os.path.abspath(source.path)).parts)
        for source in sources
        if source != _make_current_folder_source()
    ]
    duplicate_parts = next(
        (parts for parts, count in Counter(parts for _, parts in source_parts).items() if count > 1), None
    )
    if duplicate_parts is not None:
        raise ArchiveError(f"{Path(*duplicate_parts)}: given twice; pass each archive once")
    if len(source_parts) < 2:
        return {}
    max_depth = max(len(parts) for _, parts in source_parts)
    for depth in range(1, max_depth + 1):
        names = ["/".join(parts[-depth:]) for _, parts in source_parts]
        if len(set(names)) == len(names):
            break
    return {source: escape_name(name) + "/" for (source, _), name in zip(source_parts, names, strict=True)}


def _make_ids_unique(ids: list[str]) -> list[str]:
    """Append ``#2``, ``#3``, … to duplicate ids."""
    hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
    if len(np.unique(hashes)) == len(ids):  # the common case, without a set of millions of strings
        return ids
    seen_ids: set[str] = set()
    suffix_counts: Counter[str] = Counter()
    for row, name in enumerate(ids):
        unique_id = name
        while unique_id in seen_ids:
            suffix_counts[name] += 1
            unique_id = f"{name}#{suffix_counts[name] + 1}"
        seen_ids.add(unique_id)
        ids[row] = unique_id
    return ids


_FAULT_REASONS = {
    Status.MISSING: "did not exist when the archive was listed",
    Status.UNREADABLE: "cannot be read: encrypted, of an unknown compression, or without permission",
    Status.EMPTY: "empty: there are no bytes",
    Status.TOO_LARGE: "more bytes than the limit for one image",
    Status.NOT_A_FILE: "a link, a device, a folder or a sparse file; expected a regular file",
}


class _ArchiveReader(Protocol):
    def read(self, offset: int, size: int) -> bytes: ...
    def close(self) -> None: ...


class SampleReader:
    """Reads samples by row; thread-safe.

    Archive files are opened on first use and closed together. Nothing is cached.

    Parameters
    ----------
    index : Index
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._archive_readers: dict[int, _ArchiveReader] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> SampleReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            while self._archive_readers:
                self._archive_readers.popitem()[1].close()

    def read(self, row: int) -> bytes:
        """Read all bytes of one sample.

        Raises
        ------
        SampleError
            If the sample cannot be read; its status is the reason.
        ArchiveError
            If the archive is missing or has changed since it was listed.
        """
        index = self._index
        source = index.sources[index.source[row]]
        try:
            fault = Status(int(index.fault[row]))
            if fault != Status.OK:
                raise SampleError(_FAULT_REASONS[fault], status=fault)
            if source.kind in ("folder", "files"):
                path = os.path.join(os.fsencode(source.real_path), index.raw_name(row))
                return read_file(path, index.limits.max_member_bytes)
            size = int(index.size[row])
            data = self._get_archive_reader(int(index.source[row])).read(int(index.offset[row]), size)
            if len(data) != size:
                raise SampleError(f"ends after {len(data)} of {size} bytes", status=Status.UNREADABLE)
            return data
        except SampleError as error:
            raise self._make_sample_error(str(error), error.status, row) from error
        except MemoryError as error:
            raise self._make_sample_error("not enough memory to read it", Status.OUT_OF_MEMORY, row) from error

    def _make_sample_error(self, reason: str, status: Status, row: int) -> SampleError:
        archive = str(self._index.sources[self._index.source[row]].path)
        sample_id = self._index.ids[row]
        return SampleError(
            f"{archive}: {format_name(sample_id)}: {reason}", status=status, archive=archive, sample_id=sample_id
        )

    def _get_archive_reader(self, source_number: int) -> _ArchiveReader:
        with self._lock:
            if source_number not in self._archive_readers:
                self._archive_readers[source_number] = self._open_archive(self._index.sources[source_number])
            return self._archive_readers[source_number]

    def _open_archive(self, source: ArchiveSource) -> _ArchiveReader:
        try:
            current_stat = os.stat(source.real_path)
        except OSError as error:
            raise ArchiveError(
                f"{source.path}: cannot be opened: {error.strerror}; it existed when it was listed"
            ) from error
        if (current_stat.st_size, current_stat.st_mtime_ns) != (source.size_bytes, source.mtime_ns):
            raise ArchiveError(f"{source.path}: changed since it was listed; list it again")
        if source.kind == "zip":
            return ZipReader(source)
        return TarReader(source, self._index.limits) if source.compression else PlainTarReader(source)
