"""Commands that are stopped at a known moment, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

# The process sends the signal to itself when it has committed its first part, so that no test waits for a time.
STOPPED_AFTER_THE_FIRST_PART = """
import os, sys
from featpipe.extraction import worker
from featpipe.storage import StagingArea

worker.MAX_PART_SECONDS = 0.2
commit, number = StagingArea.commit, int(os.environ["STOPPED_BY"])

def commit_and_stop(*arguments, **keywords):
    part = commit(*arguments, **keywords)
    StagingArea.commit = commit
    os.kill(os.getpid(), number)
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
        [sys.executable, "-c", STOPPED_AFTER_THE_FIRST_PART, *arguments],
        cwd=folder,
        env={**os.environ, "STOPPED_BY": str(int(stop))},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
