"""Archive + backbone → cache."""

from featpipe.extraction.facts import EXTRACTION_VERSION, facts_of, load_backbone
from featpipe.extraction.ledger import RACY_NANOSECONDS
from featpipe.extraction.verb import Embedded, embed_files, embed_into, extract, extract_index

__all__ = [
    "EXTRACTION_VERSION",
    "RACY_NANOSECONDS",
    "Embedded",
    "embed_files",
    "embed_into",
    "extract",
    "extract_index",
    "facts_of",
    "load_backbone",
]
