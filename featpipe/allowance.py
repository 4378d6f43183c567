"""Memory that several threads share: how much can be had, and who waits for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Allowance", "available_bytes"]

NO_QUESTION_BELOW = 16 << 20  # bytes; a photograph of 500 × 375 needs 2 MB
SHARE = 4  # of what can be had


class Allowance:
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
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def turn(self) -> Iterator[Callable[[int], None]]:
        """Gives a function that takes bytes, once; they are given back at the end."""
        mine = 0

        def take(nbytes: int) -> None:
            nonlocal mine
            if nbytes < NO_QUESTION_BELOW:
                return
            with self._changed:
                self._changed.wait_for(lambda: not self._taken or self._taken + nbytes <= self._all())
                self._taken, mine = self._taken + nbytes, nbytes

        try:
            yield take
        finally:
            if mine:
                with self._changed:
                    self._taken -= mine
                    self._changed.notify_all()

    def _all(self) -> int:
        if self._nbytes is None:
            self._nbytes = available_bytes() // SHARE
        return self._nbytes


def available_bytes(root: str | os.PathLike[str] = "/") -> int:
    """Bytes of memory that can be had without swapping, by the machine and by the limits of this process's container.

    Parameters
    ----------
    root : path-like
        Where ``proc`` and ``sys`` are.
    """
    top = Path(root)
    try:
        lines = dict(line.split(":", 1) for line in (top / "proc/meminfo").read_text().splitlines())
        found = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return max(0, min([found, *_left_to_groups(top)]))


def _left_to_groups(top: Path) -> Iterator[int]:
    """What the control groups of this process allow beyond what they use; version 2, and 1."""
    try:
        lines = (top / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        folder = top / "sys/fs/cgroup" / controllers
        names = (
            ("memory.max", "memory.current") if not controllers else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        here = folder / path.lstrip("/")
        for group in (here, *here.parents):
            if not group.is_relative_to(folder):
                break
            yield from _left(group, *names)


def _left(group: Path, limit: str, used: str) -> Iterator[int]:
    """Of one group, if it has a limit. Pages of files that it could do without count as used, and are not."""
    try:
        most, now = (group / limit).read_text(), int((group / used).read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        if most.strip() != "max":
            yield int(most) - now + int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
    except (OSError, ValueError):
        return
