"""A network made ready for a CPU gives the network's own answers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featpipe import backbones
from featpipe.errors import ConfigError
from featpipe.inference import Engine, fusion, optimize
from featpipe.inference.fusion import fuse_convolutions
from featpipe.inference.optimize import export_graph
from tests.support.networks import ByHand, Deciding, Remembering, Tiny, tiny_transform

CPU = torch.device("cpu")
MANY = 10**6


def images(n: int, size: int = 12) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


class Varied(nn.Module):
    """Convolutions as they occur: with and without bias and norm, in groups, padded by hand, summed, activated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm2 = nn.BatchNorm2d(16, affine=False)
        self.plain = nn.Conv2d(16, 16, 1)
        self.words = nn.Conv2d(16, 16, 3, padding="same")
        self.norm3 = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 8, 1, bias=False)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    nn.init.normal_(module.weight)
                    nn.init.normal_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardtanh(self.norm(self.stem(nn.functional.pad(x, (0, 1, 0, 1)))), 0.0, 6.0)
        y = nn.functional.silu(self.norm2(self.depthwise(x)), inplace=True)
        y = nn.functional.relu(self.norm3(self.plain(y)) + x, inplace=True)
        y = nn.functional.hardswish(self.words(nn.functional.dropout(y, 0.5, self.training)))
        return self.last(y).sigmoid().mean((2, 3))


