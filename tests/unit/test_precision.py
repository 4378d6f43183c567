"""The precision is selected by its effect on the first images, and the selection is reused."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featpipe import backbones, extract, inference
from featpipe.errors import ConfigError
from featpipe.inference import compute_min_cosine, precision, select_precision
from tests.support.logs import logged_warning
from tests.support.networks import Tiny, tiny_transform

CPU = torch.device("cpu")


class CancellingInBf16(nn.Module):
    """Differences of large numbers, which bfloat16 cannot represent."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1)[:, :16] + 1000 * self.weight) - 1000 * self.weight


class OverflowingInFp16(nn.Module):
    """Has intermediate values that are too large for float16."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1)[:, :16] * 1e5 * self.weight) * 1e-5


def make_images(n: int = 5) -> list[Tensor]:
    return list(torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(autouse=True)
def fixed_candidates(monkeypatch):
    """The same candidates on every machine."""
    monkeypatch.setattr(precision, "candidate_precisions", lambda device: ("bf16",))


def load_network(network: nn.Module) -> backbones.Backbone:
    return backbones.load(network, transform=tiny_transform)


def test_a_faster_precision_with_a_sufficient_cosine_is_selected(tiny):
    engine, fidelity = select_precision(tiny, CPU, make_images(), 0.99)
    assert (engine.precision, fidelity.precision) == ("bf16", "bf16")
    fp32_embeddings = inference.Engine(tiny, CPU, batch=8).embed(torch.stack(make_images()))
    bf16_embeddings = inference.Engine(tiny, CPU, "bf16", batch=8).embed(torch.stack(make_images()))
    assert fidelity.cosine == {"bf16": pytest.approx(compute_min_cosine(bf16_embeddings, fp32_embeddings))}
    assert 0.99 < fidelity.cosine["bf16"] < 1


def test_float32_is_selected_if_no_other_precision_suffices():
    engine, fidelity = select_precision(load_network(CancellingInBf16()), CPU, make_images(), 0.999)
    assert (engine.precision, fidelity.precision) == ("fp32", "fp32")
    assert fidelity.cosine["bf16"] < 0.999


def test_the_minimum_cosine_over_images_and_outputs_decides(tiny):
    exact = {"a": np.eye(3, 4, dtype=np.float32), "b": np.ones((3, 2), np.float32)}
    approximate = {"a": exact["a"].copy(), "b": exact["b"] * 7}
    assert compute_min_cosine(approximate, exact) == pytest.approx(1)
    approximate["a"][2] = [0, 1, 1, 0]
    assert compute_min_cosine(approximate, exact) == pytest.approx(2**-0.5)


def test_non_finite_embeddings_never_suffice_and_zeros_equal_zeros(monkeypatch):
    zeros, bad = np.zeros((1, 3), np.float32), np.full((1, 3), np.inf, np.float32)
    assert compute_min_cosine({"a": zeros}, {"a": zeros}) == 1
    assert compute_min_cosine({"a": bad}, {"a": np.ones((1, 3), np.float32)}) == -1
    monkeypatch.setattr(precision, "candidate_precisions", lambda device: ("fp16",))
    assert select_precision(load_network(OverflowingInFp16()), CPU, make_images(), 0.0)[1].precision == "fp32"


def test_without_images_nothing_is_compared(tiny):
    engine, fidelity = select_precision(tiny, CPU, [], 0.5)
    assert (engine.precision, fidelity.images, fidelity.cosine) == ("fp32", 0, {})


def test_the_measurements_are_in_the_manifest(make_folder, tiny, tmp_path):
    cache = extract(make_folder(), backbone=tiny, cache=tmp_path, precision="auto", min_cosine=0.99)
    assert cache.facts["precision"] == "bf16"
    assert cache.manifest["fidelity"]["images"] == 18
    assert cache.manifest["fidelity"]["min_cosine"] == 0.99
    assert cache.manifest["fidelity"]["cosine"]["bf16"] > 0.99


def test_the_cache_equals_that_of_the_selected_precision_by_name(make_folder, tiny, tmp_path):
    folder = make_folder()
    selected = extract(folder, backbone=tiny, cache=tmp_path / "a", precision="auto", min_cosine=0.99)
    named = extract(folder, backbone=tiny, cache=tmp_path / "b", precision="bf16")
    assert selected.manifest["fingerprint"] == named.manifest["fingerprint"]
    assert selected.features().tobytes() == named.features().tobytes()


@pytest.mark.parametrize("out", [None, "photos.h5"])
def test_a_repeated_extraction_measures_nothing_and_reads_no_image(make_folder, tiny, tmp_path, monkeypatch, out, log):
    folder = make_folder()
    for path in folder.rglob("*.jpg"):
        os.utime(path, (1e9, 1e9))  # files that were just written would be read again
    settings = {"backbone": tiny, "cache": tmp_path, "precision": "auto", "min_cosine": 0.99}
    settings |= {"out": tmp_path / out} if out else {}
    first_cache = extract(folder, **settings)
    monkeypatch.setattr("featpipe.data.SampleReader.read", None)
    log.clear()
    second_cache = extract(folder, **settings)
    assert second_cache.path == first_cache.path
    assert not [text for text in log if "minimum cosine" in text]


def test_a_higher_minimum_cosine_is_measured_again(make_folder, tmp_path):
    folder, backbone = make_folder(), load_network(Tiny())
    low_cache = extract(folder, backbone=backbone, cache=tmp_path, precision="auto", min_cosine=0.9)
    high_cache = extract(folder, backbone=backbone, cache=tmp_path, precision="auto", min_cosine=1.0)
    assert (low_cache.facts["precision"], high_cache.facts["precision"]) == ("bf16", "fp32")


def test_bad_images_are_skipped_in_the_measurement(make_folder, tiny, tmp_path):
    folder = make_folder()
    for name in ("00", "01"):
        (folder / "ape" / f"{name}.jpg").write_bytes(b"\xff\xd8\xff nothing")
    with logged_warning("2 damaged"):
        cache = extract(folder, backbone=tiny, cache=tmp_path, precision="auto", min_cosine=0.99)
    assert cache.manifest["fidelity"]["images"] == 16
    assert cache.bad_rows() == {"damaged": 2}


def test_a_minimum_cosine_outside_0_to_1_is_refused(make_folder, tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"min_cosine is 1\.5; give a number from 0 to 1"):
        extract(make_folder(), backbone=tiny, cache=tmp_path, precision="auto", min_cosine=1.5)
