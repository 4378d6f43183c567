"""Work on blocks of rows, spread over the threads that BLAS may use; the answer does not depend on how many."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from itertools import islice
from typing import Any, Generic, Self, TypeVar

from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped,unused-ignore]

__all__ = ["Workers", "ahead", "side_by_side"]

ONE_THREAD_BELOW_PRODUCTS = 1e7

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A context in which BLAS has one thread and `map` has as many as BLAS had before.

    Parameters
    ----------
    products : float
        Multiplications of one pass over the rows; a small pass stays on the caller's thread, since starting more
        costs more than they bring.

    Notes
    -----
    BLAS threads wait for each other in every product, which on a busy machine takes longer than the product.
    """

    def __init__(self, products: float = 0.0) -> None:
        self.products = products
        self.threads = 1
        self._pool: ThreadPoolExecutor | None = None
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        blas = _controller().select(user_api="blas")
        if self.products >= ONE_THREAD_BELOW_PRODUCTS:
            self.threads = max([library.num_threads for library in blas.lib_controllers], default=1)
        self._exits.enter_context(blas.limit(limits=1))
        if self.threads > 1:
            self._pool = ThreadPoolExecutor(self.threads - 1)
            self._exits.callback(self._pool.shutdown, cancel_futures=True)  # after an error nobody waits for the others
        return self

    def __exit__(self, *error: object) -> None:
        self._pool = None
        self._exits.close()

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """``work`` of each item, in order; few results wait at a time, and the caller works too while it waits."""
        if self._pool is None:
            yield from map(work, items)
            return
        waiting: deque[_Task[Item, Result]] = deque()
        for item in items:
            waiting.append(_Task(self._pool, work, item))
            if len(waiting) > 2 * self.threads:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``work`` of each item: as many at a time as there are threads, each on one; those left over in turn, on all.

    For work whose passes are too small to keep several threads busy, and that is so short that it can be waited for
    where another item ends in an error.
    """
    with Workers(ONE_THREAD_BELOW_PRODUCTS) as workers:
        together = len(items) - len(items) % workers.threads if workers.threads > 1 else 0
        found = list(workers.map(work, items[:together]))
    return [*found, *map(work, items[together:])]


def ahead(work: Callable[[Item], Result], items: Iterable[Item], ready: int = 1) -> Iterator[Result]:
    """``work`` of each item, in order; while one result is used, another thread works on so many of the next."""
    left = iter(items)
    with ThreadPoolExecutor(1, "featpipe-ahead") as other:
        coming = deque(other.submit(work, item) for item in islice(left, ready))
        try:
            while coming:
                found = coming.popleft().result()
                coming.extend(other.submit(work, item) for item in islice(left, 1))
                yield found
        finally:
            for future in coming:
                future.cancel()


class _Task(Generic[Item, Result]):
    """Work on one item, begun by another thread or taken over by the caller's."""

    def __init__(self, pool: ThreadPoolExecutor, work: Callable[[Item], Result], item: Item) -> None:
        self._work, self._item = work, item
        self.future = pool.submit(work, item)

    def take_over(self) -> bool:
        """Do it here, if nobody has begun; whether that was so."""
        if not self.future.cancel():
            return False
        self.future = Future()
        self.future.set_result(self._work(self._item))
        return True


def _first(waiting: deque[_Task[Item, Result]]) -> Result:
    """The first result; meanwhile this thread works too, on what nobody has begun."""
    while not waiting[0].future.done() and any(task.take_over() for task in waiting):
        pass
    return waiting.popleft().future.result()


@cache
def _controller() -> Any:
    """Looking for the libraries of the process takes milliseconds: once."""
    return ThreadpoolController()
