"""Logistic regression on features, against scikit-learn's lbfgs on the same float32 numbers, in turns.

    python tests/benchmarks/softmax.py [CASE]... [--seconds CAP]
    python tests/benchmarks/softmax.py path

Every point of an optimisation is stored with its time. Its gap to the minimum, which a longer run finds, is computed
afterwards in float64, outside of all timing. CAP is the limit in seconds for a fit of scikit-learn.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import _logistic as sklearn_logistic
from threadpoolctl import threadpool_limits

from featpipe.heads import SoftmaxRegression, SoftmaxRegressionCV
from featpipe.heads.logistic import solver
from featpipe.heads.logistic.objective import LogisticProblem
from featpipe.runtime import BlasThreadPool

Trace = list[tuple[float, NDArray[Any]]]

CASES = {  # rows, width, classes, kind of rows, rounds
    "200": (200, 512, 10, "relu", 9),
    "200-two": (200, 64, 2, "noisy", 9),
    "200-hundred": (200, 512, 100, "relu", 5),
    "2000": (2000, 512, 20, "relu", 7),
    "2000-noisy": (2000, 512, 20, "noisy", 7),
    "2000-gauss": (2000, 512, 20, "gauss", 7),
    "2000-two": (2000, 512, 2, "noisy", 7),
    "2000-hundred": (2000, 512, 100, "noisy", 3),
    "2000-wide": (2000, 1280, 100, "noisy", 1),
    "50k-512": (50_000, 512, 100, "relu", 1),
    "50k-512-noisy": (50_000, 512, 100, "noisy", 1),
    "50k-512-gauss": (50_000, 512, 100, "gauss", 1),
    "50k-512-separable": (50_000, 512, 100, "separable", 1),
    "50k-1280": (50_000, 1280, 100, "relu", 1),
    "50k-1280-noisy": (50_000, 1280, 100, "noisy", 1),
    "50k-1280-gauss": (50_000, 1280, 100, "gauss", 1),
}
GAPS = (1e-2, 1e-4, 1e-6)


def make_rows(n: int, d: int, k: int, kind: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Standardised rows and their classes.

    gauss: class means and isotropic noise. relu: like the last layer of a network, non-negative, with unequal scales
    and most of the variance in a few directions. separable: the same with classes far apart. noisy: the same with a
    tenth of the labels drawn at random.
    """
    rng = np.random.default_rng(0)
    y = rng.integers(0, k, n)
    if kind == "gauss":
        X = 0.12 * rng.normal(size=(k, d))[y] + rng.normal(size=(n, d))
    else:
        latent = 64
        spectrum = np.arange(1, latent + 1) ** -0.5
        spread = 3.0 if kind == "separable" else 1.0
        Z = (spread * rng.normal(size=(k, latent))[y] + rng.normal(size=(n, latent))) * spectrum
        X = Z @ rng.normal(size=(latent, d)) / 2 - 0.5 + 0.3 * rng.normal(size=(n, d))
        X = np.maximum(X, 0) * np.exp(0.7 * rng.normal(size=d))
    if kind == "noisy":
        y = np.where(rng.random(n) < 0.1, rng.integers(0, k, n), y)
    X = X.astype(np.float32)
    X -= X.mean(axis=0)
    X /= np.maximum(X.std(axis=0), 1e-6)
    # With few rows, some classes may have none.
    return X, np.unique(y, return_inverse=True)[1]


class _TimeLimitReached(Exception):
    pass


@contextmanager
def trace_calls(owner: Any, name: str, get_point: Any, trace: Trace, max_seconds: float = np.inf) -> Iterator[None]:
    """Store a point at each call of a function, and stop after a number of seconds."""
    original, started = getattr(owner, name), perf_counter()

    def call_and_trace(*args: Any, **settings: Any) -> Any:
        result = original(*args, **settings)
        seconds = perf_counter() - started
        trace.append((seconds, get_point(*args)))
        if seconds > max_seconds:
            raise _TimeLimitReached
        return result

    setattr(owner, name, call_and_trace)
    try:
        yield
    except _TimeLimitReached:
        pass
    finally:
        setattr(owner, name, original)


def trace_scikit_learn(X: Any, y: Any, max_seconds: float) -> Trace:
    trace: Trace = []
    k, d = int(y.max()) + 1, X.shape[1]
    shape = (lambda w: w.reshape(k, d + 1, order="F")) if k > 2 else (lambda w: w[None])
    head = LogisticRegression(C=1.0, tol=1e-12, max_iter=100_000)
    with trace_calls(
        sklearn_logistic.LinearModelLoss, "loss_gradient", lambda loss, w, *rest: shape(w.copy()), trace, max_seconds
    ):
        head.fit(X, y)
    return trace


