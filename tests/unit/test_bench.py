"""The benchmark measures each step alone and derives the upper bound."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from featpipe import bench
from featpipe.bench import BenchResult, ForwardBenchmark, run_benchmark
from featpipe.errors import ArchiveError


@pytest.fixture
def tiny_bench(tiny, monkeypatch):
    monkeypatch.setattr(bench, "candidate_precisions", lambda device: ("bf16",))
    return {"backbone": tiny, "device": "cpu", "seconds": 0.5}


@pytest.mark.thorough
def test_every_step_engine_and_precision_and_a_complete_extraction_are_measured(make_folder, tiny_bench):
    result = run_benchmark([make_folder()], **tiny_bench, engine="torch")
    assert result.images == 18
    assert {forward.precision for forward in result.forward} == {"fp32", "bf16"}
    assert (result.forward[0].engine, result.forward[0].precision) == ("torch, fused", "fp32")
    assert result.forward[0].cosine == pytest.approx(1)
    assert all(value > 0 for value in (result.reading, result.decoding, result.writing, result.extraction))
    configured = result.forward[0]
    compute_rate = 1 / (1 / result.decoding + 1 / configured.images_per_second)
    assert result.row_bytes == 4 * tiny_bench["backbone"].width
    assert result.bound == configured.bound == min(result.reading, result.writing / result.row_bytes, compute_rate)
    assert set(result.seconds) >= {"preparing", "reading", "decoding", "embedding", "committing", "waiting", "total"}
    assert result.bottleneck in ("reading", "decoding", "forward", "writing")


@pytest.mark.thorough
def test_a_given_batch_size_is_measured_beside_the_default(make_folder, tiny_bench):
    result = run_benchmark([make_folder()], **tiny_bench, engine="torch", batch=2)
    measured = [(forward.precision, forward.batch) for forward in result.forward]
    assert measured[:2] == [("fp32", 2), ("fp32", 4)]
    assert ("bf16", 2) in measured
    assert len(set(result.forward)) == len(measured)


def test_synthetic_images_are_used_without_an_archive(tiny_bench):
    result = run_benchmark(**tiny_bench)
    assert result.archive == "made-up JPEGs"
    assert 40e3 < result.image_bytes < 120e3
    assert math.isinf(result.reading)


def test_an_archive_without_a_readable_image_is_an_error(make_folder, tiny_bench):
    folder = make_folder(("ape",), 2)
    for path in (folder / "ape").iterdir():
        path.write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(ArchiveError, match="none of the first images can be decoded"):
        run_benchmark([folder], **tiny_bench)


def test_the_bound_adds_decoding_and_forward_on_a_cpu_but_not_on_a_gpu():
    assert bench._combine_rates("cpu", math.inf, 300, 150) == pytest.approx(100)
    assert bench._combine_rates("cuda", math.inf, 300, 150) == 150
    assert bench._combine_rates("cuda", 90, 300, 150) == 90


RESULT = BenchResult(
    machine={"device": "cpu", "cores": 2, "usable_cores": 2, "workers": 2},
    backbone="tiny",
    archive="photos",
    images=18,
    image_bytes=1e5,
    reading=5000.0,
    decoding=400.0,
    writing=1e9,
    forward=(
        ForwardBenchmark("OpenVINO", "fp32", 8, 150, 1.0, 100.0),
        ForwardBenchmark("OpenVINO", "bf16", 8, 400, 0.99, 200.0),
    ),
    bound=100.0,
    extraction=95.0,
    bottleneck="forward",
)


def format_advice(**changes: object) -> str:
    return "\n".join(bench._iter_advice(replace(RESULT, **changes)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "--precision bf16: 2.0 times as fast, minimum cosine 0.9900"),
        (
            {"forward": (RESULT.forward[0], replace(RESULT.forward[0], batch=2, bound=140.0))},
            "leave --batch out: batches of 2 are 1.4 times as fast as those of 8",
        ),
        ({"machine": {**RESULT.machine, "usable_cores": 1}}, "may use 1 of 2 cores"),
        ({"machine": {**RESULT.machine, "workers": 1}}, "--workers 2"),
        ({"reading": 120.0}, ".tar shards"),
        ({"writing": 1.5e6, "row_bytes": 10_000}, "writing is near the limit, 10,000 bytes per image"),
        ({"machine": {**RESULT.machine, "device": "cuda:0"}, "bottleneck": "decoding"}, "the GPU waits for images"),
        ({"extraction": 50.0}, "50% of the bound"),
    ],
)
def test_advice_names_the_bottleneck_and_the_change(changes, expected):
    assert expected in format_advice(**changes)


def test_no_advice_is_given_without_a_gain(monkeypatch):
    monkeypatch.setattr(bench, "has_openvino", lambda: True)
    assert format_advice(forward=RESULT.forward[:1]) == ""
    monkeypatch.setattr(bench, "has_openvino", lambda: False)
    assert "featpipe[cpu]" in format_advice(forward=RESULT.forward[:1])


@pytest.mark.thorough
def test_the_command_prints_a_table_or_json(command, make_folder, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def tiny():\n"
        "    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "    return network, lambda image: image[:, :12, :12].float() / 255\n"
    )
    arguments = [make_folder(), "--backbone", "net:tiny", "--device", "cpu", "--engine", "torch", "--seconds", "1"]
    printed = command("bench", *arguments).stdout
    assert "upper bound of all steps" in printed
    assert "bottleneck: " in printed
    result = json.loads(command("bench", *arguments, "--json").stdout)
    assert result["forward"][0]["engine"] == "torch, fused"
