from __future__ import annotations

import numpy as np
import pytest

from featpipe.heads import SoftmaxRegression
from featpipe.heads.logistic import solver
from featpipe.heads.logistic.lbfgs import HISTORY_SIZE, LBFGSHistory
from featpipe.heads.logistic.objective import LogisticProblem
from featpipe.heads.logistic.preconditioners import DiagonalPreconditioner


def compute_two_loop_direction(pairs, gradient, inverse):
    """The two-loop recursion of L-BFGS, for one group."""
    q, scales = gradient.copy(), []
    for s, y in reversed(pairs):
        scales.append(s @ q / (s @ y))
        q -= scales[-1] * y
    s, y = pairs[-1]
    r = (s @ y) / (y @ (inverse * y)) * inverse * q
    for (s, y), scale in zip(pairs, reversed(scales), strict=True):
        r += s * (scale - y @ r / (s @ y))
    return -r


@pytest.mark.parametrize("groups", [1, 3])
def test_the_search_direction_equals_that_of_the_two_loop_recursion(groups):
    rng = np.random.default_rng(0)
    memory, k, width = LBFGSHistory(), 2, 6
    root = rng.normal(size=(groups, k * width, k * width))
    hessian = root @ root.transpose(0, 2, 1) + np.eye(k * width)
    inverse = 1 / rng.uniform(1, 5, width)
    pairs = [[] for _ in range(groups)]
    for _ in range(HISTORY_SIZE + 5):
        step = rng.normal(size=(groups, k * width))
        change = np.einsum("gpq,gq->gp", hessian, step)
        for group in range(groups):
            pairs[group] = [*pairs[group], (step[group], change[group])][-HISTORY_SIZE:]
        memory.add(step.reshape(groups, k, width), change.reshape(groups, k, width))
    gradient = rng.normal(size=(groups, k, width))
    preconditioner = DiagonalPreconditioner(inverse)
    actual = memory.direction(gradient, preconditioner.solve)
    for group in range(groups):
        expected = compute_two_loop_direction(pairs[group], gradient[group].ravel(), np.tile(inverse, k))
        np.testing.assert_allclose(actual[group].ravel(), expected, rtol=1e-6, atol=1e-9)
    # After a stronger penalty, the gradient changes include its contribution.
    memory.update_penalty(2.0, width)
    ridge_increase = np.where(np.arange(k * width) % width == width - 1, 0.0, 2.0)
    actual = memory.direction(gradient, preconditioner.solve)
    for group in range(groups):
        stronger = [(s, y + ridge_increase * s) for s, y in pairs[group]]
        expected = compute_two_loop_direction(stronger, gradient[group].ravel(), np.tile(inverse, k))
        np.testing.assert_allclose(actual[group].ravel(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["copies", "unequal columns", "plain"])
def test_few_rows_reach_the_minimum_even_if_their_gram_matrix_is_singular(kind, monkeypatch):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 60)
    X = rng.normal(size=(4, 150))[y] + 3 * rng.normal(size=(60, 150))
    if kind == "copies":
        X[30:], y[30:] = X[:30], y[:30]
    if kind == "unequal columns":
        X *= np.logspace(-5, 3, 150)
    head = SoftmaxRegression(tol=1e-9).fit(X, y)
    monkeypatch.setattr(solver, "MAX_ROW_SPACE_ROWS_PER_CLASS", 0)
    head_in_all_columns = SoftmaxRegression(tol=1e-9).fit(X, y)
    problem = LogisticProblem(X, y, np.ones(60), "softmax", 4)
    value, value_in_all_columns = (
        problem.evaluate(np.column_stack([h.coef_, h.intercept_])).values.sum() for h in (head, head_in_all_columns)
    )
    assert value == pytest.approx(value_in_all_columns, rel=1e-7)
    np.testing.assert_allclose(head.predict_proba(X), head_in_all_columns.predict_proba(X), atol=1e-4)


def make_nearly_separable_rows(n: int = 6000, d: int = 48, k: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Rows like the features of a network, with well separated classes."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, k, n)
    Z = 3.0 * rng.normal(size=(k, 16))[y] + rng.normal(size=(n, 16))
    X = np.maximum(Z @ rng.normal(size=(16, d)) / 2 - 0.5 + 0.3 * rng.normal(size=(n, d)), 0)
    return ((X - X.mean(0)) / X.std(0)).astype(np.float32), y


def compute_value(head: SoftmaxRegression, X: np.ndarray, y: np.ndarray) -> float:
    problem = LogisticProblem(X, y, np.ones(len(X)), "softmax", len(head.classes_))
    return float(problem.evaluate(np.column_stack([head.coef_, head.intercept_])).values.sum())


def count_passes(X: np.ndarray, y: np.ndarray, monkeypatch, **settings: float) -> tuple[int, float]:
    """The number of passes over all rows until the minimum, and the value there."""
    row_counts, original_evaluate = [], LogisticProblem.evaluate
    with monkeypatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(solver, name, value)
        patch.setattr(
            LogisticProblem,
            "evaluate",
            lambda self, *arguments: row_counts.append(self.n) or original_evaluate(self, *arguments),
        )
        head = SoftmaxRegression().fit(X, y)
    return row_counts.count(len(X)), compute_value(head, X, y)


def test_a_start_from_a_sample_saves_passes_and_reaches_the_same_minimum(monkeypatch):
    X, y = make_nearly_separable_rows()
    plain = count_passes(X, y, monkeypatch, MIN_PRODUCTS_FOR_WARM_START=np.inf)
    sampled = count_passes(X, y, monkeypatch, MIN_PRODUCTS_FOR_WARM_START=0)
    assert sampled[0] < plain[0]
    assert sampled[1] == pytest.approx(plain[1], rel=1e-6)


def test_a_sample_with_too_few_rows_of_a_class_or_a_high_loss_is_not_used_as_start(monkeypatch):
    X, y = make_nearly_separable_rows()
    monkeypatch.setattr(solver, "MIN_PRODUCTS_FOR_WARM_START", 0)

    def find_start(y: np.ndarray) -> object:
        return solver._find_warm_start(
            LogisticProblem(X, y, np.ones(len(X)), "softmax", int(y.max()) + 1).materialize(np.float32)
        )

    assert find_start(y) is not None
    y_with_rare_class = y.copy()
    y_with_rare_class[:5] = 12
    assert find_start(y_with_rare_class) is None
    assert find_start(np.random.default_rng(1).permutation(y)) is None


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_the_loss_at_zero_weights_is_computed_without_a_pass(fit_intercept):
    rng = np.random.default_rng(0)
    y = rng.choice(3, 50, p=[0.7, 0.2, 0.1])
    problem = LogisticProblem(rng.normal(size=(50, 4)), y, rng.random(50), "softmax", 3, fit_intercept)
    assert problem.initial_loss() == pytest.approx(problem.evaluate(problem.initial_theta()).values.sum(), rel=1e-12)
