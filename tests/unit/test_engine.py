"""How a frozen network is run on this device."""

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
from tests.support.networks import ByHand, Deciding, Remembering, Tiny, tiny_transform

TINY_MULTIPLY_ADDS = 8 * 10 * 10 * 3 * 3 * 3  # of its one convolution


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def test_embeddings_are_those_of_the_network_called_by_hand(tiny):
    x = images(3)
    found = Engine(tiny, torch.device("cpu")).embed(x)["pooled"]
    with torch.inference_mode():
        expected = Tiny().eval()(x).numpy()
    assert found.dtype == np.float32
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_an_image_has_the_same_embedding_bit_for_bit_alone_and_in_any_batch(tiny):
    engine = Engine(tiny, torch.device("cpu"), batch=8)
    x = images(8)
    together = engine.embed(x)["pooled"]
    alone = np.concatenate([engine.embed(x[i : i + 1])["pooled"] for i in range(8)])
    assert np.array_equal(together, alone)


def test_the_backbone_is_left_as_it_was_by_another_precision(tiny):
    Engine(tiny, torch.device("cpu"), "bf16").embed(images(2))
    assert {p.dtype for p in tiny.network.parameters()} == {torch.float32}
    assert Engine(tiny, torch.device("cpu")).embed(images(2))["pooled"].dtype == np.float32


def test_bf16_is_near_and_not_equal_to_fp32(tiny):
    x = images(4)
    exact, rough = (Engine(tiny, torch.device("cpu"), p).embed(x)["pooled"] for p in ("fp32", "bf16"))
    assert not np.array_equal(exact, rough)
    assert np.allclose(exact, rough, atol=0.05)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "giga", "batch"),
    [("efficientnet_lite0", 0.384, 4), ("resnet18", 1.814, 4), ("resnet50", 4.087, 4), ("vit_b_16", 17.563, 2)],
)
def test_on_a_cpu_the_batch_follows_from_the_published_work_of_the_network(name, giga, batch):
    made = Engine(backbones.load(name, weights="none"), torch.device("cpu"))
    assert made.multiply_adds / 1e9 == pytest.approx(giga, rel=0.002)
    assert made.batch == batch


def test_attention_is_counted_whole():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.mean(1)
            return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1)

    made = Engine(backbones.load(Attending(), transform=tiny_transform), torch.device("cpu"))
    assert made.multiply_adds == 4 * 12 * 12 * 12 + 2 * 12 * 12 * 12  # four projections; scores and their sums


@pytest.mark.parametrize(("images_within", "batch"), [(0.5, 1), (1, 1), (2.9, 2), (7, 7), (8, 8), (1000, 8)])
def test_the_batch_is_what_the_bound_has_room_for_and_half_as_many_in_twice_the_bytes(
    tiny, monkeypatch, images_within, batch
):
    monkeypatch.setattr(inference.flops, "CPU_BATCH_MULTIPLY_ADDS", images_within * TINY_MULTIPLY_ADDS)
    assert Engine(tiny, torch.device("cpu"), "bf16").batch == batch
    assert Engine(tiny, torch.device("cpu"), "fp32").batch == min(batch, 4)


@pytest.mark.thorough
def test_another_process_chooses_the_same_batch(tiny):
    code = (
        "import torch; from tests.support.networks import Tiny, tiny_transform; "
        "from featpipe import backbones, inference; "
        "made = inference.Engine(backbones.load(Tiny(), transform=tiny_transform), torch.device('cpu')); "
        "print(made.multiply_adds, made.batch)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    here = Engine(tiny, torch.device("cpu"))
    assert done.stdout.split() == [str(here.multiply_adds), str(here.batch)] == [str(TINY_MULTIPLY_ADDS), "4"]


def test_a_batch_that_is_given_is_taken_and_nothing_is_counted(tiny, monkeypatch):
    monkeypatch.setattr(inference.flops, "CPU_BATCH_MULTIPLY_ADDS", 1)
    made = Engine(tiny, torch.device("cpu"), batch=5)
    assert (made.batch, made.multiply_adds) == (5, None)


def test_a_network_that_decides_by_values_is_counted_by_running_it():
    made = Engine(backbones.load(Deciding(), transform=tiny_transform), torch.device("cpu"))
    assert made.multiply_adds == TINY_MULTIPLY_ADDS


def test_counting_leaves_nothing_in_a_network_that_remembers():
    network = Remembering()
    made = Engine(backbones.load(network, transform=tiny_transform), torch.device("cpu"))
    with torch.inference_mode():
        expected = Remembering().eval()(images(3)).numpy()
    assert made.multiply_adds == TINY_MULTIPLY_ADDS
    assert np.allclose(made.embed(images(3))["pooled"], expected, rtol=1e-5, atol=1e-6)


def test_a_network_whose_work_does_not_show_runs_in_batches_of_4():
    made = Engine(backbones.load(ByHand(), transform=tiny_transform), torch.device("cpu"))
    assert (made.multiply_adds, made.batch) == (0, 4)


def test_a_network_that_cannot_be_counted_runs_in_batches_of_4(tiny, monkeypatch):
    def refuse(*args: object) -> None:
        raise RuntimeError("unknown operator")

    monkeypatch.setattr(backbones.Backbone, "embed", refuse)
    made = Engine(tiny, torch.device("cpu"))
    assert (made.multiply_adds, made.batch) == (None, 4)


def test_the_thread_count_of_the_process_is_put_back(tiny):
    engine = Engine(tiny, torch.device("cpu"))
    before = torch.get_num_threads()
    with engine.session():
        thread = threading.Thread(target=engine.enter_stream, args=(available_cores(),))
        thread.start()
        thread.join()
    assert torch.get_num_threads() == before
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before]


def test_the_random_state_of_the_process_is_untouched(tiny):
    state = torch.random.get_rng_state()
    Engine(tiny, torch.device("cpu")).embed(images(2))
    assert torch.equal(state, torch.random.get_rng_state())


def test_auto_is_a_device_that_is_there():
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:1", "", "cuda:"])
def test_an_unknown_device_is_answered_with_the_known_ones(name):
    with pytest.raises(ConfigError):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_refused_and_never_replaced(name):
    with pytest.raises(ConfigError, match=r"is not available.*--device auto or cpu"):
        resolve_device(name)


def test_tf32_is_refused_where_there_is_none(tiny):
    with pytest.raises(ConfigError, match="CUDA"):
        Engine(tiny, torch.device("cpu"), "tf32")


def test_an_unknown_precision_is_answered_with_the_nearest(tiny):
    with pytest.raises(ConfigError, match="'fp32'"):
        Engine(tiny, torch.device("cpu"), "fp23")


def pictures(n: int, size: tuple[int, int] = (224, 224)) -> Tensor:
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def farthest(a: np.ndarray, b: np.ndarray) -> float:
    """1 - the least cosine of two embeddings of an image."""
    return float(1 - ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["resnet18", "timm/vit_tiny_patch16_224"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("tf32", 1e-3), ("bf16", 1e-2), ("fp16", 1e-3)])
def test_a_gpu_gives_the_embeddings_of_the_cpu(name, precision, tolerance):
    net = backbones.load(name, weights="none")
    exact = Engine(net, torch.device("cpu")).embed(pictures(4))["pooled"]
    found = Engine(net, torch.device("cuda"), precision).embed(pictures(4))["pooled"]
    assert farthest(found, exact) < tolerance
