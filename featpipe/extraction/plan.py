"""Plan an extraction: which rows existing caches and committed parts contain, and which are left to embed."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import EmbeddingSource, FeatureCache, SampleTable, parts_directory, write_cache
from featpipe.config import ExtractionConfig
from featpipe.data import Index
from featpipe.errors import ArchiveError
from featpipe.extraction.identity import make_facts
from featpipe.extraction.paths import find_compatible_caches, find_finished_cache, is_up_to_date
from featpipe.extraction.row_sources import FeatureReader, RowSources, source_from_part
from featpipe.extraction.run import ExtractionRun, format_counts
from featpipe.runtime import Deadline, ProgressCallback, ignore_progress
from featpipe.status import Status
from featpipe.storage import StagingArea, compute_fingerprint

if TYPE_CHECKING:
    from featpipe.backbones import Backbone, BackboneIdentity
    from featpipe.extraction.auto_precision import PrecisionChoice


logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ExtractionPlan:
    """Which rows of an index are already embedded, and which are left.

    Attributes
    ----------
    index : Index
    backbone : Backbone or BackboneIdentity
        An identity suffices where nothing is left to embed.
    config : ExtractionConfig
    facts : dict
        The settings that determine the embeddings.
    row_sources : RowSources
        The source of each row's embedding.
    existing_cache : FeatureCache or None
        The cache at the target path, with the same archives and facts; it may be out of date.
    """

    index: Index
    backbone: Backbone | BackboneIdentity
    config: ExtractionConfig
    facts: dict[str, Any]
    row_sources: RowSources
    existing_cache: FeatureCache | None = None

    @classmethod
    def build(
        cls,
        index: Index,
        backbone: Backbone | BackboneIdentity,
        config: ExtractionConfig,
        *,
        path: Path | None = None,
        cache_folder: Path | None = None,
        staging_area: StagingArea | None = None,
    ) -> ExtractionPlan:
        """Look up every row by its stamp. No image is read and no file is changed.

        Parameters
        ----------
        index : Index
        backbone : Backbone or BackboneIdentity
        config : ExtractionConfig
            The precision must not be ``auto``.
        path : Path, optional
            The cache to write. It determines the other two.
        cache_folder : Path, optional
            Embeddings are copied from the caches of this folder.
        staging_area : StagingArea, optional
            Embeddings are copied from the parts committed here.

        Raises
        ------
        CacheMismatchError
            If ``path`` is a cache with other archives or other facts.
        """
        facts = make_facts(backbone, config)
        existing_cache = None
        if path is not None:
            cache_folder, staging_area = path.parent, make_staging_area(path, facts)
            existing_cache = find_finished_cache(path, facts, index, config)
        row_sources = RowSources(index, config.check_content)
        caches = [] if cache_folder is None else find_compatible_caches(cache_folder, facts)
        parts = [] if staging_area is None else staging_area.load_committed()
        row_sources.lookup.add(
            *(EmbeddingSource.from_cache(cache, backbone.shapes) for cache in caches), *map(source_from_part, parts)
        )
        row_sources.resolve_by_stamp()
        return cls(index, backbone, config, facts, row_sources, existing_cache)

    @property
    def unread_rows(self) -> NDArray[np.int64]:
        """Rows whose images must be read; they are embedded unless an image with the same bytes is."""
        return self.row_sources.unread_rows

    @property
    def current_cache(self) -> FeatureCache | None:
        """The existing cache if it is up to date, else None."""
        cache = self.existing_cache
        if cache is not None and is_up_to_date(cache, self.row_sources.to_table(), self.backbone.shapes):
            return cache
        return None

    def drop_damaged(self) -> None:
        """Leave rows to be embedded again if their stored embedding is damaged; call this before :meth:`execute`."""
        if self.current_cache is None:
            self.row_sources.drop_damaged()

    def make_reader(self) -> FeatureReader:
        """Make a function that reads blocks of features from their sources."""
        return self.row_sources.make_reader(self.backbone.shapes, self.config.storage)

    def embed(
        self,
        staging_area: StagingArea,
        progress: ProgressCallback = ignore_progress,
        *,
        precision_choice: PrecisionChoice | None = None,
        deadline: Deadline | None = None,
    ) -> ExtractionRun:
        """Embed the remaining rows into parts. The caller holds the lock of the staging area."""
        run = ExtractionRun(
            self.row_sources, self.backbone, self.config, staging_area, progress, precision_choice, deadline
        )
        run.embed()
        return run

    def execute(
        self,
        path: Path,
        progress: ProgressCallback = ignore_progress,
        *,
        precision_choice: PrecisionChoice | None = None,
        deadline: Deadline | None = None,
        require_readable: bool = True,
    ) -> FeatureCache:
        """Embed the remaining rows and publish the cache, unless it is up to date. The caller holds the staging lock.

        Parameters
        ----------
        path : Path
            As given to :meth:`build`.
        progress : callable
        precision_choice : PrecisionChoice, optional
        deadline : Deadline, optional
        require_readable : bool
            Warn about images without an embedding, and raise instead of writing a cache without any; False if the
            caller reports the images.

        Raises
        ------
        ArchiveError
            If no image can be read, or more images are bad than ``max_bad`` allows.
        """
        staging_area = make_staging_area(path, self.facts)
        run = self.embed(staging_area, progress, precision_choice=precision_choice, deadline=deadline)
        if require_readable:
            run.report_failures()
        current_cache = self.current_cache
        if current_cache is None:
            table = self.row_sources.to_table()
            if require_readable:
                _raise_if_none_readable(table, self.index)
            old_table = None if self.existing_cache is None else self.existing_cache.table()
            if old_table is not None and replace(old_table, stamps=table.stamps).same_as(table):  # only stamps differ
                logger.info(
                    f"{path}: recently changed images had to be read again and are unchanged; writing their "
                    "modification times, so that the next run need not read them"
                )
            write_cache(
                path,
                table,
                run.make_manifest(self.facts),
                self.backbone.shapes,
                self.config.storage,
                self.make_reader(),
                self.config.shard_bytes,
            )
            current_cache = FeatureCache(path)
        staging_area.remove()
        return current_cache


def make_staging_area(path: Path, facts: dict[str, Any]) -> StagingArea:
    """Make the staging area for the parts of an unfinished cache."""
    return StagingArea(parts_directory(path), compute_fingerprint(facts))


def _raise_if_none_readable(table: SampleTable, index: Index) -> None:
    if np.any(table.status == Status.OK):
        return
    counts = Counter(Status(int(code)).word for code in table.status)
    raise ArchiveError(
        f"none of the {len(index)} images can be read ({format_counts(counts)}); the first is {index.ids[0]}"
    )
