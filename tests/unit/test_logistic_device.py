"""Logistic regression with passes over the rows in torch: on a GPU if there is one, else on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featpipe.heads import SoftmaxRegression
from featpipe.heads.logistic.objective import DeviceProblem, LogisticProblem, get_device

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def make_data(kind: str, n: int = 400, d: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, d)).astype(np.float32)
    scores = X @ rng.normal(size=(d, 4)) + rng.normal(size=(n, 4))
    return X, {"classes": scores.argmax(axis=1), "two": scores[:, 0] > 0, "labels": (scores > 1).astype(int)}[kind]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["classes", "two", "labels"])
@pytest.mark.parametrize("settings", [{}, {"C": 1e4}, {"fit_intercept": False}, {"l1_ratio": 1.0, "C": 0.1}])
def test_a_fit_on_a_device_equals_one_on_the_cpu(device, kind, settings):
    X, y = make_data(kind)
    weights = np.random.default_rng(1).uniform(0.5, 2, len(X))
    cpu_head = SoftmaxRegression(**settings).fit(X, y, weights)
    device_head = SoftmaxRegression(**settings, device=device).fit(X, y, weights)
    np.testing.assert_allclose(device_head.predict_proba(X), cpu_head.predict_proba(X), atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
@pytest.mark.parametrize("weight_scale", [1.0, 1e4])
def test_value_and_gradient_on_a_device_equal_those_on_the_cpu(device, dtype, link, weight_scale):
    rng = np.random.default_rng(0)
    X, theta = rng.normal(size=(300, 7)), weight_scale * rng.normal(size=(5, 8))
    Y = rng.integers(0, 5, 300) if link == "softmax" else rng.integers(0, 2, (300, 5))
    weights = rng.uniform(0.1, 2, Y.shape)
    options = {"center": X.mean(axis=0), "scale": X.std(axis=0), "ridge": 0.3}
    on_cpu = LogisticProblem(X, Y, weights, link, 5, **options).evaluate(theta, dtype)
    on_device = DeviceProblem(X, Y, weights, link, 5, **options, device=get_device(device)).evaluate(theta, dtype)
    rtol = 1e-4 if dtype is np.float32 else 1e-9
    np.testing.assert_allclose(on_device.losses, on_cpu.losses, rtol=rtol)
    np.testing.assert_allclose(on_device.gradient, on_cpu.gradient, rtol=rtol, atol=rtol * abs(on_cpu.gradient).max())


def test_an_unavailable_device_is_refused():
    X, y = make_data("classes", 30)
    for name in ("nowhere", "cuda:99"):
        with pytest.raises(ValueError, match=f"device is '{name}', which is not available"):
            SoftmaxRegression(device=name).fit(X, y)
    assert SoftmaxRegression(device="auto").fit(X, y).coef_.shape == (4, 20)
