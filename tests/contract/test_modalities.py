"""A second modality is a row of a table: extraction, training, prediction and the report work with it unchanged."""

from __future__ import annotations

import csv
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import featpipe
from featpipe import backbones, data
from featpipe.data import MODALITIES, Modality, encode_png, encode_preview, get_modality
from featpipe.errors import ArchiveError, ConfigError, SampleError
from featpipe.status import Status

LENGTH = 4


@contextmanager
def decode_numbers(content: bytes):
    if len(content) != 4 * LENGTH:
        raise SampleError(f"{len(content)} bytes, expected {4 * LENGTH}", status=Status.DAMAGED)
    yield torch.from_numpy(np.frombuffer(content, "<f4").copy())


def preview_numbers(content: bytes, size: int) -> bytes:
    with decode_numbers(content):
        pixels = np.frombuffer(content, np.uint8).reshape(1, -1)
    return encode_preview(encode_png(pixels), size)


NUMBER = Modality(
    name="number",
    decoded_suffixes=(".num",),
    suffixes=frozenset([".num"]),
    decode=decode_numbers,
    to_item=lambda values: torch.as_tensor(values, dtype=torch.float32),
    to_list=list,
    make_probes=lambda: list(torch.linspace(-3, 3, 3 * LENGTH).reshape(3, LENGTH)),
    encode_preview=preview_numbers,
    make_encoded_samples=lambda: ([struct.pack("<4f", i, 1, 2, 3) for i in range(32)], "synthetic numbers"),
)


class Centering:
    """Subtracts a constant."""

    modality = "number"
    input_shape = (LENGTH,)
    input_dtype = torch.float32

    def __call__(self, item):
        return self.normalize(self.prepare(item))

    def prepare(self, item):
        return item

    def collate(self, items):
        return torch.stack(items)

    def normalize(self, batch):
        return batch - 1

    def to_dict(self):
        return {"center": 1}


@pytest.fixture
def number_modality(monkeypatch):
    monkeypatch.setitem(MODALITIES, "number", NUMBER)


@pytest.fixture
def backbone(number_modality):
    torch.manual_seed(0)
    return backbones.load(nn.Sequential(nn.Linear(LENGTH, 8), nn.Tanh()), transform=Centering())


@pytest.fixture
def archive(tmp_path) -> Path:
    """Two classes of 20 files with means 0 and 2, a damaged file, and an image, which is not of this modality."""
    rng = np.random.default_rng(0)
    for name, mean in (("low", 0), ("high", 2)):
        (tmp_path / "numbers" / name).mkdir(parents=True)
        for i in range(20):
            values = rng.normal(mean, 0.3, LENGTH).astype("<f4")
            (tmp_path / "numbers" / name / f"{i:02}.num").write_bytes(values.tobytes())
    (tmp_path / "numbers" / "low" / "damaged.num").write_bytes(b"123")
    (tmp_path / "numbers" / "low" / "photo.png").write_bytes(encode_png(np.zeros((4, 4, 3), np.uint8)))
    return tmp_path / "numbers"


def test_an_unknown_modality_is_refused_with_the_known_ones():
    assert list(MODALITIES) == ["image"]
    with pytest.raises(ConfigError, match="image"):
        get_modality("imag")


def test_an_index_lists_the_samples_of_one_modality(archive, number_modality):
    index = data.index(archive, modality="number")
    assert len(index) == 41
    assert index.modality == "number"
    assert index.ignored == {".png": 1}
    assert len(data.index(archive)) == 1
    (archive / "low" / "photo.png").unlink()
    with pytest.raises(ArchiveError, match=r"no image; found 41 \.num"):
        data.index(archive)


def test_extraction_embeds_the_items_of_the_backbones_modality(archive, backbone, tmp_path, log):
    cache = featpipe.extract(archive, backbone=backbone, cache=tmp_path / "cache", max_bad=1)
    assert cache.modality == "number"
    assert [Status(code).word for code in cache.status_codes if code] == ["damaged"]
    assert any("1 damaged" in message for message in log)
    rows = np.flatnonzero(cache.status_codes == 0)
    items = torch.stack([torch.from_numpy(np.fromfile(archive / cache.ids[row], "<f4")) for row in rows])
    expected = backbone.network(items - 1).detach().numpy()
    np.testing.assert_allclose(cache.features()[rows], expected, atol=1e-5)


def test_a_model_is_trained_and_predicts(archive, backbone, tmp_path, log):
    cache = featpipe.extract(archive, backbone=backbone, cache=tmp_path / "cache", max_bad=1)
    featpipe.train(cache, head="logistic").save(tmp_path / "numbers.model")
    model = featpipe.load_model(tmp_path / "numbers.model", backbone=backbone)
    assert model.modality == "number"
    assert model.predict([np.zeros(LENGTH), np.full(LENGTH, 2.0), archive / "high" / "00.num"]).tolist() == [
        "low",
        "high",
        "high",
    ]
    featpipe.predict(model, archive, tmp_path / "predictions.csv", max_bad=1)
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if "damaged" not in row["id"]]
    assert len(rows) == 40
    assert all(row["id"].startswith(row["label"]) for row in rows)


def test_the_report_shows_the_previews_of_the_modality(archive, backbone, tmp_path, log):
    from featpipe.report.thumbnails import Thumbnails

    cache = featpipe.extract(archive, backbone=backbone, cache=tmp_path / "cache", max_bad=1)
    thumbnails = Thumbnails(cache).load(range(len(cache)))
    assert len(thumbnails) == 40
    assert all(content.startswith(b"RIFF") for content in thumbnails.values())


def test_stored_embeddings_are_verified_against_the_archive(archive, backbone, tmp_path, log):
    cache = featpipe.extract(archive, backbone=backbone, cache=tmp_path / "cache", max_bad=1)
    report = featpipe.verify(cache.path, sample=5, backbone=backbone)
    assert report.embedded == 5
    assert not report.damaged


def test_a_network_that_is_not_frozen_is_detected_with_the_modalitys_probes(archive, number_modality, tmp_path):
    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(LENGTH, 2)
            self.calls = nn.Parameter(torch.zeros(1), requires_grad=False)

        def forward(self, numbers):
            self.calls += 1
            return self.linear(numbers) + self.calls

    with pytest.raises(ConfigError, match="not frozen"):
        backbones.prove_frozen(backbones.load(Drifting(), transform=Centering()))


def test_fine_tuning_on_another_modality_is_refused(archive, backbone, tmp_path, log):
    cache = featpipe.extract(archive, backbone=backbone, cache=tmp_path / "cache", max_bad=1)
    model = featpipe.train(cache, head="logistic").attach(backbone)
    with pytest.raises(ConfigError, match="number samples; fine-tuning and stages need images"):
        featpipe.finetune(model, archive, cache=tmp_path / "cache", out=tmp_path / "tuned.model", epochs=1)
