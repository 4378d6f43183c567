"""Ctrl-C and a scheduler's SIGTERM, heard between two steps and not in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

__all__ = ["Asked", "between_steps"]


@dataclass
class Asked:
    """Whether somebody wants the work to stop."""

    to_stop: bool = False


@contextmanager
def between_steps() -> Iterator[Asked]:
    """Note the first signal; a second one ends the work at once. Elsewhere than in the main thread nothing changes."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        if asked.to_stop:
            raise KeyboardInterrupt
        asked.to_stop = True

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
