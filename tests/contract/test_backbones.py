"""Every backbone, compared with the full network including its classifier."""

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
class BackboneCase:
    name: str
    backbone: Backbone
    full: nn.Module  # the library's network with its classifier, with the same weights
    images: Tensor


def make_full_network(name: str) -> nn.Module:
    """Make the library's network, untrained, with batch statistics other than the initial ones."""
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
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BackboneCase:
    name = request.param
    full = make_full_network(name)
    file = tmp_path_factory.mktemp("weights") / "full.safetensors"
    save_file({key: value.contiguous().clone() for key, value in full.state_dict().items()}, file)
    backbone = load(name, weights=file)
    if hasattr(full, "transform_input"):
        full.transform_input = True
    images = torch.rand(2, 3, *backbone.transform.size, generator=torch.Generator().manual_seed(1))
    return BackboneCase(name, backbone, full, images)


def find_classifier(full: nn.Module) -> nn.Module:
    """Find the last layer with 1000 outputs."""
    layers = [layer for layer in full.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    return next(layer for layer in reversed(layers) if layer.weight.shape[0] == 1000)


def compute_classifier_input(full: nn.Module, images: Tensor) -> Tensor:
    """Record the input of the last layer of the full network."""
    classifier_inputs: list[Tensor] = []
    hook = find_classifier(full).register_forward_pre_hook(
        lambda layer, args: classifier_inputs.append(args[0].clone())
    )
    with torch.inference_mode():
        full(images)
    hook.remove()
    return classifier_inputs[0] if classifier_inputs[0].ndim == 2 else classifier_inputs[0].mean((2, 3))


def test_the_embedding_is_the_input_of_the_full_networks_classifier(case):
    with torch.inference_mode():
        embeddings = case.backbone.embed(case.images)["pooled"]
    expected = compute_classifier_input(case.full, case.images)
    assert embeddings.shape == (2, WIDTHS[case.name])
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_the_declared_width_is_that_of_the_embedding(case):
    assert case.backbone.width == WIDTHS[case.name]
    assert case.backbone.shapes == {"pooled": (WIDTHS[case.name],)}


def test_no_parameter_of_the_classifier_remains(case):
    parameters = dict(case.backbone.network.named_parameters())
    assert all(1000 not in parameter.shape for parameter in parameters.values())
    assert not any("aux" in name.lower() for name in parameters)
    full_count = sum(parameter.numel() for name, parameter in case.full.named_parameters() if "aux" not in name.lower())
    layer = find_classifier(case.full)
    assert sum(p.numel() for p in parameters.values()) == full_count - sum(p.numel() for p in layer.parameters())


def test_the_backbone_is_frozen(case):
    prove_frozen(case.backbone)


def test_the_identity_does_not_depend_on_the_weights_file(case, tmp_path):
    headless = {name: value.contiguous() for name, value in case.backbone.network.state_dict().items()}
    save_file(headless, tmp_path / "headless.safetensors")
    seven_classes = {f"module.{name}": value for name, value in truncate_classes(case.full, 7).items()}
    torch.save({"state_dict": seven_classes}, tmp_path / "seven.pth")
    for file in ("headless.safetensors", "seven.pth"):
        assert load(case.name, weights=tmp_path / file).to_dict() == case.backbone.to_dict(), file


def truncate_classes(full: nn.Module, classes: int) -> dict[str, Tensor]:
    layer = find_classifier(full)
    layer_name = next(name for name, module in full.named_modules() if module is layer)
    return {
        name: value[:classes] if name in (f"{layer_name}.weight", f"{layer_name}.bias") else value
        for name, value in full.state_dict().items()
    }


def test_weights_of_another_network_are_refused(case, tmp_path):
    other_network = load("mnasnet0_75", weights="none").network if case.name != "mnasnet0_75" else nn.Linear(1, 1)
    torch.save(other_network.state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other\.pth"):
        load(case.name, weights=tmp_path / "other.pth")


def test_an_untrained_network_is_determined_by_its_seed(case):
    untrained = load(case.name, weights="none", seed=1)
    assert untrained.to_dict() == load(case.name, weights="none", seed=1).to_dict()
    assert untrained.to_dict() != case.backbone.to_dict()
    assert isinstance(untrained.transform, Transform)


@pytest.mark.parametrize("name", [name for name in registry.TORCHVISION_BACKBONES if name not in WIDTHS])
def test_the_classifier_of_every_other_torchvision_network_can_be_removed(name, monkeypatch):
    for initializer in (
        "kaiming_normal_",
        "kaiming_uniform_",
        "normal_",
        "trunc_normal_",
        "uniform_",
        "xavier_uniform_",
    ):
        monkeypatch.setattr(nn.init, initializer, lambda tensor, *args, **kwargs: tensor)
    network = models.get_model(name, weights=None)
    parameters_before = sum(parameter.numel() for parameter in network.parameters())
    removed, width = torchvision.remove_classifier(network)
    parameters_after = sum(parameter.numel() for parameter in network.parameters())
    assert len(removed) == (2 if name.startswith("squeezenet") else 1)
    assert parameters_before - parameters_after == 1000 * width + 1000


def test_a_timm_network_of_every_module_loses_its_classifier_without_new_parameters():
    modules: dict[str, str] = {}
    for name in timm.list_models():
        modules.setdefault(timm.models.model_entrypoint(name).__module__, name)
    for name in modules.values():
        with torch.device("meta"):
            try:
                network = timm.create_model(name)
            except (NotImplementedError, RuntimeError):  # its construction computes with values
                continue
        assert from_timm.remove_classifier(network, name) > 0
