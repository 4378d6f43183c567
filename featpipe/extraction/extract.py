"""Extract embeddings from archives into a cache. No image is embedded twice, and committed work is never lost."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
from numpy.typing import NDArray

from featpipe import data, inference
from featpipe.cache import FeatureCache
from featpipe.config import AUTO, ExtractionConfig, ExtractionOptions
from featpipe.data import Index
from featpipe.errors import CacheError
from featpipe.extraction.auto_precision import find_cached_choice, resolve_precision
from featpipe.extraction.identity import (
    find_modality,
    load_and_remember_backbone,
    load_backbone,
    make_facts,
    recall_backbone_identity,
)
from featpipe.extraction.paths import make_cache_path
from featpipe.extraction.plan import ExtractionPlan, make_staging_area
from featpipe.extraction.row_sources import FeatureReader
from featpipe.runtime import Deadline, ProgressCallback, ignore_progress
from featpipe.storage import StagingArea, compute_fingerprint, lock_file, make_writable_folder

if TYPE_CHECKING:
    from featpipe.backbones import Backbone, BackboneIdentity

logger = logging.getLogger(__name__)


def extract(
    archives: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    progress: ProgressCallback = ignore_progress,
    **settings: Unpack[ExtractionOptions],
) -> FeatureCache:
    """Run the frozen backbone once over the images of some archives and cache the embeddings.

    Embeddings of images with the same bytes are copied from caches of the same folder with the same settings.

    Parameters
    ----------
    archives : path-like or sequence of path-like
        Folders, ``.tar``, ``.tar.gz``, ``.zip``, tables of paths; globs and ``{000..099}`` are expanded.
    progress : callable
        Called with :class:`featpipe.runtime.Progress`.
    **settings
        The fields of :class:`featpipe.config.ExtractionConfig`.

    Returns
    -------
    FeatureCache

    Raises
    ------
    ArchiveError
        If an archive is missing, empty, unreadable or unsafe, or more images are bad than ``max_bad`` allows.
    CacheMismatchError
        If ``out`` is a cache of other archives or another backbone.

    Examples
    --------
    >>> cache = extract("photos/", backbone="resnet18", cache="cache/")          # doctest: +SKIP
    """
    config = ExtractionConfig.from_settings(settings)
    deadline = Deadline(config.time_limit)
    identity = recall_backbone_identity(config)
    if identity is None or config.device not in ("auto", "cpu"):
        inference.resolve_devices(config.device)  # fail early: listing an archive may take minutes
    if isinstance(config.backbone, str) and ":" in config.backbone:  # its transform determines which files are samples
        config = replace(config, backbone=load_backbone(config))
    index = data.index(archives, labels=config.labels, modality=find_modality(config.backbone))
    _report_index(index)
    if identity is not None:
        cache = reuse_embeddings(index, identity, config, progress)
        if cache is not None:
            return cache
    config = replace(config, device=",".join(map(str, inference.resolve_devices(config.device))))
    return extract_index(index, load_and_remember_backbone(config), config, progress, deadline=deadline)


def extract_index(
    index: Index,
    backbone: Backbone,
    settings: ExtractionConfig,
    progress: ProgressCallback = ignore_progress,
    *,
    require_readable: bool = True,
    deadline: Deadline | None = None,
) -> FeatureCache:
    """Write the cache of an index: known embeddings are copied, the rest is embedded."""
    deadline = deadline or Deadline(settings.time_limit)
    precision_choice = None
    if settings.precision == AUTO:
        settings, precision_choice = resolve_precision(index, backbone, settings)
    facts = make_facts(backbone, settings)
    path = make_cache_path(index, backbone, facts, settings)
    staging_area = make_staging_area(path, facts)
    make_writable_folder(path.parent, CacheError, "--cache or --out")
    if staging_area.is_locked():
        logger.info(f"{path}: another process is writing this cache; waiting for it")
    with staging_area.lock_for_writing():
        plan = ExtractionPlan.build(index, backbone, settings, path=path)
        plan.drop_damaged()
        return plan.execute(
            path, progress, precision_choice=precision_choice, deadline=deadline, require_readable=require_readable
        )


def reuse_embeddings(
    index: Index,
    identity: BackboneIdentity,
    settings: ExtractionConfig,
    progress: ProgressCallback = ignore_progress,
    *,
    require_readable: bool = True,
) -> FeatureCache | None:
    """Return the cache of an index without loading the network; None if an image must be read.

    A finished cache is written again only if its table is out of date: its labels or ids, for example.
    """
    precision_choice = None
    if settings.precision == AUTO:
        cached_choice = find_cached_choice(index, identity, settings)
        if cached_choice is None:
            return None
        settings, precision_choice = cached_choice
    facts = make_facts(identity, settings)
    path = make_cache_path(index, identity, facts, settings)
    staging_area = make_staging_area(path, facts)
    if staging_area.directory.exists():  # another extraction is writing this cache, or was interrupted
        return None
    plan = ExtractionPlan.build(index, identity, settings, path=path)
    if len(plan.unread_rows):
        return None
    if plan.current_cache is not None:
        plan.embed(staging_area, progress)  # no rows are left: this only reports, and checks max_bad
        return plan.existing_cache
    make_writable_folder(path.parent, CacheError, "--cache or --out")
    with staging_area.lock_for_writing():
        plan = ExtractionPlan.build(index, identity, settings, path=path)
        plan.drop_damaged()
        if len(plan.unread_rows):
            return None
        return plan.execute(path, progress, precision_choice=precision_choice, require_readable=require_readable)


@dataclass(frozen=True, eq=False)
class IndexEmbeddings:
    """The embeddings of an index, valid as long as the parts that contain them exist.

    Attributes
    ----------
    status : ndarray of shape (n,), uint8
        Codes of :class:`featpipe.status.Status`.
    digests : ndarray of shape (n, 32), uint8
        SHA-256 of each image's bytes, zero where they could not be read.
    load_block : callable
        ``load_block(output, start, stop)`` returns the features of these rows; NaN if the status is not 0.
    """

    status: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    load_block: FeatureReader


def embed_into_parts(
    staging_area: StagingArea,
    index: Index,
    backbone: Backbone,
    settings: ExtractionConfig,
    progress: ProgressCallback = ignore_progress,
    *,
    deadline: Deadline | None = None,
) -> IndexEmbeddings:
    """Embed an index into parts without publishing a cache; committed parts are reused.

    The caller holds the lock of the staging area (:meth:`StagingArea.lock_for_writing`) and removes the parts when they
    are no longer needed.
    """
    plan = ExtractionPlan.build(index, backbone, settings, staging_area=staging_area)
    plan.embed(staging_area, progress, deadline=deadline)
    return IndexEmbeddings(plan.row_sources.status, plan.row_sources.digests, plan.make_reader())


def embed_files(
    paths: Sequence[str | os.PathLike[str]],
    backbone: Backbone,
    settings: ExtractionConfig,
    progress: ProgressCallback = ignore_progress,
) -> tuple[NDArray[np.floating], NDArray[np.uint8]]:
    """Return the embeddings of files, in the order given, using the caches of a folder.

    Files without an embedding in these caches are embedded into an additional cache in the folder.

    Returns
    -------
    features : ndarray of shape (n, d)
        NaN in the rows whose status is not 0.
    status : ndarray of shape (n,), uint8
        Codes of :class:`featpipe.status.Status`.
    """
    unique_paths, inverse = np.unique([os.path.abspath(path) for path in paths], return_inverse=True)
    fingerprint, folder = compute_fingerprint(make_facts(backbone, settings)), Path(settings.cache)
    make_writable_folder(folder, CacheError, "--cache or --out")
    with lock_file(folder / f".files-{fingerprint[:8]}.lock"):
        index = data.index_files(unique_paths.tolist(), modality=backbone.modality)
        plan = ExtractionPlan.build(index, backbone, settings, cache_folder=folder)
        plan.row_sources.drop_damaged()
        output, status = next(iter(backbone.shapes)), plan.row_sources.status
        features = plan.make_reader()(output, 0, len(unique_paths))
        unread_rows = plan.unread_rows
        if len(unread_rows):
            unread_paths = unique_paths[unread_rows].tolist()
            identity_hash = hashlib.sha256("\n".join([fingerprint, *unread_paths]).encode("utf-8", "replace"))
            out = folder / f"files-{identity_hash.hexdigest()[:16]}.h5"
            unread_index = data.index_files(unread_paths, modality=backbone.modality)
            cache = extract_index(unread_index, backbone, replace(settings, out=out), progress, require_readable=False)
            features[unread_rows], status[unread_rows] = cache.features(output), cache.status_codes
    return features[inverse], status[inverse]


def _report_index(index: Index) -> None:
    text = f"{len(index)} images"
    if index.labels.task in ("classification", "multilabel"):
        text += f", {len(index.labels.classes)} classes"
        n_unlabeled = int(np.count_nonzero(~index.labels.known))
        text += f", {n_unlabeled} without a label" if n_unlabeled else ""
    if index.ignored:
        text += "; not images: " + ", ".join(f"{count} {reason}" for reason, count in index.ignored.items())
    logger.info(text)