class Shared(nn.Module):
    """Values between a convolution and what follows it that somebody else uses too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 1)
        self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        raw = self.first(x)
        normed = self.norm(raw)
        again = self.second(normed)
        normed.relu_()  # after it was read
        return (raw + normed.relu() * again + again.add_(normed)).mean((2, 3))


def loaded(network: nn.Module, **more: object) -> backbones.Backbone:
    return backbones.load(network, transform=tiny_transform, **more)


def answers(engine: Engine, x: Tensor) -> dict[str, np.ndarray]:
    return engine.embed(x)


@pytest.mark.parametrize("network", [Tiny, Varied, Shared])
@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_a_network_made_ready_gives_its_own_answers(network, kind):
    if kind == "openvino":
        pytest.importorskip("openvino")
    net = loaded(network())
    made = Engine(net, CPU, kind=kind, images=MANY)
    assert made.name != "torch"
    expected = answers(Engine(net, CPU), images(3))["pooled"]
    assert np.allclose(answers(made, images(3))["pooled"], expected, rtol=1e-4, atol=1e-5)


def fused_calls(network: nn.Module, **more: object) -> list[str]:
    net = loaded(network, **more)
    weights = dict(net.network.named_parameters()) | dict(net.network.named_buffers())
    module = fuse_convolutions(export_graph(net, 2), weights, torch.float32)
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def test_norms_sums_and_activations_become_part_of_their_convolution():
    calls = fused_calls(Varied())
    assert [name.removeprefix("mkldnn._convolution_pointwise.") for name in calls if "mkldnn" in name] == [
        "default",  # stem, norm, hardtanh
        "default",  # depthwise, norm, silu
        "binary",  # plain, norm, sum, relu
        "default",  # last, sigmoid
    ]
    assert not [name for name in calls if "batch_norm" in name or "dropout" in name]
    assert [name for name in calls if "conv2d" in name] == ["aten.conv2d.padding"]


class Padded(nn.Module):
    """A convolution of each channel by itself, of maps that were padded by hand."""

    def __init__(self, sizes: tuple[int, ...], kernel: int = 3, dilation: int = 1, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sizes, self.shared = sizes, shared
        self.first = nn.Conv2d(3, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, kernel, stride=2, dilation=dilation, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.first(x).relu(), self.sizes)
        y = self.depthwise(x).relu().mean((2, 3))
        return y + x.mean((2, 3)) if self.shared else y


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("sizes", "kernel"), [((0, 1, 0, 1), 3), ((1, 2, 1, 2), 5), ((1, 0, 2, 0), 3), ((2, 2, 2, 2), 5)]
)
def test_padding_becomes_part_of_a_depthwise_convolution_to_the_bit(sizes, kernel, precision, monkeypatch):
    found = answers(Engine(loaded(Padded(sizes, kernel)), CPU, precision, kind="torch", images=MANY), images(3))
    assert not [name for name in fused_calls(Padded(sizes, kernel)) if "pad" in name]
    monkeypatch.setattr(fusion, "_is_padded_depthwise", lambda convolution: False)
    assert [name for name in fused_calls(Padded(sizes, kernel)) if "pad" in name]
    before = answers(Engine(loaded(Padded(sizes, kernel)), CPU, precision, kind="torch", images=MANY), images(3))
    assert np.array_equal(found["pooled"], before["pooled"])


@pytest.mark.parametrize("network", [((0, 1, 0, 1), 3, 1, True), ((0, -1, 0, 1), 3), ((0, 1, 0, 1), 3, 2)])
def test_padding_that_somebody_else_sees_or_that_is_of_another_kind_stays(network):
    assert [name for name in fused_calls(Padded(*network)) if "pad" in name]
    expected = answers(Engine(loaded(Padded(*network)), CPU), images(3))["pooled"]
    found = answers(Engine(loaded(Padded(*network)), CPU, kind="torch", images=MANY), images(3))["pooled"]
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_no_output_needs_is_not_in_the_graph():
    calls = fused_calls(Varied(), outputs=["plain:avg"])
    assert len([name for name in calls if "mkldnn" in name]) == 3
    assert not [name for name in calls if "conv2d" in name]


def test_what_somebody_else_uses_stays():
    calls = fused_calls(Shared())
    assert "aten.batch_norm.default" in calls


@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_inner_outputs_come_from_the_graph_too(kind):
    if kind == "openvino":
        pytest.importorskip("openvino")
    net = loaded(Varied(), outputs=["plain:avg", "norm:max", "depthwise:none"])
    made = Engine(net, CPU, kind=kind, images=MANY)
    assert made.name != "torch"
    found, expected = answers(made, images(3)), answers(Engine(net, CPU), images(3))
    assert list(found) == list(expected) == ["plain:avg", "norm:max", "depthwise:none"]
    assert all(np.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5) for name in expected)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["efficientnet_lite0", "timm/vit_tiny_patch16_224"])
@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_networks_of_the_libraries_keep_a_cosine_of_one_in_float32_and_are_near_in_bf16(name, kind):
    if kind == "openvino":
        pytest.importorskip("openvino")
    net = backbones.load(name, weights=None if name == "efficientnet_lite0" else "none")
    noise = torch.randint(0, 256, (2, 3, *net.transform.size), dtype=torch.uint8)
    expected = answers(Engine(net, CPU, batch=2), noise)["pooled"]
    for precision, least in (("fp32", 1 - 1e-6), ("bf16", 0.98)):
        made = Engine(net, CPU, precision, batch=2, kind=kind, images=MANY)
        if precision == "fp32" or kind == "openvino" or torch.cpu._is_avx512_bf16_supported():
            assert made.name != "torch"  # a CPU without bfloat16 has no fused operators of that precision
        found = answers(made, noise)["pooled"]
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        assert ((found * expected).sum(1) / lengths).min() > least


@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_an_image_has_the_same_embedding_bit_for_bit_alone_and_in_any_batch(kind):
    if kind == "openvino":
        pytest.importorskip("openvino")
    made = Engine(loaded(Varied()), CPU, batch=4, kind=kind, images=MANY)
    x = images(4)
    together = answers(made, x)["pooled"]
    alone = np.concatenate([answers(made, x[i : i + 1])["pooled"] for i in range(4)])
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("network", [Deciding, ByHand])
def test_a_network_that_cannot_be_followed_is_called_as_it_is(network):
    net = loaded(network())
    made = Engine(net, CPU, images=MANY)
    assert made.name == "torch"
    assert np.array_equal(answers(made, images(3))["pooled"], answers(Engine(net, CPU), images(3))["pooled"])


def test_following_leaves_nothing_in_a_network_that_remembers():
    net = loaded(Remembering())
    net.network.offset = None
    made = Engine(net, CPU, images=MANY)
    expected = Remembering().eval()(images(3)).detach().numpy()
    assert np.allclose(answers(made, images(3))["pooled"], expected, rtol=1e-5, atol=1e-6)
    assert net.network.offset is None


def test_a_graph_that_answers_otherwise_is_not_used(monkeypatch):
    def wrong(*arguments):
        module = fuse_convolutions(*arguments)
        for buffer in module.buffers():
            if not buffer.is_mkldnn:
                buffer += 1
        return module

    monkeypatch.setattr("featpipe.inference.fusion.fuse_convolutions", wrong)
    assert Engine(loaded(Varied()), CPU, kind="torch", images=MANY).name == "torch"


def test_for_a_few_images_nothing_is_made_ready():
    assert Engine(loaded(Tiny()), CPU).name == "torch"
    assert Engine(loaded(Tiny()), CPU, images=99).name == "torch"
    assert Engine(loaded(Tiny()), CPU, images=100).name == "torch, fused"


def test_openvino_is_taken_for_many_images_where_it_is_installed(monkeypatch):
    pytest.importorskip("openvino")
    assert Engine(loaded(Tiny()), CPU, images=1000).name.startswith("OpenVINO 20")
    monkeypatch.setattr(optimize, "has_openvino", lambda: False)
    assert Engine(loaded(Tiny()), CPU, images=1000).name == "torch, fused"


def test_openvino_that_was_asked_for_is_never_replaced(monkeypatch):
    pytest.importorskip("openvino")
    with pytest.raises(ConfigError, match="computes in fp32, bf16, not in fp16"):
        Engine(loaded(Tiny()), CPU, "fp16", kind="openvino")
    with pytest.raises(ConfigError, match=r"OpenVINO cannot run this network.*--engine torch"):
        Engine(loaded(Deciding()), CPU, kind="openvino")
    monkeypatch.setattr(optimize, "has_openvino", lambda: False)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'featpipe\[cpu\]'"):
        Engine(loaded(Tiny()), CPU, kind="openvino")


ONE_AFTER_THE_OTHER = """
import signal, threading, torch
from featpipe import backbones
from featpipe.inference import Engine
from tests.support.networks import Tiny, tiny_transform

def use():
    engine = Engine(backbones.load(Tiny(), transform=tiny_transform), torch.device("cpu"), kind="openvino")
    engine.embed(torch.rand(2, 3, 12, 12))
    return engine

first = use()
second = use()
del first
del second
other = threading.Thread(target=use)
other.start()
other.join()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("heard")
"""


@pytest.mark.thorough
def test_ctrl_c_is_heard_after_openvino_was_used_and_given_up():
    """It was a segmentation fault, of the process that had used two networks, one after the other."""
    pytest.importorskip("openvino")
    child = subprocess.run([sys.executable, "-c", ONE_AFTER_THE_OTHER], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout) == (0, "heard\n"), child.stderr


def test_an_unknown_engine_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="'openvino'"):
        Engine(loaded(Tiny()), CPU, kind="openvin")
