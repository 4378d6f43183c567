"""A table of samples that deserve a look, as text, JSON and CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featpipe.errors import ConfigError
from featpipe.storage import atomic_write

__all__ = ["Finding", "write_findings"]


@dataclass(frozen=True)
class Finding:
    """One table.

    Attributes
    ----------
    name : str
        Its key in JSON, and the name of its file.
    title, meaning : str
        What it is, and what to do with it, in a sentence.
    columns : tuple of str
        The first is ``id`` where the rows are samples.
    rows : list of dict
        The most telling first.
    total : int
        How many there are in all, where `rows` does not hold every one.
    note : str
        Why there is none, where that was not looked for.
    """

    name: str
    title: str
    meaning: str
    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]] = ()
    total: int = 0
    note: str = ""

    @property
    def has_sample_rows(self) -> bool:
        """Whether each row names a sample."""
        return self.columns[0] == "id"

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "title": self.title,
            "meaning": self.meaning,
            "total": self.total,
            "note": self.note,
            "rows": [dict(row) for row in self.rows],
        }


def write_findings(findings: Sequence[Finding], folder: str | os.PathLike[str]) -> list[Path]:
    """Write each table that has rows as ``NAME.csv``; one of an earlier time that has none now is removed.

    Raises
    ------
    ConfigError
        If the folder cannot be written.
    """
    written_paths = []
    output_folder = Path(folder)
    try:
        for finding in findings:
            path = output_folder / f"{finding.name}.csv"
            if not finding.rows:
                path.unlink(missing_ok=True)
                continue
            with atomic_write(path, text=True) as file:
                writer = csv.DictWriter(file, finding.columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(finding.rows)
            written_paths.append(path)
    except OSError as error:
        raise ConfigError(
            f"{output_folder}: cannot write the findings ({error.strerror or error}); name a folder that can be written"
        ) from error
    return written_paths
