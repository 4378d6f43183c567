"""How work is done: threads, memory, deadlines, progress."""

from __future__ import annotations

from featpipe.runtime.deadline import Deadline, parse_duration
from featpipe.runtime.float16 import convert_float
from featpipe.runtime.memory import MIN_TRACKED_BYTES, MemoryBudget, available_bytes
from featpipe.runtime.progress import Progress, ProgressBar, ProgressCallback, ignore_progress, in_notebook
from featpipe.runtime.text import format_duration, format_size, format_table, printable
from featpipe.runtime.threads import BlasThreadPool, limit_torch_threads, map_in_parallel, prefetch

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
    "format_size",
    "format_table",
    "ignore_progress",
    "in_notebook",
    "limit_torch_threads",
    "map_in_parallel",
    "parse_duration",
    "prefetch",
    "printable",
]
