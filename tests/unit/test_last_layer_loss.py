"""The training loss of the last layer equals the formulas of the papers, written and differentiated in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.preprocessing import StandardScaler
from torch.nn import functional

from featpipe import SoftmaxRegression
from featpipe.heads.last_layer import LastLayer
from featpipe.incremental.last_layer_loss import DistillationTerm, LastLayerObjective, QuadraticPenalty, fit_last_layer
from featpipe.incremental.methods.bias_correction import fit_bias_correction
from featpipe.incremental.methods.last_layer import init_layer
from featpipe.incremental.methods.replay import compute_weights_and_offsets, rescale_layer

N, P, K, K_OLD = 30, 5, 6, 4


@pytest.fixture(scope="module")
def problem() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "Z": rng.normal(size=(N, P)),
        "y": rng.integers(0, K, N),
        "weights": rng.uniform(0.5, 2, N),
        "theta": rng.normal(size=(K, P + 1)),
        "old_theta": rng.normal(size=(K_OLD, P + 1)),
        "teacher_scores": 3 * rng.normal(size=(N, K_OLD)),
        "offsets": rng.normal(size=K),
        "importances": np.vstack([rng.uniform(size=(K_OLD, P + 1)), np.zeros((K - K_OLD, P + 1))]),
    }


def compute_torch_loss(problem: dict[str, Any], theta: torch.Tensor, terms: set[str]) -> torch.Tensor:
    """The loss as in the papers: learning without forgetting (temperature 2), elastic weight consolidation."""
    Z, w = torch.tensor(problem["Z"]), torch.tensor(problem["weights"])
    scores = Z @ theta[:, :-1].T + theta[:, -1]
    adjusted_scores = scores + torch.tensor(problem["offsets"]) if "offsets" in terms else scores
    loss = (w * functional.cross_entropy(adjusted_scores, torch.tensor(problem["y"]), reduction="none")).sum()
    loss = loss + 0.5 * 0.3 * (theta[:, :-1] ** 2).sum()
    if "distill" in terms:
        target = torch.softmax(torch.tensor(problem["teacher_scores"]) / 2, dim=1)
        student_log_probs = torch.log_softmax(scores[:, :K_OLD] / 2, dim=1)
        row_losses = functional.kl_div(student_log_probs, target, reduction="none").sum(dim=1)
        loss = loss + 7.0 * 2**2 * (w * row_losses).sum()
    if "ewc" in terms:
        difference = theta[:K_OLD] - torch.tensor(problem["old_theta"])
        loss = loss + 0.5 * (torch.tensor(problem["importances"])[:K_OLD] * difference**2).sum()
        loss = loss + 0.5 * (torch.tensor(problem["importances"])[K_OLD:] * theta[K_OLD:] ** 2).sum()
    return loss


@pytest.mark.parametrize("terms", [set(), {"distill"}, {"ewc"}, {"distill", "ewc"}, {"offsets", "distill", "ewc"}])
def test_values_and_gradients_are_those_of_the_formulas(terms: set[str], problem: dict[str, Any]) -> None:
    objective = LastLayerObjective(
        problem["Z"],
        problem["y"],
        problem["weights"],
        0.3,
        offsets=problem["offsets"] if "offsets" in terms else None,
        distillation=DistillationTerm(problem["teacher_scores"], 2.0, 7.0) if "distill" in terms else None,
        quadratic_penalty=QuadraticPenalty(problem["old_theta"], problem["importances"]) if "ewc" in terms else None,
    )
    value, gradient = objective.value_and_gradient(problem["theta"])
    theta = torch.tensor(problem["theta"], requires_grad=True)
    reference = compute_torch_loss(problem, theta, terms)
    (expected,) = torch.autograd.grad(reference, [theta])
    assert value == pytest.approx(reference.item(), rel=1e-12)
    assert np.allclose(gradient, expected.numpy(), rtol=1e-10, atol=1e-12)


def test_half_weights_and_half_offsets_restore_the_class_frequencies() -> None:
    """Without informative features, the probabilities are the shares of the represented rows."""
    y, represented_counts = np.array([0, 0, 1, 1, 1, 2]), np.array([10.0, 10.0, 1.0, 1.0, 1.0, 4.0])
    weights, offsets = compute_weights_and_offsets(y, represented_counts, 3)
    layer = fit_last_layer(
        LastLayerObjective(np.zeros((6, 1)), y, weights, offsets=offsets), LastLayer(np.zeros((3, 1)), np.zeros(3)), 200
    )
    assert np.allclose(softmax(layer.b), np.array([20, 3, 4]) / 27, atol=1e-5)


def test_a_rescaled_layer_gives_the_same_scores() -> None:
    rng = np.random.default_rng(0)
    X, new_X = rng.normal(size=(50, P)) * 3, rng.normal(size=(90, P)) + 2
    old_scaler, new_scaler = StandardScaler().fit(X), StandardScaler().fit(new_X)
    layer = LastLayer(rng.normal(size=(K, P)), rng.normal(size=K))
    rescaled = rescale_layer(layer, old_scaler, new_scaler)
    assert np.allclose(
        rescaled.compute_scores(new_scaler.transform(X)), layer.compute_scores(old_scaler.transform(X)), atol=1e-10
    )


def test_fixed_scores_leave_the_gradient_of_the_trained_ones(problem: dict[str, Any]) -> None:
    theta = problem["theta"]
    full_objective = LastLayerObjective(problem["Z"], problem["y"], problem["weights"])
    fixed_scores = problem["Z"] @ theta[:K_OLD, :-1].T + theta[:K_OLD, -1]
    partial_objective = LastLayerObjective(problem["Z"], problem["y"], problem["weights"], fixed_scores=fixed_scores)
    value, gradient = partial_objective.value_and_gradient(theta[K_OLD:])
    assert value == pytest.approx(full_objective.value_and_gradient(theta)[0])
    assert np.allclose(gradient, full_objective.value_and_gradient(theta)[1][K_OLD:])


def test_the_minimum_is_that_of_softmax_regression_and_each_epoch_is_reported(problem: dict[str, Any]) -> None:
    losses: list[float] = []
    objective = LastLayerObjective(problem["Z"], problem["y"], np.ones(N), 1 / 2.0)
    layer = fit_last_layer(
        objective, LastLayer(np.zeros((K, P)), np.zeros(K)), 500, lambda layer, loss: losses.append(loss)
    )
    expected = SoftmaxRegression(C=2.0).fit(problem["Z"], problem["y"])
    assert np.allclose(layer.W, expected.coef_, atol=1e-3)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(np.log(K))
    assert len(losses) > 5


def test_new_classes_start_at_their_means_and_old_ones_as_they_were(problem: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    y = np.repeat([4, 5], 20)
    Z = 4 * np.eye(P)[y - 4] + 0.3 * rng.normal(size=(40, P))
    old = LastLayer(problem["old_theta"][:, :-1], problem["old_theta"][:, -1])
    layer = init_layer(old, Z, y, K)
    assert np.array_equal(layer.W[:K_OLD], old.W)
    assert np.array_equal(layer.b[:K_OLD], old.b)
    assert (layer.compute_scores(Z)[:, K_OLD:].argmax(axis=1) == y - K_OLD).all()
    means = np.stack([Z[y == code].mean(axis=0) for code in (4, 5)])
    assert np.allclose(layer.W[K_OLD:] / np.linalg.norm(layer.W[K_OLD]), means / np.linalg.norm(means[0]))
    assert np.linalg.norm(layer.W[K_OLD:], axis=1).mean() == pytest.approx(np.linalg.norm(old.W, axis=1).mean())


def test_the_bias_correction_separates_old_from_new_rows_and_stays_within_the_scores() -> None:
    rng = np.random.default_rng(0)
    old, new = np.zeros((500, 2)), np.zeros((500, 2))
    old[:, 1], new[:, 1] = rng.normal(4, 1, 500), rng.normal(10, 1, 500)
    y, weights = np.ones(500, np.int64), np.ones(500)
    assert fit_bias_correction(1, old, weights, new, y) == pytest.approx(-7, abs=0.3)
    old[:, 1] = rng.normal(0, 100, 500)
    new[:, 1] = old[:, 1] + 3  # hardly informative
    assert abs(fit_bias_correction(1, old, 3 * weights, new, y)) < 3 * 100
