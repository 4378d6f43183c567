"""Several devices at once: a process for each, all committing parts of the same cache.

The processes are started anew and told what to do over a pipe that they inherit: they import what they need, and do not
run the program that called. They ask before an image is embedded, so that none is embedded twice, and tell what was
read and committed. One that dies costs the part in its hand.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from featpipe.archive import Index
from featpipe.backbone import Backbone
from featpipe.commit import Parts
from featpipe.engine import available_cores
from featpipe.errors import CacheError, ConfigError, FeatpipeError
from featpipe.extraction.stream import Message, Stream
from featpipe.recipe import Extraction

if TYPE_CHECKING:
    from featpipe.extraction.run import Run

__all__ = ["child", "embed"]

_Connection = Any  # typeshed's type of a pipe is another one than that of its end
_Process = subprocess.Popen[bytes]

BLOCK = 256  # neighbouring rows for one process: read nearly in order, and nobody is left with the slow ones
SECONDS_TO_STOP = 30.0
ALONE = "cannot be sent to another process, as several devices need; use one device"
START = "from featpipe.extraction.processes import child; child()"


@dataclass(frozen=True)
class _Task:
    """What one process is to do."""

    index: Index
    stamps: NDArray[np.uint8]
    backbone: Backbone
    settings: Extraction
    parts: Parts
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class _Failed:
    """A process ended with an error of ours, or another one."""

    error: FeatpipeError | str


def embed(run: Run, devices: Sequence[torch.device], rows: NDArray[np.int64]) -> None:
    """Embed rows on several devices.

    Parameters
    ----------
    run : Run
        Is told what happens.
    devices : sequence of torch.device
    rows : ndarray of shape (m,), int64

    Raises
    ------
    CacheError
        If a process died. What was committed is kept.
    """
    ledger, settings = run.ledger, run.settings
    blocks = np.arange(len(rows)) // BLOCK % len(devices)
    if len(rows) < BLOCK * len(devices):
        blocks = np.arange(len(rows)) % len(devices)
    workers = settings.workers or max(1, available_cores() // len(devices))
    tasks = [
        _Task(
            ledger.index,
            ledger.stamps,
            run.backbone,
            replace(settings, device=str(device), workers=workers, backbone=None, transform=None),
            run.parts,
            rows[blocks == number],
        )
        for number, device in enumerate(devices)
    ]
    with _started(tasks) as connections:
        _listen(run, connections)


@contextlib.contextmanager
def _started(tasks: Sequence[_Task]) -> Iterator[dict[_Connection, _Process]]:
    """The processes with their tasks; all of them are gone afterwards, and have committed what they had."""
    processes: dict[_Connection, _Process] = {}
    try:
        for _ in tasks:
            ours, theirs = Pipe()
            with theirs:
                command = [sys.executable, "-c", START, str(theirs.fileno())]
                processes[ours] = subprocess.Popen(command, pass_fds=[theirs.fileno()])  # noqa: S603
        for task, (connection, process) in zip(tasks, processes.items(), strict=True):
            try:
                connection.send(sys.path)
                connection.send_bytes(pickle.dumps(task))  # torch would have tensors shared, which ends with us
            except OSError:
                process.wait()
                _refuse_dead(process)
            except Exception as error:  # whatever a network of one's own holds that cannot be copied
                raise ConfigError(f"{task.backbone.name} {ALONE} ({error})") from error
        yield processes
    finally:
        _stop(processes)


def _listen(run: Run, processes: dict[_Connection, _Process]) -> None:
    """Answer and note until all have ended."""
    going = dict(processes)
    while going:
        ready: list[Any] = wait(list(going))
        for connection in ready:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                process = going.pop(connection)
                process.wait()
                _refuse_dead(process)
                continue
            if isinstance(message, bytes):
                connection.send(run.is_known(message))
            elif isinstance(message, _Failed):
                raise message.error if isinstance(message.error, FeatpipeError) else RuntimeError(message.error)
            else:
                run.receive(message)


def _refuse_dead(process: _Process) -> None:
    code = process.returncode
    if code:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise CacheError(f"a process of this extraction {how}; what was finished is kept: run the same command again")


def _stop(processes: Mapping[_Connection, _Process]) -> None:
    """Ask the processes to commit what they have and go; those that do not are killed."""
    for process in processes.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for connection in processes:
        connection.close()  # who waits for an answer gets none any more
    for process in processes.values():
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Line:
    """A process's end of the pipe: questions and news, from several threads."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def is_known(self, digest: bytes) -> bool:
        with self._lock:
            self._connection.send(digest)
            return bool(self._connection.recv())

    def deliver(self, message: Message | _Failed) -> None:
        # Whoever listened may be gone: what is committed counts all the same.
        with self._lock, contextlib.suppress(OSError):
            self._connection.send(message)


def child() -> None:
    """What a process runs; its argument is the number of its end of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one tells the others
    signal.signal(signal.SIGTERM, _interrupt)
    connection: _Connection = Connection(int(sys.argv[1]))
    with connection:
        sys.path[:] = connection.recv()
        line = _Line(connection)
        try:
            _embed(_received(connection), line)
        except (KeyboardInterrupt, BrokenPipeError, ConnectionError, EOFError):
            pass
        except FeatpipeError as error:
            line.deliver(_Failed(error))
        except Exception as error:
            line.deliver(_Failed(f"{type(error).__name__}: {error}"))
            raise
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end is near, and needs no other


def _received(connection: _Connection) -> _Task:
    try:
        task: _Task = pickle.loads(connection.recv_bytes())  # noqa: S301  # of the process that started this one
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"this network {ALONE} ({error}); define it in a module of its own") from None
    return task


def _embed(task: _Task, line: _Line) -> None:
    from featpipe.extraction.run import engine_for

    stream = Stream(task.index, task.stamps, task.backbone, task.settings, task.parts, line.is_known, line.deliver)
    stream.run(lambda: engine_for(task.backbone, task.settings, len(task.index)), task.rows)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
