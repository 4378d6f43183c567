"""Read groups, times and lists of samples from tables, matched to the rows of a cache."""

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

from featpipe.cache import FeatureCache
from featpipe.data import (
    TABLE_SUFFIXES,
    ArchiveSource,
    Index,
    Labels,
    LabelValue,
    RawLabels,
    TableRows,
    escape_name,
    format_name,
    match_table_rows,
    parse_number,
    read_column,
    read_paths,
)
from featpipe.errors import ArchiveError, ConfigError
from featpipe.storage import StringColumn

_MAX_LISTED_IMAGES = 3
_ISO_DATE_PATTERN = re.compile(r"[0-9]{4}-[0-9]{2}(-[0-9]{2})?([T ][0-9:.,]+ ?(Z|[+-][0-9:]+)?)?")


def parse_table_column(text: str) -> tuple[Path, str]:
    """Split ``TABLE:COLUMN`` into the table and the column.

    Raises
    ------
    ConfigError
        If one of them is missing.

    Examples
    --------
    >>> parse_table_column("visits.csv:patient")
    (PosixPath('visits.csv'), 'patient')
    """
    table, colon, column = text.rpartition(":")
    if not (colon and table.strip() and column.strip()) or column.lower().endswith(TABLE_SUFFIXES):
        raise ConfigError(f"{text!r} is not TABLE:COLUMN; write it as in visits.csv:patient")
    return Path(table), column.strip()


def load_column(
    cache: FeatureCache, table: str | os.PathLike[str], column: str, rows: ArrayLike | None = None
) -> list[LabelValue]:
    """Read a column of a table for samples of a cache.

    Rows of the table are matched to images in the same way as labels: by id; else by path within the archive, by path
    relative to the table's folder, or by absolute path. The table may contain rows for other images.

    Parameters
    ----------
    cache : FeatureCache
    table : path-like
        A .csv, .tsv or .parquet file with a column of paths (``path``, ``file``, ``id``, …).
    column : str
        The name of the column; case is ignored unless that is ambiguous.
    rows : array-like of shape (m,), optional
        Row numbers of the images that need a value; all of them if not given.

    Returns
    -------
    list of m str, int, float, or tuple of str

    Raises
    ------
    ArchiveError
        If an image is missing from the table, has no value or two different values, or the table cannot be read.
    ConfigError
        If the table has no such column.
    """
    path = Path(table)
    row_indices = np.arange(len(cache)) if rows is None else np.asarray(rows, np.int64)
    paths, values = read_column(path, column)
    if not paths:
        raise ArchiveError(f"{path}: the table has no rows; expected one for each image, with its {column!r}")
    _check_single(path, column, paths, values)
    table_rows = _match_rows(cache, path, paths, [str(value) for value in values])[row_indices]
    missing = row_indices[table_rows < 0]
    if len(missing):
        raise ArchiveError(
            f"{path}: no row for {_format_images(cache, missing, len(row_indices))}; the first path of the table is "
            f"{format_name(paths[0])}. Add a row with {column!r} for each image, under its id, its path within the "
            "archive, or its path relative to the table"
        )
    row_values = [values[table_row] for table_row in table_rows.tolist()]
    rows_without_value = row_indices[[value is None for value in row_values]]
    if len(rows_without_value):
        raise ArchiveError(
            f"{path}: {column!r} is empty for {_format_images(cache, rows_without_value, len(row_indices))}; fill it in"
        )
    return row_values


def find_listed_rows(cache: FeatureCache, table: str | os.PathLike[str]) -> NDArray[np.int64]:
    """Find the rows of a cache whose images a table lists, matched as in :func:`load_column`, in ascending order.

    Raises
    ------
    ArchiveError
        If the table lists none of the images, or cannot be read.
    """
    path = Path(table)
    paths = read_paths(path)
    rows = np.flatnonzero(_match_rows(cache, path, paths, [""] * len(paths)) >= 0)
    if paths and not len(rows):
        raise ArchiveError(
            f"{path}: none of its {len(paths)} paths is an image of {cache.path.name}, the first is "
            f"{format_name(paths[0])}; list ids or paths of its images"
        )
    return rows


