"""Runtime services: threads, memory, deadlines, progress and text formatting."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featpipe.runtime.deadline import Deadline, parse_duration
from featpipe.runtime.lazy import lazy_imports
from featpipe.runtime.memory import MIN_TRACKED_BYTES, MemoryBudget, available_bytes
from featpipe.runtime.progress import Progress, ProgressBar, ProgressCallback, ignore_progress, in_notebook
from featpipe.runtime.text import format_duration, format_error, format_size, format_table, nan_to_none, printable
from featpipe.runtime.threads import BlasThreadPool, limit_torch_threads, map_in_parallel, prefetch

if TYPE_CHECKING:
    from featpipe.runtime.float16 import convert_float
else:
    __getattr__, __dir__ = lazy_imports(__name__)

__all__ = [
    "MIN_TRACKED_BYTES",
    "BlasThreadPool",
    "Deadline",
    "MemoryBudget",
    "Progress",
    "ProgressBar",
    "ProgressCallback",
    "available_bytes",
    "convert_float",
    "format_duration",
    "format_error",
    "format_size",
    "format_table",
    "ignore_progress",
    "in_notebook",
    "lazy_imports",
    "limit_torch_threads",
    "map_in_parallel",
    "nan_to_none",
    "parse_duration",
    "prefetch",
    "printable",
]
