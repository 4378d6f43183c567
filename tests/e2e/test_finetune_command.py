"""The command that fine-tunes: interrupted and typed again, in one process and in two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import featpipe
from tests.support.finetuning import write_photos

pytestmark = pytest.mark.thorough  # every test is a process

NETWORK = "timm/test_resnet"
OPTIONS = ["--unfreeze", "all", "--epochs", "2", "--batch", "8", "--device", "cpu", "--keep-worse"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Photographs, the cache of a small untrained network, and a model that has much to learn."""
    home = tmp_path_factory.mktemp("home")
    photos = write_photos(home / "photos", each=14)
    cache = featpipe.extract(photos, backbone=NETWORK, weights="none", cache=home / "cache")
    featpipe.train(cache, "logistic", params={"C": 1e-4}).save(home / "photos.model")
    return home


@pytest.fixture(scope="module")
def tuned(home):
    """What one process gives in one go."""
    done = run(home, "finetune", "photos.model", "photos", *OPTIONS)
    return done, featpipe.load_model(home / done.stdout.strip())


def started(home, *arguments, launcher=()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "featpipe", *arguments],
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1"},
    )


def run(home, *arguments, **how) -> subprocess.CompletedProcess[str]:
    process = started(home, *arguments, **how)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return subprocess.CompletedProcess(arguments, 0, out, err)


def same(a: featpipe.Model, b: featpipe.Model, tolerance: float) -> None:
    first, second = (model.backbone.network.state_dict() for model in (a, b))
    for name in first:
        np.testing.assert_allclose(
            first[name].numpy(), second[name].numpy(), atol=tolerance, rtol=tolerance, err_msg=name
        )
    np.testing.assert_allclose(a.head[-1].coefs_[0], b.head[-1].coefs_[0], atol=tolerance, rtol=tolerance)


def test_finetune_prints_the_path_of_the_model_and_a_table_of_both_models(home, tuned):
    done, model = tuned
    assert done.stdout == "photos.tuned.model\n"
    assert "probe" in done.stderr
    assert "fine-tuned" in done.stderr
    assert "than the probe on" in done.stderr
    for label in ("ape", "bee", "cow"):
        assert f"\n{label}" in done.stderr
    told = run(home, "info", "photos.tuned.model").stdout
    assert "fine tuning       the fine-tuned model is kept; fine-tuned is" in told
    assert model.backbone.digest != featpipe.load_model(home / "photos.model").backbone.digest


def test_finetune_does_nothing_the_second_time(home, tuned):
    before = (home / "photos.tuned.model").stat().st_mtime_ns
    done = run(home, "finetune", "photos.model", "photos", *OPTIONS, "--json")
    assert (home / "photos.tuned.model").stat().st_mtime_ns == before
    result = json.loads(done.stdout)
    assert result["model"] == "photos.tuned.model"
    assert len(result["curve"]) == 3


def test_an_interrupted_finetune_resumes_to_the_same_weights(home, tuned):
    out = "interrupted.model"
    arguments = ["finetune", "photos.model", "photos", *OPTIONS, "--out", out]
    process = started(home, *arguments)
    for line in process.stderr:
        if "before training" in line:
            process.send_signal(signal.SIGTERM)
            break
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    assert "run the same command again to resume" in err
    assert (home / f"{out}.checkpoint").exists()
    done = run(home, *arguments)
    assert "resuming from" in done.stderr
    same(featpipe.load_model(home / out), tuned[1], 0)


def test_two_processes_train_the_same_model_as_one(home, tuned):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run(home, "finetune", "photos.model", "photos", *OPTIONS, "--out", "two.model", launcher=launcher)
    assert done.stdout == "two.model\n"
    distributed, single = featpipe.load_model(home / "two.model"), tuned[1]
    same(distributed, single, 1e-3)
    curves = [model.history["curves"]["loss_curve"] for model in (distributed, single)]
    np.testing.assert_allclose(*curves, rtol=1e-3)
