"""The benchmark: steps are measured alone, the upper bound follows from them."""

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
def test_every_step_engine_and_precision_is_measured_and_an_extraction_with_them(make_folder, tiny_bench):
    found = run_benchmark([make_folder()], **tiny_bench, engine="torch")
    assert found.images == 18
    assert {way.precision for way in found.forward} == {"fp32", "bf16"}
    assert (found.forward[0].engine, found.forward[0].precision) == ("torch, fused", "fp32")
    assert found.forward[0].cosine == pytest.approx(1)
    assert all(value > 0 for value in (found.reading, found.decoding, found.writing, found.extraction))
    first = found.forward[0]
    computing = 1 / (1 / found.decoding + 1 / first.images_per_second)
    assert found.row_bytes == 4 * tiny_bench["backbone"].width
    assert found.bound == first.bound == min(found.reading, found.writing / found.row_bytes, computing)
    assert set(found.seconds) >= {"preparing", "reading", "decoding", "embedding", "committing", "waiting", "total"}
    assert found.bottleneck in ("reading", "decoding", "forward", "writing")


@pytest.mark.thorough
def test_a_given_batch_size_is_measured_beside_the_default(make_folder, tiny_bench):
    found = run_benchmark([make_folder()], **tiny_bench, engine="torch", batch=2)
    measured = [(way.precision, way.batch) for way in found.forward]
    assert measured[:2] == [("fp32", 2), ("fp32", 4)]
    assert ("bf16", 2) in measured
    assert len(set(found.forward)) == len(measured)


def test_synthetic_images_are_used_without_an_archive(tiny_bench):
    found = run_benchmark(**tiny_bench)
    assert found.archive == "made-up JPEGs"
    assert 40e3 < found.image_bytes < 120e3
    assert math.isinf(found.reading)


def test_an_archive_without_a_readable_image_is_an_error(make_folder, tiny_bench):
    folder = make_folder(("ape",), 2)
    for path in (folder / "ape").iterdir():
        path.write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(ArchiveError, match="none of the first images can be decoded"):
        run_benchmark([folder], **tiny_bench)


def test_the_bound_adds_decoding_and_forward_on_a_cpu_but_not_on_a_gpu():
    assert bench._combined_rate("cpu", math.inf, 300, 150) == pytest.approx(100)
    assert bench._combined_rate("cuda", math.inf, 300, 150) == 150
    assert bench._combined_rate("cuda", 90, 300, 150) == 90


MEASURED = BenchResult(
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


def advice(**changes: object) -> str:
    return "\n".join(bench._iter_advice(replace(MEASURED, **changes)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "--precision bf16: 2.0 times as fast, least cosine 0.9900"),
        (
            {"forward": (MEASURED.forward[0], replace(MEASURED.forward[0], batch=2, bound=140.0))},
            "leave --batch out: batches of 2 are 1.4 times as fast as those of 8",
        ),
        ({"machine": {**MEASURED.machine, "usable_cores": 1}}, "may use 1 of 2 cores"),
        ({"machine": {**MEASURED.machine, "workers": 1}}, "--workers 2"),
        ({"reading": 120.0}, ".tar shards"),
        ({"writing": 1.5e6, "row_bytes": 10_000}, "writing is near the limit, 10,000 bytes per image"),
        ({"machine": {**MEASURED.machine, "device": "cuda:0"}, "bottleneck": "decoding"}, "the GPU waits for images"),
        ({"extraction": 50.0}, "50% of the bound"),
    ],
)
def test_advice_names_the_bottleneck_and_the_change(changes, said):
    assert said in advice(**changes)


def test_no_advice_is_given_without_a_gain(monkeypatch):
    monkeypatch.setattr(bench, "has_openvino", lambda: True)
    assert advice(forward=MEASURED.forward[:1]) == ""
    monkeypatch.setattr(bench, "has_openvino", lambda: False)
    assert "featpipe[cpu]" in advice(forward=MEASURED.forward[:1])


@pytest.mark.thorough
def test_the_command_prints_a_table_or_json(command, make_folder, tmp_path):

    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def tiny():\n"
        "    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "    return network, lambda image: image[:, :12, :12].float() / 255\n"
    )
    given = [make_folder(), "--backbone", "net:tiny", "--device", "cpu", "--engine", "torch", "--seconds", "1"]
    printed = command("bench", *given).stdout
    assert "upper bound of all steps" in printed
    assert "bottleneck: " in printed
    found = json.loads(command("bench", *given, "--json").stdout)
    assert found["forward"][0]["engine"] == "torch, fused"
