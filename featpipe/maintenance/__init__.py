"""What is done with caches that are there: packed into one file, merged, cleaned up after, compared with a request."""

from __future__ import annotations

from featpipe.maintenance.clean import AbandonedFiles, clean, remove_abandoned
from featpipe.maintenance.diff import CacheDiff, SampleDiff, diff_with_cache, diff_with_request
from featpipe.maintenance.merge import merge
from featpipe.maintenance.pack import pack
from featpipe.maintenance.verify import TOLERANCES, Verification, repair, verify

__all__ = [
    "TOLERANCES",
    "AbandonedFiles",
    "CacheDiff",
    "SampleDiff",
    "Verification",
    "clean",
    "diff_with_cache",
    "diff_with_request",
    "merge",
    "pack",
    "remove_abandoned",
    "repair",
    "verify",
]