def load_groups(cache: FeatureCache, table_column: str, rows: ArrayLike | None = None) -> NDArray[np.str_]:
    """Load the group name of each image, for the argument ``groups`` of :func:`featpipe.splits.make_folds`.

    Parameters
    ----------
    cache : FeatureCache
    table_column : str
        ``TABLE:COLUMN``.
    rows : array-like of shape (m,), optional

    Returns
    -------
    ndarray of shape (m,), str
        Whole numbers in Parquet files become the digits that a CSV file would contain.
    """
    path, column = parse_table_column(table_column)
    return np.array(
        [_to_group_name(path, column, value) for value in load_column(cache, path, column, rows)], dtype=np.str_
    )


def load_times(cache: FeatureCache, table_column: str, rows: ArrayLike | None = None) -> NDArray[Any]:
    """Load the time of each image, for the argument ``times`` of :func:`featpipe.splits.make_folds`.

    Parameters
    ----------
    cache : FeatureCache
    table_column : str
        ``TABLE:COLUMN``. The column contains numbers, or ISO 8601 dates and times: ``2021-03``, ``2021-03-04``,
        ``2021-03-04 15:00:59.5``, ``2021-03-04T15:00+01:00``. Times without a zone are not converted; either all
        or none have a zone.
    rows : array-like of shape (m,), optional

    Returns
    -------
    ndarray of shape (m,)
        float64, or datetime64[us]; converted to UTC if the times have zones.

    Raises
    ------
    ArchiveError
        If a value is neither a number nor a date, or numbers and dates are mixed.
    """
    path, column = parse_table_column(table_column)
    values = load_column(cache, path, column, rows)
    numbers = [parse_number(value) for value in values]
    if None not in numbers:
        return np.array(numbers, np.float64)
    datetimes = [_parse_datetime(value) for value in values]
    parsed_times = [timestamp for timestamp in datetimes if timestamp is not None]
    if len(parsed_times) < len(values):
        n_numbers = sum(value is not None for value in numbers)
        kind, row = (
            ("number", numbers.index(None)) if n_numbers > len(parsed_times) else ("date", datetimes.index(None))
        )
        image = cache.ids[row if rows is None else int(np.asarray(rows)[row])]
        n_invalid = len(values) - max(n_numbers, len(parsed_times))
        raise ArchiveError(
            f"{path}: {column!r} is not a {kind} for {n_invalid} of {len(values)} images of {cache.path.name}, the "
            f"first is {format_name(str(values[row]))} of {format_name(image)}; expected ISO 8601 dates (2021-03-04, "
            "2021-03-04T15:00) for all images, or numbers for all"
        )
    has_zone = [timestamp.tzinfo is not None for timestamp in parsed_times]
    if any(has_zone) and not all(has_zone):
        raise ArchiveError(
            f"{path}: {column!r} has times with a time zone ({values[has_zone.index(True)]}) and without one "
            f"({values[has_zone.index(False)]}); give a time zone for all or for none"
        )
    return np.array([_to_utc(timestamp) for timestamp in parsed_times], dtype="datetime64[us]")


def parse_time(text: str, times: NDArray[Any]) -> Any:
    """Parse a time so that it can be compared with the times that :func:`load_times` returns.

    Raises
    ------
    ConfigError
        If the text is not of the same kind, number or date, as the times.

    Examples
    --------
    >>> parse_time("2021-03", np.array(["2021-02-27"], "datetime64[us]"))
    np.datetime64('2021-03-01T00:00:00.000000')
    """
    is_date = times.dtype.kind == "M"
    parsed = _parse_datetime(text) if is_date else parse_number(text)
    if parsed is None:
        expected = "dates; expected a date such as 2021-03-04" if is_date else "numbers; expected a number"
        raise ConfigError(f"since is {text!r}, but the times are {expected}")
    return np.datetime64(_to_utc(parsed), "us") if isinstance(parsed, datetime) else parsed


def _match_rows(cache: FeatureCache, path: Path, paths: list[str], values: list[str]) -> NDArray[np.int64]:
    """For each sample of a cache the row of the table, shape (n,); -1 if there is none."""
    table_rows = TableRows(paths, RawLabels("classification", [*values]), bytes(len(paths)))
    return np.array(match_table_rows(path, table_rows, _make_index(cache), allow_unmatched=True), np.int64)


def _check_single(path: Path, column: str, paths: Sequence[str], values: Sequence[LabelValue]) -> None:
    first_row_by_path: dict[str, int] = {}
    for row, name in enumerate(paths):
        first_row = first_row_by_path.setdefault(posixpath.normpath(name), row)
        if values[first_row] != values[row]:
            raise ArchiveError(
                f"{path}: {format_name(name)} has two values of {column!r}, {values[first_row]!r} and "
                f"{values[row]!r}; keep one"
            )


