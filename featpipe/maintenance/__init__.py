"""Maintenance of caches: pack into one file, merge, clean up, compare with a request, verify and repair."""

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
