"""A precision is chosen by what it does to the first images, and the choice is remembered."""

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


class Delicate(nn.Module):
    """Differences of large numbers, which bfloat16 does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1)[:, :16] + 1000 * self.weight) - 1000 * self.weight


class Overflowing(nn.Module):
    """Too large for float16, and only on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1)[:, :16] * 1e5 * self.weight) * 1e-5


def pictures(n: int = 5) -> list[Tensor]:
    return list(torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(autouse=True)
def hardware(monkeypatch):
    """The same on every machine."""
    monkeypatch.setattr(precision, "candidate_precisions", lambda device: ("bf16",))


def loaded(network: nn.Module) -> backbones.Backbone:
    return backbones.load(network, transform=tiny_transform)


def test_the_faster_precision_is_taken_where_it_is_faithful_enough(tiny):
    made, found = select_precision(tiny, CPU, pictures(), 0.99)
    assert (made.precision, found.precision) == ("bf16", "bf16")
    exact = inference.Engine(tiny, CPU, batch=8).embed(torch.stack(pictures()))
    rough = inference.Engine(tiny, CPU, "bf16", batch=8).embed(torch.stack(pictures()))
    assert found.cosine == {"bf16": pytest.approx(compute_min_cosine(rough, exact))}
    assert 0.99 < found.cosine["bf16"] < 1


def test_float32_stays_where_no_other_is():
    made, found = select_precision(loaded(Delicate()), CPU, pictures(), 0.999)
    assert (made.precision, found.precision) == ("fp32", "fp32")
    assert found.cosine["bf16"] < 0.999


def test_the_least_faithful_image_decides(tiny):
    exact = {"a": np.eye(3, 4, dtype=np.float32), "b": np.ones((3, 2), np.float32)}
    found = {"a": exact["a"].copy(), "b": exact["b"] * 7}
    assert compute_min_cosine(found, exact) == pytest.approx(1)
    found["a"][2] = [0, 1, 1, 0]
    assert compute_min_cosine(found, exact) == pytest.approx(2**-0.5)


def test_numbers_that_are_not_finite_are_never_faithful_and_zeros_are_zeros(monkeypatch):
    zeros, bad = np.zeros((1, 3), np.float32), np.full((1, 3), np.inf, np.float32)
    assert compute_min_cosine({"a": zeros}, {"a": zeros}) == 1
    assert compute_min_cosine({"a": bad}, {"a": np.ones((1, 3), np.float32)}) == -1
    monkeypatch.setattr(precision, "candidate_precisions", lambda device: ("fp16",))
    assert select_precision(loaded(Overflowing()), CPU, pictures(), 0.0)[1].precision == "fp32"


def test_without_an_image_nothing_is_compared(tiny):
    made, found = select_precision(tiny, CPU, [], 0.5)
    assert (made.precision, found.images, found.cosine) == ("fp32", 0, {})


def test_what_was_measured_and_chosen_is_in_the_manifest(make_folder, tiny, tmp_path):
    cache = extract(make_folder(), backbone=tiny, cache=tmp_path, precision="auto", min_cosine=0.99)
    assert cache.facts["precision"] == "bf16"
    assert cache.manifest["fidelity"]["images"] == 18
    assert cache.manifest["fidelity"]["min_cosine"] == 0.99
    assert cache.manifest["fidelity"]["cosine"]["bf16"] > 0.99


def test_it_is_the_cache_that_the_chosen_precision_gives_by_name(make_folder, tiny, tmp_path):
    folder = make_folder()
    chosen = extract(folder, backbone=tiny, cache=tmp_path / "a", precision="auto", min_cosine=0.99)
    named = extract(folder, backbone=tiny, cache=tmp_path / "b", precision="bf16")
    assert chosen.manifest["fingerprint"] == named.manifest["fingerprint"]
    assert chosen.features().tobytes() == named.features().tobytes()


@pytest.mark.parametrize("out", [None, "photos.h5"])
def test_typed_again_nothing_is_measured_and_no_image_is_read(make_folder, tiny, tmp_path, monkeypatch, out, log):
    folder = make_folder()
    for path in folder.rglob("*.jpg"):
        os.utime(path, (1e9, 1e9))  # a file that changed just now is read again
    settings = {"backbone": tiny, "cache": tmp_path, "precision": "auto", "min_cosine": 0.99}
    settings |= {"out": tmp_path / out} if out else {}
    first = extract(folder, **settings)
    monkeypatch.setattr("featpipe.data.SampleReader.read", None)
    log.clear()
    again = extract(folder, **settings)
    assert again.path == first.path
    assert not [text for text in log if "least cosine" in text]


def test_a_higher_cosine_is_measured_again(make_folder, tmp_path):
    folder, net = make_folder(), loaded(Tiny())
    low = extract(folder, backbone=net, cache=tmp_path, precision="auto", min_cosine=0.9)
    high = extract(folder, backbone=net, cache=tmp_path, precision="auto", min_cosine=1.0)
    assert (low.facts["precision"], high.facts["precision"]) == ("bf16", "fp32")


def test_bad_images_at_the_front_are_passed_over(make_folder, tiny, tmp_path):
    folder = make_folder()
    for name in ("00", "01"):
        (folder / "ape" / f"{name}.jpg").write_bytes(b"\xff\xd8\xff nothing")
    with logged_warning("2 damaged"):
        cache = extract(folder, backbone=tiny, cache=tmp_path, precision="auto", min_cosine=0.99)
    assert cache.manifest["fidelity"]["images"] == 16
    assert cache.bad_rows() == {"damaged": 2}


def test_a_cosine_is_from_0_to_1(make_folder, tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"min_cosine is 1\.5; give a number from 0 to 1"):
        extract(make_folder(), backbone=tiny, cache=tmp_path, precision="auto", min_cosine=1.5)
