"""Fixtures of all tests: small archives of synthetic photographs, a tiny network, commands, and a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other, a process for each core

import pytest
import torch

from featpipe.cli import logging
from tests.support.devices import needs_gpu
from tests.support.images import jpeg
from tests.support.logs import logged_messages, pop_unexpected_warnings
from tests.support.networks import CUSTOM_NETWORK_CODE, Tiny, tiny_transform


def pytest_configure() -> None:
    """Handle SIGINT, also where the tests run in the background: a shell starts such a process with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tiny() -> object:
    """The tiny network as a custom backbone."""
    from featpipe import backbones

    return backbones.load(Tiny(), transform=tiny_transform)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A GPU: emulated on the CPU, and a real one if there is one."""
    from featpipe.backbones.resize import matmul
    from tests.support.emulated_gpu import emulate_gpu

    if request.param == "emulated":
        emulate_gpu(monkeypatch)
    matmul.is_exact.cache_clear()
    yield torch.device("cuda")
    matmul.is_exact.cache_clear()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests ran on an emulated GPU, because they prove less than those on a real one."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ())]
    emulated = {report.nodeid for report in reports if "emulated" in report.nodeid}
    if emulated:
        terminalreporter.write_line(f"{len(emulated)} tests ran on an emulated GPU")


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The notes and warnings that the package logs during the test."""
    with logged_messages() as messages:
        yield messages


@pytest.fixture(autouse=True)
def _no_unexpected_warning() -> Iterator[None]:
    yield
    assert pop_unexpected_warnings() == []


@pytest.fixture(autouse=True)
def _log_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the log format of the process, which a test may have changed."""
    monkeypatch.setitem(logging._log_settings, "format", "text")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of small JPEGs, with a subfolder for each class; the images of a class look alike."""

    def make(classes: Sequence[str] = ("ape", "bee", "cow"), each: int = 6, name: str = "photos") -> Path:
        folder = tmp_path / name
        for number, label in enumerate(classes):
            (folder / label).mkdir(parents=True)
            for i in range(each):
                (folder / label / f"{i:02}.jpg").write_bytes(jpeg(1000 * number + i))
        return folder

    return make


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command in this process, in the temporary folder."""
    from tests.support.commands import run_command

    return partial(run_command, cwd=tmp_path)


@pytest.fixture
def command_process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command in a new process, in the temporary folder."""

    def run(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        process = subprocess.run(
            [sys.executable, "-m", "featpipe", *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "PYTHONWARNINGS": "default"},
        )
        assert process.returncode == code, f"exit {process.returncode}\n{process.stdout}\n{process.stderr}"
        return process

    return run


@pytest.fixture(scope="module")
def make_cache(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    """Write caches of synthetic embeddings, see :func:`tests.support.expansion.make_cache_writer`."""
    from tests.support.expansion import make_cache_writer

    return make_cache_writer(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def custom_network(tmp_path: Path) -> str:
    """A fast custom network, in the folder where the commands run."""
    (tmp_path / "nets.py").write_text(CUSTOM_NETWORK_CODE.format(slow=0))
    return "nets:make"
