"""Findings: tables of samples or classes to inspect, as JSON and CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featpipe.errors import ConfigError
from featpipe.storage import atomic_write

FINDING_NAMES = (
    "mistakes",
    "unsure",
    "confused",
    "label_errors",
    "errors",
    "near_duplicates",
    "outliers",
    "short_classes",
)

PREDICTION_COLUMNS = ("predicted", "suggested")  # in tables of samples that were selected by predictions on them


@dataclass(frozen=True)
class Finding:
    """One table of samples or classes to inspect.

    Attributes
    ----------
    name : str
        Key in JSON, and name of the CSV file.
    title, meaning : str
        What the table lists, and how to use it.
    columns : tuple of str
        The first is ``id`` if the rows are samples.
    rows : sequence of mapping
        The most important first; at most `MAX_FINDING_ROWS`.
    total : int
        Number of rows without that limit.
    note : str
        Why the check was not made, or only in part.
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
        """Whether the rows are samples."""
        return self.columns[0] == "id"

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "meaning": self.meaning,
            "total": self.total,
            "note": self.note,
            "rows": [dict(row) for row in self.rows],
        }


def write_findings(findings: Sequence[Finding], folder: str | os.PathLike[str]) -> list[Path]:
    """Write each table that has rows as ``NAME.csv``, and remove the files of tables without rows.

    Parameters
    ----------
    findings : sequence of Finding
    folder : path-like
        Created if missing.

    Returns
    -------
    list of Path
        The files written.

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
            f"{output_folder}: cannot write the findings ({error.strerror or error}); give a writable folder"
        ) from error
    return written_paths
