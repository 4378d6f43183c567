"""What the tests share: small archives of made-up photographs, and a tiny network."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other, a process for each core

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from featpipe.cli import logging
from tests.support.logs import logged_messages, pop_unexpected_warnings


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A smooth random picture: noise, blown up."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def jpeg(seed: int, size: tuple[int, int] = (40, 32)) -> bytes:
    file = io.BytesIO()
    picture(seed, size).save(file, "JPEG", quality=92)
    return file.getvalue()


def tiny_transform(image: Tensor) -> Tensor:
    """Twelve by twelve pixels in [0, 1]."""
    small = nn.functional.interpolate(image[None].float(), (12, 12), mode="area")
    return small[0] / 255


class Tiny(nn.Module):
    """A network that embeds thousands of images in a second."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 8, 3)
            self.norm = nn.BatchNorm2d(8)
            self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each forward pass is of, from here on; what proves that a network is frozen is none."""
    from featpipe.inference import Engine

    passes: list[int] = []
    submit = Engine.submit

    def counted(self: Engine, images: Tensor) -> object:
        passes.append(len(images))
        return submit(self, images)

    monkeypatch.setattr(Engine, "submit", counted)
    return passes


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


@pytest.fixture
def tiny() -> object:
    """The tiny network as a backbone of its own."""
    from featpipe import backbones

    return backbones.load(Tiny(), transform=tiny_transform)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A GPU: emulated on the CPU, and a real one where there is one."""
    from featpipe.backbones.resize import matmul
    from tests.support.emulated_gpu import emulate_gpu

    if request.param == "emulated":
        emulate_gpu(monkeypatch)
    matmul.is_exact.cache_clear()
    yield torch.device("cuda")
    matmul.is_exact.cache_clear()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests ran on an emulated GPU: they prove less than those on a real one."""
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
    """What one test asks of the log of its process, the next one does not find."""
    monkeypatch.setitem(logging._log_settings, "format", "text")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of small JPEGs, one folder for each class; the pictures of a class look alike."""

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
    """Runs the real command in a process of its own, in the temporary folder."""

    def run(*arguments: str | Path, code: int = 0, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "featpipe", *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "PYTHONWARNINGS": "default"},
        )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="module")
def make_cache(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    """Writes caches of made-up embeddings, see :func:`tests.support.expansion.make_cache_writer`."""
    from tests.support.expansion import make_cache_writer

    return make_cache_writer(tmp_path_factory.mktemp("caches"))
