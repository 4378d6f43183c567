"""Extraction on several devices: one process for each, one cache."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from featpipe import backbones, extract
from featpipe.errors import ArchiveError, CacheError, ConfigError
from featpipe.extraction import multi_device
from tests.support.networks import Tiny, tiny_transform

ROOT = Path(__file__).parents[2]


def test_two_processes_write_the_same_cache_as_one(make_folder, tiny, tmp_path, log):
    folder = make_folder()
    (folder / "bee" / "again.jpg").write_bytes((folder / "ape" / "00.jpg").read_bytes())
    (folder / "bee" / "bad.jpg").write_bytes(b"\xff\xd8\xff nothing")
    single = extract(folder, backbone=tiny, cache=tmp_path / "a", device="cpu")
    parallel = extract(folder, backbone=tiny, cache=tmp_path / "b", device="cpu,cpu")
    assert parallel.features().tobytes() == single.features().tobytes()
    assert parallel.digests.tobytes() == single.digests.tobytes()
    assert (parallel.ids[:], parallel.bad_rows()) == (single.ids[:], single.bad_rows())
    assert parallel.manifest["embedded"] == single.manifest["embedded"] == 18  # of 20: one is damaged, one is a copy
    assert parallel.manifest["device"] == "cpu,cpu"
    assert parallel.manifest["seconds"]["embedding"] > 0
    assert not list((tmp_path / "b").glob("*.parts"))


@pytest.mark.thorough
def test_an_error_in_one_process_ends_all_and_is_raised_unchanged(make_folder, tiny, tmp_path):
    folder = make_folder()
    for path in (folder / "ape").iterdir():
        path.write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(ArchiveError, match="more than --max-bad 2 allows"):
        extract(folder, backbone=tiny, cache=tmp_path, device="cpu,cpu", max_bad=2)


class KillsWorkers(Tiny):
    """Kills every process except the parent."""

    def __init__(self, parent_pid: int) -> None:
        super().__init__()
        self.parent_pid = parent_pid

    def forward(self, x):
        if os.getpid() != self.parent_pid:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


@pytest.mark.thorough
def test_a_killed_process_is_an_error_with_advice(make_folder, tmp_path):
    folder = make_folder()
    backbone = backbones.load(KillsWorkers(os.getpid()), transform=tiny_transform)
    with pytest.raises(CacheError, match="was killed by signal 9; finished work is kept"):
        extract(folder, backbone=backbone, cache=tmp_path, device="cpu,cpu")
    cache = extract(folder, backbone=backbone, cache=tmp_path, device="cpu")
    assert np.isfinite(cache.features()).all()


def test_an_unknown_device_among_several_is_refused(make_folder, tiny, tmp_path):
    with pytest.raises(ConfigError, match="device"):
        extract(make_folder(), backbone=tiny, cache=tmp_path, device="cpu,gpu")


SLOW_NETWORK_CODE = """
    import sys, time
    from tests.support.networks import Tiny, tiny_transform

    class Slow(Tiny):
        def forward(self, x):
            time.sleep(0.15)
            return super().forward(x)

    def net():
        return Slow(), tiny_transform
"""
CLI_CODE = """
import sys
from featpipe.cli import main
sys.argv = ["featpipe", *sys.argv[1:]]
main()
"""


@pytest.mark.thorough
def test_an_interrupt_commits_finished_work_and_ends_all_processes(make_folder, tmp_path):
    folder = make_folder(each=30)  # too few for graph optimization, which would drop the sleeping
    for path in folder.rglob("*.*"):
        os.utime(path, (1e9, 1e9))  # files that were just written would be read again
    (tmp_path / "slow.py").write_text(textwrap.dedent(SLOW_NETWORK_CODE))
    arguments = ["extract", folder, "--backbone", "slow:net", "--batch", "2", "--device", "cpu,cpu", "--out", "c.h5"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", CLI_CODE, *map(str, arguments)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "embedding on" in line:
                break
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        error_output = process.stderr.read()
        assert process.wait(60) == 1
    assert "interrupted; finished work is kept" in error_output
    assert "Traceback" not in error_output
    assert list(tmp_path.glob("*.parts/*.record"))
    assert multi_device.WORKER_CODE not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    resumed = subprocess.run(
        [*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "of 90 images are in a cache already" in resumed.stderr