def trace_featpipe(X: Any, y: Any, tol: float) -> Trace:
    trace: Trace = []
    head = SoftmaxRegression(tol=tol)
    started = perf_counter()
    # In the row space a point has another length, but the objective in float64 has the same value.
    get_point = (
        (lambda search: search.point.values.sum()) if len(X) < X.shape[1] else lambda search: search.theta.copy()
    )
    with trace_calls(solver._LBFGSSearch, "_record_progress", get_point, trace):
        head.fit(X, y)
    trace.append((perf_counter() - started, np.column_stack([head.coef_, head.intercept_])))
    return trace


def compute_seconds_to(gap: float, trace: Trace, problem: LogisticProblem, minimum: float) -> float:
    """Seconds until the gap was reached, by bisection, because the objective decreases."""
    low, high = 0, len(trace)
    while low < high:
        middle = (low + high) // 2
        point = trace[middle][1]
        value = problem.evaluate(point).values.sum() if np.ndim(point) else point
        low, high = (low, middle) if value <= minimum * (1 + gap) else (middle + 1, high)
    return trace[low][0] if low < len(trace) else np.inf


def compare(case: str, max_seconds: float) -> None:
    n, d, k, kind, rounds = CASES[case]
    X, y = make_rows(n, d, k, kind)
    k = int(y.max()) + 1
    one_thread = "scikit-learn, one thread"
    timings: dict[str, list[list[float]]] = {"scikit-learn": [], one_thread: [], "featpipe": []}
    warnings.simplefilter("ignore")
    reference = SoftmaxRegression(tol=1e-10).fit(X, y)
    settings = (y, np.ones(n), "softmax", k) if k > 2 else (y[:, None], np.ones((n, 1)), "sigmoid", 1)
    with BlasThreadPool(float(n) * d * k) as workers:
        problem = LogisticProblem(X, *settings, workers=workers)
        minimum = problem.evaluate(np.column_stack([reference.coef_, reference.intercept_])).values.sum()
    counts = {}
    for _ in range(rounds):
        traces = {
            "scikit-learn": trace_scikit_learn(X, y, max_seconds),
            "featpipe": trace_featpipe(X, y, SoftmaxRegression().tol),
        }
        if n < 10_000:
            with threadpool_limits(1):
                traces[one_thread] = trace_scikit_learn(X, y, max_seconds)
        for name, trace in traces.items():
            counts[name] = len(trace)
            with BlasThreadPool(float(n) * d * k) as workers:
                problem = LogisticProblem(X, *settings, workers=workers)
                timings[name].append(
                    [*(compute_seconds_to(gap, trace, problem, minimum) for gap in GAPS), trace[-1][0]]
                )
    for name, values in timings.items():
        if not values:
            continue
        columns = [statistics.median(column) for column in zip(*values, strict=True)]
        print(case, f"{name:24}", *(f"{seconds:9.3f}" for seconds in columns), f"{counts[name]} points", flush=True)


def measure_path(n: int = 10_000, d: int = 512, k: int = 50) -> None:
    """45 strengths on one split, and on five folds with the fit at the end, against fits from scratch at C = 1."""
    for kind in ("relu", "noisy", "gauss", "separable"):
        X, y = make_rows(n, d, k, kind)
        seconds: dict[str, list[float]] = {"one fit": [], "one split": [], "five folds": []}
        split = [(np.arange(n) % 5 > 0, np.arange(n) % 5 == 0)]
        heads = {
            "one fit": SoftmaxRegression(),
            "one split": SoftmaxRegressionCV(cv=[tuple(map(np.flatnonzero, split[0]))], refit=False),
            "five folds": SoftmaxRegressionCV(cv=5),
        }
        for _ in range(3):
            for name, head in heads.items():
                started = perf_counter()
                head.fit(X, y)
                seconds[name].append(perf_counter() - started)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratios = (f"{name} {values:.2f} s = {values / medians['one fit']:.1f} fits" for name, values in medians.items())
        print("path", kind, *ratios, sep=", ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--seconds", type=float, default=120.0)
    options = parser.parse_args()
    print("case, library, seconds to gaps of", *GAPS, "and in total")
    for case in options.cases:
        if case == "path":
            measure_path()
            continue
        compare(case, options.seconds)


if __name__ == "__main__":
    main()
