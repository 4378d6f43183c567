"""Models + archives → a file of predictions, or standard output.

An unfinished prediction stores embeddings as parts beside the target file, because the forward pass is the expensive
step: heads process tens of thousands of embeddings per second. A prediction with another head, another number of
classes or another file format therefore resumes from the same parts and is never mixed with earlier predictions. The
parts are as safe from kills, full disks and power cuts as those of an extraction. They take about 5 kB per image until
the file is complete; an image has about 100 kB.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from featpipe import data
from featpipe.cache import FeatureCache, parts_directory, restrict_facts_to_output
from featpipe.config import ExtractionConfig
from featpipe.data import Index
from featpipe.errors import ArchiveError, ConfigError
from featpipe.extraction import IndexEmbeddings, embed_into_parts, extract_index, make_facts, reuse_embeddings
from featpipe.prediction.config import PredictConfig, PredictOptions
from featpipe.prediction.provenance import PredictionRequest
from featpipe.prediction.rows import Prediction, iter_predictions
from featpipe.prediction.stream import stream_all
from featpipe.prediction.writers import make_columns, make_write_error, select_writer
from featpipe.runtime import Deadline, Progress, ProgressCallback, ignore_progress
from featpipe.status import Status
from featpipe.storage import StagingArea, compute_fingerprint, describe_differences

if TYPE_CHECKING:
    from featpipe.model import Model

logger = logging.getLogger(__name__)

HEAD_BATCH_ROWS = 1024
SHARED_EMBEDDING_KEYS = ("backbone", "precision", "storage")  # equal for models that share a forward pass


class StatusCounts(dict[str, int]):
    """Number of samples by status."""

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{escape(name)}</td><td>{count:,}</td></tr>" for name, count in self.items())
        return f"<table><thead><tr><th>status</th><th>samples</th></tr></thead><tbody>{rows}</tbody></table>"


def predict(
    model: Model,
    archives: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    also: Sequence[Model] = (),
    progress: ProgressCallback = ignore_progress,
    **options: Unpack[PredictOptions],
) -> StatusCounts:
    """Predict every sample of some archives.

    After an interrupt, the same call resumes. A file that is up to date is left as it is.

    Parameters
    ----------
    model : Model
    archives : path-like or sequence of path-like
    out : path-like, optional
        ``.csv``, ``.jsonl`` or ``.parquet``; CSV on standard output if not given. A file is complete or absent.
    also : sequence of Model
        More models of the same embeddings, for the same forward pass; their columns are prefixed with the model's name.
    progress : callable
    **options
        The fields of :class:`featpipe.prediction.PredictConfig`.

    Returns
    -------
    StatusCounts
        From status to the number of samples.

    Raises
    ------
    ArchiveError
        If an archive cannot be listed, more images are bad than ``max_bad`` allows, or ``out`` cannot be written.
    ConfigError
        If a model needs other embeddings than the first one.
    TimeLimitError
        If ``time_limit`` passed; finished work is kept.

    Examples
    --------
    >>> predict(model, "photos/", "predictions.csv", cache="cache/")                 # doctest: +SKIP
    """
    config = PredictConfig.from_settings(options)
    deadline = Deadline(config.time_limit)
    models = [model, *also]
    select_writer(out)
    config.check_models(models)
    for model_number, other in enumerate(also, 2):
        _check_same_embeddings(model, other, model_number)
    if out is None and config.cache is None:
        _check_stdout_options(model, config)
    index = data.index(archives, modality=model.modality)
    return _PredictionJob(models, index, None if out is None else Path(out), config, progress, deadline).run()


@dataclass(frozen=True)
class _PredictionJob:
    """One prediction of some archives."""

    models: Sequence[Model]
    index: Index
    path: Path | None
    config: PredictConfig
    progress: ProgressCallback
    deadline: Deadline

    def run(self) -> StatusCounts:
        """Reuse a finished file, or load the heads and predict."""
        if self.path is not None:
            return self._predict_to_file(self.path)
        if self.config.cache is not None:
            embeddings = self._embed_to_cache()
            return self._write_predictions(self._iter_predictions(embeddings))
        self.models[0].engine(len(self.index))  # an unavailable backbone is an error before the first line
        with closing(stream_all(self.models, self.index, self.config, self.progress)) as rows:
            return self._write_predictions(rows)

    def _predict_to_file(self, path: Path) -> StatusCounts:
        """Write the file, unless it is up to date."""
        request = PredictionRequest(self.models, self.index, self.config, path)
        finished_counts = self._find_finished_counts(request, path)
        if finished_counts is not None:
            return finished_counts
        for model in self.models:
            _ = model.head  # a damaged one is an error before the forward pass
        _check_writable(path)
        if self.config.cache is not None:
            return self._write_with_receipt(request, path, self._embed_to_cache())
        return self._predict_via_staging(request, path)

    def _predict_via_staging(self, request: PredictionRequest, path: Path) -> StatusCounts:
        """Write the file from parts beside it, and remove the parts."""
        extraction_config, backbone = self._extraction_config, self.models[0].backbone
        staging_area = StagingArea(parts_directory(path), compute_fingerprint(make_facts(backbone, extraction_config)))
        had_to_wait = staging_area.is_locked()
        if had_to_wait:
            logger.info(f"{path}: another prediction is writing this file; waiting for it")
        with staging_area.lock_for_writing():
            counts = self._find_finished_counts(request, path) if had_to_wait else None
            if counts is None:
                embeddings = embed_into_parts(
                    staging_area, self.index, backbone, extraction_config, self.progress, deadline=self.deadline
                )
                counts = self._write_with_receipt(request, path, embeddings)
            staging_area.remove()
        return counts

    @property
    def _extraction_config(self) -> ExtractionConfig:
        return self.config.extraction_config(self.models[0])

    def _embed_to_cache(self) -> IndexEmbeddings:
        """Embed the images into a cache, or reuse it."""
        cache: FeatureCache | None = None
        identity = self.models[0].backbone_identity
        if identity is not None:  # the network need not be loaded if no image is new
            config = self.config.extraction_config(self.models[0], identity.name)
            cache = reuse_embeddings(self.index, identity, config, self.progress, require_readable=False)
        if cache is None:
            cache = extract_index(
                self.index,
                self.models[0].backbone,
                self._extraction_config,
                self.progress,
                require_readable=False,
                deadline=self.deadline,
            )
        return IndexEmbeddings(
            cache.status_codes, cache.digests, lambda output, start, stop: cache.features(output)[start:stop]
        )

    def _find_finished_counts(self, request: PredictionRequest, path: Path) -> StatusCounts | None:
        """Read the counts of a file that is up to date; None if it must be written."""
        receipt = request.find_current_receipt(path, self.progress)
        if receipt is None:
            return None
        _remove_stale_parts(path)
        counts = StatusCounts(receipt.status)
        n = len(self.index)
        logger.info(f"{path}: the predictions of {n} images are up to date, nothing to do")
        self._report_failures(counts)
        self._check_max_bad(counts)
        return counts

    def _write_with_receipt(self, request: PredictionRequest, path: Path, embeddings: IndexEmbeddings) -> StatusCounts:
        counts = self._write_predictions(self._iter_predictions(embeddings))
        try:
            request.write_receipt(path, embeddings.digests, counts)
        except OSError as error:
            raise make_write_error(path, error) from None
        return counts

    def _iter_predictions(self, embeddings: IndexEmbeddings) -> Iterator[tuple[Prediction, ...]]:
        """Yield the predictions of all models for each row, computed block by block."""
        n, output = len(self.index), self.models[0].output
        for start in range(0, n, HEAD_BATCH_ROWS):
            stop = min(n, start + HEAD_BATCH_ROWS)
            status = embeddings.status[start:stop]
            X = np.asarray(embeddings.load_block(output, start, stop)[status == Status.OK], np.float32)
            ids = self.index.ids[start:stop]
            predictions_by_model = (
                iter_predictions(model, ids, status.tolist(), X, self.config) for model in self.models
            )
            yield from zip(*predictions_by_model, strict=True)
            self.progress(Progress("predicting", stop, n))

    def _write_predictions(self, rows: Iterator[tuple[Prediction, ...]]) -> StatusCounts:
        counts = StatusCounts()
        with select_writer(self.path)(self.path, make_columns(self.models, self.config.sets)) as write:
            for sample_predictions in rows:
                status = sample_predictions[0].status
                counts[status] = counts.get(status, 0) + 1
                write(sample_predictions)
        self._report_failures(counts)
        return counts

    def _check_max_bad(self, counts: Mapping[str, int]) -> None:
        """Apply ``max_bad`` to a finished file, which may have been made with another limit."""
        max_bad_count = self.config.get_max_bad_count(len(self.index))
        n_bad = sum(counts.values()) - counts.get(Status.OK.word, 0)
        if max_bad_count is not None and n_bad > max_bad_count:
            raise ArchiveError(
                f"{self.path}: {n_bad} images have no prediction, more than --max-bad {self.config.max_bad} allows; "
                "repair the images, or run again with a higher --max-bad"
            )

    def _report_failures(self, counts: Mapping[str, int]) -> None:
        bad_counts = {status: count for status, count in counts.items() if status != Status.OK.word}
        if bad_counts:
            reasons = ", ".join(f"{count} {status}" for status, count in bad_counts.items())
            text = f"{sum(bad_counts.values())} of {len(self.index)} images have no prediction: {reasons}"
            logger.warning(text)


def _check_writable(path: Path) -> None:
    """Check the path before the work without creating a file; missing folders are created."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise make_write_error(path, error) from None
    if path.is_dir():
        raise make_write_error(path, OSError(errno.EISDIR, os.strerror(errno.EISDIR)))
    if not os.access(path.parent, os.W_OK):
        raise make_write_error(path, OSError(errno.EACCES, os.strerror(errno.EACCES)))


