"""Commands in batch jobs: interrupts, time limits, job arrays, and the scripts of the README."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import featpipe
from featpipe import cli
from featpipe.cli import RESUMABLE_COMMANDS, logging, terminal
from featpipe.storage import StagingArea
from tests.support.commands import run_command
from tests.support.images import jpeg
from tests.support.interrupts import run_and_stop
from tests.support.networks import CUSTOM_NETWORK_CODE

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)

HomeFolder = Path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> HomeFolder:
    """A folder with photos/, nets.py, a.h5 and a.model."""
    home = tmp_path_factory.mktemp("home")
    for number, label in enumerate(("photos/ape", "photos/bee", "photos/cow", "more/owl")):
        (home / label).mkdir(parents=True)
        for i in range(30):
            (home / label / f"{i:02}.jpg").write_bytes(jpeg(1000 * number + i))
            os.utime(home / label / f"{i:02}.jpg", (1e9, 1e9))  # stamps of recent files are not trusted
    (home / "nets.py").write_text(CUSTOM_NETWORK_CODE.format(slow=0))
    (home / "slownets.py").write_text(CUSTOM_NETWORK_CODE.format(slow=0.05))
    for name in ("nets", "slownets"):
        sys.path.insert(0, str(home))
        cache = featpipe.extract(home / "photos", backbone=f"{name}:make", out=home / f"{name}.h5")
        featpipe.train(cache, params={"C": 1.0}, cv=None).save(home / f"{name}.model")
        sys.path.remove(str(home))
    return home


# -- signals ---------------------------------------------------------------------------------------------------------

LONG_COMMANDS = {
    "extract": ["photos", "--backbone", "nets:make", "--cache", "elsewhere"],
    "train": ["nets.h5", "--out", "t.model"],
    "expand": ["nets.model", "more", "--backbone", "nets:make", "--cache", "elsewhere", "--out", "e.model"],
    "evaluate": ["nets.model", "photos", "--backbone", "nets:make", "--cache", "elsewhere"],
    "finetune": ["nets.model", "photos", "--backbone", "nets:make", "--cache", "elsewhere", "--out", "f.model"],
    "run": ["linear-probe", "photos", "--set", "backbones.0.name=nets:make", "--out", "run"],
    "predict": ["nets.model", "photos", "--backbone", "nets:make", "--out", "p.csv"],
    "verify": ["nets.h5"],
    "merge": ["nets.h5", "nets.h5", "--out", "m.h5"],
    "pack": ["nets.h5", "--out", "packed.h5"],
    "bench": ["photos", "--backbone", "nets:make", "--seconds", "1"],
    "demo": ["--out", "demo"],
}


def test_every_command_with_a_progress_bar_is_in_the_interrupt_test() -> None:
    folder = Path(cli.__file__).parent
    commands = {name for name in cli.COMMAND_SUMMARIES if "with Terminal()" in (folder / f"{name}.py").read_text()}
    assert commands == set(LONG_COMMANDS)


@pytest.mark.parametrize("name", LONG_COMMANDS)
def test_sigterm_ends_every_long_command_like_ctrl_c(
    name: str, home: HomeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal is sent at the first log note or progress report."""
    signals: list[int] = []

    def terminate(*_: object) -> None:
        if not signals:
            signals.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(terminal.Terminal, "__call__", terminate)
    monkeypatch.setattr(logging.LogHandler, "emit", terminate)
    files_before = {path.name for path in home.iterdir()}
    process = run_command(name, *LONG_COMMANDS[name], code=1, cwd=home)
    assert signals
    kept = "finished work is kept" if name in RESUMABLE_COMMANDS else "no output was written"
    assert process.stderr.splitlines()[-1].startswith(f"featpipe: interrupted; {kept}")
    assert process.stdout == ""
    unfinished = {"elsewhere", "demo", "run", "__pycache__", "p.csv.parts"}
    assert {path.name for path in home.iterdir()} - files_before <= unfinished, "no finished file may exist"
    assert not list(home.glob("elsewhere/*.h5"))


@pytest.mark.thorough
def test_an_interrupted_prediction_resumes(home: HomeFolder, tmp_path: Path, command: Any, log: list[str]) -> None:
    out = tmp_path / "p.jsonl"
    arguments = ["predict", "slownets.model", "photos", "--backbone", "slownets:make", "--out", str(out)]
    stopped = run_and_stop(["--log-format", "json", *arguments, "--workers", "1"], home, signal.SIGTERM)
    n_finished = StagingArea(tmp_path / "p.jsonl.parts", "").count_recorded_rows()
    assert 0 < n_finished < 90
    assert not out.exists()
    last_event = json.loads(stopped.stderr.splitlines()[-1])
    assert (stopped.returncode, last_event["event"], last_event["code"]) == (1, "interrupted", 1)
    process = command(*arguments, cwd=home)
    assert f"{n_finished} of 90 images are in a cache already" in process.stderr
    assert len(out.read_text().splitlines()) == 90
    log.clear()
    model = featpipe.load_model(home / "slownets.model")  # a current file needs no network
    assert featpipe.predict(model, home / "photos", out) == {"ok": 90}
    assert [text.rsplit("; ")[-1] for text in log] == [
        f"{out}: the predictions of 90 images are up to date, nothing to do"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".p.jsonl.made.json", "p.jsonl"]


