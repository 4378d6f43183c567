"""A remembered identity is used only while nothing that decides it has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import time_ns

import pytest
import safetensors.torch
import timm
from PIL import Image

from featpipe import FeatureCache, backbones, extraction
from featpipe.backbones import BackboneRequest, IdentityStore, identity
from featpipe.config import ExtractionConfig
from featpipe.extraction import load_backbone, make_facts

NAME = "shufflenet_v2_x0_5"
LONG_AGO = 10**9  # seconds


def age(path: Path) -> None:
    os.utime(path, (LONG_AGO, LONG_AGO))


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights file; its change time, which is now, is taken for old."""
    monkeypatch.setattr(identity, "RACY_NANOSECONDS", -(10**12))
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(backbones.load(NAME, weights="none", seed=1).network.state_dict(), path)
    age(path)
    return path


def remember(store: IdentityStore, request: BackboneRequest) -> backbones.Backbone:
    backbone = backbones.load(request.name, weights=request.weights, outputs=request.outputs, seed=request.seed)
    store.write(request, backbone, time_ns())
    return backbone


def test_a_remembered_identity_is_that_of_the_loaded_backbone(tmp_path: Path, weights: Path) -> None:
    store, request = IdentityStore(tmp_path), BackboneRequest(NAME, str(weights), ("pooled", "stage4:max"), 0)
    assert store.find(request) is None
    backbone = remember(store, request)
    remembered = store.find(request)
    assert remembered is not None
    assert remembered.to_dict() == json.loads(json.dumps(backbone.to_dict()))
    assert list(remembered.shapes.items()) == list(backbone.shapes.items())
    assert (remembered.name, remembered.request) == (backbone.name, backbone.request)
    assert make_facts(remembered, ExtractionConfig()) == make_facts(backbone, ExtractionConfig())


@pytest.mark.parametrize(
    "other",
    [
        {"weights": "none"},
        {"weights": None},
        {"outputs": ("stage4:max",)},
        {"outputs": ("pooled", "stage4:max")},
        {"seed": 1},
        {"name": "shufflenet_v2_x1_0"},
    ],
)
def test_another_request_has_another_identity(tmp_path: Path, weights: Path, other: dict[str, object]) -> None:
    store, settings = (
        IdentityStore(tmp_path),
        {"name": NAME, "weights": str(weights), "outputs": ("pooled",), "seed": 0},
    )
    remember(store, BackboneRequest(**settings))
    assert store.find(BackboneRequest(**settings)) is not None
    assert store.find(BackboneRequest(**settings | other)) is None


def test_weights_of_the_same_size_and_modification_time_are_not_taken_for_the_old_ones(
    tmp_path: Path, weights: Path
) -> None:
    store, request = IdentityStore(tmp_path), BackboneRequest(NAME, str(weights), ("pooled",), 0)
    remember(store, request)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    age(weights)
    assert store.find(request) is None
    remember(store, request)
    replacement = tmp_path / "replacement"
    replacement.write_bytes(data)
    age(replacement)
    assert store.find(request) is not None
    replacement.replace(weights)
    assert store.find(request) is None
    weights.unlink()
    assert store.find(request) is None


def test_weights_that_changed_shortly_before_they_were_read_are_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(backbones.load(NAME, weights="none").network.state_dict(), path)
    age(path)  # anybody can set this time; nobody can set the change time
    store, request = IdentityStore(tmp_path), BackboneRequest(NAME, str(path), ("pooled",), 0)
    remember(store, request)
    assert store.find(request) is None


