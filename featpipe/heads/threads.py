"""How many threads torch works with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

__all__ = ["limit_torch_threads"]

MIN_MULTITHREADED_MULTIPLICATIONS = 2e9

_lock = Lock()
_saved_thread_counts: list[int] = []  # one entry for each context that is open


@contextmanager
def limit_torch_threads(multiplications: float) -> Iterator[None]:
    """A context in which torch has one thread if a step is small; afterwards as many as before.

    Parameters
    ----------
    products : float
        Multiplications of a step.

    Notes
    -----
    Threads wait for each other in every operation. When another process has the core of one, the others wait until it
    is given back, which takes milliseconds, far longer than a small operation.
    """
    import torch

    with _lock:
        _saved_thread_counts.append(_saved_thread_counts[0] if _saved_thread_counts else torch.get_num_threads())
        if multiplications < MIN_MULTITHREADED_MULTIPLICATIONS and torch.get_num_threads() > 1:
            torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            saved_thread_count = _saved_thread_counts.pop()
            if not _saved_thread_counts and torch.get_num_threads() != saved_thread_count:
                torch.set_num_threads(saved_thread_count)
