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

from featpipe.backbones import Backbone
from featpipe.config import ExtractionConfig
from featpipe.data import Index
from featpipe.errors import CacheError, ConfigError, FeatpipeError
from featpipe.extraction.worker import ExtractionWorker, WorkerMessage
from featpipe.inference import available_cores
from featpipe.storage import StagingArea

if TYPE_CHECKING:
    from featpipe.extraction.run import ExtractionRun

__all__ = ["embed_on_devices", "run_worker_process"]

_Connection = Any  # typeshed's type of a pipe is another one than that of its end
_Process = subprocess.Popen[bytes]

ROWS_PER_BLOCK = 256  # neighbouring rows for one process: read nearly in order, and nobody is left with the slow ones
SHUTDOWN_SECONDS = 30.0
NOT_PICKLABLE = "cannot be sent to another process, as several devices need; use one device"
WORKER_CODE = "from featpipe.extraction.multi_device import run_worker_process; run_worker_process()"


@dataclass(frozen=True)
class _WorkerTask:
    """What one process is to do."""

    index: Index
    stamps: NDArray[np.uint8]
    backbone: Backbone
    settings: ExtractionConfig
    parts: StagingArea
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class _WorkerFailure:
    """A process ended with an error of ours, or another one."""

    error: FeatpipeError | str


def embed_on_devices(run: ExtractionRun, devices: Sequence[torch.device], rows: NDArray[np.int64]) -> None:
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
    plan, settings = run.plan, run.settings
    device_indices = np.arange(len(rows)) // ROWS_PER_BLOCK % len(devices)
    if len(rows) < ROWS_PER_BLOCK * len(devices):
        device_indices = np.arange(len(rows)) % len(devices)
    workers = settings.workers or max(1, available_cores() // len(devices))
    tasks = [
        _WorkerTask(
            plan.index,
            plan.stamps,
            run.backbone,
            replace(settings, device=str(device), workers=workers, backbone=None, transform=None),
            run.parts,
            rows[device_indices == device_index],
        )
        for device_index, device in enumerate(devices)
    ]
    with _start_workers(tasks) as workers_by_connection:
        _handle_messages(run, workers_by_connection)


@contextlib.contextmanager
def _start_workers(tasks: Sequence[_WorkerTask]) -> Iterator[dict[_Connection, _Process]]:
    """The processes with their tasks; all of them are gone afterwards, and have committed what they had."""
    processes: dict[_Connection, _Process] = {}
    try:
        for _ in tasks:
            parent_end, child_end = Pipe()
            with child_end:
                command = [sys.executable, "-c", WORKER_CODE, str(child_end.fileno())]
                processes[parent_end] = subprocess.Popen(command, pass_fds=[child_end.fileno()])  # noqa: S603
        for task, (connection, process) in zip(tasks, processes.items(), strict=True):
            try:
                connection.send(sys.path)
                connection.send_bytes(pickle.dumps(task))  # torch would have tensors shared, which ends with us
            except OSError:
                process.wait()
                _raise_if_failed(process)
            except Exception as error:  # whatever a network of one's own holds that cannot be copied
                raise ConfigError(f"{task.backbone.name} {NOT_PICKLABLE} ({error})") from error
        yield processes
    finally:
        _stop_workers(processes)


def _handle_messages(run: ExtractionRun, processes: dict[_Connection, _Process]) -> None:
    """Answer and note until all have ended."""
    running = dict(processes)
    while running:
        ready: list[Any] = wait(list(running))
        for connection in ready:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                process = running.pop(connection)
                process.wait()
                _raise_if_failed(process)
                continue
            if isinstance(message, bytes):
                connection.send(run.has_embedding(message))
            elif isinstance(message, _WorkerFailure):
                raise message.error if isinstance(message.error, FeatpipeError) else RuntimeError(message.error)
            else:
                run.handle_message(message)


def _raise_if_failed(process: _Process) -> None:
    exit_code = process.returncode
    if exit_code:
        outcome = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
        raise CacheError(
            f"a process of this extraction {outcome}; what was finished is kept: run the same command again"
        )


def _stop_workers(processes: Mapping[_Connection, _Process]) -> None:
    """Ask the processes to commit what they have and go; those that do not are killed."""
    for process in processes.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for connection in processes:
        connection.close()  # who waits for an answer gets none any more
    for process in processes.values():
        try:
            process.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _WorkerChannel:
    """A process's end of the pipe: questions and news, from several threads."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def has_embedding(self, digest: bytes) -> bool:
        with self._lock:
            self._connection.send(digest)
            return bool(self._connection.recv())

    def send_message(self, message: WorkerMessage | _WorkerFailure) -> None:
        # Whoever listened may be gone: what is committed counts all the same.
        with self._lock, contextlib.suppress(OSError):
            self._connection.send(message)


def run_worker_process() -> None:
    """What a process runs; its argument is the number of its end of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one tells the others
    signal.signal(signal.SIGTERM, _raise_interrupt)
    connection: _Connection = Connection(int(sys.argv[1]))
    with connection:
        sys.path[:] = connection.recv()
        channel = _WorkerChannel(connection)
        try:
            _run_task(_receive_task(connection), channel)
        except (KeyboardInterrupt, BrokenPipeError, ConnectionError, EOFError):
            pass
        except FeatpipeError as error:
            channel.send_message(_WorkerFailure(error))
        except Exception as error:
            channel.send_message(_WorkerFailure(f"{type(error).__name__}: {error}"))
            raise
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end is near, and needs no other


def _receive_task(connection: _Connection) -> _WorkerTask:
    try:
        task: _WorkerTask = pickle.loads(connection.recv_bytes())  # noqa: S301  # of the process that started this one
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"this network {NOT_PICKLABLE} ({error}); define it in a module of its own") from None
    return task


def _run_task(task: _WorkerTask, channel: _WorkerChannel) -> None:
    from featpipe.extraction.run import create_engine

    worker = ExtractionWorker(
        task.index, task.stamps, task.backbone, task.settings, task.parts, channel.has_embedding, channel.send_message
    )
    worker.run(lambda: create_engine(task.backbone, task.settings, len(task.index)), task.rows)


def _raise_interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt
