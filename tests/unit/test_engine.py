"""How a frozen network is run on this device."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from featpipe import backbone
from featpipe.engine import Engine, available_cores, resolve_device
from featpipe.errors import ConfigError
from tests.conftest import Tiny


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def test_embeddings_are_those_of_the_network_called_by_hand(tiny):
    x = images(5)
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


def test_the_thread_count_of_the_process_is_put_back(tiny):
    engine = Engine(tiny, torch.device("cpu"))
    before = torch.get_num_threads()
    with engine.running():
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
    with pytest.raises(ConfigError, match=r"is not there.*--device auto or cpu"):
        resolve_device(name)


def test_tf32_is_refused_where_there_is_none(tiny):
    with pytest.raises(ConfigError, match="CUDA"):
        Engine(tiny, torch.device("cpu"), "tf32")


def test_an_unknown_precision_is_answered_with_the_nearest(tiny):
    with pytest.raises(ConfigError, match="'fp32'"):
        Engine(tiny, torch.device("cpu"), "fp23")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("tf32", 1e-3), ("bf16", 1e-2), ("fp16", 1e-3)])
def test_a_gpu_gives_the_embeddings_of_the_cpu(precision, tolerance):
    net = backbone.load("resnet18", weights="none")
    x = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    exact = Engine(net, torch.device("cpu")).embed(x)["pooled"]
    found = Engine(net, torch.device("cuda"), precision).embed(x)["pooled"]
    cosine = (exact * found).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(found, axis=1)
    assert cosine.min() > 1 - tolerance