def _remove_stale_parts(path: Path) -> None:
    """Remove parts left by a kill after the file was published."""
    staging_area = StagingArea(parts_directory(path), "")
    if staging_area.directory.is_dir() and not staging_area.is_locked():
        with staging_area.lock_for_writing():
            staging_area.remove()


def _check_same_embeddings(first: Model, other: Model, model_number: int) -> None:
    """Refuse a model that needs other embeddings than the first one."""
    name = other.path or f"model {model_number}"
    if other.output != first.output:
        raise ConfigError(
            f"{name}: was trained on {other.output!r}, {first.path or 'the first'} on {first.output!r}; models share a "
            "forward pass only if they have the same output: predict with a separate command for each"
        )
    first_identity, other_identity = (
        {key: restrict_facts_to_output(model.facts, model.output)[key] for key in SHARED_EMBEDDING_KEYS}
        for model in (first, other)
    )
    mismatches = describe_differences(other_identity, first_identity, expected_label="in the first")
    if mismatches:
        raise ConfigError(
            f"{name}: was trained on other embeddings than {first.path or 'the first'} ({'; '.join(mismatches[:4])}); "
            "predict with a separate command for each"
        )


def _check_stdout_options(model: Model, config: PredictConfig) -> None:
    """Refuse options that need stored work, which standard output does not have."""
    restricted_options = {"max_bad": config.max_bad, "time_limit": config.time_limit}
    unsupported = [name.replace("_", "-") for name, value in restricted_options.items() if value is not None]
    unsupported += ["several devices"] if "," in model.device else []
    if unsupported:
        raise ConfigError(
            f"{unsupported[0]} requires --out or --cache, because standard output stores no finished work"
        )
