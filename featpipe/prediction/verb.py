"""Models + archives → a file of predictions, or standard output.

What an unfinished prediction has finished are embeddings, as parts beside the file that is to be: the forward pass is
what costs, heads answer tens of thousands of embeddings a second. So another head, another number of classes or another
kind of file goes on from the same parts and can never be mixed with an earlier answer; all that keeps an extraction
whole through kills, full disks and power cuts keeps this whole. Until the file is there they take some 5 kB an image,
which itself has 100.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from featpipe import archive
from featpipe.archive import Index
from featpipe.cache import narrowed, parts_directory
from featpipe.commit import Parts
from featpipe.deadline import Deadline
from featpipe.errors import ArchiveError, ConfigError
from featpipe.extraction import Embedded, embed_into, extract_index, facts_of
from featpipe.fingerprint import differences, fingerprint
from featpipe.model import Model
from featpipe.prediction.answers import Prediction, predictions
from featpipe.prediction.asked import Asked
from featpipe.prediction.files import cannot_write, columns_of, writer_for
from featpipe.prediction.live import stream_all
from featpipe.prediction.made import Request, record
from featpipe.progress import Progress, Tell, quiet
from featpipe.recipe import Extraction
from featpipe.status import Status

__all__ = ["Counts", "predict"]

ROWS_AT_ONCE = 1024
SHARED = ("backbone", "precision", "storage")  # of the facts of two models that one forward pass serves


class Counts(dict[str, int]):
    """How many samples have which status."""

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{escape(name)}</td><td>{count:,}</td></tr>" for name, count in self.items())
        return f"<table><thead><tr><th>status</th><th>samples</th></tr></thead><tbody>{rows}</tbody></table>"


def predict(
    model: Model,
    archives: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    also: Sequence[Model] = (),
    progress: Tell = quiet,
    **asked: Any,
) -> Counts:
    """Predict every sample of some archives.

    Interrupted, the same call goes on; where the file is what would be written, nothing is done.

    Parameters
    ----------
    model : Model
    archives : path-like or sequence of path-like
    out : path-like, optional
        ``.csv``, ``.jsonl`` or ``.parquet``; CSV on standard output if not given. A file is whole or absent.
    also : sequence of Model
        More models of the same embeddings, by the same forward pass; the names of their columns begin with theirs.
    progress : callable
    **asked
        The fields of :class:`featpipe.prediction.Asked`.

    Returns
    -------
    Counts
        From status to the number of samples.

    Raises
    ------
    ArchiveError
        If an archive cannot be listed, more images are bad than ``max_bad`` allows, or ``out`` cannot be written.
    ConfigError
        If a model needs other embeddings than the first.
    TimeLimitError
        If ``time_limit`` passed; what was finished is kept.

    Examples
    --------
    >>> predict(model, "photos/", "predictions.csv", cache="cache/")                 # doctest: +SKIP
    """
    settings = Asked.of(asked)
    deadline = Deadline(settings.time_limit)
    models = [model, *also]
    writer_for(out)
    settings.check(models)
    for number, other in enumerate(also, 2):
        _refuse_other_embeddings(model, other, number)
    if out is None and settings.cache is None:
        _refuse_what_needs_a_place(model, settings)
    work = _Work(models, archive.index(archives), None if out is None else Path(out), settings, progress, deadline)
    return work.run()


@dataclass(frozen=True)
class _Work:
    """One prediction of some archives."""

    models: Sequence[Model]
    index: Index
    path: Path | None
    asked: Asked
    progress: Tell
    deadline: Deadline

    def run(self) -> Counts:
        if self.path is not None:
            return self._to_file(self.path)
        if self.asked.cache is not None:
            found = self._cached()
            return self._write(self._answered(found))
        self.models[0].engine(len(self.index))  # a backbone that cannot be had is told before the first line
        with closing(stream_all(self.models, self.index, self.asked, self.progress)) as rows:
            counts = self._write(rows)
        self._tell_bad(counts)
        return counts

    def _to_file(self, path: Path) -> Counts:
        """Make the file, unless it is what would be made."""
        request = Request.of(self.models, self.index, self.asked, path)
        done = self._finished(request, path)
        if done is not None:
            return done
        _refuse_unwritable(path)
        if self.asked.cache is not None:
            return self._finish(request, path, self._cached())
        return self._in_parts(request, path)

    def _in_parts(self, request: Request, path: Path) -> Counts:
        """Make the file from parts beside it, which are removed when it is there."""
        settings, backbone = self._settings, self.models[0].backbone
        parts = Parts(parts_directory(path), fingerprint(facts_of(backbone, settings)))
        waited = parts.busy()
        if waited:
            self.progress(Progress("note", f"{path}: another prediction writes this file; waiting for it"))
        with parts.writing():
            done = self._finished(request, path) if waited else None
            if done is None:
                found = embed_into(parts, self.index, backbone, settings, self.progress, deadline=self.deadline)
                done = self._finish(request, path, found)
            parts.remove()
        return done

    @property
    def _settings(self) -> Extraction:
        return self.asked.extraction(self.models[0])

    def _cached(self) -> Embedded:
        """The embeddings as a cache."""
        settings, backbone = self._settings, self.models[0].backbone
        cache = extract_index(
            self.index, backbone, settings, self.progress, refuse_all_bad=False, deadline=self.deadline
        )
        return Embedded(
            cache.status_codes, cache.digests, lambda output, start, stop: cache.features(output)[start:stop]
        )

    def _finished(self, request: Request, path: Path) -> Counts | None:
        """How many samples have which status in a file that needs no work; None if it does."""
        made = request.finished(path, self.progress)
        if made is None:
            return None
        _remove_unfinished(path)
        counts = Counts(made.status)
        n = len(self.index)
        self.progress(Progress("note", f"{path}: these predictions of {n} images are there already: no forward pass"))
        self._tell_bad(counts)
        self._refuse_too_many_bad(counts)
        return counts

    def _finish(self, request: Request, path: Path, found: Embedded) -> Counts:
        counts = self._write(self._answered(found))
        try:
            record(path, request.made(found.digests, counts))
        except OSError as error:
            raise cannot_write(path, error) from None
        return counts

    def _answered(self, found: Embedded) -> Iterator[tuple[Prediction, ...]]:
        """What the models say of each row, block by block."""
        n, output = len(self.index), self.models[0].output
        for start in range(0, n, ROWS_AT_ONCE):
            stop = min(n, start + ROWS_AT_ONCE)
            status = found.status[start:stop]
            X = np.asarray(found.block(output, start, stop)[status == Status.OK], np.float32)
            ids = self.index.ids[start:stop]
            told = (predictions(model, ids, status.tolist(), X, self.asked) for model in self.models)
            yield from zip(*told, strict=True)
            self.progress(Progress("bar", "predicting", stop, n))

    def _write(self, rows: Iterator[tuple[Prediction, ...]]) -> Counts:
        counts = Counts()
        with writer_for(self.path)(self.path, columns_of(self.models, self.asked.sets)) as write:
            for sample in rows:
                status = sample[0].status
                counts[status] = counts.get(status, 0) + 1
                write(sample)
        return counts

    def _refuse_too_many_bad(self, counts: Mapping[str, int]) -> None:
        """Of a finished file: another limit may have held when it was made."""
        limit = self.asked.bad_limit(len(self.index))
        bad = sum(counts.values()) - counts.get(Status.OK.word, 0)
        if limit is not None and bad > limit:
            raise ArchiveError(
                f"{self.path}: {bad} images have no prediction, more than --max-bad {self.asked.max_bad} allows; "
                "repair them, or run again with a higher --max-bad"
            )

    def _tell_bad(self, counts: Mapping[str, int]) -> None:
        bad = {status: count for status, count in counts.items() if status != Status.OK.word}
        if bad:
            reasons = ", ".join(f"{count} {status}" for status, count in bad.items())
            text = f"{sum(bad.values())} of {len(self.index)} images have no prediction: {reasons}"
            self.progress(Progress("warning", text))


def _refuse_unwritable(path: Path) -> None:
    """Find out before the work, and without a file that a kill would leave there; missing folders are made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None
    if path.is_dir():
        raise cannot_write(path, OSError(errno.EISDIR, os.strerror(errno.EISDIR)))
    if not os.access(path.parent, os.W_OK):
        raise cannot_write(path, OSError(errno.EACCES, os.strerror(errno.EACCES)))