@pytest.mark.thorough
def test_a_job_with_a_time_limit_finishes_when_it_is_repeated_after_exit_code_75(
    home: HomeFolder, tmp_path: Path
) -> None:
    """A script repeats the job until its exit code is not 75."""
    out = tmp_path / "p.csv"
    options = f"nets.model photos --backbone nets:make --time-limit 0.001 --workers 1 --log-format json --out {out}"
    command = f"{sys.executable} -c {shlex.quote(LARGE_BATCHES_CODE)}"
    script = f"for i in $(seq 9); do {command} predict {options}; c=$?; echo $c; [ $c -eq 75 ] || exit $c; done"
    process = subprocess.run(["bash", "-c", script], cwd=home, capture_output=True, text=True, timeout=280)
    codes = [line for line in process.stdout.splitlines() if line.isdigit()]
    assert codes[-1] == "0", process.stderr
    assert set(codes[:-1]) == {"75"}
    events = [json.loads(line)["event"] for line in process.stderr.splitlines()]
    assert events.count("time-limit") == len(codes) - 1
    assert len(out.read_text().splitlines()) == 91


LARGE_BATCHES_CODE = """
import sys
from featpipe.inference import engine
engine.default_batch_size = lambda device, multiply_adds, dtype: 40
sys.argv[0] = "featpipe"
from featpipe.cli import main
main()
"""


# -- the README ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with shards/000.tar and 001.tar, of two classes."""
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        folder = tmp_path / "images" / str(shard)
        for number, label in enumerate(("cat", "dog")):
            (folder / label).mkdir(parents=True)
            for i in range(3):
                path = folder / label / f"{shard}-{i}.jpg"
                path.write_bytes(jpeg(100 * shard + 10 * number + i, (120, 90)))
        with tarfile.open(tmp_path / "shards" / f"{shard:03}.tar", "w") as tar:
            tar.add(folder, ".")
    return tmp_path


def list_shell_scripts() -> list[str]:
    return [text for kind, text in BLOCKS if kind == "sh"]


def run_script(text: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    path = f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "-c", text], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PATH": path, **environment},
    )  # fmt: skip


@pytest.mark.thorough
def test_a_job_array_over_shards_gives_the_same_cache_as_one_process(shards: Path) -> None:
    array_script, merge_script = list_shell_scripts()
    jobs = [run_script(array_script, shards, SLURM_ARRAY_TASK_ID=str(number), SLURM_JOB_ID="1") for number in range(2)]
    for job in jobs:
        _, stderr = job.communicate(timeout=200)
        assert job.returncode == 0, stderr
        assert {json.loads(line)["level"] for line in stderr.splitlines()} == {"info"}
    merge_job = run_script(merge_script, shards)
    _, stderr = merge_job.communicate(timeout=200)
    assert merge_job.returncode == 0, stderr
    merged = featpipe.FeatureCache(shards / "all.h5")
    single_process = featpipe.extract(sorted((shards / "shards").glob("*.tar")), out=shards / "alone.h5")
    assert np.array_equal(merged.digests, single_process.digests)
    assert np.array_equal(merged.features(), single_process.features())
    assert list(merged.labels) == list(single_process.labels)
    assert featpipe.load_model(shards / "shards.model").classes == ("cat", "dog")


def test_an_array_job_is_requeued_after_exit_code_75_only(shards: Path) -> None:
    (shards / "scontrol").write_text('#!/bin/sh\necho "$@" >> queued\n')
    (shards / "featpipe").write_text('#!/bin/sh\nexit "$CODE"\n')
    for name in ("scontrol", "featpipe"):
        (shards / name).chmod(0o755)
    for code in (0, 1, 2, 75):
        job = run_script(
            list_shell_scripts()[0], shards, SLURM_ARRAY_TASK_ID="1", SLURM_JOB_ID=f"7{code}", CODE=str(code)
        )
        job.communicate(timeout=60)
        assert job.returncode == code
    assert (shards / "queued").read_text() == "requeue 775\n"


@pytest.mark.parametrize("kind", ["cron", "docker"])
def test_the_commands_of_cron_and_docker_jobs_are_valid(kind: str) -> None:
    (text,) = (text for name, text in BLOCKS if name == kind)
    match = re.search(r"featpipe (predict .*?)[\"\n]", text)
    assert match is not None
    name, *arguments = shlex.split(match[1])
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    assert command.make_context(name, arguments).params["out"] == "predictions.csv"


@pytest.mark.thorough
def test_the_cron_job_runs(shards: Path) -> None:
    (text,) = (text for name, text in BLOCKS if name == "cron")
    line = re.sub(r"^(\S+ ){5}", "", text.strip())
    (shards / "photos").mkdir()
    (shards / "images").rename(shards / "photos" / "incoming")
    cache = featpipe.extract(shards / "photos" / "incoming", out=shards / "i.h5")
    assert len(cache) == 12
    featpipe.train(cache, params={"C": 1.0}, cv=None).save(shards / "photos" / "photos.model")
    job = run_script(line, shards, HOME=str(shards))
    _, stderr = job.communicate(timeout=200)
    assert job.returncode == 0, stderr
    assert len((shards / "photos" / "predictions.csv").read_text().splitlines()) == 13
