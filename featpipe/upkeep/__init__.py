"""What is done with caches that are there: packed into one file, merged, cleaned up after, compared with a request."""

from __future__ import annotations

from featpipe.upkeep.cleaning import AbandonedFiles, clean, remove_abandoned
from featpipe.upkeep.merging import merge
from featpipe.upkeep.packing import pack

__all__ = ["AbandonedFiles", "clean", "merge", "pack", "remove_abandoned"]
