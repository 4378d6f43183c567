"""How work is done: threads, memory, deadlines, progress."""

from __future__ import annotations

from featpipe.runtime.deadline import Deadline, parse_duration
from featpipe.runtime.float16 import convert_float
from featpipe.runtime.memory import MIN_TRACKED_BYTES, MemoryBudget, available_bytes
from featpipe.runtime.progress import Progress, ProgressCallback, report_warnings_only
from featpipe.runtime.text import format_duration, format_size, format_table, printable
from featpipe.runtime.threads import BlasThreadPool, limit_torch_threads, map_in_parallel, prefetch

__all__ = [
    "MIN_TRACKED_BYTES",
    "BlasThreadPool",
    "Deadline",
    "MemoryBudget",
    "Progress",
    "ProgressCallback",
    "available_bytes",
    "convert_float",
    "format_duration",
    "format_size",
    "format_table",
    "limit_torch_threads",
    "map_in_parallel",
    "parse_duration",
    "prefetch",
    "printable",
    "report_warnings_only",
]
