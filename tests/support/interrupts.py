"""Commands that are stopped, or held, at a known moment, in processes of their own: no test waits for a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# When the first part is committed, the process sends itself a signal, or says so and waits for its input to end.
_AFTER_THE_FIRST_PART = """
import os, sys
from featpipe.extraction import worker
from featpipe.storage import StagingArea

worker.MAX_PART_SECONDS = 0.2
commit, stop = StagingArea.commit, int(os.environ["STOPPED_BY"])

def commit_and_stop(*arguments, **keywords):
    part = commit(*arguments, **keywords)
    StagingArea.commit = commit
    if stop:
        os.kill(os.getpid(), stop)
    else:
        print("committed", flush=True)
        sys.stdin.read()
    return part

StagingArea.commit = commit_and_stop
sys.argv[0] = "featpipe"
from featpipe.cli import main
main()
"""


def run_and_stop(
    arguments: list[str], folder: Path, stop: signal.Signals = signal.SIGINT
) -> subprocess.CompletedProcess[str]:
    """Run a command that embeds images, and stop it by a signal as soon as its first part is committed."""
    return subprocess.run(
        [sys.executable, "-c", _AFTER_THE_FIRST_PART, *arguments],
        cwd=folder,
        env={**os.environ, "STOPPED_BY": str(int(stop))},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def start_and_hold(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """A running command that has committed its first part, and goes no further until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", _AFTER_THE_FIRST_PART, *arguments],
        cwd=folder,
        env={**os.environ, "STOPPED_BY": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "committed\n", process.communicate()
    return process


def interrupt_fine_tuning(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """As Ctrl-C would, after some steps, once; gets an entry for each step."""
    from featpipe.finetuning import loop

    real, made = loop.optimizer_step, list[int]()

    def interrupted(*given: object) -> None:
        real(*given)  # type: ignore[arg-type]
        made.append(1)
        if len(made) == after:
            signal.raise_signal(signal.SIGINT)  # to this thread: here, and nowhere within torch

    monkeypatch.setattr(loop, "optimizer_step", interrupted)
    return made
