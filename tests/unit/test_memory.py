"""Memory that several threads share."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest

from featpipe.runtime import MIN_TRACKED_BYTES, MemoryBudget, available_bytes

MB = 1 << 20


def begun(allowance: MemoryBudget, nbytes: int) -> tuple[threading.Thread, threading.Event]:
    """A thread that takes a turn and ends it at once; the event says when it has it."""
    has = threading.Event()

    def run() -> None:
        with allowance.reservation() as take:
            take(nbytes)
            has.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, has


def test_who_needs_much_waits_until_there_is_room():
    allowance = MemoryBudget(100 * MB)
    with allowance.reservation() as take:
        take(60 * MB)
        beside, has = begun(allowance, 40 * MB)
        assert has.wait(60)
        beside.join()
        waiting, has = begun(allowance, 41 * MB)
        assert not has.wait(0.2)
    assert has.wait(60)
    waiting.join()


def test_little_is_had_without_waiting():
    allowance = MemoryBudget(1)
    with allowance.reservation() as take:
        take(50 * MB)
        small, has = begun(allowance, MIN_TRACKED_BYTES - 1)
        assert has.wait(60)
        small.join()


def test_what_is_larger_than_all_of_it_has_its_turn_alone():
    allowance = MemoryBudget(20 * MB)
    with ExitStack() as stack:
        take = stack.enter_context(allowance.reservation())
        take(1000 * MB)
        waiting, has = begun(allowance, 1000 * MB)
        assert not has.wait(0.2)
    assert has.wait(60)
    waiting.join()


def test_an_error_gives_back_what_was_taken():
    allowance = MemoryBudget(20 * MB)

    def fail() -> None:
        with allowance.reservation() as take:
            take(20 * MB)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    after, has = begun(allowance, 20 * MB)
    assert has.wait(60)
    after.join()


@pytest.fixture
def machine(tmp_path):
    """A machine of which 1,000 MB can be had; and what writes a file of it."""

    def write(path: str, text: object) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")

    write("proc/meminfo", f"MemTotal: 9000000 kB\nMemAvailable: {1000 * 1024} kB\nHugePages_Free: 0")
    return tmp_path, write


def test_what_the_machine_has_can_be_had(machine):
    assert available_bytes(machine[0]) == 1000 * MB
    assert available_bytes() > 0


@pytest.mark.parametrize(
    ("kind", "folder", "limit", "used", "inactive"),
    [
        ("0::/jobs/a", "sys/fs/cgroup/jobs/a", "memory.max", "memory.current", "inactive_file"),
        ("0::/", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        (
            "9:memory:/jobs/a",
            "sys/fs/cgroup/memory/jobs",  # the limit of a group holds for those in it
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
def test_a_container_has_less(machine, kind, folder, limit, used, inactive):
    root, write = machine
    write("proc/self/cgroup", f"3:cpu:/other\n{kind}")
    write(f"{folder}/{limit}", 300 * MB)
    write(f"{folder}/{used}", 250 * MB)
    write(f"{folder}/memory.stat", f"anon 1\n{inactive} {100 * MB}")
    assert available_bytes(root) == 150 * MB
    write(f"{folder}/{used}", 500 * MB)
    assert available_bytes(root) == 0
    write(f"{folder}/{limit}", "max" if "max" in limit else 2**63 - 4096)
    assert available_bytes(root) == 1000 * MB
