"""Commands that are interrupted or paused at a defined point, in new processes, so that no test depends on time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# When the first part is committed, the process sends itself a signal, or prints a line and waits for its input to end.
_STOP_AFTER_FIRST_PART = """
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
    """Run a command that embeds images, and interrupt it by a signal as soon as its first part is committed."""
    return subprocess.run(
        [sys.executable, "-c", _STOP_AFTER_FIRST_PART, *arguments],
        cwd=folder,
        env={**os.environ, "STOPPED_BY": str(int(stop))},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def start_and_hold(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start a command that pauses after its first part is committed, until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", _STOP_AFTER_FIRST_PART, *arguments],
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


def interrupt_fine_tuning(monkeypatch: pytest.MonkeyPatch, n_steps: int) -> list[int]:
    """Interrupt fine-tuning once, like Ctrl-C, after a number of steps; the returned list gets an entry per step."""
    from featpipe.finetuning import loop

    optimizer_step, steps = loop.optimizer_step, list[int]()

    def step_and_interrupt(*arguments: object) -> None:
        optimizer_step(*arguments)  # type: ignore[arg-type]
        steps.append(1)
        if len(steps) == n_steps:
            signal.raise_signal(signal.SIGINT)  # in this thread, so that it arrives here and not within torch

    monkeypatch.setattr(loop, "optimizer_step", step_and_interrupt)
    return steps