def _format_images(cache: FeatureCache, rows: NDArray[np.int64], n: int) -> str:
    """Format how many of n images these are, with the first of them as examples."""
    examples = [format_name(cache.ids[row]) for row in rows[:_MAX_LISTED_IMAGES].tolist()]
    if len(rows) > _MAX_LISTED_IMAGES:
        examples.append("…")
    return f"{len(rows)} of {n} images of {cache.path.name} ({', '.join(examples)})"


def _to_group_name(path: Path, column: str, value: LabelValue) -> str:
    if isinstance(value, tuple):
        raise ArchiveError(f"{path}: {column!r} holds lists ({list(value)[:3]}); expected one group for each image")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _parse_datetime(value: LabelValue) -> datetime | None:
    """Parse an ISO 8601 date or time; None if it is neither."""
    text = str(value)
    if not isinstance(value, str) or not _ISO_DATE_PATTERN.fullmatch(text):
        return None
    try:
        return datetime.fromisoformat(f"{text}-01" if len(text) == len("2021-03") else text)
    except ValueError:
        return None


def _to_utc(timestamp: datetime) -> datetime:
    return timestamp.astimezone(UTC).replace(tzinfo=None) if timestamp.tzinfo else timestamp


def _make_index(cache: FeatureCache) -> Index:
    """Rebuild from a cache the part of the archives' index that is needed to match the rows of a table."""
    n, names = len(cache), cache.ids
    source_indices = np.zeros(n, np.int32)
    archive_paths, archive_kinds = (cache.manifest.get(key) or [] for key in ("archives", "archive_kinds"))
    if len(archive_paths) != len(archive_kinds):  # a merged cache does not record which archive a sample came from
        archive_paths, archive_kinds = [], []
    sources = [_make_source(path, kind) for path, kind in zip(archive_paths, archive_kinds, strict=True)]
    if len(sources) != 1:
        path_by_prefix = _find_id_prefixes(archive_paths, archive_kinds)
        fallback_source = next(
            (i for i, path in enumerate(archive_paths) if path not in path_by_prefix.values()), len(sources)
        )
        sources.append(ArchiveSource(Path(), "tar", ""))
        source_by_path = {path: i for i, path in enumerate(archive_paths)}
        names_and_paths = [_split_id_prefix(name, path_by_prefix) for name in names]
        names = StringColumn.from_strings(name for name, _ in names_and_paths)
        source_indices = np.array(
            [fallback_source if path is None else source_by_path[path] for _, path in names_and_paths], np.int32
        )
    zeros = np.zeros(n, np.int64)
    return Index(
        sources=tuple(sources),
        ids=cache.ids,
        names=names,
        source=source_indices,
        offset=zeros,
        size=zeros,
        mtime_ns=zeros,
        fault=cache.status_codes,
        labels=Labels.unlabeled(n),
        split=np.zeros(n, np.uint8),
        ignored={},
    )


def _make_source(path: str, kind: Any) -> ArchiveSource:
    """An archive of the manifest; single files are relative to the folder of their table, or to the path itself."""
    folder = os.path.dirname(path) if _is_table(path, kind) else path
    return ArchiveSource(Path(folder), kind, os.path.realpath(folder))


def _is_table(path: str, kind: str) -> bool:
    return kind == "files" and path.lower().endswith(TABLE_SUFFIXES)


def _find_id_prefixes(archive_paths: Sequence[str], archive_kinds: Sequence[str]) -> dict[str, str]:
    """Map the id prefix of each archive, made by the rules of `featpipe.data`, to the path of the archive."""
    archives = zip(archive_paths, archive_kinds, strict=True)
    prefixed_paths = [path for path, kind in archives if kind != "files" or _is_table(path, kind)]
    if len(set(prefixed_paths)) < 2:
        return {}
    path_parts = [Path(path).parts for path in prefixed_paths]
    for depth in range(1, max(map(len, path_parts)) + 1):
        names = ["/".join(parts[-depth:]) for parts in path_parts]
        if len(set(names)) == len(names):
            break
    return {escape_name(name) + "/": path for name, path in zip(names, prefixed_paths, strict=True)}


def _split_id_prefix(name: str, path_by_prefix: dict[str, str]) -> tuple[str, str | None]:
    """The name of a sample within its archive, and the path of the archive."""
    prefix = next((prefix for prefix in path_by_prefix if name.startswith(prefix)), "")
    return name[len(prefix) :], path_by_prefix.get(prefix)
