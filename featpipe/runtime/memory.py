"""Memory that several threads share: how much can be had, and who waits for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["MemoryBudget", "available_bytes"]

MIN_TRACKED_BYTES = 16 << 20  # bytes; a photograph of 500 × 375 needs 2 MB
BUDGET_DIVISOR = 4  # of what can be had


class MemoryBudget:
    """Some bytes of memory. Who needs many of them takes a turn, and waits until there is room.

    Parameters
    ----------
    nbytes : int, optional
        A quarter of what can be had when the first one asks, if not given.

    Notes
    -----
    Whatever is larger than all of it has its turn alone, so that nobody waits for ever. Less than 16 MiB are not worth
    waiting for.
    """

    def __init__(self, nbytes: int | None = None) -> None:
        self._nbytes = nbytes
        self._used_bytes = 0
        self._released = threading.Condition()

    @contextmanager
    def reservation(self) -> Iterator[Callable[[int], None]]:
        """Gives a function that takes bytes, once; they are given back at the end."""
        reserved = 0

        def reserve(nbytes: int) -> None:
            nonlocal reserved
            if nbytes < MIN_TRACKED_BYTES:
                return
            with self._released:
                self._released.wait_for(
                    lambda: not self._used_bytes or self._used_bytes + nbytes <= self._total_bytes()
                )
                self._used_bytes, reserved = self._used_bytes + nbytes, nbytes

        try:
            yield reserve
        finally:
            if reserved:
                with self._released:
                    self._used_bytes -= reserved
                    self._released.notify_all()

    def _total_bytes(self) -> int:
        if self._nbytes is None:
            self._nbytes = available_bytes() // BUDGET_DIVISOR
        return self._nbytes


def available_bytes(root: str | os.PathLike[str] = "/") -> int:
    """Bytes of memory that can be had without swapping, by the machine and by the limits of this process's container.

    Parameters
    ----------
    root : path-like
        Where ``proc`` and ``sys`` are.
    """
    root_path = Path(root)
    try:
        lines = dict(line.split(":", 1) for line in (root_path / "proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return max(0, min([available, *_cgroup_free_bytes(root_path)]))


def _cgroup_free_bytes(root_path: Path) -> Iterator[int]:
    """What the control groups of this process allow beyond what they use; version 2, and 1."""
    try:
        lines = (root_path / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        hierarchy = root_path / "sys/fs/cgroup" / controllers
        file_names = (
            ("memory.max", "memory.current") if not controllers else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        process_group = hierarchy / path.lstrip("/")
        for group in (process_group, *process_group.parents):
            if not group.is_relative_to(hierarchy):
                break
            yield from _group_free_bytes(group, *file_names)


def _group_free_bytes(group: Path, limit: str, used: str) -> Iterator[int]:
    """Of one group, if it has a limit. Pages of files that it could do without count as used, and are not."""
    try:
        limit_text, used_bytes = (group / limit).read_text(), int((group / used).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        if limit_text.strip() != "max":
            yield (
                int(limit_text)
                - used_bytes
                + int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
            )
    except (OSError, ValueError):
        return
