"""Which row of a table speaks of which sample."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from featpipe.archive.listing import ArchiveSource, format_name
from featpipe.archive.marks import normalize_name
from featpipe.archive.tables import TableRows
from featpipe.errors import ArchiveError

if TYPE_CHECKING:
    from featpipe.archive.indexing import Index

__all__ = ["map_paths_to_rows", "match_table_rows"]


def map_paths_to_rows(path: Path, table_rows: TableRows) -> dict[str, int]:
    """From each path of a table, normalised, to its first row; two rows on one path must agree."""
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
                f"{path}: {format_name(name)} has two labels or splits, {table_rows.raw_labels.values[first_row]!r} and "
                f"{table_rows.raw_labels.values[row]!r}; keep one"
            )
    return row_by_path


def match_table_rows(path: Path, table_rows: TableRows, index: Index, *, allow_unmatched: bool = False) -> list[int]:
    """Find the row of a table for each sample.

    By id; else by path within the archive, by path relative to the table's folder, or by absolute path.

    Parameters
    ----------
    path : Path
        Of the table.
    rows : Rows
    index : Index
    others : bool
        Whether the table may name what is no sample.

    Returns
    -------
    list of n int
        -1 for a sample that the table does not name.

    Raises
    ------
    ArchiveError
        If the table names what is no sample, or one of its names fits several.
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
            f"{path}: {len(missing_names)} of its paths name no sample: {first_names}; expected names such as {example}, or paths "
            f"relative to {path.parent}"
        )
    return row_by_sample


def _match_paths(path: Path, row_by_path: dict[str, int], index: Index, row_by_sample: list[int]) -> None:
    roots = [list(_list_root_prefixes(source, path)) for source in index.sources]
    sample_by_row: dict[int, int] = {}
    for sample, (name, source) in enumerate(zip(index.names, index.source.tolist(), strict=True)):
        if row_by_sample[sample] >= 0:
            continue
        relative_name = name if index.sources[source].kind == "files" else normalize_name(name)
        candidates = (posixpath.normpath(posixpath.join(root, relative_name)) for root in roots[source])
        row = next((row_by_path[candidate] for candidate in candidates if candidate in row_by_path), -1)
        if row >= 0 and sample_by_row.setdefault(row, sample) != sample:
            raise ArchiveError(
                f"{path}: {format_name(_find_name(row_by_path, row))} fits several samples, {format_name(index.ids[sample_by_row[row]])} and "
                f"{format_name(index.ids[sample])}; write their ids"
            )
        row_by_sample[sample] = row


def _find_name(row_by_path: dict[str, int], row: int) -> str:
    return next(name for name, table_row in row_by_path.items() if table_row == row)


def _list_root_prefixes(source: ArchiveSource, path: Path) -> Iterator[str]:
    """What may stand before the name of a sample in a table: nothing, the way from the table, the absolute path."""
    yield ""
    if source.kind not in ("folder", "files"):
        return
    yield Path(os.path.relpath(source.real_path, os.path.realpath(path.parent))).as_posix()
    yield Path(source.real_path).as_posix()
    yield Path(os.path.abspath(source.path)).as_posix()
