from __future__ import annotations

import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import sklearn
import torch
from scipy.optimize import brentq
from scipy.special import softmax
from sklearn.base import clone
from sklearn.linear_model import Lasso, Ridge
from sklearn.metrics import log_loss, r2_score
from sklearn.model_selection import cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from featpipe.heads import LinearClassifier, LinearRegressor, MLPClassifier, MLPRegressor
from featpipe.heads.neural import batches
from featpipe.heads.neural.batches import BatchSource, TrainingBatch
from featpipe.heads.neural.config import NetworkTrainingConfig
from featpipe.heads.neural.losses import LossFunction
from featpipe.heads.neural.train import (
    ACTIVATIONS,
    Network,
    NetworkArchitecture,
    Optimizer,
    forward,
    make_schedule,
)

HEADS = [LinearClassifier, MLPClassifier, LinearRegressor, MLPRegressor]
CLASSIFIERS = HEADS[:2]
# One step per epoch on all rows, with steps that become small: these reach the optimum to many digits.
OPTIMUM_SETTINGS = {"batch_size": 10_000, "weight_decay": 0.0, "random_state": 0}


def make_rows(n: int = 150, d: int = 8, k: int = 3, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    return rng.normal(size=(n, d)) + 1.5 * np.random.default_rng(9).normal(size=(k, d))[y], y


def make_linear_targets(n: int = 200, d: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Standardised columns, and a standardised target, half of whose variance is noise."""
    rng = np.random.default_rng(0)
    X = StandardScaler().fit_transform(rng.normal(size=(n, d)))
    y = X @ np.array([2.0, -1.0, 0.3, 0.05, 0.0, 0.0])[:d] + rng.normal(size=n)
    return X, (y - y.mean()) / y.std()


def make_scores_and_codes(k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, k, generator=generator, dtype=torch.float64) * 3
    return (
        scores,
        torch.randint(0, k, (40,), generator=generator),
        torch.randint(0, 2, (40, k), generator=generator).double(),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_cross_entropy_equals_that_of_torch(smoothing):
    scores, codes, _ = make_scores_and_codes(4)
    actual = LossFunction("softmax", "cross_entropy").per_row_loss(scores, codes, smoothing)
    torch.testing.assert_close(
        actual, functional.cross_entropy(scores, codes, reduction="none", label_smoothing=smoothing)
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_the_focal_loss_of_labels_equals_that_of_torchvision(gamma):
    scores, _, labels = make_scores_and_codes(3)
    actual = LossFunction("sigmoid", "focal", focal_gamma=gamma).per_row_loss(scores, labels)
    torch.testing.assert_close(actual, sigmoid_focal_loss(scores, labels, alpha=-1, gamma=gamma))


def test_the_focal_loss_of_two_classes_equals_that_of_one_label():
    scores, codes, _ = make_scores_and_codes(2)
    actual = LossFunction("softmax", "focal", focal_gamma=1.5).per_row_loss(scores, codes)
    expected = sigmoid_focal_loss(scores[:, 1] - scores[:, 0], codes.double(), alpha=-1, gamma=1.5)
    torch.testing.assert_close(actual, expected)


def test_the_focal_loss_of_many_classes_equals_the_formula_of_the_paper():
    scores, codes, _ = make_scores_and_codes(5)
    p = softmax(scores.numpy(), axis=1)[np.arange(40), codes.numpy()]
    actual = LossFunction("softmax", "focal", focal_gamma=2.0).per_row_loss(scores, codes)
    np.testing.assert_allclose(actual.numpy(), -((1 - p) ** 2) * np.log(p), rtol=1e-10)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_gradient_of_the_focal_loss_is_finite_for_extreme_scores(link, gamma):
    scores = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [60.0, -60.0]], requires_grad=True)
    targets = torch.tensor([0, 0, 0]) if link == "softmax" else torch.tensor([[1.0, 0.0]] * 3)
    LossFunction(link, "focal", focal_gamma=gamma).per_row_loss(scores, targets).sum().backward()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize(
    ("link", "loss"),
    [
        ("softmax", "cross_entropy"),
        ("softmax", "focal"),
        ("sigmoid", "focal"),
        ("identity", "huber"),
        ("identity", "squares"),
        ("identity", "absolute"),
    ],
)
def test_gradients_of_losses_equal_finite_differences(link, loss):
    scores, codes, labels = make_scores_and_codes(3)
    adjustment = None if link == "identity" else np.array([0.1, -2.0, 1.0])
    objective = LossFunction(link, loss, adjustment=adjustment)
    targets = codes if link == "softmax" else labels
    assert torch.autograd.gradcheck(lambda s: objective.per_row_loss(s, targets, 0.1), scores.requires_grad_())


def test_regression_losses_equal_those_of_torch():
    scores, _, labels = make_scores_and_codes(3)
    for loss, torch_loss in [
        ("squares", 0.5 * functional.mse_loss(scores, labels, reduction="none")),
        ("absolute", functional.l1_loss(scores, labels, reduction="none")),
        ("huber", functional.huber_loss(scores, labels, reduction="none", delta=0.7)),
    ]:
        actual = LossFunction("identity", loss, huber_delta=0.7).per_row_loss(scores, labels)
        torch.testing.assert_close(actual, torch_loss.mean(dim=1))


def test_the_mixup_loss_equals_the_loss_of_mixed_targets():
    scores, codes, labels = make_scores_and_codes(3)
    order, ones = torch.randperm(40, generator=torch.Generator().manual_seed(1)), torch.ones(40).double()
    one_hot = functional.one_hot(codes, 3).double()
    batch = TrainingBatch(scores, codes, ones)
    actual = LossFunction("softmax", "cross_entropy").batch_loss(scores, batch, batch.take(order), 0.3)
    torch.testing.assert_close(actual, functional.cross_entropy(scores, one_hot.mul(0.3) + one_hot[order].mul(0.7)))
    batch = TrainingBatch(scores, labels, ones)
    actual = LossFunction("identity", "absolute").batch_loss(scores, batch, batch.take(order), 0.3)
    torch.testing.assert_close(actual, functional.l1_loss(scores, 0.3 * labels + 0.7 * labels[order]))


@pytest.mark.parametrize("multilabel", [False, True])
def test_logit_adjustment_shifts_scores_by_the_log_prior(multilabel):
    rng = np.random.default_rng(0)
    y = rng.choice(3, 400, p=[0.7, 0.2, 0.1])
    X = rng.normal(size=(400, 4)) + 0.5 * y[:, None]
    target = np.column_stack([y == 1, y == 2]).astype(int) if multilabel else y
    plain, adjusted = (
        LinearClassifier(learning_rate=0.1, epochs=500, logit_adjustment=tau, **OPTIMUM_SETTINGS).fit(X, target)
        for tau in (0.0, 1.0)
    )
    p = target.mean(axis=0) if multilabel else np.bincount(y) / 400
    prior = np.log(p / (1 - p)) if multilabel else np.log(p)
    difference = plain.decision_function(X) - adjusted.decision_function(X) - prior
    if not multilabel:
        difference -= difference.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(difference, 0, atol=0.01)


def test_logit_adjustment_of_balanced_rows_changes_nothing():
    X, y = make_rows()
    settings = {"class_weight": "balanced", "epochs": 5, "random_state": 0}
    plain, adjusted = (LinearClassifier(logit_adjustment=tau, **settings).fit(X, y) for tau in (0, 1))
    np.testing.assert_allclose(plain.predict_proba(X), adjusted.predict_proba(X), atol=1e-6)


@pytest.mark.parametrize("loss", ["absolute", "huber"])
def test_a_regressor_on_constant_features_predicts_the_minimiser_of_its_loss(loss):
    y = np.append(np.random.default_rng(0).normal(size=100) ** 3, 60.0)
    head = LinearRegressor(loss=loss, huber_delta=0.5, learning_rate=0.05, epochs=800, **OPTIMUM_SETTINGS)
    head.fit(np.zeros((101, 2)), y)
    delta = 0.5 * y.std()
    expected = np.median(y) if loss == "absolute" else brentq(lambda m: np.clip(y - m, -delta, delta).sum(), -9, 9)
    assert head.intercept_[0] == pytest.approx(expected, abs=2e-3 * y.std())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_an_l1_penalty_converges_to_the_lasso(optimizer):
    X, y = make_linear_targets()
    rate = 0.02 if optimizer == "sgd" else 0.05
    settings = {**OPTIMUM_SETTINGS, "optimizer": optimizer, "learning_rate": rate, "epochs": 600}
    head = LinearRegressor(l1=0.15, **settings).fit(X, y)
    lasso = Lasso(alpha=0.15, tol=1e-10).fit(X, y)
    np.testing.assert_allclose(head.coef_[0], lasso.coef_, atol=2e-3)
    np.testing.assert_array_equal(head.coef_[0] == 0, lasso.coef_ == 0)
    assert 0 < (lasso.coef_ == 0).sum() < 6


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weight_decay_converges_to_ridge_regression(optimizer):
    X, y = make_linear_targets()
    settings = {**OPTIMUM_SETTINGS, "weight_decay": 0.5, "optimizer": optimizer, "learning_rate": 0.05, "epochs": 500}
    head = LinearRegressor(**settings).fit(X, y)
    np.testing.assert_allclose(head.coef_[0], Ridge(alpha=0.5 * len(y)).fit(X, y).coef_, atol=1e-4)


def test_feature_noise_converges_to_ridge_regression():
    X, y = make_linear_targets()
    settings = {"learning_rate": 0.02, "batch_size": 50, "epochs": 800, "weight_decay": 0.0, "random_state": 0}
    head = LinearRegressor(feature_noise=0.7, **settings).fit(X, y)
    np.testing.assert_allclose(head.coef_[0], Ridge(alpha=0.49 * len(y)).fit(X, y).coef_, atol=0.03)


@pytest.mark.parametrize(
    ("name", "torch_class", "torch_settings"),
    [
        ("adamw", torch.optim.AdamW, {}),
        ("adam", torch.optim.Adam, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_optimizer_steps_equal_those_of_torch(name, torch_class, torch_settings):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(4, 3, generator=generator), torch.randn(3, generator=generator)
    torch_parameters = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    optimizer = Optimizer([weight], [bias], NetworkTrainingConfig(optimizer=name, weight_decay=0.1))
    groups = [
        {"params": torch_parameters[:1], "weight_decay": 0.1},
        {"params": torch_parameters[1:], "weight_decay": 0.0},
    ]
    torch_optimizer = torch_class(groups, lr=0.01, **torch_settings)
    for _ in range(5):
        gradients = [torch.randn(p.shape, generator=generator) for p in torch_parameters]
        optimizer.step(gradients, 0.01)
        for parameter, gradient in zip(torch_parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        torch_optimizer.step()
    torch.testing.assert_close(weight, torch_parameters[0].detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(bias, torch_parameters[1].detach(), rtol=1e-5, atol=1e-7)


def compute_torch_rates(scheduler, steps: int, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    schedule, actual = scheduler(optimizer, **settings), []
    for _ in range(steps):
        actual.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return actual


@pytest.mark.parametrize(
    ("name", "scheduler", "settings"),
    [
        ("cosine", torch.optim.lr_scheduler.CosineAnnealingLR, {"T_max": 40}),
        ("linear", torch.optim.lr_scheduler.LinearLR, {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 40}),
        ("step", torch.optim.lr_scheduler.MultiStepLR, {"milestones": [20, 30]}),
        ("constant", torch.optim.lr_scheduler.ConstantLR, {"factor": 1.0}),
        ("one-cycle", torch.optim.lr_scheduler.OneCycleLR, {"max_lr": 0.4, "total_steps": 41, "cycle_momentum": False}),
    ],
)
def test_schedules_equal_those_of_torch(name, scheduler, settings):
    rate = make_schedule(NetworkTrainingConfig(schedule=name), 0.4, settings.get("total_steps", 40))
    np.testing.assert_allclose(
        [rate(step) for step in range(40)], compute_torch_rates(scheduler, 40, **settings), rtol=1e-9
    )


@pytest.mark.parametrize("name", ["cosine", "linear", "step", "constant", "one-cycle"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 97])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.9])
def test_learning_rates_rise_in_warmup_and_stay_above_zero(name, steps, warmup):
    rate = make_schedule(NetworkTrainingConfig(schedule=name, warmup=warmup), 0.4, steps)
    actual = np.array([rate(step) for step in range(steps)])
    assert (actual > 0).all()
    assert actual.max() <= 0.4 + 1e-12
    rising = np.diff(actual[: int(warmup * steps)])
    assert (rising > 0).all()


def test_the_automatic_learning_rate_falls_with_the_width():
    X, y = make_rows(60, 20)
    auto = MLPClassifier(10, epochs=3, random_state=0).fit(X, y)
    explicit = MLPClassifier(10, epochs=3, random_state=0, learning_rate=0.5 / 20).fit(X, y)
    np.testing.assert_array_equal(auto.coefs_[0], explicit.coefs_[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prediction_with_numpy_equals_the_forward_pass_of_torch(activation, dtype):
    network = Network(
        NetworkArchitecture((7, 6, 5, 3), activation, initial_weights="glorot"), dtype, torch.Generator().manual_seed(0)
    )
    X = 2 * torch.randn(50, 7, dtype=dtype, generator=torch.Generator().manual_seed(1))
    coefs, intercepts = network.copy_weights()
    actual = forward(X.numpy(), coefs, intercepts, activation)
    assert actual.dtype == X.numpy().dtype
    np.testing.assert_allclose(actual, network(X).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_initial_weights_have_the_published_distributions():
    shape = NetworkArchitecture((400, 300, 200), initial_weights="glorot")
    network = Network(shape, torch.float64, torch.Generator().manual_seed(0))
    for weight, (fan_in, fan_out) in zip(network.weights, pairwise(shape.widths), strict=True):
        bound = np.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.var().item() == pytest.approx(2 / (fan_in + fan_out), rel=0.02)
    he = Network(NetworkArchitecture((400, 300, 200)), torch.float64, torch.Generator().manual_seed(0))
    assert he.weights[0].var().item() == pytest.approx(2 / 400, rel=0.02)
    assert not he.weights[1].any()


def test_the_keras_head_equals_torch_modules_from_the_same_start():
    X, y = make_rows(96, 12)
    adam = {"optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 0, "schedule": "constant"}
    settings = {"initial_weights": "glorot", "batch_size": 32, "epochs": 10, "random_state": 0, **adam}
    head = MLPClassifier(1024, **settings).fit(X, y)
    seed = int(np.random.RandomState(0).randint(2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    initial_network = Network(NetworkArchitecture((12, 1024, 3), initial_weights="glorot"), torch.float64, generator)
    model = torch.nn.Sequential(torch.nn.Linear(12, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 3)).double()
    with torch.no_grad():
        for layer, weight in zip((model[0], model[2]), initial_network.weights, strict=True):
            layer.weight.copy_(weight.T)
            layer.bias.zero_()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(10):
        for batch_rows in torch.randperm(96, generator=generator).split(32):
            optimizer.zero_grad()
            functional.cross_entropy(model(torch.from_numpy(X)[batch_rows]), torch.from_numpy(y)[batch_rows]).backward()
            optimizer.step()
    expected = softmax(model(torch.from_numpy(X)).detach().numpy(), axis=1)
    np.testing.assert_allclose(head.predict_proba(X), expected, atol=1e-8)


def test_a_head_trained_in_float32_predicts_in_float32():
    X, y = make_rows(80, 10)
    head = MLPClassifier(16, epochs=3, random_state=0).fit(X.astype(np.float16), y)
    assert {a.dtype for a in head.coefs_ + head.intercepts_} == {np.dtype(np.float32)}
    exact = forward(X, [c.astype(float) for c in head.coefs_], [c.astype(float) for c in head.intercepts_], "relu")
    actual = head.decision_function(X)
    assert 0 < np.abs(actual - exact).max() < 1e-5


@pytest.mark.parametrize("early_stopping", [False, True])
def test_validation_curves_use_the_given_validation_rows(early_stopping):
    X, y = make_rows(90, 30)
    y = np.array(["ant", "bee", "cat"])[y]
    settings = {"learning_rate": 0.02, "schedule": "constant", "weight_decay": 0, "random_state": 0, "patience": 3}
    head = MLPClassifier(32, epochs=12, early_stopping=early_stopping, **settings)
    head.fit(X[:60], y[:60], validation=(X[60:], y[60:]))
    assert head.best_epoch_ == (np.argmin(head.validation_curve_) + 1 if early_stopping else 12)
    assert len(head.loss_curve_) == len(head.validation_curve_) == len(head.validation_score_curve_) == head.n_iter_
    best_index = head.best_epoch_ - 1
    assert head.validation_curve_[best_index] == pytest.approx(log_loss(y[60:], head.predict_proba(X[60:])), rel=1e-6)
    assert head.validation_score_curve_[best_index] == pytest.approx(head.score(X[60:], y[60:]))
    retrained = MLPClassifier(32, epochs=head.best_epoch_, **settings).fit(X[:60], y[:60])
    np.testing.assert_array_equal(retrained.coefs_[0], head.coefs_[0])


def test_the_validation_score_of_a_regressor_is_r2():
    X, y = make_linear_targets()
    Y = np.column_stack([y * 1e3 + 7, X[:, 0] - y])
    weights = np.random.default_rng(0).random(50)
    head = MLPRegressor(8, epochs=4, random_state=0).fit(X[:150], Y[:150], validation=(X[150:], Y[150:], weights))
    expected = r2_score(Y[150:], head.predict(X[150:]), sample_weight=weights)
    assert head.validation_score_curve_[-1] == pytest.approx(expected, rel=1e-6)


def test_validation_rows_have_the_weights_of_training_rows():
    X, y = make_rows(300, 5)
    validation_rows = (X[200:], y[200:])
    settings = {"epochs": 2, "random_state": 0}
    head = LinearClassifier(class_weight={0: 5.0, 1: 0.5}, **settings).fit(X[:200], y[:200], validation=validation_rows)
    weights = np.array([5.0, 0.5, 1.0])[validation_rows[1]]
    expected = log_loss(validation_rows[1], head.predict_proba(validation_rows[0]), sample_weight=weights)
    assert head.validation_curve_[-1] == pytest.approx(expected, rel=1e-6)
    balanced = LinearClassifier(sampling="balanced", **settings).fit(X[:200], y[:200], validation=validation_rows)
    weights = 1 / np.bincount(y[:200])[validation_rows[1]]
    expected = log_loss(validation_rows[1], balanced.predict_proba(validation_rows[0]), sample_weight=weights)
    assert balanced.validation_curve_[-1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (lambda X, y: (X, 0 * y + 5), "validation has class 5, which no training row has"),
        (lambda X, y: (X, y[:-1]), "validation has 150 rows of X and 149 of y"),
        (lambda X, y: (X[:, :3], y), "X has 3 features"),
        (lambda X, y: (X, y, -np.ones(150)), "sample_weight holds negative"),
        (lambda X, y: X, r"a pair \(X, y\)"),
    ],
)
def test_invalid_validation_rows_are_refused(validation, message):
    X, y = make_rows()
    with pytest.raises(ValueError, match=message):
        LinearClassifier(epochs=1).fit(X, y, validation=validation(X, y))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("b", "k"), [(1024, 2), (1024, 3), (300, 15), (128, 16), (2, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fast_loss_of_few_classes_equals_the_general_one(b, k, smoothing, dtype):
    generator = torch.Generator().manual_seed(0)
    scores = (5 * torch.randn(b, k, dtype=dtype, generator=generator)).requires_grad_(True)
    Y = torch.randint(0, k, (b,), generator=generator)
    actual = LossFunction("softmax", "cross_entropy").per_row_loss(scores, Y, smoothing)
    expected = functional.cross_entropy(scores, Y, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), scores)[0] for loss in (actual, expected)))


@pytest.fixture
def small_buffers(monkeypatch):
    """Sources of more than 4,000 bytes are streamed, in blocks of 5 rows of 8 float32 values and buffers of 12 blocks.

    About 12 rows are prefetched at once, in chunks of 3.
    """
    monkeypatch.setattr(batches, "MAX_IN_MEMORY_BYTES", 4000)
    monkeypatch.setattr(batches, "BLOCK_BYTES", 160)
    monkeypatch.setattr(batches, "PREFETCHED_VALUES", 100)
    monkeypatch.setattr(batches, "VALUES_PER_CHUNK", 24)


def write_memmap(X: np.ndarray, path, dtype: str = "float32") -> np.memmap:
    X.astype(dtype).tofile(path)
    return np.memmap(path, dtype, "r", shape=X.shape)


def collect_batches(actual: BatchSource, size: int, count: int = 1) -> list[list[TrainingBatch]]:
    generator = torch.Generator().manual_seed(0)
    # A batch is valid until the next is requested, so it is copied.
    return [
        [batch.take(torch.arange(len(batch))) for batch in actual.iter_shuffled(size, generator)] for _ in range(count)
    ]


def make_numbered_rows(n: int) -> np.ndarray:
    return np.arange(n)[:, None] + np.zeros(8)


@pytest.mark.parametrize("size", [1, 7, 60, 64, 1000])
@pytest.mark.parametrize("uses_subset", [False, True])
def test_a_streamed_pass_has_every_row_once_with_its_target(small_buffers, tmp_path, size, uses_subset):
    row_numbers = np.flatnonzero(np.arange(203) % 3 > 0) if uses_subset else np.arange(203)
    source = write_memmap(make_numbered_rows(203), tmp_path / "X")
    actual = BatchSource(source, row_numbers * 10.0, row_numbers + 1.0, row_indices=row_numbers)
    for batch_list in collect_batches(actual, size, 3):
        assert [len(batch) for batch in batch_list[:-1]] == [size] * (-(-len(row_numbers) // size) - 1)
        for batch in batch_list:
            np.testing.assert_array_equal(batch.X[:, 0] * 10, batch.Y)
            np.testing.assert_allclose(batch.weights * (row_numbers + 1).mean(), batch.X[:, 0] + 1, rtol=1e-6)
        assert sorted(torch.cat([batch.X[:, 0] for batch in batch_list]).tolist()) == row_numbers.tolist()
    assert torch.cat([batch.X[:, 0].clone() for batch in actual.iter_in_order()]).tolist() == row_numbers.tolist()


def test_a_batch_is_valid_until_the_next_is_requested(small_buffers, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "PREFETCHED_VALUES", 1)
    actual = BatchSource(write_memmap(make_numbered_rows(203), tmp_path / "X"), np.arange(203), np.ones(203))
    for batch in actual.iter_shuffled(20, torch.Generator().manual_seed(0)):
        time.sleep(0.01)  # until the next batch is ready
        np.testing.assert_array_equal(batch.X[:, 0], batch.Y)


@pytest.mark.parametrize("uses_subset", [False, True])
def test_reads_are_announced_to_the_source_in_advance(small_buffers, uses_subset):
    class Source:
        def __init__(self, X: np.ndarray) -> None:
            self.X, self.shape, self.dtype = X, X.shape, X.dtype
            self.announced: set[tuple[int, int]] = set()

        def expect(self, rows: slice) -> None:
            self.announced.add((rows.start, rows.stop))

        def read_into(self, out: np.ndarray, rows: slice) -> None:
            out[...] = self[rows]

        def __getitem__(self, rows: slice) -> np.ndarray:
            assert (rows.start, rows.stop) in self.announced
            return self.X[rows]

    row_numbers = np.flatnonzero(np.arange(403) % 3 > 0) if uses_subset else np.arange(403)
    actual = BatchSource(
        Source(make_numbered_rows(403).astype(np.float32)),
        np.zeros(len(row_numbers)),
        np.ones(len(row_numbers)),
        row_indices=row_numbers,
    )
    assert (
        sorted(torch.cat([batch.X[:, 0] for batch in collect_batches(actual, 7)[0]]).tolist()) == row_numbers.tolist()
    )


def test_a_streamed_batch_mixes_many_blocks_and_passes_differ(small_buffers, tmp_path):
    actual = BatchSource(write_memmap(make_numbered_rows(300), tmp_path / "X"), np.zeros(300), np.ones(300))
    first_pass, second_pass = collect_batches(actual, 20, 2)
    assert min(len(set((batch.X[:, 0] // 5).tolist())) for batch in first_pass) >= 6
    assert not torch.equal(first_pass[0].X, second_pass[0].X)


@pytest.mark.parametrize("streamed", [False, True])
def test_balanced_sampling_draws_classes_equally_often(small_buffers, tmp_path, streamed):
    codes = np.sort(np.random.default_rng(0).choice(3, 900, p=[0.8, 0.15, 0.05]))
    X = make_numbered_rows(900)
    source = write_memmap(X, tmp_path / "X") if streamed else X
    actual = BatchSource(source, codes, np.ones(900), sampling_weights=1 / np.bincount(codes)[codes])
    drawn_codes = []
    for batch_list in collect_batches(actual, 64, 20):
        assert sum(len(batch) for batch in batch_list) == 900
        assert {len(batch) for batch in batch_list[:-1]} == {64}
        drawn_codes += [batch.Y for batch in batch_list]
    np.testing.assert_allclose(np.bincount(torch.cat(drawn_codes)) / 18_000, 1 / 3, atol=0.02)


def test_balanced_sampling_predicts_like_balanced_weights():
    rng = np.random.default_rng(0)
    y = (rng.random(600) < 0.1).astype(int)
    X = rng.normal(size=(600, 4)) + 0.8 * y[:, None]
    settings = {"learning_rate": 0.02, "epochs": 60, "random_state": 0}
    sampled = LinearClassifier(sampling="balanced", **settings).fit(X, y)
    weighted = LinearClassifier(class_weight="balanced", **settings).fit(X, y)
    np.testing.assert_allclose(sampled.predict_proba(X), weighted.predict_proba(X), atol=0.06)
    with pytest.raises(ValueError, match="sampling draws rows by class"):
        sampled.fit(X, np.column_stack([y, y]))


@pytest.mark.parametrize("kind", HEADS)
def test_a_small_file_gives_the_same_head_as_rows_in_memory(tmp_path, kind):
    X, y = make_rows()
    X = X.astype(np.float16)
    center, scale = X.mean(axis=0, dtype=float), X.std(axis=0, dtype=float)
    settings = {"epochs": 4, "early_stopping": True, "random_state": 0}
    mapped = kind(**settings)._fit_rows(write_memmap(X, tmp_path / "X", "float16"), y, None, center=center, scale=scale)
    standardised = (X.astype(np.float32) - center.astype(np.float32)) / scale.astype(np.float32)
    plain = kind(**settings).fit(standardised, y)
    assert mapped.n_features_in_ == 8
    for mapped_array, plain_array in zip(
        mapped.coefs_ + mapped.intercepts_, plain.coefs_ + plain.intercepts_, strict=True
    ):
        np.testing.assert_allclose(mapped_array, plain_array, rtol=1e-4, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", HEADS)
def test_a_streamed_fit_is_reproducible_and_as_good_as_one_in_memory(small_buffers, tmp_path, kind):
    X, y = make_rows(400, 8)
    X, y = X[np.argsort(y)].astype(np.float32), np.sort(y)
    source = write_memmap(X, tmp_path / "X")
    settings = {"learning_rate": 0.01, "epochs": 40, "random_state": 0}
    streamed, refitted = (kind(**settings)._fit_rows(source, y, None, validation=(X, y)) for _ in range(2))
    plain = kind(**settings).fit(X, y)
    np.testing.assert_array_equal(streamed.coefs_[0], refitted.coefs_[0])
    method = "predict_proba" if kind in CLASSIFIERS else "predict"
    np.testing.assert_allclose(getattr(streamed, method)(X), getattr(plain, method)(X), atol=0.25)
    assert streamed.score(X, y) == pytest.approx(plain.score(X, y), abs=0.02)


@pytest.mark.parametrize("streamed", [False, True])
def test_held_out_rows_and_rows_of_weight_zero_are_not_trained_on(request, tmp_path, streamed):
    if streamed:
        request.getfixturevalue("small_buffers")
    X, y = make_rows(300)
    source = write_memmap(X, tmp_path / "X")
    weights = np.where(np.arange(300) % 4 == 0, 0.0, 1.0)
    source_with_nan = write_memmap(np.where(weights[:, None] == 0, np.nan, X), tmp_path / "X_with_nan")
    settings = {"epochs": 3, "early_stopping": True, "random_state": 0}
    head, head_with_nan = (
        LinearClassifier(**settings)._fit_rows(fit_source, y, weights) for fit_source in (source, source_with_nan)
    )
    np.testing.assert_array_equal(head.coef_, head_with_nan.coef_)
    assert head.validation_curve_ == head_with_nan.validation_curve_


def test_a_nonfinite_row_is_named(small_buffers, tmp_path):
    X, y = make_rows(300)
    X[217, 3] = np.nan
    with pytest.raises(ValueError, match=r"^row 217 of X holds NaN or infinity"):
        LinearClassifier(epochs=2)._fit_rows(write_memmap(X, tmp_path / "X"), y, None)


def test_a_small_fit_uses_one_thread_and_restores_the_thread_count(monkeypatch):
    X, y = make_rows(60)
    thread_counts, original_call = [], Network.__call__

    def record_threads(self, x, **options):
        thread_counts.append(torch.get_num_threads())
        if len(thread_counts) == 6:
            raise KeyboardInterrupt
        return original_call(self, x, **options)

    monkeypatch.setattr(Network, "__call__", record_threads)
    initial_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        LinearClassifier(epochs=4, batch_size=60).fit(X, y)
        assert (set(thread_counts), torch.get_num_threads()) == ({1}, 3)
        with pytest.raises(KeyboardInterrupt):
            LinearClassifier(epochs=4, batch_size=60).fit(X, y)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(initial_threads)


def test_concurrent_fits_restore_the_thread_count():
    X, y = make_rows(60)
    initial_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        fits = [threading.Thread(target=LinearClassifier(epochs=n).fit, args=(X, y)) for n in (5, 40, 20)]
        for fit in fits:
            fit.start()
        for fit in fits:
            fit.join()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(initial_threads)


@pytest.mark.parametrize("kind", HEADS)
def test_settings_are_estimator_parameters(kind):
    head = kind(l1=0.5, optimizer="adam", validation_fraction=0.2)
    copy = clone(head)
    assert copy.get_params() == head.get_params()
    assert (copy.l1, copy.set_params(epochs=3).epochs) == (0.5, 3)
    assert repr(head) == f"{kind.__name__}(l1=0.5, optimizer='adam', validation_fraction=0.2)"
    assert kind.__name__ in head._repr_html_()
    with pytest.raises(TypeError):
        kind(depth=3)


def test_weights_and_validation_rows_are_routed_to_the_head():
    X, y = make_rows()
    with sklearn.config_context(enable_metadata_routing=True):
        head = MLPClassifier(4, epochs=3, random_state=0).set_fit_request(sample_weight=True, validation=True)
        head.set_score_request(sample_weight=True)
        pipeline = make_pipeline(StandardScaler().set_fit_request(sample_weight=False), head)
        weights = np.where(y == 0, 100.0, 1.0)
        pipeline.fit(X, y, sample_weight=weights, validation=(X, y))
        assert len(pipeline[-1].validation_curve_) == 3
        assert (pipeline.predict(X) == 0).mean() > 0.5
        assert len(cross_validate(pipeline, X, y, cv=3, params={"sample_weight": weights})["test_score"]) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "hinge"}, {"focal_gamma": -1}, {"logit_adjustment": -1}, {"sampling": "smote"}, {"warmup": 1.0},
        {"l1": -1}, {"feature_noise": -0.1}, {"mixup": "a"}, {"activation": "rely"}, {"initial_weights": "zeros"},
        {"learning_rate": "fast"}, {"schedule": "cyclic"}, {"optimizer": "lion"},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} is"):
        MLPClassifier(**settings).fit([[0.0], [1.0]], [0, 1])


def test_a_classifier_refuses_a_regression_loss():
    with pytest.raises(ValueError, match="loss is 'focal'; give one of squares, absolute, huber"):
        LinearRegressor(loss="focal").fit([[0.0], [1.0]], [0, 1])
