"""The commands on small archives: run twice, interrupted and run again."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial

import pytest

import featpipe
from featpipe import demo
from tests.support.interrupts import run_and_stop
from tests.support.networks import CUSTOM_NETWORK_CODE


@pytest.fixture
def slow_network(tmp_path):
    (tmp_path / "slownets.py").write_text(CUSTOM_NETWORK_CODE.format(slow=0.05))
    return "slownets:make"


def test_the_demo_fits_nothing_the_second_time(tiny, tmp_path, monkeypatch, log):
    monkeypatch.setattr(demo, "HEADS", ("ridge", "knn"))
    monkeypatch.setattr(demo, "extract", partial(featpipe.extract, backbone=tiny))
    first = demo.run_demo(tmp_path)
    files = [first.archive, first.labels, *first.models.values(), first.report]
    written_at = [path.stat().st_mtime_ns for path in files]
    log.clear()
    second = demo.run_demo(tmp_path)
    assert [text for text in log if text.endswith("up to date, nothing to do")] == [
        f"{path}: up to date, nothing to do" for path in (*first.models.values(), first.report)
    ]
    assert not any("fitting" in text for text in log)
    assert [path.stat().st_mtime_ns for path in files] == written_at
    for name in ("models", "comparison", "best_head", "examples", "n_tested"):
        assert getattr(second, name) == getattr(first, name)


@pytest.mark.thorough
def test_the_demo_beats_its_baselines(command, tmp_path):
    text = command("demo", "--out", "demo").stdout
    document = json.loads(command("demo", "--out", "demo", "--json").stdout)
    accuracy = {row["name"]: row["accuracy"] for row in document["comparison"]}
    for name, value in accuracy.items():
        assert re.search(rf"{name} +{value:.3f} \[", text), name
    assert min(accuracy[head] for head in ("logistic", "mlp", "linear")) > 0.85
    assert accuracy["raw pixels"] < 0.4
    assert accuracy["majority class"] < 0.1


def test_from_a_folder_to_predictions_and_a_second_time_the_same(
    command, command_process, make_folder, custom_network, tmp_path
):
    make_folder()
    runs = []
    for run in (command_process, command):
        cache = run("extract", "photos", "--backbone", custom_network).stdout.strip()
        model = run("train", cache, "--cv", "3").stdout.strip()
        run("predict", model, "photos", "--backbone", custom_network, "--out", "p.csv")
        runs.append((cache, model, (tmp_path / "p.csv").read_text()))
    assert runs[0] == runs[1]
    rows = list(csv.DictReader(runs[0][2].splitlines()))
    assert [row["id"] for row in rows] == [f"{label}/{i:02}.jpg" for label in ("ape", "bee", "cow") for i in range(6)]
    assert all(row["status"] == "ok" and row["label"] in ("ape", "bee", "cow") for row in rows)


def test_the_code_of_a_custom_network_is_not_run_by_default(command, make_folder, custom_network):
    make_folder()
    cache = command("extract", "photos", "--backbone", custom_network).stdout.strip()
    model = command("train", cache, "--cv", "0").stdout.strip()
    assert "--backbone" in command("predict", model, "photos", code=1).stderr


def test_results_are_printed_as_json(command, make_folder, custom_network):
    make_folder()
    result = json.loads(command("extract", "photos", "--backbone", custom_network, "--json").stdout)
    assert (result["samples"], result["bad"]) == (18, {})
    trained = json.loads(command("train", result["cache"], "--cv", "2", "--json").stdout)
    assert trained["scores"]["cross_validation"]["n"] == 18
    cache_info = json.loads(command("info", result["cache"], "--json").stdout)
    assert cache_info["classes"] == {"ape": 6, "bee": 6, "cow": 6}
    assert json.loads(command("info", trained["model"], "--json").stdout)["head"] == "logistic"
    assert {row["head"] for row in json.loads(command("heads", "--json").stdout)} >= {"logistic", "mlp", "linear"}
    assert "resnet18" in json.loads(command("backbones", "resnet1*", "--json").stdout)


@pytest.mark.thorough
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_extraction_says_how_to_resume_and_resumes(command, make_folder, slow_network, tmp_path, stop):
    make_folder(each=30)  # too few for a graph, which would leave out the sleeping
    arguments = ["extract", "photos", "--backbone", slow_network, "--batch", "2", "--workers", "2"]
    interrupted = run_and_stop(arguments, tmp_path, stop)
    assert interrupted.stdout == ""
    if stop != signal.SIGKILL:
        assert interrupted.returncode == 1, interrupted.stderr
        assert "interrupted" in interrupted.stderr
        assert "Traceback" not in interrupted.stderr
    assert not list(tmp_path.glob("cache/*.h5"))
    resumed = json.loads(command(*arguments, "--json").stdout)
    assert resumed["samples"] == 90
    assert 0 < resumed["manifest"]["embedded"] < 90


@pytest.mark.thorough
@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_closed_output_pipe_is_no_error(command, make_folder, custom_network, tmp_path):
    make_folder(each=30)
    cache = command("extract", "photos", "--backbone", custom_network).stdout.strip()
    model = command("train", cache, "--cv", "0").stdout.strip()
    line = f"{sys.executable} -m featpipe predict {model} photos --backbone {custom_network} | head -2"
    result = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.stdout.startswith("id,status,label")
    assert "Traceback" not in result.stderr
