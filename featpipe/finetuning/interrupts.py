"""Ctrl-C and a scheduler's SIGTERM, heard between two steps and not in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

__all__ = ["StopRequest", "defer_signals"]


@dataclass
class StopRequest:
    """Whether somebody wants the work to stop."""

    requested: bool = False


@contextmanager
def defer_signals() -> Iterator[StopRequest]:
    """Note the first signal; a second one ends the work at once. Elsewhere than in the main thread nothing changes."""
    stop_request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop_request
        return
    previous_handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle_signal(number: int, frame: FrameType | None) -> None:
        if stop_request.requested:
            raise KeyboardInterrupt
        stop_request.requested = True

    for number in previous_handlers:
        signal.signal(number, handle_signal)
    try:
        yield stop_request
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
