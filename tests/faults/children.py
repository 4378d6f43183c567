"""Forked children, how they end, and what they count while they live."""

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

__all__ = ["Child", "Ended", "Tally", "Wrong", "start"]


class Wrong(Exception):
    """What was found is not what may be found."""


class Tally:
    """Counts that outlive the process that makes them: in memory that is shared with the forked child."""

    NAMES = ("embedded", "acknowledged", "ended", "calls")
    PROMISES = ("acknowledged", "ended")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * len(self.NAMES))
        self.mark: Callable[[str], None] = lambda text: None

    def add(self, name: str, count: int) -> None:
        at = 8 * self.NAMES.index(name)
        total = struct.unpack_from("<q", self._memory, at)[0] + count
        struct.pack_into("<q", self._memory, at, total)
        if name in self.PROMISES:
            self.mark(f"{name} {total}")

    def __getitem__(self, name: str) -> int:
        return struct.unpack_from("<q", self._memory, 8 * self.NAMES.index(name))[0]

    def clear(self) -> None:
        self._memory[:] = bytes(len(self._memory))


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, negative for a signal, and what it said."""

    code: int
    said: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def said_one_line_of_ours(self) -> bool:
        """A library's error is one line; a command told its progress before it."""
        lines = self.said.splitlines()
        command = lines[-1].startswith("featpipe: ") and not any("Error" in line for line in lines[:-1])
        return command or (len(lines) == 1 and lines[0].startswith(("CacheError: ", "ArchiveError: ")))


@dataclass(frozen=True)
class Child:
    """A running child and the file of what it says."""

    number: int
    said: int

    def kill(self) -> None:
        os.kill(self.number, signal.SIGKILL)

    def wait(self) -> Ended:
        code = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        text = os.pread(self.said, 10_000, 0).decode(errors="replace").strip()
        os.close(self.said)
        return Ended(code, text)


def start(action: Callable[[], object]) -> Child:
    """Fork a child that does this and nothing else. It exits with 1 after an error of ours and 3 after any other."""
    said = os.memfd_create("said")
    number = os.fork()
    if number:
        return Child(number, said)
    os.dup2(said, 1)
    os.dup2(said, 2)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # notes and warnings; an error is one line
    code = 0
    try:
        action()
    except FeatpipeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 3
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
