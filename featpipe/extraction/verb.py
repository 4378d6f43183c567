"""Archive + backbone → cache. No image is embedded twice, and what was committed is never lost."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import archive
from featpipe.archive import Index
from featpipe.backbone import Backbone
from featpipe.cache import FeatureCache, Table, parts_directory, write_cache
from featpipe.commit import Parts, exclusive
from featpipe.deadline import Deadline
from featpipe.durable import make_folder
from featpipe.engine import resolve_devices
from featpipe.errors import ArchiveError, CacheError
from featpipe.extraction.facts import facts_of, load_backbone
from featpipe.extraction.ledger import Ledger, source_of_part
from featpipe.extraction.places import caches_for, existing_at, is_cache_of, path_of
from featpipe.extraction.precision import with_precision
from featpipe.extraction.run import Run, told
from featpipe.fingerprint import fingerprint
from featpipe.known import Source
from featpipe.progress import Progress, Tell, quiet
from featpipe.recipe import AUTO, Extraction
from featpipe.status import Status

__all__ = ["Embedded", "embed_files", "embed_into", "extract", "extract_index"]


def extract(
    archives: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    progress: Tell = quiet,
    **settings: Any,
) -> FeatureCache:
    """Run the frozen backbone once over the images of some archives and cache the embeddings.

    Images whose bytes were embedded before under the same facts, in any cache of the same folder, are copied.

    Parameters
    ----------
    archives : path-like or sequence of path-like
        Folders, ``.tar``, ``.tar.gz``, ``.zip``, tables of paths; globs and ``{000..099}`` are expanded.
    progress : callable
        Told what is going on, as :class:`featpipe.progress.Progress`.
    **settings
        The fields of :class:`featpipe.recipe.Extraction`.

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
    settings_ = Extraction.of(settings)
    deadline = Deadline(settings_.time_limit)
    devices = resolve_devices(settings_.device)  # before minutes are spent on listing an archive
    index = archive.index(archives, labels=settings_.labels)
    _tell_index(index, progress)
    settings_ = replace(settings_, device=",".join(map(str, devices)))
    return extract_index(index, load_backbone(settings_), settings_, progress, deadline=deadline)


def extract_index(
    index: Index,
    backbone: Backbone,
    settings: Extraction,
    progress: Tell = quiet,
    *,
    refuse_all_bad: bool = True,
    deadline: Deadline | None = None,
) -> FeatureCache:
    """The cache of an index: from what is known already, and a forward pass for the rest."""
    deadline = deadline or Deadline(settings.time_limit)
    chosen = None
    if settings.precision == AUTO:
        settings, chosen = with_precision(index, backbone, settings, progress)
    facts = facts_of(backbone, settings)
    path = path_of(index, backbone, facts, settings)
    parts = Parts(parts_directory(path), fingerprint(facts))
    make_folder(path.parent, CacheError, "--cache or --out")
    if parts.busy():
        progress(Progress("note", f"{path}: another extraction writes this cache; waiting for it"))
    with parts.writing():
        existing = existing_at(path, facts, index, settings)
        shapes = dict(backbone.shapes)
        ledger = Ledger(index, settings.check_content)
        for cache in caches_for(path.parent, facts):
            ledger.known.add(Source.of_cache(cache, shapes))
        for part in parts.committed():
            ledger.known.add(source_of_part(part))
        ledger.resolve()
        if existing is None or not is_cache_of(existing, ledger.table(), shapes):
            ledger.drop_damaged()
        run = Run(ledger, backbone, settings, parts, progress, chosen, deadline)
        run.embed()
        if existing is not None and is_cache_of(existing, ledger.table(), shapes):
            parts.remove()
            return existing
        table = ledger.table()
        if refuse_all_bad:
            _refuse_all_bad(table, index)
        gather = ledger.gather(shapes, settings.storage)
        write_cache(path, table, run.manifest(facts), shapes, settings.storage, gather, settings.shard_bytes)
        parts.remove()
    return FeatureCache(path)


@dataclass(frozen=True, eq=False)
class Embedded:
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
    block: Callable[[str, int, int], NDArray[np.floating]]


def embed_into(
    parts: Parts,
    index: Index,
    backbone: Backbone,
    settings: Extraction,
    progress: Tell = quiet,
    *,
    deadline: Deadline | None = None,
) -> Embedded:
    """Embed an index into parts that never become a cache; what lies there already is not embedded again.

    The caller holds the folder by :meth:`Parts.writing`, and removes the parts when they have served.
    """
    shapes = dict(backbone.shapes)
    ledger = Ledger(index, settings.check_content)
    for part in parts.committed():
        ledger.known.add(source_of_part(part))
    ledger.resolve()
    Run(ledger, backbone, settings, parts, progress, deadline=deadline).embed()
    return Embedded(ledger.status, ledger.digests, ledger.gather(shapes, settings.storage))


def embed_files(
    paths: Sequence[str | os.PathLike[str]], backbone: Backbone, settings: Extraction, progress: Tell = quiet
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
    names, inverse = np.unique([os.path.abspath(path) for path in paths], return_inverse=True)
    facts, folder = facts_of(backbone, settings), Path(settings.cache)
    make_folder(folder, CacheError, "--cache or --out")
    with exclusive(folder / f".files-{fingerprint(facts)[:8]}.lock"):
        ledger = Ledger(archive.index_files(names.tolist()), settings.check_content)
        shapes = dict(backbone.shapes)
        for cache in caches_for(folder, facts):
            ledger.known.add(Source.of_cache(cache, shapes))
        ledger.resolve()
        ledger.drop_damaged()
        output = next(iter(shapes))
        features = ledger.gather(shapes, settings.storage)(output, 0, len(names))
        unread = ledger.unread
        if len(unread):
            rest = archive.index_files(names[unread].tolist())
            made_from = hashlib.sha256("\n".join([fingerprint(facts), *names[unread]]).encode("utf-8", "replace"))
            out = folder / f"files-{made_from.hexdigest()[:16]}.h5"
            cache = extract_index(rest, backbone, replace(settings, out=out), progress)
            features[unread], ledger.status[unread] = cache.features(output), cache.status_codes
    return features[inverse], ledger.status[inverse]


def _tell_index(index: Index, progress: Tell) -> None:
    text = f"{len(index)} images"
    if index.labels.task in ("classification", "multilabel"):
        text += f", {len(index.labels.classes)} classes"
        unlabelled = int(np.count_nonzero(~index.labels.known))
        text += f", {unlabelled} without a label" if unlabelled else ""
    if index.ignored:
        text += "; not images: " + ", ".join(f"{count} {what}" for what, count in index.ignored.items())
    progress(Progress("note", text))


def _refuse_all_bad(table: Table, index: Index) -> None:
    if not np.any(table.status == Status.OK):
        counts = Counter(Status(int(code)).word for code in table.status)
        first = index.ids[0]
        raise ArchiveError(f"none of the {len(index)} images can be read ({told(counts)}); the first is {first}")
