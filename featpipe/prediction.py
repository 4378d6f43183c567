"""Model + archive → predictions, streamed: memory is flat, order is the archive's, one row for every sample."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from featpipe import archive
from featpipe.archive import Index
from featpipe.durable import whole_file
from featpipe.errors import ArchiveError, ConfigError
from featpipe.loader import Loader, embedded
from featpipe.model import Model
from featpipe.names import unknown
from featpipe.progress import Progress, Tell, quiet
from featpipe.status import Status

__all__ = ["WRITERS", "Prediction", "predict", "stream"]


@dataclass(frozen=True)
class Prediction:
    """What a model says of one sample.

    Attributes
    ----------
    id : str
    status : str
        ``"ok"``, or why there is no prediction.
    label : str or None
        The most probable class; the classes above 0.5, joined by ``;``, of a multi-label model.
    probability : float or None
    top : list of (class, probability)
        The most probable classes.
    values : tuple of float
        The targets that a regression model predicts.
    novelty : float or None
        The share of training-like images that look less new.
    answers : tuple of str
        The set that holds the right class as often as was asked for.
    bounds : tuple of (low, high)
        The interval of each target, likewise.
    """

    id: str
    status: str
    label: str | None = None
    probability: float | None = None
    top: Sequence[tuple[str, float]] = ()
    values: Sequence[float] = ()
    novelty: float | None = None
    answers: Sequence[str] = ()
    bounds: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Asked:
    """What is to be told of each sample.

    Attributes
    ----------
    top : int
        How many classes to name.
    sets : float or None
        How often a set of answers shall hold the right one.
    """

    top: int = 5
    sets: float | None = None

    def check(self, model: Model) -> None:
        """Refuse what cannot be, before any work."""
        if self.top < 1:
            raise ConfigError(f"top is {self.top}; it must be at least 1")
        if self.sets is not None:
            model.sets_known().reach(self.sets)


def predict(
    model: Model,
    archives: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    top: int = 5,
    sets: float | None = None,
    workers: int | None = None,
    progress: Tell = quiet,
) -> dict[str, int]:
    """Predict every sample of some archives.

    Parameters
    ----------
    model : Model
    archives : path-like or sequence of path-like
    out : path-like, optional
        ``.csv``, ``.jsonl`` or ``.parquet``; CSV on standard output if not given. A file is whole or absent.
    top : int
        How many classes to name for each sample.
    sets : float, optional
        Name a set of classes for each sample that holds the right one this often, such as 0.9; of a regression, the
        ends of an interval.
    workers : int, optional
    progress : callable

    Returns
    -------
    dict from status to the number of samples

    Raises
    ------
    ArchiveError
        If an archive cannot be listed.
    """
    writer = _writer(out)
    _check(workers)
    Asked(top, sets).check(model)
    index = archive.index(archives)
    model.engine(len(index))  # a backbone that cannot be had is told before the first line is written
    counts: dict[str, int] = {}
    columns = _Columns.of(model, sets)
    with (
        writer(Path(out) if out is not None else None, columns) as write,
        closing(stream(model, index, top=top, sets=sets, workers=workers, progress=progress)) as predictions,
    ):
        for prediction in predictions:
            counts[prediction.status] = counts.get(prediction.status, 0) + 1
            write(prediction)
    bad = {status: count for status, count in counts.items() if status != Status.OK.word}
    if bad:
        reasons = ", ".join(f"{count} {status}" for status, count in bad.items())
        progress(Progress("warning", f"{sum(bad.values())} of {len(index)} images have no prediction: {reasons}"))
    return counts


def stream(
    model: Model,
    index: Index,
    *,
    top: int = 5,
    sets: float | None = None,
    workers: int | None = None,
    progress: Tell = quiet,
) -> Generator[Prediction, None, None]:
    """The predictions of an index, in its order, as they are made."""
    _check(workers)
    asked = Asked(top, sets)
    asked.check(model)
    engine = model.engine(len(index))
    workers = workers or engine.workers
    n, done = len(index), 0
    loader = Loader(index, np.arange(n), engine.transform, engine.batch, collect=engine.collect)
    waiting: dict[int, Prediction] = {}
    with closing(loader), engine.running(), closing(embedded(loader, engine, workers)) as batches:
        for batch, features in batches:
            ids = [index.ids[row] for row in batch.rows]
            waiting.update(zip(batch.rows, _predictions(model, ids, batch, features, asked), strict=True))
            while done in waiting:
                yield waiting.pop(done)
                done += 1
            progress(Progress("bar", "predicting", done, n))


def _check(workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}; it must be at least 1")


def _predictions(
    model: Model, ids: list[str], batch: Any, features: dict[str, NDArray[np.float32]], asked: Asked
) -> Iterator[Prediction]:
    made: dict[int, Prediction] = {}
    if features:
        X = features[model.output]
        finite = np.asarray(np.isfinite(X).all(axis=1))
        told = iter(_tell(model, X[finite], asked))
        for place, good in zip(batch.places, finite, strict=True):
            told_here = next(told) if good else {}
            status = Status.OK if good else Status.NOT_FINITE
            made[place] = Prediction(ids[place], status.word, **told_here)
    for at, name in enumerate(ids):
        yield made.get(at) or Prediction(name, batch.status[at].word)


def _tell(model: Model, X: NDArray[np.float32], asked: Asked) -> Iterable[dict[str, Any]]:
    if not len(X):
        return
    found = model.predict_sets_features(X, asked.sets) if asked.sets is not None else [()] * len(X)
    new = model.novelty_features(X).tolist() if model.trust.novelty is not None else [None] * len(X)
    if model.task == "regression":
        for values, bounds, novelty in zip(model.predict_features(X).reshape(len(X), -1), found, new, strict=True):
            ends = tuple((float(low), float(high)) for low, high in bounds)
            yield {"values": tuple(map(float, values)), "bounds": ends, "novelty": novelty}
        return
    for row, answers, novelty in zip(model.predict_proba_features(X), found, new, strict=True):
        order = np.argsort(-row, kind="stable")[: asked.top]
        ranked = [(model.classes[i], float(row[i])) for i in order]
        if model.task == "multilabel":
            chosen = [model.classes[i] for i in np.flatnonzero(row > 0.5)]
            told: dict[str, Any] = {"label": ";".join(chosen), "probability": None}
        else:
            told = {"label": ranked[0][0], "probability": ranked[0][1]}
        yield {**told, "top": ranked, "answers": answers, "novelty": novelty}


@dataclass(frozen=True)
class _Columns:
    """The columns of a file of predictions, besides id and status.

    Attributes
    ----------
    targets : tuple of str or None
        Of a regression.
    novelty, sets : bool
    """

    targets: tuple[str, ...] | None
    novelty: bool
    sets: bool

    @classmethod
    def of(cls, model: Model, sets: float | None) -> _Columns:
        return cls(
            model.classes if model.task == "regression" else None, model.trust.novelty is not None, sets is not None
        )

    @property
    def names(self) -> list[str]:
        columns = ["label", "probability", "top"] if self.targets is None else self._of_targets()
        return [
            *columns,
            *(["set"] if self.sets and self.targets is None else []),
            *(["novelty"] if self.novelty else []),
        ]

    def _of_targets(self) -> list[str]:
        assert self.targets is not None
        ends = [f"{end}_{name}" for name in self.targets for end in ("low", "high")] if self.sets else []
        return [*(f"predicted_{name}" for name in self.targets), *ends]


def _record(prediction: Prediction, columns: _Columns) -> dict[str, Any]:
    """One flat row; the same columns for every sample of a file."""
    record: dict[str, Any] = {"id": prediction.id, "status": prediction.status}
    if columns.targets is not None:
        n = len(columns.targets)
        nothing: list[Any] = [None] * n
        told: list[Any] = [*prediction.values] or nothing
        if columns.sets:
            ends: list[Any] = [end for bounds in prediction.bounds for end in bounds]
            told += ends or nothing * 2
    else:
        ranked = {label: round(probability, 6) for label, probability in prediction.top}
        told = [prediction.label, prediction.probability, ranked]
        told += [list(prediction.answers)] if columns.sets else []
    if columns.novelty:
        told.append(None if prediction.novelty is None else round(prediction.novelty, 4))
    return {**record, **dict(zip(columns.names, told, strict=True))}


@contextmanager
def _whole(path: Path | None, binary: bool = False) -> Iterator[Any]:
    """A file that has its name when it is complete, or standard output."""
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    try:
        with whole_file(path, text=not binary) as file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be written ({error.strerror or error}); choose another --out") from None


class _Lines:
    """Ends the rows of a table with a line feed. The csv module quotes a carriage return only if rows end with it."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")


