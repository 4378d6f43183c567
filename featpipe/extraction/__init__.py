"""Extract embeddings: archive + backbone → cache."""

from __future__ import annotations

from featpipe.extraction.extract import (
    IndexEmbeddings,
    embed_files,
    embed_into_parts,
    extract,
    extract_index,
    reuse_embeddings,
)
from featpipe.extraction.identity import EXTRACTION_VERSION, load_backbone, make_facts
from featpipe.extraction.paths import (
    find_compatible_caches,
    find_finished_cache,
    is_up_to_date,
    list_archive_paths,
    make_cache_path,
)
from featpipe.extraction.plan import ExtractionPlan

__all__ = [
    "EXTRACTION_VERSION",
    "ExtractionPlan",
    "IndexEmbeddings",
    "embed_files",
    "embed_into_parts",
    "extract",
    "extract_index",
    "find_compatible_caches",
    "find_finished_cache",
    "is_up_to_date",
    "list_archive_paths",
    "load_backbone",
    "make_cache_path",
    "make_facts",
    "reuse_embeddings",
]
