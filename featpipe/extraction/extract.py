"""Archive + backbone → cache. No image is embedded twice, and what was committed is never lost."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from featpipe import data
from featpipe.backbones import Backbone
from featpipe.cache import EmbeddingSource, FeatureCache, SampleTable, parts_directory, write_cache
from featpipe.config import AUTO, ExtractionConfig, ExtractionOptions
from featpipe.data import Index
from featpipe.errors import ArchiveError, CacheError
from featpipe.extraction.auto_precision import resolve_precision
from featpipe.extraction.identity import load_backbone, make_facts
from featpipe.extraction.paths import find_compatible_caches, find_finished_cache, is_up_to_date, make_cache_path
from featpipe.extraction.plan import EmbeddingPlan, source_from_part
from featpipe.extraction.run import ExtractionRun, format_counts
from featpipe.inference import resolve_devices
from featpipe.runtime import Deadline, Progress, ProgressCallback, report_warnings_only
from featpipe.status import Status
from featpipe.storage import StagingArea, compute_fingerprint, lock_file, make_writable_folder

__all__ = ["IndexEmbeddings", "embed_files", "embed_into_parts", "extract", "extract_index"]


def extract(
    archives: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    progress: ProgressCallback = report_warnings_only,
    **settings: Unpack[ExtractionOptions],
) -> FeatureCache:
    """Run the frozen backbone once over the images of some archives and cache the embeddings.

    Images whose bytes were embedded before under the same facts, in any cache of the same folder, are copied.

    Parameters
    ----------
    archives : path-like or sequence of path-like
        Folders, ``.tar``, ``.tar.gz``, ``.zip``, tables of paths; globs and ``{000..099}`` are expanded.
    progress : callable
        Told what is going on, as :class:`featpipe.runtime.progress.Progress`.
    **settings
        The fields of :class:`featpipe.config.ExtractionConfig`.

    Returns
    -------
    FeatureCache

    Raises
    ------
    ArchiveError
        If an archive is missing, empty, unreadable or hostile, or more images are bad than ``max_bad`` allows.
    CacheMismatchError
        If ``out`` is a cache that was made from something else.

    Examples
    --------
    >>> cache = extract("photos/", backbone="resnet18", cache="cache/")          # doctest: +SKIP
    """
    config = ExtractionConfig.from_settings(settings)
    deadline = Deadline(config.time_limit)
    devices = resolve_devices(config.device)  # before minutes are spent on listing an archive
    index = data.index(archives, labels=config.labels)
    _report_index(index, progress)
    config = replace(config, device=",".join(map(str, devices)))
    return extract_index(index, load_backbone(config), config, progress, deadline=deadline)


def extract_index(
    index: Index,
    backbone: Backbone,
    settings: ExtractionConfig,
    progress: ProgressCallback = report_warnings_only,
    *,
    require_readable: bool = True,
    deadline: Deadline | None = None,
) -> FeatureCache:
    """The cache of an index: from what is known already, and a forward pass for the rest."""
    deadline = deadline or Deadline(settings.time_limit)
    precision_choice = None
    if settings.precision == AUTO:
        settings, precision_choice = resolve_precision(index, backbone, settings, progress)
    facts = make_facts(backbone, settings)
    path = make_cache_path(index, backbone, facts, settings)
    parts = StagingArea(parts_directory(path), compute_fingerprint(facts))
    make_writable_folder(path.parent, CacheError, "--cache or --out")
    if parts.is_locked():
        progress(Progress("note", f"{path}: another extraction writes this cache; waiting for it"))
    with parts.lock_for_writing():
        existing_cache = find_finished_cache(path, facts, index, settings)
        shapes = dict(backbone.shapes)
        plan = EmbeddingPlan(index, settings.check_content)
        for cache in find_compatible_caches(path.parent, facts):
            plan.lookup.add(EmbeddingSource.from_cache(cache, shapes))
        for part in parts.load_committed():
            plan.lookup.add(source_from_part(part))
        plan.resolve_by_stamp()
        if existing_cache is None or not is_up_to_date(existing_cache, plan.to_table(), shapes):
            plan.drop_damaged()
        run = ExtractionRun(plan, backbone, settings, parts, progress, precision_choice, deadline)
        run.embed()
        if existing_cache is not None and is_up_to_date(existing_cache, plan.to_table(), shapes):
            parts.remove()
            return existing_cache
        table = plan.to_table()
        if require_readable:
            _raise_if_none_readable(table, index)
        gather = plan.make_gather(shapes, settings.storage)
        write_cache(path, table, run.make_manifest(facts), shapes, settings.storage, gather, settings.shard_bytes)
        parts.remove()
    return FeatureCache(path)


@dataclass(frozen=True, eq=False)
class IndexEmbeddings:
    """The embeddings of an index, as long as the parts that hold them are there.

    Attributes
    ----------
    status : ndarray of shape (n,), uint8
        Codes of :class:`featpipe.status.Status`.
    digests : ndarray of shape (n, 32), uint8
        SHA-256 of each image's bytes, zero where they could not be read.
    block : callable
        ``block(output, start, stop)`` are the features of these rows, NaN where the status is not 0.
    """

    status: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    load_block: Callable[[str, int, int], NDArray[np.floating]]


def embed_into_parts(
    parts: StagingArea,
    index: Index,
    backbone: Backbone,
    settings: ExtractionConfig,
    progress: ProgressCallback = report_warnings_only,
    *,
    deadline: Deadline | None = None,
) -> IndexEmbeddings:
    """Embed an index into parts that never become a cache; what lies there already is not embedded again.

    The caller holds the folder by :meth:`Parts.writing`, and removes the parts when they have served.
    """
    shapes = dict(backbone.shapes)
    plan = EmbeddingPlan(index, settings.check_content)
    for part in parts.load_committed():
        plan.lookup.add(source_from_part(part))
    plan.resolve_by_stamp()
    ExtractionRun(plan, backbone, settings, parts, progress, deadline=deadline).embed()
    return IndexEmbeddings(plan.status, plan.digests, plan.make_gather(shapes, settings.storage))


def embed_files(
    paths: Sequence[str | os.PathLike[str]],
    backbone: Backbone,
    settings: ExtractionConfig,
    progress: ProgressCallback = report_warnings_only,
) -> tuple[NDArray[np.floating], NDArray[np.uint8]]:
    """The embeddings of some files, in the order given, through the caches of a folder.

    What no cache of the folder holds is embedded into one more cache there.

    Returns
    -------
    features : ndarray of shape (n, d)
        NaN in the rows whose status is not 0.
    status : ndarray of shape (n,), uint8
        Codes of :class:`featpipe.status.Status`.
    """
    unique_paths, inverse = np.unique([os.path.abspath(path) for path in paths], return_inverse=True)
    facts, folder = make_facts(backbone, settings), Path(settings.cache)
    make_writable_folder(folder, CacheError, "--cache or --out")
    with lock_file(folder / f".files-{compute_fingerprint(facts)[:8]}.lock"):
        plan = EmbeddingPlan(data.index_files(unique_paths.tolist()), settings.check_content)
        shapes = dict(backbone.shapes)
        for cache in find_compatible_caches(folder, facts):
            plan.lookup.add(EmbeddingSource.from_cache(cache, shapes))
        plan.resolve_by_stamp()
        plan.drop_damaged()
        output = next(iter(shapes))
        features = plan.make_gather(shapes, settings.storage)(output, 0, len(unique_paths))
        unread_rows = plan.unread_rows
        if len(unread_rows):
            unread_index = data.index_files(unique_paths[unread_rows].tolist())
            identity_hash = hashlib.sha256(
                "\n".join([compute_fingerprint(facts), *unique_paths[unread_rows]]).encode("utf-8", "replace")
            )
            out = folder / f"files-{identity_hash.hexdigest()[:16]}.h5"
            cache = extract_index(unread_index, backbone, replace(settings, out=out), progress)
            features[unread_rows], plan.status[unread_rows] = cache.features(output), cache.status_codes
    return features[inverse], plan.status[inverse]


def _report_index(index: Index, progress: ProgressCallback) -> None:
    text = f"{len(index)} images"
    if index.labels.task in ("classification", "multilabel"):
        text += f", {len(index.labels.classes)} classes"
        n_unlabeled = int(np.count_nonzero(~index.labels.known))
        text += f", {n_unlabeled} without a label" if n_unlabeled else ""
    if index.ignored:
        text += "; not images: " + ", ".join(f"{count} {reason}" for reason, count in index.ignored.items())
    progress(Progress("note", text))


def _raise_if_none_readable(table: SampleTable, index: Index) -> None:
    if not np.any(table.status == Status.OK):
        counts = Counter(Status(int(code)).word for code in table.status)
        first_id = index.ids[0]
        raise ArchiveError(
            f"none of the {len(index)} images can be read ({format_counts(counts)}); the first is {first_id}"
        )
