from __future__ import annotations

import numpy as np
import pytest

from featpipe.heads import SoftmaxRegression, solver
from featpipe.heads.curvature import Diagonal
from featpipe.heads.objective import Problem
from featpipe.heads.quasi_newton import HISTORY, Memory


def two_loops(pairs, gradient, inverse):
    """L-BFGS as the textbook has it, for one group."""
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
def test_a_step_is_that_of_the_two_loops(groups):
    rng = np.random.default_rng(0)
    memory, k, width = Memory(), 2, 6
    root = rng.normal(size=(groups, k * width, k * width))
    hessian = root @ root.transpose(0, 2, 1) + np.eye(k * width)
    inverse = 1 / rng.uniform(1, 5, width)
    pairs = [[] for _ in range(groups)]
    for _ in range(HISTORY + 5):
        step = rng.normal(size=(groups, k * width))
        change = np.einsum("gpq,gq->gp", hessian, step)
        for group in range(groups):
            pairs[group] = [*pairs[group], (step[group], change[group])][-HISTORY:]
        memory.add(step.reshape(groups, k, width), change.reshape(groups, k, width))
    gradient = rng.normal(size=(groups, k, width))
    metric = Diagonal(inverse)
    found = memory.direction(gradient, metric.solve)
    for group in range(groups):
        expected = two_loops(pairs[group], gradient[group].ravel(), np.tile(inverse, k))
        np.testing.assert_allclose(found[group].ravel(), expected, rtol=1e-6, atol=1e-9)
    # Under a stronger penalty the changes are those that would have been seen.
    memory.repenalise(2.0, width)
    grown = np.where(np.arange(k * width) % width == width - 1, 0.0, 2.0)
    found = memory.direction(gradient, metric.solve)
    for group in range(groups):
        stronger = [(s, y + grown * s) for s, y in pairs[group]]
        expected = two_loops(stronger, gradient[group].ravel(), np.tile(inverse, k))
        np.testing.assert_allclose(found[group].ravel(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["copies", "unequal columns", "plain"])
def test_few_rows_reach_the_minimum_also_where_their_products_are_singular(kind, monkeypatch):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 60)
    X = rng.normal(size=(4, 150))[y] + 3 * rng.normal(size=(60, 150))
    if kind == "copies":
        X[30:], y[30:] = X[:30], y[:30]
    if kind == "unequal columns":
        X *= np.logspace(-5, 3, 150)
    head = SoftmaxRegression(tol=1e-9).fit(X, y)
    monkeypatch.setattr(solver, "ROWS_FOR_EACH_CLASS", 0)
    whole = SoftmaxRegression(tol=1e-9).fit(X, y)
    problem = Problem(X, y, np.ones(60), "softmax", 4)
    here, there = (problem.at(np.column_stack([h.coef_, h.intercept_])).values.sum() for h in (head, whole))
    assert here == pytest.approx(there, rel=1e-7)
    np.testing.assert_allclose(head.predict_proba(X), whole.predict_proba(X), atol=1e-4)
