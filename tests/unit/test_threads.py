"""Thread pools for blocks of rows."""

from __future__ import annotations

import threading
import time
from itertools import islice

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from featpipe.runtime import BlasThreadPool, map_in_parallel

MANY_MULTIPLICATIONS = 1e9


@pytest.fixture(params=[1, 2, 3])
def pool(request):
    with threadpool_limits(request.param, user_api="blas"), BlasThreadPool(MANY_MULTIPLICATIONS) as blas_pool:
        yield blas_pool


def test_results_keep_the_order_of_the_items(pool):
    def square_slowly(item: int) -> int:
        time.sleep(0.01 * (item % 3 == 0))
        return item * item

    assert list(pool.map(square_slowly, range(40))) == [item * item for item in range(40)]


def test_the_pool_uses_at_most_as_many_threads_as_blas_including_the_caller(pool):
    barrier = threading.Barrier(min(2, pool.n_threads))
    thread_ids = set()

    def record_thread(item: int) -> None:
        thread_ids.add(threading.get_ident())
        if item < 2:  # neither of the first two items ends before both have started
            barrier.wait(timeout=60)

    for _ in pool.map(record_thread, range(12)):
        pass
    assert threading.get_ident() in thread_ids
    assert min(2, pool.n_threads) <= len(thread_ids) <= pool.n_threads


def test_an_error_is_raised_at_the_position_of_its_item(pool):
    def fail_at_five(item: int) -> int:
        if item == 5:
            raise ZeroDivisionError
        return item

    results = pool.map(fail_at_five, range(9))
    assert list(islice(results, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_small_pass_stays_in_the_thread_of_the_caller():
    with BlasThreadPool(10.0) as small_pool:
        assert list(small_pool.map(lambda item: threading.get_ident(), range(5))) == [threading.get_ident()] * 5


def get_blas_thread_counts() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_blas_uses_one_thread_inside_the_pool_and_its_previous_number_afterwards():
    with threadpool_limits(2, user_api="blas"):
        counts_before = get_blas_thread_counts()
        with BlasThreadPool(MANY_MULTIPLICATIONS):
            assert get_blas_thread_counts() == {1}
        assert get_blas_thread_counts() == counts_before


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parallel_items_use_one_blas_thread_each_and_the_remainder_uses_all(threads):
    with threadpool_limits(threads, user_api="blas"):
        results = map_in_parallel(lambda item: (item, max(get_blas_thread_counts())), range(5))
        assert get_blas_thread_counts() == {threads}
    n_parallel = {1: 0, 2: 4, 3: 3}[threads]
    assert results == [(item, 1 if item < n_parallel else threads) for item in range(5)]


def test_after_an_error_no_further_item_starts():
    started_items = []

    def work(item: int) -> None:
        started_items.append(item)
        if item == 0:
            raise ZeroDivisionError
        time.sleep(0.1 if item == 1 else 1.0)

    with threadpool_limits(2, user_api="blas"), pytest.raises(ZeroDivisionError):
        map_in_parallel(work, range(5))
    assert not {3, 4} & set(started_items)
