"""`featpipe finetune`: output, reuse, resumption after an interrupt, and two processes."""

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
    """Photographs, the cache of a small untrained network, and a model with a weak head."""
    home = tmp_path_factory.mktemp("home")
    photos = write_photos(home / "photos", each=14)
    cache = featpipe.extract(photos, backbone=NETWORK, weights="none", cache=home / "cache")
    featpipe.train(cache, "logistic", params={"C": 1e-4}).save(home / "photos.model")
    return home


@pytest.fixture(scope="module")
def uninterrupted(home):
    """The output of an uninterrupted run in one process, and its model."""
    process = run_command(home, "finetune", "photos.model", "photos", *OPTIONS)
    return process, featpipe.load_model(home / process.stdout.strip())


def start_command(home, *arguments, launcher=()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "featpipe", *arguments],
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1"},
    )


def run_command(home, *arguments, **options) -> subprocess.CompletedProcess[str]:
    process = start_command(home, *arguments, **options)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    return subprocess.CompletedProcess(arguments, 0, stdout, stderr)


def assert_same_weights(a: featpipe.Model, b: featpipe.Model, tolerance: float) -> None:
    weights_a, weights_b = (model.backbone.network.state_dict() for model in (a, b))
    for name in weights_a:
        np.testing.assert_allclose(
            weights_a[name].numpy(), weights_b[name].numpy(), atol=tolerance, rtol=tolerance, err_msg=name
        )
    np.testing.assert_allclose(a.head[-1].coefs_[0], b.head[-1].coefs_[0], atol=tolerance, rtol=tolerance)


def test_finetune_prints_the_path_of_the_model_and_a_table_of_both_models(home, uninterrupted):
    process, model = uninterrupted
    assert process.stdout == "photos.tuned.model\n"
    assert "probe" in process.stderr
    assert "fine-tuned" in process.stderr
    assert "than the probe on" in process.stderr
    for label in ("ape", "bee", "cow"):
        assert f"\n{label}" in process.stderr
    info_text = run_command(home, "info", "photos.tuned.model").stdout
    assert "fine tuning       the fine-tuned model is kept; fine-tuned is" in info_text
    assert model.backbone.digest != featpipe.load_model(home / "photos.model").backbone.digest


def test_finetune_reuses_the_model_the_second_time(home, uninterrupted):
    mtime_before = (home / "photos.tuned.model").stat().st_mtime_ns
    process = run_command(home, "finetune", "photos.model", "photos", *OPTIONS, "--json")
    assert (home / "photos.tuned.model").stat().st_mtime_ns == mtime_before
    result = json.loads(process.stdout)
    assert result["model"] == "photos.tuned.model"
    assert len(result["curve"]) == 3


def test_an_interrupted_finetune_resumes_to_the_same_weights(home, uninterrupted):
    model_name = "interrupted.model"
    arguments = ["finetune", "photos.model", "photos", *OPTIONS, "--out", model_name]
    process = start_command(home, *arguments)
    for line in process.stderr:
        if "before training" in line:
            process.send_signal(signal.SIGTERM)
            break
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 1, stderr
    assert "run the same command again to resume" in stderr
    assert (home / f"{model_name}.checkpoint").exists()
    process = run_command(home, *arguments)
    assert "resuming from" in process.stderr
    assert_same_weights(featpipe.load_model(home / model_name), uninterrupted[1], 0)


def test_two_processes_train_the_same_model_as_one(home, uninterrupted):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = run_command(home, "finetune", "photos.model", "photos", *OPTIONS, "--out", "two.model", launcher=launcher)
    assert process.stdout == "two.model\n"
    distributed, single = featpipe.load_model(home / "two.model"), uninterrupted[1]
    assert_same_weights(distributed, single, 1e-3)
    curves = [model.history["curves"]["loss_curve"] for model in (distributed, single)]
    np.testing.assert_allclose(*curves, rtol=1e-3)
