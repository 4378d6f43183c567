"""Tables of paths and labels: CSV and Parquet."""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featpipe.config import unknown_name_error
from featpipe.data.labels.infer import RawLabel, RawLabels, normalize_name, parse_label_column, parse_number
from featpipe.data.labels.labels import LabelTask
from featpipe.data.sources.listing import ArchiveSource, format_name
from featpipe.data.sources.sidecars import LabelValue
from featpipe.errors import ArchiveError, ConfigError

if TYPE_CHECKING:
    from featpipe.data.index import Index

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")

_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "filepath", "id")
_LABEL_COLUMNS = ("label", "class", "category", "target", "targets", "labels", "y")
_SPLIT_CODES = {"": 0, "train": 1, "training": 1, "validation": 2, "val": 2, "valid": 2, "dev": 2, "test": 3}


@dataclass(frozen=True)
class LabelTable:
    """A table of labels, and how to read it.

    Attributes
    ----------
    path : Path
        A .csv (separated by comma, semicolon or tab), .tsv or .parquet file with column names.
    path_column, label_column : str, optional
        By default detected by their usual names. ``label_column="age,height"`` names several targets.
    task : {"classification", "regression", "multilabel", "none"}, optional
        By default inferred from the values.
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
    raw_labels : RawLabels
    split : bytes
        0 none, 1 train, 2 validation, 3 test for each row.
    """

    paths: list[str]
    raw_labels: RawLabels
    split: bytes


def read_table(table: LabelTable, *, require_labels: bool) -> TableRows:
    """Read the columns of paths, labels and splits of a table.

    Raises
    ------
    ArchiveError
        If a column is missing or the file cannot be read.
    ConfigError
        If a split is not one of train, validation and test.
    """
    names = read_column_names(table.path)
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
    """Read the paths of a table and one other column, without interpreting its values.

    Returns
    -------
    paths : list of str
    values : list of str, int, float, tuple of str, or None for an empty cell

    Raises
    ------
    ArchiveError
        If there is no column of paths, or the file cannot be read.
    ConfigError
        If the column does not exist.
    """
    names = read_column_names(path)
    path_column = _require_column(path, names, None, _PATH_COLUMNS, "paths")
    matched_column = column if column in names else _find_column(names, (column.lower(),))
    if matched_column is None:
        raise unknown_name_error("column", column, filter(None, names), hint=f"({path})")
    paths, values = _read_columns(path, [path_column, matched_column])
    return _parse_paths(path, path_column, paths), values


def read_paths(path: Path) -> list[str]:
    """Read only the paths of a table.

    Raises
    ------
    ArchiveError
        If there is no column of paths, or the file cannot be read.
    """
    column = _require_column(path, read_column_names(path), None, _PATH_COLUMNS, "paths")
    return _parse_paths(path, column, _read_columns(path, [column])[0])


def _parse_paths(path: Path, column: str, values: Sequence[LabelValue]) -> list[str]:
    paths = [str(value) if value is not None else "" for value in values]
    if "" in paths:
        raise ArchiveError(f"{path}: row {paths.index('') + 1} has no {column!r}; complete the table")
    return paths


def _parse_labels(table: LabelTable, names: Sequence[str], columns: dict[str, list[LabelValue]], n: int) -> RawLabels:
    if not names:
        return RawLabels.unlabeled(n)
    if len(names) == 1:
        return parse_label_column(columns[names[0]], names[0], where=str(table.path), task=table.task)
    if table.task not in (None, "regression"):
        raise ConfigError(f"{table.path}: several label columns are regression targets, but the task is {table.task}")
    targets: list[RawLabel] = []
    for row in zip(*(columns[name] for name in names), strict=True):
        numbers = [parse_number(value) for value in row]
        valid_numbers = tuple(n for n in numbers if n is not None)
        for name, value, parsed in zip(names, row, numbers, strict=True):
            if value is not None and parsed is None:
                raise ArchiveError(f"{table.path}: column {name!r} holds {str(value)[:60]!r}, expected numbers")
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
        present_names = ", ".join(repr(name[:60]) for name in names[:20]) or "none"
        raise ArchiveError(
            f"{path}: no column of {description}; found {present_names}, expected {expected}; rename a column"
        )
    return column


