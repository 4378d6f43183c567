"""Forked child processes, their results, and counters that they share with the parent."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import signal
import struct
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from featpipe.errors import FeatpipeError

__all__ = ["Child", "ChildResult", "SharedCounters", "UnexpectedState", "start_child"]


class UnexpectedState(Exception):
    """The state after a fault is not an allowed one."""


class SharedCounters:
    """Counters in memory that is shared with forked children, so that they outlive a killed child."""

    NAMES = ("embedded", "acknowledged", "ended", "calls")
    PROMISES = ("acknowledged", "ended")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * len(self.NAMES))
        self.record_promise: Callable[[str], None] = lambda text: None

    def add(self, name: str, count: int) -> None:
        offset = 8 * self.NAMES.index(name)
        total = struct.unpack_from("<q", self._memory, offset)[0] + count
        struct.pack_into("<q", self._memory, offset, total)
        if name in self.PROMISES:
            self.record_promise(f"{name} {total}")

    def __getitem__(self, name: str) -> int:
        return struct.unpack_from("<q", self._memory, 8 * self.NAMES.index(name))[0]

    def clear(self) -> None:
        self._memory[:] = bytes(len(self._memory))


@dataclass(frozen=True)
class ChildResult:
    """How a child ended: its exit code, negative for a signal, and its output."""

    code: int
    output: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def printed_one_error_line(self) -> bool:
        """Whether the output is the one-line error of the library, or ends with that of the command."""
        lines = self.output.splitlines()
        command = lines[-1].startswith("featpipe: ") and not any("Error" in line for line in lines[:-1])
        return command or (len(lines) == 1 and lines[0].startswith(("CacheError: ", "ArchiveError: ")))


@dataclass(frozen=True)
class Child:
    """A running child, and the descriptor of the file with its output."""

    number: int
    output_descriptor: int

    def kill(self) -> None:
        os.kill(self.number, signal.SIGKILL)

    def wait(self) -> ChildResult:
        code = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        output = os.pread(self.output_descriptor, 10_000, 0).decode(errors="replace").strip()
        os.close(self.output_descriptor)
        return ChildResult(code, output)


def start_child(action: Callable[[], object]) -> Child:
    """Fork a child that runs an action. Its exit code is 1 after a FeatpipeError and 3 after any other exception."""
    output_descriptor = os.memfd_create("output")
    number = os.fork()
    if number:
        return Child(number, output_descriptor)
    os.dup2(output_descriptor, 1)
    os.dup2(output_descriptor, 2)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # only errors are printed
    code = 0
    try:
        action()
    except FeatpipeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 3
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
