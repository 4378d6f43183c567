"""A stored identity is used only while its inputs are unchanged."""

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


def set_old_times(path: Path) -> None:
    os.utime(path, (LONG_AGO, LONG_AGO))


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights file that counts as old although it was just written."""
    monkeypatch.setattr(identity, "RACY_NANOSECONDS", -(10**12))
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(backbones.load(NAME, weights="none", seed=1).network.state_dict(), path)
    set_old_times(path)
    return path


def load_and_store(store: IdentityStore, request: BackboneRequest) -> backbones.Backbone:
    backbone = backbones.load(request.name, weights=request.weights, outputs=request.outputs, seed=request.seed)
    store.write(request, backbone, time_ns())
    return backbone


def test_a_stored_identity_is_that_of_the_loaded_backbone(tmp_path: Path, weights: Path) -> None:
    store, request = IdentityStore(tmp_path), BackboneRequest(NAME, str(weights), ("pooled", "stage4:max"), 0)
    assert store.find(request) is None
    backbone = load_and_store(store, request)
    stored = store.find(request)
    assert stored is not None
    assert stored.to_dict() == json.loads(json.dumps(backbone.to_dict()))
    assert list(stored.shapes.items()) == list(backbone.shapes.items())
    assert (stored.name, stored.request) == (backbone.name, backbone.request)
    assert make_facts(stored, ExtractionConfig()) == make_facts(backbone, ExtractionConfig())


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "none"},
        {"weights": None},
        {"outputs": ("stage4:max",)},
        {"outputs": ("pooled", "stage4:max")},
        {"seed": 1},
        {"name": "shufflenet_v2_x1_0"},
    ],
)
def test_another_request_has_no_stored_identity(tmp_path: Path, weights: Path, change: dict[str, object]) -> None:
    store, settings = (
        IdentityStore(tmp_path),
        {"name": NAME, "weights": str(weights), "outputs": ("pooled",), "seed": 0},
    )
    load_and_store(store, BackboneRequest(**settings))
    assert store.find(BackboneRequest(**settings)) is not None
    assert store.find(BackboneRequest(**settings | change)) is None


def test_changed_weights_of_the_same_size_and_modification_time_are_detected(tmp_path: Path, weights: Path) -> None:
    store, request = IdentityStore(tmp_path), BackboneRequest(NAME, str(weights), ("pooled",), 0)
    load_and_store(store, request)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    set_old_times(weights)
    assert store.find(request) is None
    load_and_store(store, request)
    replacement = tmp_path / "replacement"
    replacement.write_bytes(data)
    set_old_times(replacement)
    assert store.find(request) is not None
    replacement.replace(weights)
    assert store.find(request) is None
    weights.unlink()
    assert store.find(request) is None


def test_the_identity_of_weights_that_changed_shortly_before_loading_is_not_stored(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(backbones.load(NAME, weights="none").network.state_dict(), path)
    set_old_times(path)  # a program can set the modification time, but not the change time
    store, request = IdentityStore(tmp_path), BackboneRequest(NAME, str(path), ("pooled",), 0)
    load_and_store(store, request)
    assert store.find(request) is None


@pytest.mark.parametrize("package", identity.PACKAGES)
def test_another_package_version_invalidates_a_stored_identity(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    store, request = IdentityStore(tmp_path), BackboneRequest(NAME, str(weights), ("pooled",), 0)
    load_and_store(store, request)
    installed = identity.version
    monkeypatch.setattr(identity, "version", lambda name: "0.0.0" if name == package else installed(name))
    assert store.find(request) is None


def test_another_download_folder_invalidates_a_stored_identity(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, request = IdentityStore(tmp_path), BackboneRequest(NAME, str(weights), ("pooled",), 0)
    load_and_store(store, request)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert store.find(request) is None


def test_identities_with_custom_code_or_transforms_are_never_stored(tmp_path: Path) -> None:
    for settings in (
        {"backbone": "tests.conftest:Tiny"},
        {"backbone": "resnet18", "transform": lambda image: image.float()},
        {"backbone": backbones.load(NAME, weights="none")},
    ):
        assert extraction.identity._make_backbone_request(ExtractionConfig(**settings)) is None
    backbone = backbones.load(NAME, weights="none", transform=lambda image: image[:, :64, :64].float())
    assert backbone.weight_files is None


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"format": "featpipe-backbones/1", "entries": []}'])
def test_a_damaged_store_is_ignored_and_rewritten(tmp_path: Path, weights: Path, damage: bytes) -> None:
    store, request = IdentityStore(tmp_path), BackboneRequest(NAME, str(weights), ("pooled",), 0)
    store.path.write_bytes(damage)
    assert store.find(request) is None
    load_and_store(store, request)
    assert store.find(request) is not None


def test_an_edited_entry_is_not_used(tmp_path: Path, weights: Path) -> None:
    store, request = IdentityStore(tmp_path), BackboneRequest(NAME, str(weights), ("pooled",), 0)
    load_and_store(store, request)
    text = store.path.read_text()
    assert '"resize": ' in text
    store.path.write_text(text.replace('"source": "torchvision"', '"source": "timm"'))
    assert store.find(request) is None


@pytest.mark.thorough
def test_published_timm_weights_are_identified_by_the_files_in_the_hub_cache(tmp_path: Path) -> None:
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
stored = IdentityStore(Path(".")).find(request)
loaded = sorted({"torch", "timm", "huggingface_hub"} & sys.modules.keys())
backbone = backbones.load(request.name)
IdentityStore(Path(".")).write(request, backbone, time_ns())
print(stored is not None and stored.to_dict()["weights"] == backbone.digest, loaded)
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
        set_old_times(path)
    code = (
        "import sys; from featpipe import extract\n"
        f"cache = extract({str(folder)!r}, cache={str(tmp_path / 'cache')!r}, backbone=sys.argv[1])\n"
        "loaded = sorted({'torch', 'torchvision', 'timm'} & sys.modules.keys())\n"
        "print(cache.path, cache.fingerprint, loaded)"
    )
    command = [sys.executable, "-c", code, "efficientnet_lite0"]
    first_output, second_output = (
        subprocess.check_output(command, text=True, cwd=tmp_path).split(" ", 2) for _ in range(2)
    )
    assert second_output[:2] == first_output[:2]
    assert "torch" in first_output[2]
    assert second_output[2] == "[]\n"
    assert load_backbone(ExtractionConfig()).to_dict()["weights"] in (tmp_path / "cache/.backbones.json").read_text()
    (folder / "ape" / "00.jpg").unlink()
    third_output = subprocess.check_output(command, text=True, cwd=tmp_path)
    assert third_output.startswith(first_output[0])
    assert third_output.endswith(" []\n")  # removing a row needs no network
    assert len(FeatureCache(first_output[0])) == 17
    Image.new("RGB", (40, 30)).save(folder / "ape" / "00.jpg")
    assert "torch" in subprocess.check_output(command, text=True, cwd=tmp_path)
