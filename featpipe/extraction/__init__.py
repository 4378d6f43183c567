"""Archive + backbone → cache."""

from featpipe.extraction.facts import EXTRACTION_VERSION, load_backbone, make_facts
from featpipe.extraction.ledger import RACY_NANOSECONDS
from featpipe.extraction.verb import IndexEmbeddings, embed_files, embed_into_parts, extract, extract_index

__all__ = [
    "EXTRACTION_VERSION",
    "RACY_NANOSECONDS",
    "IndexEmbeddings",
    "embed_files",
    "embed_into_parts",
    "extract",
    "extract_index",
    "load_backbone",
    "make_facts",
]
