"""Writers of prediction files: CSV, JSON lines, Parquet. Files are written atomically."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from featpipe.cache import parts_directory
from featpipe.config import unknown_name_error
from featpipe.errors import ArchiveError, ConfigError
from featpipe.prediction.rows import Prediction
from featpipe.storage import atomic_write

if TYPE_CHECKING:
    from featpipe.model import Model

RowWriter = Callable[[Sequence[Prediction]], None]
"""Writes one sample: a sequence with the prediction of each model."""

LEADING_COLUMNS = ("id", "status")
PARQUET_ROW_GROUP_SIZE = 4096  # rows


@dataclass(frozen=True)
class PredictionColumns:
    """The columns of one model in a prediction file, besides id and status.

    Attributes
    ----------
    targets : tuple of str or None
        Target names of a regression model; None for other models.
    novelty, sets : bool
        Whether the file has out-of-distribution scores, and prediction sets or intervals.
    prefix : str
        Prefix of the column names, which distinguishes several models.
    """

    targets: tuple[str, ...] | None
    novelty: bool
    sets: bool
    prefix: str = ""

    @property
    def names(self) -> list[str]:
        """The names of the columns, with the prefix."""
        if self.targets is None:
            names, set_names = ["label", "probability", "top"], ["set"]
        else:
            names = [f"predicted_{name}" for name in self.targets]
            set_names = [f"{end}_{name}" for name in self.targets for end in ("low", "high")]
        names += [*(set_names if self.sets else []), *(["novelty"] if self.novelty else [])]
        return [self.prefix + name for name in names]

    def values(self, prediction: Prediction) -> list[Any]:
        """The values of one sample, in the order of ``names``."""
        if self.targets is not None:
            missing: list[Any] = [None] * len(self.targets)
            row_values: list[Any] = [*prediction.values] or missing
            if self.sets:
                interval_ends: list[Any] = [end for bounds in prediction.bounds for end in bounds]
                row_values += interval_ends or missing * 2
        else:
            probability_by_label = {label: round(probability, 6) for label, probability in prediction.top}
            row_values = [prediction.label, prediction.probability, probability_by_label]
            row_values += [list(prediction.answers)] if self.sets else []
        if self.novelty:
            row_values.append(None if prediction.novelty is None else round(prediction.novelty, 4))
        return row_values


def make_columns(models: Sequence[Model], sets: float | None) -> tuple[PredictionColumns, ...]:
    """Make the columns of each model. From the second model on, their names begin with the model's name and a dot."""
    prefixes = [""]
    for model_number, model in enumerate(models[1:], 2):
        prefix_candidate = f"{model.path.name.removesuffix('.model') if model.path else f'model{model_number}'}."
        prefixes.append(
            f"{prefix_candidate[:-1]}#{model_number}." if prefix_candidate in prefixes else prefix_candidate
        )
    return tuple(
        PredictionColumns(
            model.classes if model.task == "regression" else None,
            model.trust.novelty is not None,
            sets is not None,
            prefix,
        )
        for model, prefix in zip(models, prefixes, strict=True)
    )


def _list_column_names(columns: Sequence[PredictionColumns]) -> list[str]:
    return [*LEADING_COLUMNS, *(name for model_columns in columns for name in model_columns.names)]


def _to_record(predictions: Sequence[Prediction], columns: Sequence[PredictionColumns]) -> dict[str, Any]:
    """Make one flat row. All samples of a file have the same columns."""
    model_values = (
        value
        for prediction, model_columns in zip(predictions, columns, strict=True)
        for value in model_columns.values(prediction)
    )
    return dict(
        zip(_list_column_names(columns), (predictions[0].id, predictions[0].status, *model_values), strict=True)
    )


@contextmanager
def _open_atomic(path: Path | None, binary: bool = False) -> Iterator[Any]:
    """Open a file for an atomic write, or standard output if ``path`` is None."""
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    try:
        with atomic_write(path, text=not binary, folder=find_parts_directory(path)) as file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise make_write_error(path, error) from None


def find_parts_directory(path: Path) -> Path | None:
    """Find the parts folder of a prediction file, if it exists. The run that resumes from it cleans the folder up."""
    folder = parts_directory(path)
    return folder if folder.is_dir() else None


def make_write_error(path: Path, error: OSError) -> ArchiveError:
    """Make the error for a path where predictions cannot be written."""
    return ArchiveError(f"{path}: cannot be written ({error.strerror or error}); choose another --out")


class _LineFeedWriter:
    """Ends rows with a line feed. The csv module quotes carriage returns only if its line terminator contains one."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")


@contextmanager
def _open_csv(path: Path | None, columns: Sequence[PredictionColumns]) -> Iterator[RowWriter]:
    with _open_atomic(path) as file:
        writer = csv.DictWriter(_LineFeedWriter(file), _list_column_names(columns))
        writer.writeheader()

        def write(predictions: Sequence[Prediction]) -> None:
            record = _to_record(predictions, columns)
            for name, value in record.items():
                if isinstance(value, (dict, list)):
                    record[name] = json.dumps(value, ensure_ascii=False)
            writer.writerow(record)

        yield write


@contextmanager
def _open_jsonl(path: Path | None, columns: Sequence[PredictionColumns]) -> Iterator[RowWriter]:
    with _open_atomic(path) as file:

        def write(predictions: Sequence[Prediction]) -> None:
            file.write(json.dumps(_to_record(predictions, columns), ensure_ascii=False) + "\n")

        yield write


@contextmanager
def _open_parquet(path: Path | None, columns: Sequence[PredictionColumns]) -> Iterator[RowWriter]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'featpipe[parquet]', or write .csv or .jsonl") from None
    schema = _make_parquet_schema(pa, columns)
    pending_records: list[dict[str, Any]] = []
    with _open_atomic(path, binary=True) as file, pq.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(pending_records, schema))
            pending_records.clear()

        def write(predictions: Sequence[Prediction]) -> None:
            record = _to_record(predictions, columns)
            pending_records.append({name: _to_label_probability_pairs(value) for name, value in record.items()})
            if len(pending_records) >= PARQUET_ROW_GROUP_SIZE:
                flush()

        yield write
        flush()


def _make_parquet_schema(pa: Any, columns: Sequence[PredictionColumns]) -> Any:
    label_probability_list = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())]))
    label_column_types = {"label": pa.string(), "top": label_probability_list, "set": pa.list_(pa.string())}
    fields = [pa.field(name, pa.string()) for name in LEADING_COLUMNS]
    for model_columns in columns:
        for name in model_columns.names:
            column_type = (
                label_column_types.get(name.removeprefix(model_columns.prefix))
                if model_columns.targets is None
                else None
            )
            fields.append(pa.field(name, column_type or pa.float64()))
    return pa.schema(fields)


def _to_label_probability_pairs(value: Any) -> Any:
    """Convert a dict to a list of pairs, because Parquet maps have no order."""
    if not isinstance(value, dict):
        return value
    return [{"label": label, "probability": probability} for label, probability in value.items()]


FileWriter = Callable[[Path | None, Sequence[PredictionColumns]], AbstractContextManager[RowWriter]]
WRITERS: dict[str, FileWriter] = {".csv": _open_csv, ".jsonl": _open_jsonl, ".parquet": _open_parquet}


def select_writer(out: str | os.PathLike[str] | None) -> FileWriter:
    """Select the writer by the suffix of the file name; CSV for standard output."""
    suffix = ".csv" if out is None else Path(out).suffix.lower()
    if suffix not in WRITERS:
        raise unknown_name_error("kind of output file", suffix or str(out), WRITERS)
    return WRITERS[suffix]
