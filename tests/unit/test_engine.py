"""Engines: embeddings, batch sizes, settings and devices."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featpipe import backbones, inference
from featpipe.errors import ConfigError
from featpipe.inference import Engine, available_cores, resolve_device
from tests.support.devices import needs_gpu
from tests.support.networks import DataDependent, OutsideTorch, Stateful, Tiny, tiny_transform

TINY_MULTIPLY_ADDS = 8 * 10 * 10 * 3 * 3 * 3  # of its one convolution


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def test_embeddings_equal_those_of_the_network_called_directly(tiny):
    x = images(3)
    embeddings = Engine(tiny, torch.device("cpu")).embed(x)["pooled"]
    with torch.inference_mode():
        expected = Tiny().eval()(x).numpy()
    assert embeddings.dtype == np.float32
    assert np.allclose(embeddings, expected, rtol=1e-5, atol=1e-6)


def test_an_image_has_the_same_embedding_bit_for_bit_alone_and_in_any_batch(tiny):
    engine = Engine(tiny, torch.device("cpu"), batch=8)
    x = images(8)
    together = engine.embed(x)["pooled"]
    alone = np.concatenate([engine.embed(x[i : i + 1])["pooled"] for i in range(8)])
    assert np.array_equal(together, alone)


def test_another_precision_does_not_change_the_backbone(tiny):
    Engine(tiny, torch.device("cpu"), "bf16").embed(images(2))
    assert {p.dtype for p in tiny.network.parameters()} == {torch.float32}
    assert Engine(tiny, torch.device("cpu")).embed(images(2))["pooled"].dtype == np.float32


def test_bf16_is_close_but_not_equal_to_fp32(tiny):
    x = images(4)
    fp32_embeddings, bf16_embeddings = (
        Engine(tiny, torch.device("cpu"), p).embed(x)["pooled"] for p in ("fp32", "bf16")
    )
    assert not np.array_equal(fp32_embeddings, bf16_embeddings)
    assert np.allclose(fp32_embeddings, bf16_embeddings, atol=0.05)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "giga_multiply_adds", "batch"),
    [("efficientnet_lite0", 0.384, 4), ("resnet18", 1.814, 4), ("resnet50", 4.087, 4), ("vit_b_16", 17.563, 2)],
)
def test_on_a_cpu_the_batch_size_follows_from_the_published_multiply_adds(name, giga_multiply_adds, batch):
    engine = Engine(backbones.load(name, weights="none"), torch.device("cpu"))
    assert engine.multiply_adds / 1e9 == pytest.approx(giga_multiply_adds, rel=0.002)
    assert engine.batch == batch


def test_the_multiply_adds_of_attention_are_counted():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.mean(1)
            return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1)

    engine = Engine(backbones.load(Attending(), transform=tiny_transform), torch.device("cpu"))
    assert engine.multiply_adds == 4 * 12 * 12 * 12 + 2 * 12 * 12 * 12  # four projections, scores, and weighted sums


@pytest.mark.parametrize(("images_within", "batch"), [(0.5, 1), (1, 1), (2.9, 2), (7, 7), (8, 8), (1000, 8)])
def test_the_batch_size_is_bounded_by_multiply_adds_and_bytes(tiny, monkeypatch, images_within, batch):
    monkeypatch.setattr(inference.flops, "CPU_BATCH_MULTIPLY_ADDS", images_within * TINY_MULTIPLY_ADDS)
    assert Engine(tiny, torch.device("cpu"), "bf16").batch == batch
    assert Engine(tiny, torch.device("cpu"), "fp32").batch == min(batch, 4)


@pytest.mark.thorough
def test_another_process_chooses_the_same_batch(tiny):
    code = (
        "import torch; from tests.support.networks import Tiny, tiny_transform; "
        "from featpipe import backbones, inference; "
        "engine = inference.Engine(backbones.load(Tiny(), transform=tiny_transform), torch.device('cpu')); "
        "print(engine.multiply_adds, engine.batch)"
    )
    root = Path(__file__).parents[2]
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    engine = Engine(tiny, torch.device("cpu"))
    assert child.stdout.split() == [str(engine.multiply_adds), str(engine.batch)] == [str(TINY_MULTIPLY_ADDS), "4"]


def test_an_explicit_batch_size_is_used_without_counting(tiny, monkeypatch):
    monkeypatch.setattr(inference.flops, "CPU_BATCH_MULTIPLY_ADDS", 1)
    engine = Engine(tiny, torch.device("cpu"), batch=5)
    assert (engine.batch, engine.multiply_adds) == (5, None)


def test_a_network_with_data_dependent_control_flow_is_counted_on_real_values():
    engine = Engine(backbones.load(DataDependent(), transform=tiny_transform), torch.device("cpu"))
    assert engine.multiply_adds == TINY_MULTIPLY_ADDS


def test_counting_does_not_change_a_stateful_network():
    network = Stateful()
    engine = Engine(backbones.load(network, transform=tiny_transform), torch.device("cpu"))
    with torch.inference_mode():
        expected = Stateful().eval()(images(3)).numpy()
    assert engine.multiply_adds == TINY_MULTIPLY_ADDS
    assert np.allclose(engine.embed(images(3))["pooled"], expected, rtol=1e-5, atol=1e-6)


def test_a_network_without_counted_operations_runs_in_batches_of_4():
    engine = Engine(backbones.load(OutsideTorch(), transform=tiny_transform), torch.device("cpu"))
    assert (engine.multiply_adds, engine.batch) == (0, 4)


def test_a_network_that_cannot_be_counted_runs_in_batches_of_4(tiny, monkeypatch):
    def refuse(*args: object) -> None:
        raise RuntimeError("unknown operator")

    monkeypatch.setattr(backbones.Backbone, "embed", refuse)
    engine = Engine(tiny, torch.device("cpu"))
    assert (engine.multiply_adds, engine.batch) == (None, 4)


def test_the_thread_count_of_the_process_is_restored(tiny):
    engine = Engine(tiny, torch.device("cpu"))
    before = torch.get_num_threads()
    with engine.session():
        thread = threading.Thread(target=engine.enter_stream, args=(available_cores(),))
        thread.start()
        thread.join()
    assert torch.get_num_threads() == before
    thread_counts = []
    thread = threading.Thread(target=lambda: thread_counts.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert thread_counts == [before]


def test_the_random_state_of_the_process_is_untouched(tiny):
    state = torch.random.get_rng_state()
    Engine(tiny, torch.device("cpu")).embed(images(2))
    assert torch.equal(state, torch.random.get_rng_state())


def test_auto_selects_an_available_device():
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:1", "", "cuda:"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(ConfigError):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is available")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_an_unavailable_device_is_refused_and_never_replaced(name):
    with pytest.raises(ConfigError, match=r"is not available.*--device auto or cpu"):
        resolve_device(name)


def test_tf32_is_refused_on_a_cpu(tiny):
    with pytest.raises(ConfigError, match="CUDA"):
        Engine(tiny, torch.device("cpu"), "tf32")


def test_an_unknown_precision_is_refused_with_the_nearest(tiny):
    with pytest.raises(ConfigError, match="'fp32'"):
        Engine(tiny, torch.device("cpu"), "fp23")


def random_images(n: int, size: tuple[int, int] = (224, 224)) -> Tensor:
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def compute_max_cosine_distance(a: np.ndarray, b: np.ndarray) -> float:
    """1 - the minimum cosine between two embeddings of the same image."""
    return float(1 - ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["resnet18", "timm/vit_tiny_patch16_224"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("tf32", 1e-3), ("bf16", 1e-2), ("fp16", 1e-3)])
def test_a_gpu_gives_the_embeddings_of_the_cpu(name, precision, tolerance):
    backbone = backbones.load(name, weights="none")
    cpu_embeddings = Engine(backbone, torch.device("cpu")).embed(random_images(4))["pooled"]
    gpu_embeddings = Engine(backbone, torch.device("cuda"), precision).embed(random_images(4))["pooled"]
    assert compute_max_cosine_distance(gpu_embeddings, cpu_embeddings) < tolerance
