"""The memory budget of several threads, and the available memory."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest

from featpipe.runtime import MIN_TRACKED_BYTES, MemoryBudget, available_bytes

MIB = 1 << 20


def start_reservation(budget: MemoryBudget, nbytes: int) -> tuple[threading.Thread, threading.Event]:
    """Start a thread that reserves memory and releases it at once; the event is set when it has the reservation."""
    is_reserved = threading.Event()

    def run() -> None:
        with budget.reservation() as reserve:
            reserve(nbytes)
            is_reserved.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, is_reserved


def test_a_reservation_waits_until_its_bytes_are_free():
    budget = MemoryBudget(100 * MIB)
    with budget.reservation() as reserve:
        reserve(60 * MIB)
        concurrent_thread, is_reserved = start_reservation(budget, 40 * MIB)
        assert is_reserved.wait(60)
        concurrent_thread.join()
        waiting_thread, is_reserved = start_reservation(budget, 41 * MIB)
        assert not is_reserved.wait(0.2)
    assert is_reserved.wait(60)
    waiting_thread.join()


def test_a_small_reservation_does_not_wait():
    budget = MemoryBudget(1)
    with budget.reservation() as reserve:
        reserve(50 * MIB)
        small_thread, is_reserved = start_reservation(budget, MIN_TRACKED_BYTES - 1)
        assert is_reserved.wait(60)
        small_thread.join()


def test_a_reservation_larger_than_the_budget_runs_alone():
    budget = MemoryBudget(20 * MIB)
    with ExitStack() as stack:
        reserve = stack.enter_context(budget.reservation())
        reserve(1000 * MIB)
        waiting_thread, is_reserved = start_reservation(budget, 1000 * MIB)
        assert not is_reserved.wait(0.2)
    assert is_reserved.wait(60)
    waiting_thread.join()


def test_an_error_releases_the_reservation():
    budget = MemoryBudget(20 * MIB)

    def fail() -> None:
        with budget.reservation() as reserve:
            reserve(20 * MIB)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    later_thread, is_reserved = start_reservation(budget, 20 * MIB)
    assert is_reserved.wait(60)
    later_thread.join()


@pytest.fixture
def fake_machine(tmp_path):
    """A fake root folder of a machine with 1,000 MiB of available memory, and a function that writes its files."""

    def write(path: str, text: object) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")

    write("proc/meminfo", f"MemTotal: 9000000 kB\nMemAvailable: {1000 * 1024} kB\nHugePages_Free: 0")
    return tmp_path, write


def test_available_bytes_reports_the_available_memory_of_the_machine(fake_machine):
    assert available_bytes(fake_machine[0]) == 1000 * MIB
    assert available_bytes() > 0


@pytest.mark.parametrize(
    ("kind", "folder", "limit", "used", "inactive"),
    [
        ("0::/jobs/a", "sys/fs/cgroup/jobs/a", "memory.max", "memory.current", "inactive_file"),
        ("0::/", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        (
            "9:memory:/jobs/a",
            "sys/fs/cgroup/memory/jobs",  # the limit of a group applies to its subgroups
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
def test_available_bytes_respects_the_limits_of_control_groups(fake_machine, kind, folder, limit, used, inactive):
    root, write = fake_machine
    write("proc/self/cgroup", f"3:cpu:/other\n{kind}")
    write(f"{folder}/{limit}", 300 * MIB)
    write(f"{folder}/{used}", 250 * MIB)
    write(f"{folder}/memory.stat", f"anon 1\n{inactive} {100 * MIB}")
    assert available_bytes(root) == 150 * MIB
    write(f"{folder}/{used}", 500 * MIB)
    assert available_bytes(root) == 0
    write(f"{folder}/{limit}", "max" if "max" in limit else 2**63 - 4096)
    assert available_bytes(root) == 1000 * MIB
