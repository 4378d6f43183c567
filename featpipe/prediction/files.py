"""Files of predictions: CSV, JSON lines, Parquet; whole or absent."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from featpipe.cache import parts_directory
from featpipe.durable import whole_file
from featpipe.errors import ArchiveError, ConfigError
from featpipe.model import Model
from featpipe.names import unknown
from featpipe.prediction.answers import Prediction

__all__ = ["WRITERS", "Columns", "Write", "cannot_write", "columns_of", "unfinished_at", "writer_for"]

Write = Callable[[Sequence[Prediction]], None]
"""Takes one sample: what each model says of it."""

FIRST = ("id", "status")
PARQUET_ROWS = 4096  # in a group


@dataclass(frozen=True)
class Columns:
    """The columns of one model in a file of predictions, besides id and status.

    Attributes
    ----------
    targets : tuple of str or None
        Of a regression.
    novelty, sets : bool
    prefix : str
        Before the name of each column, where several models are told of.
    """

    targets: tuple[str, ...] | None
    novelty: bool
    sets: bool
    prefix: str = ""

    @property
    def names(self) -> list[str]:
        columns = ["label", "probability", "top"] if self.targets is None else self._of_targets()
        answers = ["set"] if self.sets and self.targets is None else []
        return [self.prefix + name for name in (*columns, *answers, *(["novelty"] if self.novelty else []))]

    def _of_targets(self) -> list[str]:
        assert self.targets is not None
        ends = [f"{end}_{name}" for name in self.targets for end in ("low", "high")] if self.sets else []
        return [*(f"predicted_{name}" for name in self.targets), *ends]

    def values(self, prediction: Prediction) -> list[Any]:
        """One sample's, in the order of the names."""
        if self.targets is not None:
            nothing: list[Any] = [None] * len(self.targets)
            told: list[Any] = [*prediction.values] or nothing
            if self.sets:
                ends: list[Any] = [end for bounds in prediction.bounds for end in bounds]
                told += ends or nothing * 2
        else:
            ranked = {label: round(probability, 6) for label, probability in prediction.top}
            told = [prediction.label, prediction.probability, ranked]
            told += [list(prediction.answers)] if self.sets else []
        if self.novelty:
            told.append(None if prediction.novelty is None else round(prediction.novelty, 4))
        return told


def columns_of(models: Sequence[Model], sets: float | None) -> tuple[Columns, ...]:
    """Those of each model; all but the first one's begin with the model's name and a dot."""
    prefixes = [""]
    for number, model in enumerate(models[1:], 2):
        name = f"{model.path.name.removesuffix('.model') if model.path else f'model{number}'}."
        prefixes.append(f"{name[:-1]}#{number}." if name in prefixes else name)
    return tuple(
        Columns(
            model.classes if model.task == "regression" else None,
            model.trust.novelty is not None,
            sets is not None,
            prefix,
        )
        for model, prefix in zip(models, prefixes, strict=True)
    )


def _names(columns: Sequence[Columns]) -> list[str]:
    return [*FIRST, *(name for some in columns for name in some.names)]


def _record(sample: Sequence[Prediction], columns: Sequence[Columns]) -> dict[str, Any]:
    """One flat row; the same columns for every sample of a file."""
    told = (value for one, some in zip(sample, columns, strict=True) for value in some.values(one))
    return dict(zip(_names(columns), (sample[0].id, sample[0].status, *told), strict=True))


@contextmanager
def _whole(path: Path | None, binary: bool = False) -> Iterator[Any]:
    """A file that has its name when it is complete, or standard output."""
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    try:
        with whole_file(path, text=not binary, folder=unfinished_at(path)) as file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from None


def unfinished_at(path: Path) -> Path | None:
    """Where the unfinished work of a file lies, if there is any: the next one to go on from it clears the folder."""
    folder = parts_directory(path)
    return folder if folder.is_dir() else None


def cannot_write(path: Path, error: OSError) -> ArchiveError:
    """The error of a place where predictions cannot be written."""
    return ArchiveError(f"{path}: cannot be written ({error.strerror or error}); choose another --out")


class _Lines:
    """Ends the rows of a table with a line feed. The csv module quotes a carriage return only if rows end with it."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")


@contextmanager
def _csv(path: Path | None, columns: Sequence[Columns]) -> Iterator[Write]:
    with _whole(path) as file:
        writer = csv.DictWriter(_Lines(file), _names(columns))
        writer.writeheader()

        def write(sample: Sequence[Prediction]) -> None:
            record = _record(sample, columns)
            writer.writerow({name: _cell(value) for name, value in record.items()})

        yield write


def _cell(value: Any) -> Any:
    """What holds several values is JSON in its cell."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value


@contextmanager
def _jsonl(path: Path | None, columns: Sequence[Columns]) -> Iterator[Write]:
    with _whole(path) as file:

        def write(sample: Sequence[Prediction]) -> None:
            file.write(json.dumps(_record(sample, columns), ensure_ascii=False) + "\n")

        yield write


@contextmanager
def _parquet(path: Path | None, columns: Sequence[Columns]) -> Iterator[Write]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'featpipe[parquet]', or write .csv or .jsonl") from None
    schema = _schema(pa, columns)
    block: list[dict[str, Any]] = []
    with _whole(path, binary=True) as file, pq.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(block, schema))
            block.clear()

        def write(sample: Sequence[Prediction]) -> None:
            record = _record(sample, columns)
            block.append({name: _pairs(value) for name, value in record.items()})
            if len(block) >= PARQUET_ROWS:
                flush()

        yield write
        flush()


def _schema(pa: Any, columns: Sequence[Columns]) -> Any:
    pairs = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())]))
    kinds = {"label": pa.string(), "top": pairs, "set": pa.list_(pa.string())}
    fields = [pa.field(name, pa.string()) for name in FIRST]
    for some in columns:
        for name in some.names:
            kind = kinds.get(name.removeprefix(some.prefix)) if some.targets is None else None
            fields.append(pa.field(name, kind or pa.float64()))
    return pa.schema(fields)


def _pairs(value: Any) -> Any:
    """Parquet has no maps in order: a list of pairs."""
    if not isinstance(value, dict):
        return value
    return [{"label": label, "probability": probability} for label, probability in value.items()]


Writer = Callable[[Path | None, Sequence[Columns]], AbstractContextManager[Write]]
WRITERS: dict[str, Writer] = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}


def writer_for(out: str | os.PathLike[str] | None) -> Writer:
    """By the end of a file's name; CSV for standard output."""
    suffix = ".csv" if out is None else Path(out).suffix.lower()
    if suffix not in WRITERS:
        raise unknown("kind of output file", suffix or str(out), WRITERS)
    return WRITERS[suffix]
