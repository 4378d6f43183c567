"""Runtime services: threads, memory, deadlines, progress and text formatting."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from featpipe.runtime.deadline import Deadline, parse_duration
from featpipe.runtime.memory import MIN_TRACKED_BYTES, MemoryBudget, available_bytes
from featpipe.runtime.progress import Progress, ProgressBar, ProgressCallback, ignore_progress, in_notebook
from featpipe.runtime.text import format_duration, format_size, format_table, printable
from featpipe.runtime.threads import BlasThreadPool, limit_torch_threads, map_in_parallel, prefetch

if TYPE_CHECKING:
    from featpipe.runtime.float16 import convert_float

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

_LAZY_MODULES = {"convert_float": "float16"}  # imported on first use: it needs numpy, which `--help` does not load


def __getattr__(name: str) -> object:
    if name not in _LAZY_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
