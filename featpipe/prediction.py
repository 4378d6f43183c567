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
    """

    id: str
    status: str
    label: str | None = None
    probability: float | None = None
    top: Sequence[tuple[str, float]] = ()
    values: Sequence[float] = ()


def predict(
    model: Model,
    archives: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    top: int = 5,
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
    _check(top, workers)
    index = archive.index(archives)
    model.engine(len(index))  # a backbone that cannot be had is told before the first line is written
    counts: dict[str, int] = {}
    names = [f"predicted_{name}" for name in model.classes] if model.task == "regression" else None
    with (
        writer(Path(out) if out is not None else None, names) as write,
        closing(stream(model, index, top=top, workers=workers, progress=progress)) as predictions,
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
    model: Model, index: Index, *, top: int = 5, workers: int | None = None, progress: Tell = quiet
) -> Generator[Prediction, None, None]:
    """The predictions of an index, in its order, as they are made."""
    _check(top, workers)
    engine = model.engine(len(index))
    workers = workers or engine.workers
    n, done = len(index), 0
    loader = Loader(index, np.arange(n), engine.transform, engine.batch, collect=engine.collect)
    waiting: dict[int, Prediction] = {}
    with closing(loader), engine.running(), closing(embedded(loader, engine, workers)) as batches:
        for batch, features in batches:
            ids = [index.ids[row] for row in batch.rows]
            waiting.update(zip(batch.rows, _predictions(model, ids, batch, features, top), strict=True))
            while done in waiting:
                yield waiting.pop(done)
                done += 1
            progress(Progress("bar", "predicting", done, n))


def _check(top: int, workers: int | None) -> None:
    for name, value in (("top", top), ("workers", workers)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")


def _predictions(
    model: Model, ids: list[str], batch: Any, features: dict[str, NDArray[np.float32]], top: int
) -> Iterator[Prediction]:
    made: dict[int, Prediction] = {}
    if features:
        X = features[model.output]
        finite = np.asarray(np.isfinite(X).all(axis=1))
        told = iter(_tell(model, X[finite], top))
        for place, good in zip(batch.places, finite, strict=True):
            told_here = next(told) if good else {}
            status = Status.OK if good else Status.NOT_FINITE
            made[place] = Prediction(ids[place], status.word, **told_here)
    for at, name in enumerate(ids):
        yield made.get(at) or Prediction(name, batch.status[at].word)


def _tell(model: Model, X: NDArray[np.float32], top: int) -> Iterable[dict[str, Any]]:
    if not len(X):
        return
    if model.task == "regression":
        for values in model.predict_features(X).reshape(len(X), -1):
            yield {"values": tuple(map(float, values))}
        return
    for row in model.predict_proba_features(X):
        order = np.argsort(-row, kind="stable")[:top]
        ranked = [(model.classes[i], float(row[i])) for i in order]
        if model.task == "multilabel":
            chosen = [model.classes[i] for i in np.flatnonzero(row > 0.5)]
            yield {"label": ";".join(chosen), "probability": None, "top": ranked}
        else:
            yield {"label": ranked[0][0], "probability": ranked[0][1], "top": ranked}


def _record(prediction: Prediction, targets: Sequence[str] | None) -> dict[str, Any]:
    """One flat row; the same columns for every sample of a file."""
    record: dict[str, Any] = {"id": prediction.id, "status": prediction.status}
    if targets is not None:
        values: Sequence[float | None] = prediction.values or [None] * len(targets)
        return {**record, **dict(zip(targets, values, strict=True))}
    ranked = {label: round(probability, 6) for label, probability in prediction.top}
    return {**record, "label": prediction.label, "probability": prediction.probability, "top": ranked}


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
def _csv(path: Path | None, targets: Sequence[str] | None) -> Iterator[Any]:
    columns = ["id", "status", *(targets if targets is not None else ["label", "probability", "top"])]
    with _whole(path) as file:
        writer = csv.DictWriter(_Lines(file), columns)
        writer.writeheader()

        def write(prediction: Prediction) -> None:
            record = _record(prediction, targets)
            if "top" in record:
                record["top"] = json.dumps(record["top"], ensure_ascii=False)
            writer.writerow(record)

        yield write


@contextmanager
def _jsonl(path: Path | None, targets: Sequence[str] | None) -> Iterator[Any]:
    with _whole(path) as file:
        yield lambda prediction: _line(file, _record(prediction, targets))


def _line(file: IO[str], record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


@contextmanager
def _parquet(path: Path | None, targets: Sequence[str] | None) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'featpipe[parquet]', or write .csv or .jsonl") from None
    kinds = [pa.field("id", pa.string()), pa.field("status", pa.string())]
    if targets is not None:
        kinds += [pa.field(name, pa.float64()) for name in targets]
    else:
        pairs = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())]))
        kinds += [pa.field("label", pa.string()), pa.field("probability", pa.float64()), pa.field("top", pairs)]
    schema = pa.schema(kinds)
    block: list[dict[str, Any]] = []
    with _whole(path, binary=True) as file, pq.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(block, schema))
            block.clear()

        def write(prediction: Prediction) -> None:
            record = _record(prediction, targets)
            if "top" in record:
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