@contextmanager
def _csv(path: Path | None, columns: _Columns) -> Iterator[Any]:
    with _whole(path) as file:
        writer = csv.DictWriter(_Lines(file), ["id", "status", *columns.names])
        writer.writeheader()

        def write(prediction: Prediction) -> None:
            record = _record(prediction, columns)
            if columns.targets is None:
                for name in [name for name in ("top", "set") if name in record]:
                    record[name] = json.dumps(record[name], ensure_ascii=False)
            writer.writerow(record)

        yield write


@contextmanager
def _jsonl(path: Path | None, columns: _Columns) -> Iterator[Any]:
    with _whole(path) as file:
        yield lambda prediction: _line(file, _record(prediction, columns))


def _line(file: IO[str], record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


@contextmanager
def _parquet(path: Path | None, columns: _Columns) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'featpipe[parquet]', or write .csv or .jsonl") from None
    pairs = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())]))
    text = {"id": pa.string(), "status": pa.string(), "label": pa.string(), "top": pairs, "set": pa.list_(pa.string())}
    known = text if columns.targets is None else {name: text[name] for name in ("id", "status")}
    kinds = [pa.field(name, known.get(name, pa.float64())) for name in ["id", "status", *columns.names]]
    schema = pa.schema(kinds)
    block: list[dict[str, Any]] = []
    with _whole(path, binary=True) as file, pq.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(block, schema))
            block.clear()

        def write(prediction: Prediction) -> None:
            record = _record(prediction, columns)
            if columns.targets is None:
                record["top"] = [{"label": a, "probability": b} for a, b in record["top"].items()]
            block.append(record)
            if len(block) >= 4096:
                flush()

        yield write
        flush()


WRITERS = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}


def _writer(out: str | os.PathLike[str] | None) -> Any:
    suffix = ".csv" if out is None else Path(out).suffix.lower()
    if suffix not in WRITERS:
        raise unknown("kind of output file", suffix or str(out), WRITERS)
    return WRITERS[suffix]
