"""Archive + backbone → cache."""

from featpipe.extraction.facts import EXTRACTION_VERSION, facts_of, load_backbone
from featpipe.extraction.verb import embed_files, extract, extract_index

__all__ = ["EXTRACTION_VERSION", "embed_files", "extract", "extract_index", "facts_of", "load_backbone"]
