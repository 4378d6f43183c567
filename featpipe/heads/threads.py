"""How many threads torch works with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

__all__ = ["threads_for"]

ONE_THREAD_BELOW_PRODUCTS = 2e9

_lock = Lock()
_before: list[int] = []  # one entry for each context that is open


@contextmanager
def threads_for(products: float) -> Iterator[None]:
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
        _before.append(_before[0] if _before else torch.get_num_threads())
        if products < ONE_THREAD_BELOW_PRODUCTS and torch.get_num_threads() > 1:
            torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            before = _before.pop()
            if not _before and torch.get_num_threads() != before:
                torch.set_num_threads(before)
