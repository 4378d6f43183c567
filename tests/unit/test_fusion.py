"""A network optimized for a CPU gives the embeddings of the original network."""

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
from tests.support.networks import DataDependent, OutsideTorch, Stateful, Tiny, tiny_transform

CPU = torch.device("cpu")
MANY_IMAGES = 10**6


def images(n: int, size: int = 12) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


class VariedConvolutions(nn.Module):
    """Typical convolutions: with and without bias and norm, grouped, explicitly padded, summed, activated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm2 = nn.BatchNorm2d(16, affine=False)
        self.plain = nn.Conv2d(16, 16, 1)
        self.same_padded = nn.Conv2d(16, 16, 3, padding="same")
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
        y = nn.functional.hardswish(self.same_padded(nn.functional.dropout(y, 0.5, self.training)))
        return self.last(y).sigmoid().mean((2, 3))


class SharedValues(nn.Module):
    """Values between a convolution and its activation that other operations use too."""

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
        projected = self.second(normed)
        normed.relu_()  # after the convolution has read it
        return (raw + normed.relu() * projected + projected.add_(normed)).mean((2, 3))


def load_network(network: nn.Module, **options: object) -> backbones.Backbone:
    return backbones.load(network, transform=tiny_transform, **options)


@pytest.mark.parametrize("network", [Tiny, VariedConvolutions, SharedValues])
@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_an_optimized_network_gives_the_original_embeddings(network, kind):
    if kind == "openvino":
        pytest.importorskip("openvino")
    backbone = load_network(network())
    engine = Engine(backbone, CPU, kind=kind, images=MANY_IMAGES)
    assert engine.name != "torch"
    expected = Engine(backbone, CPU).embed(images(3))["pooled"]
    assert np.allclose(engine.embed(images(3))["pooled"], expected, rtol=1e-4, atol=1e-5)


def list_fused_calls(network: nn.Module, **options: object) -> list[str]:
    backbone = load_network(network, **options)
    weights = dict(backbone.network.named_parameters()) | dict(backbone.network.named_buffers())
    module = fuse_convolutions(export_graph(backbone, 2), weights, torch.float32)
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def test_norms_sums_and_activations_are_fused_into_their_convolution():
    calls = list_fused_calls(VariedConvolutions())
    assert [name.removeprefix("mkldnn._convolution_pointwise.") for name in calls if "mkldnn" in name] == [
        "default",  # stem, norm, hardtanh
        "default",  # depthwise, norm, silu
        "binary",  # plain, norm, sum, relu
        "default",  # last, sigmoid
    ]
    assert not [name for name in calls if "batch_norm" in name or "dropout" in name]
    assert [name for name in calls if "conv2d" in name] == ["aten.conv2d.padding"]


class PaddedDepthwise(nn.Module):
    """A depthwise convolution of explicitly padded maps."""

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
def test_padding_folded_into_a_depthwise_convolution_is_bit_identical(sizes, kernel, precision, monkeypatch):
    folded = Engine(
        load_network(PaddedDepthwise(sizes, kernel)), CPU, precision, kind="torch", images=MANY_IMAGES
    ).embed(images(3))
    assert not [name for name in list_fused_calls(PaddedDepthwise(sizes, kernel)) if "pad" in name]
    monkeypatch.setattr(fusion, "_is_padded_depthwise", lambda convolution: False)
    assert [name for name in list_fused_calls(PaddedDepthwise(sizes, kernel)) if "pad" in name]
    unfolded = Engine(
        load_network(PaddedDepthwise(sizes, kernel)), CPU, precision, kind="torch", images=MANY_IMAGES
    ).embed(images(3))
    assert np.array_equal(folded["pooled"], unfolded["pooled"])


@pytest.mark.parametrize("network", [((0, 1, 0, 1), 3, 1, True), ((0, -1, 0, 1), 3), ((0, 1, 0, 1), 3, 2)])
def test_padding_with_other_users_or_of_another_kind_is_not_folded(network):
    assert [name for name in list_fused_calls(PaddedDepthwise(*network)) if "pad" in name]
    expected = Engine(load_network(PaddedDepthwise(*network)), CPU).embed(images(3))["pooled"]
    embeddings = Engine(load_network(PaddedDepthwise(*network)), CPU, kind="torch", images=MANY_IMAGES).embed(
        images(3)
    )["pooled"]
    assert np.allclose(embeddings, expected, rtol=1e-4, atol=1e-5)


def test_nodes_that_no_output_needs_are_removed():
    calls = list_fused_calls(VariedConvolutions(), outputs=["plain:avg"])
    assert len([name for name in calls if "mkldnn" in name]) == 3
    assert not [name for name in calls if "conv2d" in name]


def test_a_norm_with_other_users_is_not_fused():
    calls = list_fused_calls(SharedValues())
    assert "aten.batch_norm.default" in calls


@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_inner_outputs_are_computed_by_the_optimized_graph(kind):
    if kind == "openvino":
        pytest.importorskip("openvino")
    backbone = load_network(VariedConvolutions(), outputs=["plain:avg", "norm:max", "depthwise:none"])
    engine = Engine(backbone, CPU, kind=kind, images=MANY_IMAGES)
    assert engine.name != "torch"
    embeddings, expected = engine.embed(images(3)), Engine(backbone, CPU).embed(images(3))
    assert list(embeddings) == list(expected) == ["plain:avg", "norm:max", "depthwise:none"]
    assert all(np.allclose(embeddings[name], expected[name], rtol=1e-4, atol=1e-5) for name in expected)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["efficientnet_lite0", "timm/vit_tiny_patch16_224"])
@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_optimized_library_networks_agree_in_float32_and_are_close_in_bf16(name, kind):
    if kind == "openvino":
        pytest.importorskip("openvino")
    backbone = backbones.load(name, weights=None if name == "efficientnet_lite0" else "none")
    noise = torch.randint(0, 256, (2, 3, *backbone.transform.size), dtype=torch.uint8)
    expected = Engine(backbone, CPU, batch=2).embed(noise)["pooled"]
    for precision, min_cosine in (("fp32", 1 - 1e-6), ("bf16", 0.98)):
        engine = Engine(backbone, CPU, precision, batch=2, kind=kind, images=MANY_IMAGES)
        if precision == "fp32" or kind == "openvino" or torch.cpu._is_avx512_bf16_supported():
            assert engine.name != "torch"  # a CPU without bfloat16 has no fused operators for it
        embeddings = engine.embed(noise)["pooled"]
        norms = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(expected, axis=1)
        assert ((embeddings * expected).sum(1) / norms).min() > min_cosine


@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_an_image_has_the_same_embedding_bit_for_bit_alone_and_in_any_batch(kind):
    if kind == "openvino":
        pytest.importorskip("openvino")
    engine = Engine(load_network(VariedConvolutions()), CPU, batch=4, kind=kind, images=MANY_IMAGES)
    x = images(4)
    together = engine.embed(x)["pooled"]
    alone = np.concatenate([engine.embed(x[i : i + 1])["pooled"] for i in range(4)])
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("network", [DataDependent, OutsideTorch])
def test_a_network_that_cannot_be_exported_runs_eagerly(network):
    backbone = load_network(network())
    engine = Engine(backbone, CPU, images=MANY_IMAGES)
    assert engine.name == "torch"
    assert np.array_equal(engine.embed(images(3))["pooled"], Engine(backbone, CPU).embed(images(3))["pooled"])


def test_exporting_does_not_change_a_stateful_network():
    backbone = load_network(Stateful())
    backbone.network.offset = None
    engine = Engine(backbone, CPU, images=MANY_IMAGES)
    expected = Stateful().eval()(images(3)).detach().numpy()
    assert np.allclose(engine.embed(images(3))["pooled"], expected, rtol=1e-5, atol=1e-6)
    assert backbone.network.offset is None


def test_a_graph_with_other_embeddings_is_not_used(monkeypatch):
    def fuse_wrongly(*arguments):
        module = fuse_convolutions(*arguments)
        for buffer in module.buffers():
            if not buffer.is_mkldnn:
                buffer += 1
        return module

    monkeypatch.setattr("featpipe.inference.fusion.fuse_convolutions", fuse_wrongly)
    assert Engine(load_network(VariedConvolutions()), CPU, kind="torch", images=MANY_IMAGES).name == "torch"


def test_a_network_for_few_images_is_not_optimized():
    assert Engine(load_network(Tiny()), CPU).name == "torch"
    assert Engine(load_network(Tiny()), CPU, images=99).name == "torch"
    assert Engine(load_network(Tiny()), CPU, images=100).name == "torch, fused"


def test_openvino_is_used_for_many_images_if_it_is_installed(monkeypatch):
    pytest.importorskip("openvino")
    assert Engine(load_network(Tiny()), CPU, images=1000).name.startswith("OpenVINO 20")
    monkeypatch.setattr(optimize, "has_openvino", lambda: False)
    assert Engine(load_network(Tiny()), CPU, images=1000).name == "torch, fused"


def test_requested_openvino_is_never_replaced(monkeypatch):
    pytest.importorskip("openvino")
    with pytest.raises(ConfigError, match="computes in fp32, bf16, not in fp16"):
        Engine(load_network(Tiny()), CPU, "fp16", kind="openvino")
    with pytest.raises(ConfigError, match=r"OpenVINO cannot run this network.*--engine torch"):
        Engine(load_network(DataDependent()), CPU, kind="openvino")
    monkeypatch.setattr(optimize, "has_openvino", lambda: False)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'featpipe\[cpu\]'"):
        Engine(load_network(Tiny()), CPU, kind="openvino")


TWO_ENGINES_CODE = """
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
    print("interrupted")
"""


@pytest.mark.thorough
def test_ctrl_c_works_after_openvino_was_used_and_released():
    """OpenVINO frees the signal stack of a thread when its core is destroyed; the next signal then crashes."""
    pytest.importorskip("openvino")
    child = subprocess.run([sys.executable, "-c", TWO_ENGINES_CODE], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout) == (0, "interrupted\n"), child.stderr


def test_an_unknown_engine_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="'openvino'"):
        Engine(load_network(Tiny()), CPU, kind="openvin")
