"""Run commands in this process, because starting a process takes longer than most commands."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys
import warnings
from pathlib import Path

from featpipe.cli import main


def run_command(*arguments: str | Path, code: int = 0, cwd: Path | str = ".") -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, which is on the import path, and check its exit code."""
    stdout, stderr, exit_code = io.StringIO(), io.StringIO(), 0
    argv, stdin, handler = sys.argv, sys.stdin, signal.getsignal(signal.SIGTERM)
    sys.argv, sys.stdin = ["featpipe", *map(str, arguments)], io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        warnings.catch_warnings(),
    ):
        folder = str(Path.cwd())
        sys.path.insert(0, folder)
        warnings.simplefilter("default")
        try:
            main()
        except SystemExit as error:
            exit_code = int(error.code or 0)
        finally:
            sys.argv, sys.stdin = argv, stdin
            signal.signal(signal.SIGTERM, handler)
            sys.path.remove(folder)
            for name, module in list(sys.modules.items()):  # another folder may have another network of this name
                if Path(getattr(module, "__file__", None) or "/").parent == Path(folder):
                    del sys.modules[name]
    assert exit_code == code, f"exit {exit_code}\n{stdout.getvalue()}\n{stderr.getvalue()}"
    return subprocess.CompletedProcess(list(map(str, arguments)), exit_code, stdout.getvalue(), stderr.getvalue())
