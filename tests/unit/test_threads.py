"""Work on blocks of rows, spread over threads."""

from __future__ import annotations

import threading
import time
from itertools import islice

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from featpipe.runtime import BlasThreadPool, map_in_parallel

ENOUGH = 1e9


@pytest.fixture(params=[1, 2, 3])
def workers(request):
    with threadpool_limits(request.param, user_api="blas"), BlasThreadPool(ENOUGH) as found:
        yield found


def test_results_come_in_the_order_of_the_items_whichever_is_done_first(workers):
    def slow_at_first(item: int) -> int:
        time.sleep(0.01 * (item % 3 == 0))
        return item * item

    assert list(workers.map(slow_at_first, range(40))) == [item * item for item in range(40)]


def test_no_more_threads_work_than_blas_had_and_the_caller_is_one_of_them(workers):
    both = threading.Barrier(min(2, workers.n_threads))
    seen = set()

    def note(item: int) -> None:
        seen.add(threading.get_ident())
        if item < 2:  # neither of the first two ends before both have begun
            both.wait(timeout=60)

    for _ in workers.map(note, range(12)):
        pass
    assert threading.get_ident() in seen
    assert min(2, workers.n_threads) <= len(seen) <= workers.n_threads


def test_an_error_in_one_item_is_raised_where_its_result_would_come(workers):
    def fails(item: int) -> int:
        if item == 5:
            raise ZeroDivisionError
        return item

    results = workers.map(fails, range(9))
    assert list(islice(results, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_small_pass_stays_on_the_callers_thread():
    with BlasThreadPool(10.0) as few:
        assert list(few.map(lambda item: threading.get_ident(), range(5))) == [threading.get_ident()] * 5


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_blas_has_one_thread_inside_and_as_many_as_before_afterwards():
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        with BlasThreadPool(ENOUGH):
            assert blas_threads() == {1}
        assert blas_threads() == before


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_items_side_by_side_have_a_thread_each_and_those_left_over_have_all(threads):
    with threadpool_limits(threads, user_api="blas"):
        found = map_in_parallel(lambda item: (item, max(blas_threads())), range(5))
        assert blas_threads() == {threads}
    alone = {1: 0, 2: 4, 3: 3}[threads]
    assert found == [(item, 1 if item < alone else threads) for item in range(5)]


def test_after_an_error_nothing_more_is_begun():
    begun = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 0:
            raise ZeroDivisionError
        time.sleep(0.1 if item == 1 else 1.0)

    with threadpool_limits(2, user_api="blas"), pytest.raises(ZeroDivisionError):
        map_in_parallel(work, range(5))
    assert not {3, 4} & set(begun)