def read_column_names(path: Path) -> list[str]:
    """Read the names of the columns of a table.

    Raises
    ------
    ArchiveError
        If the file cannot be read, or two columns have the same name.
    """
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
            raise ArchiveError(f"{path}: line {line} has {len(cells)} cells, expected {width}; correct the line")
        for column, position in zip(columns, positions, strict=True):
            column.append(cells[position].strip() or None)
    return columns


def _iter_csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the non-empty lines of a CSV file with their line numbers."""
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


def map_paths_to_rows(path: Path, table_rows: TableRows) -> dict[str, int]:
    """Map each normalized path of a table to its first row; duplicate rows must agree."""
    row_by_path: dict[str, int] = {}
    for row, name in enumerate(table_rows.paths):
        key = posixpath.normpath(name)
        first_row = row_by_path.setdefault(key, row)
        is_consistent = (
            table_rows.raw_labels.values[first_row] == table_rows.raw_labels.values[row]
            and table_rows.split[first_row] == table_rows.split[row]
        )
        if not is_consistent:
            raise ArchiveError(
                f"{path}: {format_name(name)} has two labels or splits, "
                f"{table_rows.raw_labels.values[first_row]!r} and {table_rows.raw_labels.values[row]!r}; keep one"
            )
    return row_by_path


def match_table_rows(path: Path, table_rows: TableRows, index: Index, *, allow_unmatched: bool = False) -> list[int]:
    """Find the table row of each sample.

    Rows match by id; else by path within the archive, by path relative to the table's folder, or by absolute path.

    Parameters
    ----------
    path : Path
        Path of the table.
    table_rows : TableRows
    index : Index
    allow_unmatched : bool
        Whether the table may contain names that match no sample.

    Returns
    -------
    list of n int
        -1 for a sample that is not in the table.

    Raises
    ------
    ArchiveError
        If a name in the table matches no sample, or several.
    """
    row_by_path = map_paths_to_rows(path, table_rows)
    row_by_sample = [row_by_path.get(posixpath.normpath(name), -1) for name in index.ids]
    rows_matched_by_id = set(row_by_sample)
    unmatched_rows = {name: row for name, row in row_by_path.items() if row not in rows_matched_by_id}
    if unmatched_rows:
        _match_paths(path, unmatched_rows, index, row_by_sample)
    if allow_unmatched:
        return row_by_sample
    used_rows = set(row_by_sample)
    missing_names = [name for name, row in unmatched_rows.items() if row not in used_rows]
    if missing_names:
        first_names = ", ".join(map(format_name, missing_names[:3]))
        example = format_name(index.ids[0])
        raise ArchiveError(
            f"{path}: {len(missing_names)} of its paths name no sample: {first_names}; "
            f"expected names such as {example}, or paths relative to {path.parent}"
        )
    return row_by_sample


def _match_paths(path: Path, row_by_path: dict[str, int], index: Index, row_by_sample: list[int]) -> None:
    roots = [list(_iter_root_prefixes(source, path)) for source in index.sources]
    sample_by_row: dict[int, int] = {}
    for sample, (name, source) in enumerate(zip(index.names, index.source.tolist(), strict=True)):
        if row_by_sample[sample] >= 0:
            continue
        relative_name = name if index.sources[source].kind == "files" else normalize_name(name)
        candidates = (posixpath.normpath(posixpath.join(root, relative_name)) for root in roots[source])
        row = next((row_by_path[candidate] for candidate in candidates if candidate in row_by_path), -1)
        if row >= 0 and sample_by_row.setdefault(row, sample) != sample:
            table_name = next(name for name, table_row in row_by_path.items() if table_row == row)
            raise ArchiveError(
                f"{path}: {format_name(table_name)} matches several samples, "
                f"{format_name(index.ids[sample_by_row[row]])} and {format_name(index.ids[sample])}; use their ids"
            )
        row_by_sample[sample] = row


def _iter_root_prefixes(source: ArchiveSource, path: Path) -> Iterator[str]:
    """Yield the possible prefixes of sample names in a table: none, and the relative and absolute archive path."""
    yield ""
    if source.kind not in ("folder", "files"):
        return
    yield Path(os.path.relpath(source.real_path, os.path.realpath(path.parent))).as_posix()
    yield Path(source.real_path).as_posix()
    yield Path(os.path.abspath(source.path)).as_posix()
