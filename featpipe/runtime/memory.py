"""A memory budget shared by several threads, and the memory that is available."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MIN_TRACKED_BYTES = 16 << 20  # a decoded photograph of 500 × 375 takes 2 MB
BUDGET_DIVISOR = 4  # the budget is this fraction of the available memory


class MemoryBudget:
    """A memory budget. A thread that needs a large buffer reserves its bytes, and waits until they are free.

    Parameters
    ----------
    nbytes : int, optional
        Size of the budget. By default a quarter of the memory available at the first reservation.

    Notes
    -----
    A reservation larger than the whole budget runs alone, so that no thread waits forever. Reservations below 16 MiB
    are not tracked.
    """

    def __init__(self, nbytes: int | None = None) -> None:
        self._nbytes = nbytes
        self._used_bytes = 0
        self._released = threading.Condition()

    @contextmanager
    def reservation(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that reserves bytes, to be called at most once. The end of the block releases them."""
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
    """Bytes of memory available without swapping, within the limits of the machine and of this process's container.

    Parameters
    ----------
    root : path-like
        Folder that contains ``proc`` and ``sys``.
    """
    root_path = Path(root)
    try:
        lines = dict(line.split(":", 1) for line in (root_path / "proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return max(0, min([available, *_iter_cgroup_free_bytes(root_path)]))


def _iter_cgroup_free_bytes(root_path: Path) -> Iterator[int]:
    """Yield the free bytes of each control group of this process, of cgroup version 1 or 2."""
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
            yield from _iter_group_free_bytes(group, *file_names)


def _iter_group_free_bytes(group: Path, limit: str, used: str) -> Iterator[int]:
    """Yield the free bytes of one group if it has a limit. Reclaimable file pages count as free."""
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
