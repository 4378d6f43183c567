"""Whatever changes an embedding changes the fingerprint; what does not, does not."""

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

CODE = [
    *(f"data/{name}.py" for name in ("jpeg", "image", "modalities/image")),
    *(f"backbones/{name}.py" for name in ("backbone", "outputs", "transforms", "sources/efficientnet_lite")),
    *(f"backbones/resize/{name}.py" for name in ("matmul", "embedding_bag")),
    *(f"inference/{name}.py" for name in ("loader", "engine", "flops", "fusion", "openvino", "optimize", "runner")),
]
"""What is run for each image between its bytes and its row."""

CODE_OF_VERSION = {2: "7bd9fd7552db9f35"}


def identity(network=None, transform=tiny_transform, outputs=("pooled",), **settings) -> str:
    loaded = backbones.load(network or Tiny(), transform=transform, outputs=outputs)
    return compute_fingerprint(make_facts(loaded, ExtractionConfig(**settings)))


COUNTER = "norm.num_batches_tracked"  # of training steps; decides nothing in a frozen network


@pytest.mark.parametrize("name", [name for name in Tiny().state_dict() if name != COUNTER])
def test_one_bit_of_any_weight_or_statistic(name):
    network = Tiny()
    before = identity(network)
    value = network.state_dict()[name]
    with torch.no_grad():
        value.view(-1).view(torch.uint8)[-1] ^= 1
    assert identity(network) != before
    with torch.no_grad():
        value.view(-1).view(torch.uint8)[-1] ^= 1
    assert identity(network) == before


OTHER = {
    "resize": 233,
    "crop": (225, 224),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.407),
    "std": (0.229, 0.224, 0.226),
    "mode": "squash",
}


@pytest.mark.parametrize("field", [field.name for field in fields(Transform)])
def test_any_parameter_of_the_transform(field):
    transform = Transform((232, 232), (224, 224))
    other = replace(transform, **{field: OTHER[field]})
    found = [
        compute_fingerprint(make_facts(backbones.load("resnet18", weights="none", transform=given), ExtractionConfig()))
        for given in (transform, other)
    ]
    assert found[0] != found[1]


def test_the_code_of_a_transform_of_ones_own():
    assert identity(transform=lambda image: tiny_transform(image) * 2) != identity()


@pytest.mark.parametrize("outputs", [["conv"], ["conv:avg"], ["conv:max"], ["conv:gem"], ["conv:none"], ["norm:avg"]])
def test_the_output_and_its_pooling(outputs):
    seen = {
        identity(outputs=[other]) for other in ("pooled", "conv:avg", "conv:max", "conv:gem", "conv:none", "norm:avg")
    }
    assert len(seen) == 6
    assert identity(outputs=outputs) in seen


def test_the_numeric_precision_and_the_storage():
    found = {identity(precision=precision, storage=storage) for precision in PRECISIONS for storage in STORAGES}
    assert len(found) == len(PRECISIONS) * len(STORAGES)


def test_the_structure_of_a_network_of_ones_own():
    network = Tiny()
    network.conv.padding = (1, 1)
    assert identity(network) != identity()


def test_the_version_of_the_extraction_code(monkeypatch):
    before = identity()
    monkeypatch.setattr(extraction.identity, "EXTRACTION_VERSION", 3)
    assert identity() != before


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other versions of Python write code otherwise")
def test_code_that_changed_has_another_version_or_was_seen_to_give_the_same_bits():
    """When this fails: if any embedding changed by any bit, raise EXTRACTION_VERSION; then state the new digest."""
    texts = []
    for name in CODE:
        tree = ast.parse((Path(featpipe.__file__).parent / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Expr(ast.Constant(""))
        texts.append(ast.unparse(tree))
    found = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    assert found == CODE_OF_VERSION[extraction.EXTRACTION_VERSION]


@pytest.mark.parametrize("settings", [{"workers": 1}, {"batch": 3}, {"device": "cpu"}, {"cache": "elsewhere"}])
def test_how_fast_and_where_it_runs_is_not_part_of_it(settings):
    assert identity(**settings) == identity()


def test_the_format_of_the_file_of_weights_is_not_part_of_it(tmp_path):
    network = Tiny(3)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    digests = {
        backbones.load(Tiny(), weights=tmp_path / name, transform=tiny_transform).digest
        for name in ("w.safetensors", "w.pth")
    }
    assert digests == {backbones.load(network, transform=tiny_transform).digest}
