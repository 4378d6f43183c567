"""What is done with caches that are there: packed into one file, merged, cleaned up after, compared with a request."""

from __future__ import annotations

from featpipe.upkeep.cleaning import Abandoned, clean, remove
from featpipe.upkeep.merging import merge
from featpipe.upkeep.packing import pack

__all__ = ["Abandoned", "clean", "merge", "pack", "remove"]
