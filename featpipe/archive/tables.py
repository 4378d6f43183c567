"""Tables of paths and labels: CSV and Parquet."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featpipe.archive.listing import format_name
from featpipe.archive.marks import RawLabel, RawLabels, parse_label_column, parse_number
from featpipe.archive.notes import LabelValue
from featpipe.errors import ArchiveError, ConfigError
from featpipe.labels import LabelTask
from featpipe.names import unknown_name_error

__all__ = ["TABLE_SUFFIXES", "LabelTable", "TableRows", "read_column", "read_paths", "read_table"]

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")

_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "filepath", "id")
_LABEL_COLUMNS = ("label", "class", "category", "target", "targets", "labels", "y")
_SPLIT_CODES = {"": 0, "train": 1, "training": 1, "validation": 2, "val": 2, "valid": 2, "dev": 2, "test": 3}


@dataclass(frozen=True)
class LabelTable:
    """Where labels come from, if not from folders.

    Attributes
    ----------
    path : Path
        A .csv (separated by comma, semicolon or tab), .tsv or .parquet file with column names.
    path_column, label_column : str, optional
        Found by their usual names if not given. ``label_column="age,height"`` names several targets.
    task : {"classification", "regression", "multilabel", "none"}, optional
        Decided by the values if not given.
    """

    path: Path
    path_column: str | None = None
    label_column: str | None = None
    task: LabelTask | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))


@dataclass(frozen=True)
class TableRows:
    """The rows of a table.

    Attributes
    ----------
    paths : list of str
    marks : Marks
    split : bytes
        0 none, 1 train, 2 validation, 3 test for each row.
    """

    paths: list[str]
    raw_labels: RawLabels
    split: bytes


def read_table(table: LabelTable, *, require_labels: bool) -> TableRows:
    """Read the columns of a table that matter.

    Raises
    ------
    ArchiveError
        If a column is missing or the file cannot be read.
    ConfigError
        If a split is none of train, validation and test.
    """
    names = _read_column_names(table.path)
    path_column = _require_column(table.path, names, table.path_column, _PATH_COLUMNS, "paths")
    label_columns: list[str] = []
    if table.label_column is not None and table.label_column.lower() not in map(str.lower, names):
        label_columns = [
            _require_column(table.path, names, part.strip(), (), "labels") for part in table.label_column.split(",")
        ]
    elif require_labels or table.label_column is not None or _find_column(names, _LABEL_COLUMNS):
        label_columns = [_require_column(table.path, names, table.label_column, _LABEL_COLUMNS, "labels")]
    split_column = _find_column(names, ("split",))
    needed_columns = [path_column, *label_columns, *([split_column] if split_column else [])]
    columns = dict(zip(needed_columns, _read_columns(table.path, needed_columns), strict=True))
    paths = _parse_paths(table.path, path_column, columns[path_column])
    split = _parse_splits(table.path, columns[split_column]) if split_column else bytes(len(paths))
    return TableRows(paths, _parse_labels(table, label_columns, columns, len(paths)), split)


def read_column(path: Path, column: str) -> tuple[list[str], list[LabelValue]]:
    """Read the paths of a table's rows, and one column of any name as it stands.

    Returns
    -------
    paths : list of str
    values : list of str, int, float, tuple of str, or None where a cell is empty

    Raises
    ------
    ArchiveError
        If there is no column of paths, or the file cannot be read.
    ConfigError
        If the column is not there.
    """
    names = _read_column_names(path)
    path_column = _require_column(path, names, None, _PATH_COLUMNS, "paths")
    matched_column = column if column in names else _find_column(names, (column.lower(),))
    if matched_column is None:
        raise unknown_name_error("column", column, filter(None, names), hint=f"({path})")
    paths, values = _read_columns(path, [path_column, matched_column])
    return _parse_paths(path, path_column, paths), values


def read_paths(path: Path) -> list[str]:
    """Read the paths of a table's rows and nothing else.

    Raises
    ------
    ArchiveError
        If there is no column of paths, or the file cannot be read.
    """
    column = _require_column(path, _read_column_names(path), None, _PATH_COLUMNS, "paths")
    return _parse_paths(path, column, _read_columns(path, [column])[0])


def _parse_paths(path: Path, column: str, values: Sequence[LabelValue]) -> list[str]:
    paths = [str(value) if value is not None else "" for value in values]
    if "" in paths:
        raise ArchiveError(f"{path}: row {paths.index('') + 1} has no {column!r}; give it one")
    return paths


def _parse_labels(table: LabelTable, names: Sequence[str], columns: dict[str, list[LabelValue]], n: int) -> RawLabels:
    where = str(table.path)
    if not names:
        return RawLabels.unlabeled(n)
    if len(names) == 1:
        return parse_label_column(columns[names[0]], names[0], where=where, task=table.task)
    if table.task not in (None, "regression"):
        raise ConfigError(f"{where}: several label columns are targets of a regression, not of {table.task}")
    targets: list[RawLabel] = []
    for row in zip(*(columns[name] for name in names), strict=True):
        numbers = [parse_number(value) for value in row]
        valid_numbers = tuple(n for n in numbers if n is not None)
        for name, value, parsed in zip(names, row, numbers, strict=True):
            if value is not None and parsed is None:
                raise ArchiveError(f"{where}: column {name!r} holds {str(value)[:60]!r}, expected numbers")
        targets.append(valid_numbers if len(valid_numbers) == len(names) else None)
    return RawLabels("regression", targets, tuple(names))


def _parse_splits(path: Path, values: Sequence[LabelValue]) -> bytes:
    split = bytearray()
    for value in values:
        split_name = "" if value is None else str(value).strip().lower()
        if split_name not in _SPLIT_CODES:
            raise unknown_name_error("split", str(value), [name for name in _SPLIT_CODES if name], hint=f"({path})")
        split.append(_SPLIT_CODES[split_name])
    return bytes(split)


def _find_column(names: Sequence[str], candidates: Sequence[str]) -> str | None:
    name_by_lowercase = {name.lower(): name for name in reversed(names)}
    return next((name_by_lowercase[name] for name in candidates if name in name_by_lowercase), None)


def _require_column(
    path: Path, names: Sequence[str], requested: str | None, candidates: Sequence[str], description: str
) -> str:
    column = _find_column(names, candidates) if requested is None else _find_column(names, (requested.lower(),))
    if column is None:
        expected = f"one of {', '.join(candidates)}" if requested is None else repr(requested)
        found_names = ", ".join(repr(name[:60]) for name in names[:20]) or "none"
        raise ArchiveError(f"{path}: no column of {description}; found {found_names}, expected {expected}; name it")
    return column


def _read_column_names(path: Path) -> list[str]:
    if path.suffix.lower() == ".parquet":
        names = [str(name) for name in _open_parquet(path).schema_arrow.names]
    else:
        names = [name.strip() for name in next(_iter_csv_lines(path), (0, []))[1]]
    duplicate_name = next((name for name in names if name and names.count(name) > 1), None)
    if duplicate_name is not None:
        raise ArchiveError(f"{path}: two columns are named {duplicate_name!r}; rename one")
    return names


def _read_columns(path: Path, column_names: Sequence[str]) -> list[list[LabelValue]]:
    if path.suffix.lower() == ".parquet":
        parquet_table = _open_parquet(path).read(columns=list(dict.fromkeys(column_names)))
        return [[_to_label_value(item) for item in parquet_table.column(name).to_pylist()] for name in column_names]
    columns: list[list[LabelValue]] = [[] for _ in column_names]
    positions: list[int] = []
    width = 0
    for line, cells in _iter_csv_lines(path):
        if not positions:
            names = [name.strip() for name in cells]
            positions, width = [names.index(name) for name in column_names], len(names)
            continue
        if len(cells) != width:
            raise ArchiveError(f"{path}: line {line} has {len(cells)} cells, expected {width}; correct it")
        for column, position in zip(columns, positions, strict=True):
            column.append(cells[position].strip() or None)
    return columns


def _iter_csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a CSV that are not empty, with their numbers."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=header.count), strict=True)
            yield from ((reader.line_num, cells) for cells in reader if any(cells))
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {error.strerror}; give a .csv or .parquet file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArchiveError(f"{path}: not a CSV in UTF-8: {error}; save it as one") from error


def _open_parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ArchiveError(
            f"{path}: reading Parquet needs pyarrow; pip install 'featpipe[parquet]', or give a CSV"
        ) from error
    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise ArchiveError(f"{path}: not a readable Parquet file: {format_name(str(error))}; write it again") from error


def _to_label_value(item: object) -> LabelValue:
    if item is None or (isinstance(item, float) and item != item):
        return None
    if isinstance(item, (list, tuple)):
        return tuple(str(part) for part in item)
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        return item
    return os.fsdecode(item) if isinstance(item, bytes) else str(item).strip() or None