def _remove_unfinished(path: Path) -> None:
    """Remove what a kill left between the last step of a prediction and the end."""
    parts = Parts(parts_directory(path), "")
    if parts.directory.is_dir() and not parts.busy():
        with parts.writing():
            parts.remove()


def _refuse_other_embeddings(first: Model, other: Model, number: int) -> None:
    """Refuse a model that the first one's forward pass does not serve."""
    name = other.path or f"model {number}"
    if other.output != first.output:
        raise ConfigError(
            f"{name}: was trained on {other.output!r} and {first.path or 'the first'} on {first.output!r}; models that "
            "share a forward pass have the same output: predict with each in a command of its own"
        )
    ours, theirs = ({key: narrowed(model.facts, model.output)[key] for key in SHARED} for model in (first, other))
    differ = differences(theirs, ours, other="in the first")
    if differ:
        raise ConfigError(
            f"{name}: was trained on other embeddings than {first.path or 'the first'} ({'; '.join(differ[:4])}); "
            "predict with each in a command of its own"
        )


def _refuse_what_needs_a_place(model: Model, asked: Asked) -> None:
    """Refuse what standard output cannot give: work that is kept, or that is known before it is told."""
    limits = {"max_bad": asked.max_bad, "time_limit": asked.time_limit}
    wanted = [name.replace("_", "-") for name, value in limits.items() if value is not None]
    wanted += ["several devices"] if "," in model.device else []
    if wanted:
        raise ConfigError(
            f"{wanted[0]}: finished work needs a place, which standard output is not; give --out or --cache"
        )
