"""What every backbone promises, held against the whole network with its classifier."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from featpipe.backbones import Backbone, Transform, load, prove_frozen, registry
from featpipe.backbones.sources import timm as from_timm
from featpipe.backbones.sources import torchvision
from featpipe.errors import WeightsError

pytestmark = pytest.mark.thorough

WIDTHS = {  # of the last layer before the classifier, from the papers
    "vgg11": 4096,
    "inception_v3": 2048,
    "resnet18": 512,
    "resnet50": 2048,
    "densenet121": 1024,
    "mobilenet_v3_small": 1024,
    "mobilenet_v3_large": 1280,
    "efficientnet_b0": 1280,
    "convnext_tiny": 768,
    "regnet_y_400mf": 440,
    "vit_b_16": 768,
    "swin_t": 768,
    "squeezenet1_1": 512,
    "googlenet": 1024,
    "alexnet": 4096,
    "maxvit_t": 512,
    "mnasnet0_5": 1280,
    "shufflenet_v2_x0_5": 1024,
    "efficientnet_lite0": 1280,
    "efficientnet_lite1": 1280,
    "efficientnet_lite2": 1280,
    "timm/resnet10t": 512,
    "timm/vit_tiny_patch16_224": 192,
    "timm/mobilenetv4_conv_small": 1280,
}
NAMES = sorted(WIDTHS)


@dataclass
class Case:
    name: str
    backbone: Backbone
    full: nn.Module  # the library's own network, classifier and all, with weights of its own
    images: Tensor


def whole(name: str) -> nn.Module:
    """The library's own network, untrained, with statistics that are not those of initialisation."""
    torch.manual_seed(7)
    if name in registry.PACKAGED_BACKBONES:
        network = timm.create_model("tf_" + name)
    elif name.startswith("timm/"):
        network = timm.create_model(name.removeprefix("timm/"))
    else:
        options = {"init_weights": True, "aux_logits": True} if name in ("googlenet", "inception_v3") else {}
        network = models.get_model(name, weights=None, **options)
    for key, value in network.state_dict().items():
        if "running" in key:
            value.copy_(torch.rand_like(value) * 0.2 + (0.5 if key.endswith("var") else -0.1))
    return network.eval()


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name = request.param
    full = whole(name)
    file = tmp_path_factory.mktemp("weights") / "full.safetensors"
    save_file({key: value.contiguous().clone() for key, value in full.state_dict().items()}, file)
    backbone = load(name, weights=file)
    if hasattr(full, "transform_input"):
        full.transform_input = True
    images = torch.rand(2, 3, *backbone.transform.size, generator=torch.Generator().manual_seed(1))
    return Case(name, backbone, full, images)


def classifier(full: nn.Module) -> nn.Module:
    """The layer of 1000 classes that runs last."""
    layers = [layer for layer in full.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    return next(layer for layer in reversed(layers) if layer.weight.shape[0] == 1000)


def into_classifier(full: nn.Module, images: Tensor) -> Tensor:
    """What the whole network feeds to its last layer."""
    seen: list[Tensor] = []
    hook = classifier(full).register_forward_pre_hook(lambda layer, args: seen.append(args[0].clone()))
    with torch.inference_mode():
        full(images)
    hook.remove()
    return seen[0] if seen[0].ndim == 2 else seen[0].mean((2, 3))


def test_the_embedding_is_what_the_whole_network_feeds_its_classifier(case):
    with torch.inference_mode():
        found = case.backbone.embed(case.images)["pooled"]
    expected = into_classifier(case.full, case.images)
    assert found.shape == (2, WIDTHS[case.name])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_the_declared_width_is_the_real_one(case):
    assert case.backbone.width == WIDTHS[case.name]
    assert case.backbone.shapes == {"pooled": (WIDTHS[case.name],)}


def test_no_parameter_of_a_classifier_is_left(case):
    parameters = dict(case.backbone.network.named_parameters())
    assert all(1000 not in parameter.shape for parameter in parameters.values())
    assert not any("aux" in name.lower() for name in parameters)
    full = sum(parameter.numel() for name, parameter in case.full.named_parameters() if "aux" not in name.lower())
    layer = classifier(case.full)
    assert sum(p.numel() for p in parameters.values()) == full - sum(p.numel() for p in layer.parameters())


def test_it_is_frozen(case):
    prove_frozen(case.backbone)


def test_the_facts_are_the_same_for_the_same_weights_in_any_file(case, tmp_path):
    headless = {name: value.contiguous() for name, value in case.backbone.network.state_dict().items()}
    save_file(headless, tmp_path / "headless.safetensors")
    seven = {f"module.{name}": value for name, value in with_classes(case.full, 7).items()}
    torch.save({"state_dict": seven}, tmp_path / "seven.pth")
    for file in ("headless.safetensors", "seven.pth"):
        assert load(case.name, weights=tmp_path / file).to_dict() == case.backbone.to_dict(), file


def with_classes(full: nn.Module, classes: int) -> dict[str, Tensor]:
    layer = classifier(full)
    old = next(name for name, module in full.named_modules() if module is layer)
    return {
        name: value[:classes] if name in (f"{old}.weight", f"{old}.bias") else value
        for name, value in full.state_dict().items()
    }


def test_weights_of_another_network_are_refused(case, tmp_path):
    other = load("mnasnet0_75", weights="none").network if case.name != "mnasnet0_75" else nn.Linear(1, 1)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other\.pth"):
        load(case.name, weights=tmp_path / "other.pth")


def test_an_untrained_one_comes_from_its_seed(case):
    one = load(case.name, weights="none", seed=1)
    assert one.to_dict() == load(case.name, weights="none", seed=1).to_dict()
    assert one.to_dict() != case.backbone.to_dict()
    assert isinstance(one.transform, Transform)


@pytest.mark.parametrize("name", [name for name in registry.TORCHVISION_BACKBONES if name not in WIDTHS])
def test_every_other_torchvision_network_can_be_beheaded(name, monkeypatch):
    for slow in ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_uniform_"):
        monkeypatch.setattr(nn.init, slow, lambda tensor, *args, **kwargs: tensor)
    network = models.get_model(name, weights=None)
    before = sum(parameter.numel() for parameter in network.parameters())
    removed, width = torchvision.remove_classifier(network)
    after = sum(parameter.numel() for parameter in network.parameters())
    assert len(removed) == (2 if name.startswith("squeezenet") else 1)
    assert before - after == 1000 * width + 1000


def test_a_timm_network_of_every_module_loses_its_classifier_and_gains_nothing():
    modules: dict[str, str] = {}
    for name in timm.list_models():
        modules.setdefault(timm.models.model_entrypoint(name).__module__, name)
    for name in modules.values():
        with torch.device("meta"):
            try:
                network = timm.create_model(name)
            except (NotImplementedError, RuntimeError):  # computes while it is built
                continue
        assert from_timm.remove_classifier(network, name) > 0