@pytest.mark.parametrize("package", identity.PACKAGES)
def test_another_version_of_a_package_is_another_environment(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    store, request = IdentityStore(tmp_path), BackboneRequest(NAME, str(weights), ("pooled",), 0)
    remember(store, request)
    installed = identity.version
    monkeypatch.setattr(identity, "version", lambda name: "0.0.0" if name == package else installed(name))
    assert store.find(request) is None


def test_another_place_for_downloads_is_another_environment(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, request = IdentityStore(tmp_path), BackboneRequest(NAME, str(weights), ("pooled",), 0)
    remember(store, request)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert store.find(request) is None


def test_code_of_the_users_own_and_given_transforms_are_never_remembered(tmp_path: Path) -> None:
    for settings in (
        {"backbone": "tests.conftest:Tiny"},
        {"backbone": "resnet18", "transform": lambda image: image.float()},
        {"backbone": backbones.load(NAME, weights="none")},
    ):
        assert extraction.identity._make_backbone_request(ExtractionConfig(**settings)) is None
    backbone = backbones.load(NAME, weights="none", transform=lambda image: image[:, :64, :64].float())
    assert backbone.weight_files is None


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"format": "featpipe-backbones/1", "entries": []}'])
def test_a_damaged_store_remembers_nothing_and_is_written_again(tmp_path: Path, weights: Path, damage: bytes) -> None:
    store, request = IdentityStore(tmp_path), BackboneRequest(NAME, str(weights), ("pooled",), 0)
    store.path.write_bytes(damage)
    assert store.find(request) is None
    remember(store, request)
    assert store.find(request) is not None


def test_an_entry_that_was_edited_is_not_used(tmp_path: Path, weights: Path) -> None:
    store, request = IdentityStore(tmp_path), BackboneRequest(NAME, str(weights), ("pooled",), 0)
    remember(store, request)
    text = store.path.read_text()
    assert '"resize": ' in text
    store.path.write_text(text.replace('"source": "torchvision"', '"source": "timm"'))
    assert store.find(request) is None


@pytest.mark.thorough
def test_published_weights_of_timm_are_remembered_by_the_files_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    network = timm.create_model("tf_mobilenetv3_small_minimal_100")
    repository = tmp_path / "hub" / f"models--{network.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    safetensors.torch.save_file(network.state_dict(), snapshot / "model.safetensors")
    code = """
import sys
from pathlib import Path
from time import time_ns
from featpipe import backbones
from featpipe.backbones import BackboneRequest, IdentityStore, identity

identity.RACY_NANOSECONDS = -(10**12)
request = BackboneRequest("timm/tf_mobilenetv3_small_minimal_100", None, ("pooled",), 0)
remembered = IdentityStore(Path(".")).find(request)
loaded = sorted({"torch", "timm", "huggingface_hub"} & sys.modules.keys())
backbone = backbones.load(request.name)
IdentityStore(Path(".")).write(request, backbone, time_ns())
print(remembered is not None and remembered.to_dict()["weights"] == backbone.digest, loaded)
"""
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def look_up() -> str:
        return subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path, env=environment)

    assert [look_up(), look_up()] == ["False []\n", "True []\n"]
    (repository / "refs" / "main").write_text("0" * 40)
    assert look_up() == "False []\n"


@pytest.mark.thorough
def test_a_second_extraction_gives_the_same_cache_and_imports_no_torch(make_folder, tmp_path: Path) -> None:
    folder = make_folder()
    for path in folder.rglob("*.*"):
        age(path)
    code = (
        "import sys; from featpipe import extract\n"
        f"cache = extract({str(folder)!r}, cache={str(tmp_path / 'cache')!r}, backbone=sys.argv[1])\n"
        "loaded = sorted({'torch', 'torchvision', 'timm'} & sys.modules.keys())\n"
        "print(cache.path, cache.fingerprint, loaded)"
    )
    command = [sys.executable, "-c", code, "efficientnet_lite0"]
    first, second = (subprocess.check_output(command, text=True, cwd=tmp_path).split(" ", 2) for _ in range(2))
    assert second[:2] == first[:2]
    assert "torch" in first[2]
    assert second[2] == "[]\n"
    assert load_backbone(ExtractionConfig()).to_dict()["weights"] in (tmp_path / "cache/.backbones.json").read_text()
    (folder / "ape" / "00.jpg").unlink()
    third = subprocess.check_output(command, text=True, cwd=tmp_path)
    assert third.startswith(first[0])
    assert third.endswith(" []\n")  # a row that goes needs no network
    assert len(FeatureCache(first[0])) == 17
    Image.new("RGB", (40, 30)).save(folder / "ape" / "00.jpg")
    assert "torch" in subprocess.check_output(command, text=True, cwd=tmp_path)
