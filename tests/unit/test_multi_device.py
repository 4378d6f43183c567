"""Several devices: a process for each, one cache."""

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


def test_two_processes_make_the_cache_that_one_makes(make_folder, tiny, tmp_path, log):
    folder = make_folder()
    (folder / "bee" / "again.jpg").write_bytes((folder / "ape" / "00.jpg").read_bytes())
    (folder / "bee" / "bad.jpg").write_bytes(b"\xff\xd8\xff nothing")
    one = extract(folder, backbone=tiny, cache=tmp_path / "a", device="cpu")
    two = extract(folder, backbone=tiny, cache=tmp_path / "b", device="cpu,cpu")
    assert two.features().tobytes() == one.features().tobytes()
    assert two.digests.tobytes() == one.digests.tobytes()
    assert (two.ids[:], two.bad_rows()) == (one.ids[:], one.bad_rows())
    assert two.manifest["embedded"] == one.manifest["embedded"] == 18  # of 20: one is bad, one a copy
    assert two.manifest["device"] == "cpu,cpu"
    assert two.manifest["seconds"]["embedding"] > 0
    assert not list((tmp_path / "b").glob("*.parts"))


@pytest.mark.thorough
def test_an_error_in_one_process_ends_all_and_is_told_as_it_is(make_folder, tiny, tmp_path):
    folder = make_folder()
    for path in (folder / "ape").iterdir():
        path.write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(ArchiveError, match="more than --max-bad 2 allows"):
        extract(folder, backbone=tiny, cache=tmp_path, device="cpu,cpu", max_bad=2)


class Dying(Tiny):
    """Kills its process as soon as it is not the first one's."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, x):
        if os.getpid() != self.first:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


@pytest.mark.thorough
def test_a_process_that_is_killed_is_an_error_that_says_how_to_go_on(make_folder, tmp_path):
    folder = make_folder()
    net = backbones.load(Dying(os.getpid()), transform=tiny_transform)
    with pytest.raises(CacheError, match="was killed by signal 9; what was finished is kept"):
        extract(folder, backbone=net, cache=tmp_path, device="cpu,cpu")
    cache = extract(folder, backbone=net, cache=tmp_path, device="cpu")
    assert np.isfinite(cache.features()).all()


def test_an_unknown_device_among_several_is_refused(make_folder, tiny, tmp_path):
    with pytest.raises(ConfigError, match="device"):
        extract(make_folder(), backbone=tiny, cache=tmp_path, device="cpu,gpu")


SLOW = """
    import sys, time
    from tests.support.networks import Tiny, tiny_transform

    class Slow(Tiny):
        def forward(self, x):
            time.sleep(0.15)
            return super().forward(x)

    def net():
        return Slow(), tiny_transform
"""
CALL = """
import sys
from featpipe.cli import main
sys.argv = ["featpipe", *sys.argv[1:]]
main()
"""


@pytest.mark.thorough
def test_an_interrupt_commits_what_the_processes_have_and_ends_them(make_folder, tmp_path):
    folder = make_folder(each=30)  # too few for a graph, which would leave out the sleeping
    for path in folder.rglob("*.*"):
        os.utime(path, (1e9, 1e9))  # the stamp of a file just written is not trusted: it would be read again
    (tmp_path / "slow.py").write_text(textwrap.dedent(SLOW))
    given = ["extract", folder, "--backbone", "slow:net", "--batch", "2", "--device", "cpu,cpu", "--out", "c.h5"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", CALL, *map(str, given)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as running:
        for line in running.stderr:
            if "embedding on" in line:
                break
        time.sleep(1.0)
        running.send_signal(signal.SIGTERM)
        said = running.stderr.read()
        assert running.wait(60) == 1
    assert "interrupted; finished work is kept" in said
    assert "Traceback" not in said
    assert list(tmp_path.glob("*.parts/*.record"))
    assert multi_device.WORKER_CODE not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    done = subprocess.run(
        [*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "of 90 images are in a cache already" in done.stderr
