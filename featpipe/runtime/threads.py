"""Parallel work on blocks of rows, in as many threads as BLAS may use. The result does not depend on their number."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import islice
from threading import Lock
from typing import Any, Generic, Self, TypeVar

from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped,unused-ignore]

MIN_PARALLEL_MULTIPLICATIONS = 1e7
MIN_MULTITHREADED_MULTIPLICATIONS = 2e9

Item = TypeVar("Item")
Result = TypeVar("Result")


class BlasThreadPool:
    """A context in which BLAS uses one thread, and :meth:`map` uses as many threads as BLAS had before.

    Parameters
    ----------
    multiplications : float
        Multiplications of one pass over the rows. A small pass stays in the caller's thread, because starting threads
        would cost more than they save.

    Notes
    -----
    BLAS threads synchronize in every matrix product, which on a busy machine takes longer than the product.
    """

    def __init__(self, multiplications: float = 0.0) -> None:
        self.multiplications = multiplications
        self.n_threads = 1
        self._executor: ThreadPoolExecutor | None = None
        self._exit_stack = ExitStack()

    def __enter__(self) -> Self:
        blas = _get_threadpool_controller().select(user_api="blas")
        if self.multiplications >= MIN_PARALLEL_MULTIPLICATIONS:
            self.n_threads = max([library.num_threads for library in blas.lib_controllers], default=1)
        self._exit_stack.enter_context(blas.limit(limits=1))
        if self.n_threads > 1:
            self._executor = ThreadPoolExecutor(self.n_threads - 1)
            # after an error, pending items are cancelled
            self._exit_stack.callback(self._executor.shutdown, cancel_futures=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._executor = None
        self._exit_stack.close()

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield ``function(item)`` for each item, in order.

        At most twice as many items as threads are in flight. The caller's thread works too while it waits.
        """
        if self._executor is None:
            yield from map(function, items)
            return
        tasks: deque[_PendingCall[Item, Result]] = deque()
        for item in items:
            tasks.append(_PendingCall(self._executor, function, item))
            if len(tasks) > 2 * self.n_threads:
                yield _pop_result(tasks)
        while tasks:
            yield _pop_result(tasks)


def map_in_parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return ``function(item)`` for each item, in order.

    Items run concurrently, one per thread. The remainder, fewer items than threads, runs one by one with all BLAS
    threads. Use this for items that are too small to keep several threads busy and short enough to be
    waited for if another item fails.
    """
    with BlasThreadPool(MIN_PARALLEL_MULTIPLICATIONS) as pool:
        parallel_count = len(items) - len(items) % pool.n_threads if pool.n_threads > 1 else 0
        results = list(pool.map(function, items[:parallel_count]))
    return [*results, *map(function, items[parallel_count:])]


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], lookahead: int = 1) -> Iterator[Result]:
    """Yield ``function(item)`` for each item, in order. Another thread computes the next ``lookahead`` results."""
    remaining = iter(items)
    with ThreadPoolExecutor(1, "featpipe-ahead") as executor:
        futures = deque(executor.submit(function, item) for item in islice(remaining, lookahead))
        try:
            while futures:
                result = futures.popleft().result()
                futures.extend(executor.submit(function, item) for item in islice(remaining, 1))
                yield result
        finally:
            for future in futures:
                future.cancel()


class _PendingCall(Generic[Item, Result]):
    """A call for one item, run by a worker thread or taken over by the caller's thread."""

    def __init__(self, executor: ThreadPoolExecutor, function: Callable[[Item], Result], item: Item) -> None:
        self._function, self._item = function, item
        self.future = executor.submit(function, item)

    def run_in_caller(self) -> bool:
        """Run the call in this thread if no worker has started it. Return whether it ran here."""
        if not self.future.cancel():
            return False
        self.future = Future()
        self.future.set_result(self._function(self._item))
        return True


def _pop_result(tasks: deque[_PendingCall[Item, Result]]) -> Result:
    """Wait for the first result. Meanwhile this thread runs calls that no worker has started."""
    while not tasks[0].future.done() and any(task.run_in_caller() for task in tasks):
        pass
    return tasks.popleft().future.result()


@cache
def _get_threadpool_controller() -> Any:
    """Find the loaded BLAS libraries; cached, because the search takes milliseconds."""
    return ThreadpoolController()


_torch_threads_lock = Lock()
_saved_thread_counts: list[int] = []  # one entry for each open context of limit_torch_threads


@contextmanager
def limit_torch_threads(multiplications: float) -> Iterator[None]:
    """A context in which torch uses one thread if a step is small. At the end the previous number is restored.

    Parameters
    ----------
    multiplications : float
        Multiplications of a step.

    Notes
    -----
    Threads synchronize in every operation. If another process occupies the core of one thread, the others wait until
    the core is free, which takes milliseconds, far longer than a small operation.
    """
    import torch

    with _torch_threads_lock:
        _saved_thread_counts.append(_saved_thread_counts[0] if _saved_thread_counts else torch.get_num_threads())
        if multiplications < MIN_MULTITHREADED_MULTIPLICATIONS and torch.get_num_threads() > 1:
            torch.set_num_threads(1)
    try:
        yield
    finally:
        with _torch_threads_lock:
            saved_thread_count = _saved_thread_counts.pop()
            if not _saved_thread_counts and torch.get_num_threads() != saved_thread_count:
                torch.set_num_threads(saved_thread_count)
