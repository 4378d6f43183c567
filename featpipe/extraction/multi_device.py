"""Several devices at once: one process per device, all committing parts of the same cache.

Worker processes are spawned, not forked, and receive their task over an inherited pipe. They do not import the main
module of the parent process. They ask the parent before they embed an image, so that no image is embedded twice, and
report the rows that they read and committed. A process that dies loses at most its uncommitted part.
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

from featpipe import inference
from featpipe.errors import CacheError, ConfigError, FeatpipeError
from featpipe.extraction.worker import ExtractionTask, ExtractionWorker, WorkerMessage

if TYPE_CHECKING:
    import torch

_Connection = Any  # typeshed declares another type for Pipe()
_Process = subprocess.Popen[bytes]

ROWS_PER_ASSIGNMENT = 256  # neighbouring rows go to one process, for nearly sequential reads
SHUTDOWN_SECONDS = 30.0
NOT_PICKLABLE = "cannot be sent to another process, which is necessary for several devices; use one device"
WORKER_CODE = "from featpipe.extraction.multi_device import run_worker_process; run_worker_process()"


@dataclass(frozen=True)
class _WorkerFailure:
    """A worker process failed: a FeatpipeError, or the text of another exception."""

    error: FeatpipeError | str


def embed_on_devices(worker: ExtractionWorker, devices: Sequence[torch.device]) -> None:
    """Embed the rows of a task on several devices.

    Parameters
    ----------
    worker : ExtractionWorker
        Its task is divided among the processes; its callbacks run in this process.
    devices : sequence of torch.device

    Raises
    ------
    CacheError
        If a process died. Committed parts are kept.
    """
    task, rows = worker.task, worker.task.rows
    device_indices = np.arange(len(rows)) // ROWS_PER_ASSIGNMENT % len(devices)
    if len(rows) < ROWS_PER_ASSIGNMENT * len(devices):
        task, rows = worker.task, worker.task.rows
    device_indices = np.arange(len(rows)) % len(devices)
    n_threads = task.config.workers or max(1, inference.available_cores() // len(devices))
    tasks = [
        replace(
            task,
            config=replace(task.config, device=str(device), workers=n_threads, backbone=None, transform=None),
            rows=rows[device_indices == device_index],
        )
        for device_index, device in enumerate(devices)
    ]
    with _start_workers(tasks) as processes:
        _handle_messages(worker, processes)


@contextlib.contextmanager
def _start_workers(tasks: Sequence[ExtractionTask]) -> Iterator[dict[_Connection, _Process]]:
    """Start one process per task; on exit all have committed their finished rows and ended."""
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
                connection.send_bytes(pickle.dumps(task))  # send() would share torch's memory
            except OSError:
                process.wait()
                _raise_if_failed(process)
            except Exception as error:  # a custom network may contain objects that cannot be pickled
                raise ConfigError(f"{task.backbone.name} {NOT_PICKLABLE} ({error})") from error
        yield processes
    finally:
        _stop_workers(processes)


def _handle_messages(worker: ExtractionWorker, processes: dict[_Connection, _Process]) -> None:
    """Answer the processes and forward their messages until all have ended."""
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
                connection.send(worker.has_embedding(message))
            elif isinstance(message, _WorkerFailure):
                raise message.error if isinstance(message.error, FeatpipeError) else RuntimeError(message.error)
            else:
                worker.send_message(message)


def _raise_if_failed(process: _Process) -> None:
    exit_code = process.returncode
    if exit_code:
        outcome = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
        raise CacheError(f"a process of this extraction {outcome}; finished work is kept: run the same command again")


def _stop_workers(processes: Mapping[_Connection, _Process]) -> None:
    """Ask the processes to commit their finished rows and end; kill those that do not end."""
    for process in processes.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for connection in processes:
        connection.close()  # ends a process that waits for an answer
    for process in processes.values():
        try:
            process.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _WorkerChannel:
    """The worker process's end of the pipe, shared by its threads."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def has_embedding(self, digest: bytes) -> bool:
        with self._lock:
            self._connection.send(digest)
            return bool(self._connection.recv())

    def send_message(self, message: WorkerMessage | _WorkerFailure) -> None:
        # The parent may have ended; committed parts stay valid.
        with self._lock, contextlib.suppress(OSError):
            self._connection.send(message)


def run_worker_process() -> None:
    """Main function of a worker process; its argument is the file descriptor of its end of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent stops the workers
    signal.signal(signal.SIGTERM, _raise_interrupt)
    connection: _Connection = Connection(int(sys.argv[1]))
    with connection:
        sys.path[:] = connection.recv()
        channel = _WorkerChannel(connection)
        try:
            task = _receive_task(connection)
            ExtractionWorker(task, channel.has_embedding, channel.send_message).run(task.create_engine())
        except (KeyboardInterrupt, BrokenPipeError, ConnectionError, EOFError):
            pass
        except FeatpipeError as error:
            channel.send_message(_WorkerFailure(error))
        except Exception as error:
            channel.send_message(_WorkerFailure(f"{type(error).__name__}: {error}"))
            raise
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # already ending


def _receive_task(connection: _Connection) -> ExtractionTask:
    try:
        task: ExtractionTask = pickle.loads(connection.recv_bytes())  # noqa: S301  # sent by the parent process
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"this network {NOT_PICKLABLE} ({error}); define it in an importable module") from None
    return task


def _raise_interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt
