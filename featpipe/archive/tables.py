"""Tables of paths and labels: CSV and Parquet."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featpipe.archive.listing import shown
from featpipe.archive.marks import Mark, Marks, interpret, number
from featpipe.archive.notes import Value
from featpipe.errors import ArchiveError, ConfigError
from featpipe.labels import Task
from featpipe.names import unknown

__all__ = ["TABLE_SUFFIXES", "Rows", "Table", "read_column", "read_paths", "read_table"]

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")

_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "filepath", "id")
_LABEL_COLUMNS = ("label", "class", "category", "target", "targets", "labels", "y")
_SPLITS = {"": 0, "train": 1, "training": 1, "validation": 2, "val": 2, "valid": 2, "dev": 2, "test": 3}


@dataclass(frozen=True)
class Table:
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
    task: Task | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))


@dataclass(frozen=True)
class Rows:
    """The rows of a table.

    Attributes
    ----------
    paths : list of str
    marks : Marks
    split : bytes
        0 none, 1 train, 2 validation, 3 test for each row.
    """

    paths: list[str]
    marks: Marks
    split: bytes


def read_table(table: Table, *, need_labels: bool) -> Rows:
    """Read the columns of a table that matter.

    Raises
    ------
    ArchiveError
        If a column is missing or the file cannot be read.
    ConfigError
        If a split is none of train, validation and test.
    """
    names = _column_names(table.path)
    path_column = _pick(table.path, names, table.path_column, _PATH_COLUMNS, "paths")
    label_columns: list[str] = []
    if table.label_column is not None and table.label_column.lower() not in map(str.lower, names):
        label_columns = [_pick(table.path, names, part.strip(), (), "labels") for part in table.label_column.split(",")]
    elif need_labels or table.label_column is not None or _found(names, _LABEL_COLUMNS):
        label_columns = [_pick(table.path, names, table.label_column, _LABEL_COLUMNS, "labels")]
    split_column = _found(names, ("split",))
    wanted = [path_column, *label_columns, *([split_column] if split_column else [])]
    columns = dict(zip(wanted, _columns(table.path, wanted), strict=True))
    paths = _paths(table.path, path_column, columns[path_column])
    split = _splits(table.path, columns[split_column]) if split_column else bytes(len(paths))
    return Rows(paths, _marks(table, label_columns, columns, len(paths)), split)


def read_column(path: Path, column: str) -> tuple[list[str], list[Value]]:
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
    names = _column_names(path)
    path_column = _pick(path, names, None, _PATH_COLUMNS, "paths")
    found = column if column in names else _found(names, (column.lower(),))
    if found is None:
        raise unknown("column", column, filter(None, names), hint=f"({path})")
    paths, values = _columns(path, [path_column, found])
    return _paths(path, path_column, paths), values


def read_paths(path: Path) -> list[str]:
    """Read the paths of a table's rows and nothing else.

    Raises
    ------
    ArchiveError
        If there is no column of paths, or the file cannot be read.
    """
    column = _pick(path, _column_names(path), None, _PATH_COLUMNS, "paths")
    return _paths(path, column, _columns(path, [column])[0])


def _paths(path: Path, column: str, values: Sequence[Value]) -> list[str]:
    paths = [str(value) if value is not None else "" for value in values]
    if "" in paths:
        raise ArchiveError(f"{path}: row {paths.index('') + 1} has no {column!r}; give it one")
    return paths


def _marks(table: Table, names: Sequence[str], columns: dict[str, list[Value]], n: int) -> Marks:
    where = str(table.path)
    if not names:
        return Marks.none(n)
    if len(names) == 1:
        return interpret(columns[names[0]], names[0], where=where, task=table.task)
    if table.task not in (None, "regression"):
        raise ConfigError(f"{where}: several label columns are targets of a regression, not of {table.task}")
    targets: list[Mark] = []
    for row in zip(*(columns[name] for name in names), strict=True):
        numbers = [number(value) for value in row]
        known = tuple(n for n in numbers if n is not None)
        for name, value, parsed in zip(names, row, numbers, strict=True):
            if value is not None and parsed is None:
                raise ArchiveError(f"{where}: column {name!r} holds {str(value)[:60]!r}, expected numbers")
        targets.append(known if len(known) == len(names) else None)
    return Marks("regression", targets, tuple(names))


def _splits(path: Path, values: Sequence[Value]) -> bytes:
    split = bytearray()
    for value in values:
        word = "" if value is None else str(value).strip().lower()
        if word not in _SPLITS:
            raise unknown("split", str(value), [name for name in _SPLITS if name], hint=f"({path})")
        split.append(_SPLITS[word])
    return bytes(split)


def _found(names: Sequence[str], known: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in known if name in lower), None)


def _pick(path: Path, names: Sequence[str], asked: str | None, known: Sequence[str], what: str) -> str:
    column = _found(names, known) if asked is None else _found(names, (asked.lower(),))
    if column is None:
        expected = f"one of {', '.join(known)}" if asked is None else repr(asked)
        found = ", ".join(repr(name[:60]) for name in names[:20]) or "none"
        raise ArchiveError(f"{path}: no column of {what}; found {found}, expected {expected}; name it")
    return column


def _column_names(path: Path) -> list[str]:
    if path.suffix.lower() == ".parquet":
        names = [str(name) for name in _parquet(path).schema_arrow.names]
    else:
        names = [name.strip() for name in next(_lines(path), (0, []))[1]]
    double = next((name for name in names if name and names.count(name) > 1), None)
    if double is not None:
        raise ArchiveError(f"{path}: two columns are named {double!r}; rename one")
    return names


def _columns(path: Path, wanted: Sequence[str]) -> list[list[Value]]:
    if path.suffix.lower() == ".parquet":
        content = _parquet(path).read(columns=list(dict.fromkeys(wanted)))
        return [[_value(item) for item in content.column(name).to_pylist()] for name in wanted]
    columns: list[list[Value]] = [[] for _ in wanted]
    places: list[int] = []
    width = 0
    for line, cells in _lines(path):
        if not places:
            names = [name.strip() for name in cells]
            places, width = [names.index(name) for name in wanted], len(names)
            continue
        if len(cells) != width:
            raise ArchiveError(f"{path}: line {line} has {len(cells)} cells, expected {width}; correct it")
        for column, place in zip(columns, places, strict=True):
            column.append(cells[place].strip() or None)
    return columns


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
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


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ArchiveError(
            f"{path}: reading Parquet needs pyarrow; pip install 'featpipe[parquet]', or give a CSV"
        ) from error
    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise ArchiveError(f"{path}: not a readable Parquet file: {shown(str(error))}; write it again") from error


def _value(item: object) -> Value:
    if item is None or (isinstance(item, float) and item != item):
        return None
    if isinstance(item, (list, tuple)):
        return tuple(str(part) for part in item)
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        return item
    return os.fsdecode(item) if isinstance(item, bytes) else str(item).strip() or None
