"""The fingerprint changes with everything that changes an embedding, and with nothing else."""

from __future__ import annotations

import ast
import hashlib
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import featpipe
from featpipe import backbones, extraction
from featpipe.backbones import Transform
from featpipe.config import PRECISIONS, STORAGES, ExtractionConfig
from featpipe.extraction import make_facts
from featpipe.storage import compute_fingerprint
from tests.support.networks import Tiny, tiny_transform

EMBEDDING_CODE = [
    *(f"data/{name}.py" for name in ("jpeg", "image", "modalities/image")),
    *(f"backbones/{name}.py" for name in ("backbone", "outputs", "transforms", "sources/efficientnet_lite")),
    *(f"backbones/resize/{name}.py" for name in ("matmul", "embedding_bag")),
    *(f"inference/{name}.py" for name in ("loader", "engine", "flops", "fusion", "openvino", "optimize", "runner")),
]
"""The code between the bytes of an image and its embedding."""

CODE_OF_VERSION = {2: "cebb33c61e1c4503"}


def compute_identity(network=None, transform=tiny_transform, outputs=("pooled",), **settings) -> str:
    backbone = backbones.load(network or Tiny(), transform=transform, outputs=outputs)
    return compute_fingerprint(make_facts(backbone, ExtractionConfig(**settings)))


BATCH_COUNTER = "norm.num_batches_tracked"  # counts training steps; has no effect on a frozen network


@pytest.mark.parametrize("name", [name for name in Tiny().state_dict() if name != BATCH_COUNTER])
def test_any_bit_of_a_weight_or_statistic_changes_the_fingerprint(name):
    network = Tiny()
    before = compute_identity(network)
    value = network.state_dict()[name]
    with torch.no_grad():
        value.view(-1).view(torch.uint8)[-1] ^= 1
    assert compute_identity(network) != before
    with torch.no_grad():
        value.view(-1).view(torch.uint8)[-1] ^= 1
    assert compute_identity(network) == before


CHANGED_PARAMETERS = {
    "resize": 233,
    "crop": (225, 224),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.407),
    "std": (0.229, 0.224, 0.226),
    "mode": "squash",
}


@pytest.mark.parametrize("field", [field.name for field in fields(Transform)])
def test_any_parameter_of_the_transform_changes_the_fingerprint(field):
    transform = Transform((232, 232), (224, 224))
    changed = replace(transform, **{field: CHANGED_PARAMETERS[field]})
    fingerprints = [
        compute_fingerprint(
            make_facts(backbones.load("resnet18", weights="none", transform=candidate), ExtractionConfig())
        )
        for candidate in (transform, changed)
    ]
    assert fingerprints[0] != fingerprints[1]


def test_the_code_of_a_custom_transform_changes_the_fingerprint():
    assert compute_identity(transform=lambda image: tiny_transform(image) * 2) != compute_identity()


@pytest.mark.parametrize("outputs", [["conv"], ["conv:avg"], ["conv:max"], ["conv:gem"], ["conv:none"], ["norm:avg"]])
def test_the_output_and_its_pooling_change_the_fingerprint(outputs):
    fingerprints = {
        compute_identity(outputs=[output])
        for output in ("pooled", "conv:avg", "conv:max", "conv:gem", "conv:none", "norm:avg")
    }
    assert len(fingerprints) == 6
    assert compute_identity(outputs=outputs) in fingerprints


def test_precision_and_storage_change_the_fingerprint():
    fingerprints = {
        compute_identity(precision=precision, storage=storage) for precision in PRECISIONS for storage in STORAGES
    }
    assert len(fingerprints) == len(PRECISIONS) * len(STORAGES)


def test_the_structure_of_a_custom_network_changes_the_fingerprint():
    network = Tiny()
    network.conv.padding = (1, 1)
    assert compute_identity(network) != compute_identity()


def test_the_version_of_the_extraction_code_changes_the_fingerprint(monkeypatch):
    before = compute_identity()
    monkeypatch.setattr(extraction.identity, "EXTRACTION_VERSION", 3)
    assert compute_identity() != before


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other versions of Python unparse code differently")
def test_changed_code_has_a_new_version_or_gives_the_same_bits():
    """On failure: raise EXTRACTION_VERSION if any bit of any embedding changed; then enter the new digest."""
    texts = []
    for name in EMBEDDING_CODE:
        tree = ast.parse((Path(featpipe.__file__).parent / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Expr(ast.Constant(""))
        texts.append(ast.unparse(tree))
    code_digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    assert code_digest == CODE_OF_VERSION[extraction.EXTRACTION_VERSION]


@pytest.mark.parametrize("settings", [{"workers": 1}, {"batch": 3}, {"device": "cpu"}, {"cache": "elsewhere"}])
def test_settings_of_speed_and_place_do_not_change_the_fingerprint(settings):
    assert compute_identity(**settings) == compute_identity()


def test_the_format_of_the_weights_file_does_not_change_the_fingerprint(tmp_path):
    network = Tiny(3)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    digests = {
        backbones.load(Tiny(), weights=tmp_path / name, transform=tiny_transform).digest
        for name in ("w.safetensors", "w.pth")
    }
    assert digests == {backbones.load(network, transform=tiny_transform).digest}
