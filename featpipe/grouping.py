"""What a table says of the images of a cache beside their labels: the group that each belongs to, or its time."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featpipe.archive import Index, Source
from featpipe.archive.listing import plain, shown
from featpipe.archive.marks import Marks, number
from featpipe.archive.matching import match
from featpipe.archive.notes import Value
from featpipe.archive.tables import TABLE_SUFFIXES, Rows, read_column, read_paths
from featpipe.cache import FeatureCache
from featpipe.errors import ArchiveError, ConfigError
from featpipe.labels import Labels
from featpipe.strings import Strings

__all__ = ["address", "column_of", "groups_of", "moment_of", "rows_named", "times_of"]

_SHOWN = 3
_ISO = re.compile(r"[0-9]{4}-[0-9]{2}(-[0-9]{2})?([T ][0-9:.,]+ ?(Z|[+-][0-9:]+)?)?")


def address(text: str) -> tuple[Path, str]:
    """The table and the column of ``TABLE:COLUMN``.

    Raises
    ------
    ConfigError
        If one of them is missing.

    Examples
    --------
    >>> address("visits.csv:patient")
    (PosixPath('visits.csv'), 'patient')
    """
    table, colon, column = text.rpartition(":")
    if not (colon and table.strip() and column.strip()) or column.lower().endswith(TABLE_SUFFIXES):
        raise ConfigError(f"{text!r} is not TABLE:COLUMN; write it as in visits.csv:patient")
    return Path(table), column.strip()


def column_of(
    cache: FeatureCache, table: str | os.PathLike[str], column: str, rows: ArrayLike | None = None
) -> list[Value]:
    """What a column of a table says of images of a cache.

    Rows of the table are matched to images as those with labels are: by id; else by path within the archive, by path
    relative to the table's folder, or by absolute path. The table may name other images too.

    Parameters
    ----------
    cache : FeatureCache
    table : path-like
        A .csv, .tsv or .parquet file with a column of paths (``path``, ``file``, ``id``, …).
    column : str
        Its name; upper and lower case are the same where that is not ambiguous.
    rows : array-like of shape (m,), optional
        Row numbers of the images that need a value; all of them if not given.

    Returns
    -------
    list of m str, int, float, or tuple of str

    Raises
    ------
    ArchiveError
        If an image is not in the table, has no value or two different ones, or the table cannot be read.
    ConfigError
        If there is no such column.
    """
    path = Path(table)
    asked = np.arange(len(cache)) if rows is None else np.asarray(rows, np.int64)
    paths, values = read_column(path, column)
    _check_single(path, column, paths, values)
    marks = Marks("classification", [str(value) for value in values])
    places = np.array(match(path, Rows(paths, marks, bytes(len(paths))), _index(cache), others=True), np.int64)[asked]
    absent = asked[places < 0]
    if len(absent):
        raise ArchiveError(
            f"{path}: {_listed(cache, absent, len(asked))} are not in it, whose first path is {shown(paths[0])}; give "
            f"each a row with its {column!r}, under its id, or its path within the archive or from the table"
            if paths
            else f"{path}: has no rows; give each image one with its {column!r}"
        )
    found = [values[place] for place in places.tolist()]
    empty = asked[[value is None for value in found]]
    if len(empty):
        raise ArchiveError(f"{path}: {_listed(cache, empty, len(asked))} have an empty {column!r}; fill it in")
    return found


def rows_named(cache: FeatureCache, table: str | os.PathLike[str]) -> NDArray[np.int64]:
    """The rows of a cache whose images a table names, matched as in :func:`column_of`, ascending.

    Raises
    ------
    ArchiveError
        If it names none of them, or cannot be read.
    """
    path = Path(table)
    paths = read_paths(path)
    marks = Marks("none", [None] * len(paths))
    found = match(path, Rows(paths, marks, bytes(len(paths))), _index(cache), others=True)
    rows = np.flatnonzero(np.array(found, np.int64) >= 0)
    if paths and not len(rows):
        raise ArchiveError(
            f"{path}: none of its {len(paths)} paths, such as {shown(paths[0])}, is an image of {cache.path.name}; "
            "give a table with the ids of its images"
        )
    return rows


def groups_of(cache: FeatureCache, where: str, rows: ArrayLike | None = None) -> NDArray[np.str_]:
    """The name of the group of each image, as `featpipe.split` takes them.

    Parameters
    ----------
    cache : FeatureCache
    where : str
        ``TABLE:COLUMN``.
    rows : array-like of shape (m,), optional

    Returns
    -------
    ndarray of shape (m,), str
        Whole numbers of Parquet files as the digits that a CSV would have.
    """
    path, column = address(where)
    return np.array([_text(path, column, value) for value in column_of(cache, path, column, rows)], dtype=np.str_)


def times_of(cache: FeatureCache, where: str, rows: ArrayLike | None = None) -> NDArray[Any]:
    """The time of each image, as `featpipe.split` takes them.

    Parameters
    ----------
    cache : FeatureCache
    where : str
        ``TABLE:COLUMN``. The column holds numbers, or dates and times as in ISO 8601: ``2021-03``, ``2021-03-04``,
        ``2021-03-04 15:00:59.5``, ``2021-03-04T15:00+01:00``. A time without a zone is taken as it is; either all
        or none have one.
    rows : array-like of shape (m,), optional

    Returns
    -------
    ndarray of shape (m,)
        float64, or datetime64[us]; in UTC where there are zones.

    Raises
    ------
    ArchiveError
        If a value is neither, or they are of different kinds.
    """
    path, column = address(where)
    values = column_of(cache, path, column, rows)
    numbers = [number(value) for value in values]
    if None not in numbers:
        return np.array(numbers, np.float64)
    moments = [_moment(value) for value in values]
    known = [moment for moment in moments if moment is not None]
    if len(known) < len(values):
        n_numbers = sum(value is not None for value in numbers)
        kind, row = ("number", numbers.index(None)) if n_numbers > len(known) else ("date", moments.index(None))
        image = cache.ids[row if rows is None else int(np.asarray(rows)[row])]
        raise ArchiveError(
            f"{path}: {len(values) - max(n_numbers, len(known))} of {len(values)} images of {cache.path.name} have a "
            f"{column!r} that is no {kind}, such as {shown(str(values[row]))} of {shown(image)}; give all of them "
            "dates as in ISO 8601 (2021-03-04, 2021-03-04T15:00), or all numbers"
        )
    zoned = [moment.tzinfo is not None for moment in known]
    if any(zoned) and not all(zoned):
        raise ArchiveError(
            f"{path}: column {column!r} has times with a zone ({values[zoned.index(True)]}) and without "
            f"({values[zoned.index(False)]}); give all a zone or none"
        )
    return np.array([_in_utc(moment) for moment in known], dtype="datetime64[us]")


def moment_of(text: str, times: NDArray[Any]) -> Any:
    """A time as it is typed, to be compared with some that `times_of` read.

    Raises
    ------
    ConfigError
        If it is no number where they are numbers, or no date where they are dates.

    Examples
    --------
    >>> moment_of("2021-03", np.array(["2021-02-27"], "datetime64[us]"))
    np.datetime64('2021-03-01T00:00:00.000000')
    """
    dates = times.dtype.kind == "M"
    found = _moment(text) if dates else number(text)
    if found is None:
        kind = "dates: write it as in 2021-03-04" if dates else "numbers: give one"
        raise ConfigError(f"since is {text!r}, and the times are {kind}")
    return np.datetime64(_in_utc(found), "us") if isinstance(found, datetime) else found


def _check_single(path: Path, column: str, paths: Sequence[str], values: Sequence[Value]) -> None:
    """Refuse two rows on one path that differ."""
    first: dict[str, int] = {}
    for row, name in enumerate(paths):
        earlier = first.setdefault(posixpath.normpath(name), row)
        if values[earlier] != values[row]:
            raise ArchiveError(
                f"{path}: {shown(name)} has two values of {column!r}, {values[earlier]!r} and {values[row]!r}; keep one"
            )


def _listed(cache: FeatureCache, rows: NDArray[np.int64], n: int) -> str:
    """How many of n images these are, and the first of them."""
    first = ", ".join(shown(cache.ids[row]) for row in rows[:_SHOWN].tolist())
    return f"{len(rows)} of {n} images of {cache.path.name} ({first}{', …' if len(rows) > _SHOWN else ''})"


def _text(path: Path, column: str, value: Value) -> str:
    if isinstance(value, tuple):
        raise ArchiveError(
            f"{path}: column {column!r} holds lists ({list(value)[:3]}); expected one group for each image"
        )
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _moment(value: Value) -> datetime | None:
    """A date or a time as in ISO 8601, else None."""
    text = str(value)
    if not isinstance(value, str) or not _ISO.fullmatch(text):
        return None
    try:
        return datetime.fromisoformat(f"{text}-01" if len(text) == len("2021-03") else text)
    except ValueError:
        return None


def _in_utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment


def _index(cache: FeatureCache) -> Index:
    """As much of the archives' index as a cache remembers: what it takes to find the samples that a table names."""
    n, names = len(cache), cache.ids
    number_of = np.zeros(n, np.int32)
    places, kinds = (cache.manifest.get(key) or [] for key in ("archives", "archive_kinds"))
    if len(places) != len(kinds):  # of a merged cache: nothing says what came from where
        places, kinds = [], []
    sources = [_source(place, kind) for place, kind in zip(places, kinds, strict=True)]
    if len(sources) != 1:
        prefixes = _prefixes(places, kinds)
        loose = next((i for i, place in enumerate(places) if place not in prefixes.values()), len(sources))
        sources.append(Source(Path(), "tar", ""))
        number = {place: i for i, place in enumerate(places)}
        parts = [_within(name, prefixes) for name in names]
        names = Strings.of(name for name, _ in parts)
        number_of = np.array([loose if place is None else number[place] for _, place in parts], np.int32)
    zeros = np.zeros(n, np.int64)
    return Index(
        sources=tuple(sources),
        ids=cache.ids,
        names=names,
        source=number_of,
        offset=zeros,
        size=zeros,
        mtime_ns=zeros,
        fault=cache.status_codes,
        labels=Labels.none(n),
        split=np.zeros(n, np.uint8),
        ignored={},
    )


def _source(place: str, kind: Any) -> Source:
    """An archive as the manifest has it; single files are relative to their table's folder, or to the place itself."""
    folder = os.path.dirname(place) if _is_table(place, kind) else place
    return Source(Path(folder), kind, os.path.realpath(folder))


def _is_table(place: str, kind: str) -> bool:
    return kind == "files" and place.lower().endswith(TABLE_SUFFIXES)


def _prefixes(places: Sequence[str], kinds: Sequence[str]) -> dict[str, str]:
    """What stands before the ids of each archive, by the rules of `featpipe.archive`, and the archive's place."""
    archives = [place for place, kind in zip(places, kinds, strict=True) if kind != "files" or _is_table(place, kind)]
    if len(set(archives)) < 2:
        return {}
    parts = [Path(place).parts for place in archives]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(some[-depth:]) for some in parts]
        if len(set(names)) == len(names):
            break
    return {plain(name) + "/": place for name, place in zip(names, archives, strict=True)}


def _within(name: str, prefixes: dict[str, str]) -> tuple[str, str | None]:
    """The name of a sample within its archive, and the archive's place."""
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return name[len(prefix) :], prefixes.get(prefix)
