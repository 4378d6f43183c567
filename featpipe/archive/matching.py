"""Which row of a table speaks of which sample."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from featpipe.archive.listing import Source, shown
from featpipe.archive.marks import clean
from featpipe.archive.tables import Rows
from featpipe.errors import ArchiveError

if TYPE_CHECKING:
    from featpipe.archive.indexing import Index

__all__ = ["keyed", "match"]


def keyed(path: Path, rows: Rows) -> dict[str, int]:
    """From each path of a table, normalised, to its first row; two rows on one path must agree."""
    first: dict[str, int] = {}
    for row, name in enumerate(rows.paths):
        key = posixpath.normpath(name)
        earlier = first.setdefault(key, row)
        same = rows.marks.values[earlier] == rows.marks.values[row] and rows.split[earlier] == rows.split[row]
        if not same:
            raise ArchiveError(
                f"{path}: {shown(name)} has two labels or splits, {rows.marks.values[earlier]!r} and "
                f"{rows.marks.values[row]!r}; keep one"
            )
    return first


def match(path: Path, rows: Rows, index: Index, *, others: bool = False) -> list[int]:
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
    table = keyed(path, rows)
    of_sample = [table.get(posixpath.normpath(name), -1) for name in index.ids]
    by_id = set(of_sample)
    unclaimed = {name: row for name, row in table.items() if row not in by_id}
    if unclaimed:
        _match_paths(path, unclaimed, index, of_sample)
    if others:
        return of_sample
    used = set(of_sample)
    absent = [name for name, row in unclaimed.items() if row not in used]
    if absent:
        first = ", ".join(map(shown, absent[:3]))
        example = shown(index.ids[0])
        raise ArchiveError(
            f"{path}: {len(absent)} of its paths name no sample: {first}; expected names such as {example}, or paths "
            f"relative to {path.parent}"
        )
    return of_sample


def _match_paths(path: Path, table: dict[str, int], index: Index, of_sample: list[int]) -> None:
    roots = [list(_roots(source, path)) for source in index.sources]
    claimed: dict[int, int] = {}
    for sample, (name, source) in enumerate(zip(index.names, index.source.tolist(), strict=True)):
        if of_sample[sample] >= 0:
            continue
        inside = name if index.sources[source].kind == "files" else clean(name)
        candidates = (posixpath.normpath(posixpath.join(root, inside)) for root in roots[source])
        row = next((table[candidate] for candidate in candidates if candidate in table), -1)
        if row >= 0 and claimed.setdefault(row, sample) != sample:
            raise ArchiveError(
                f"{path}: {shown(_name_of(table, row))} fits several samples, {shown(index.ids[claimed[row]])} and "
                f"{shown(index.ids[sample])}; write their ids"
            )
        of_sample[sample] = row


def _name_of(table: dict[str, int], row: int) -> str:
    return next(name for name, number in table.items() if number == row)


def _roots(source: Source, path: Path) -> Iterator[str]:
    """What may stand before the name of a sample in a table: nothing, the way from the table, the absolute path."""
    yield ""
    if source.kind not in ("folder", "files"):
        return
    yield Path(os.path.relpath(source.real, os.path.realpath(path.parent))).as_posix()
    yield Path(source.real).as_posix()
    yield Path(os.path.abspath(source.path)).as_posix()
