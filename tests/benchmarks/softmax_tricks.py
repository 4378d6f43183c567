"""The gain of each optimisation of the logistic solver: with and without it, in turns, in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/softmax_tricks.py [fit] [path] [labels] [row-space] [l1] [--rounds ROUNDS]

Prints passes (evaluations of the objective; those on a sample count by its share of the rows) and process CPU time, the
minimum of all rounds. One thread, so that other work on the machine has little effect on the CPU time.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
from sklearn.linear_model import LogisticRegression
from softmax import make_rows

from featpipe.heads import SoftmaxRegression, SoftmaxRegressionCV
from featpipe.heads.logistic import cv, preconditioners, solver
from featpipe.heads.logistic.lbfgs import LBFGSHistory
from featpipe.heads.logistic.objective import LogisticProblem

KINDS = ("gauss", "relu", "noisy", "separable")
FIT_SIZES = ((2_000, 512, 20), (13_000, 512, 40), (50_000, 512, 100))
PATH_SIZE = (6_000, 512, 30)
LABELS_SIZE = (5_000, 256, 80)
ROW_SPACE_SIZES = ((200, 512, 10), (400, 1280, 50), (1000, 1280, 20))
L1_SIZES = ((2_000, 128, 10), (2_000, 512, 2))

Patches = Mapping[tuple[Any, str], Any]  # by owner and name: the value that switches an optimisation off


def two_loop_direction(history: LBFGSHistory, gradient: Any, precondition: Callable[[Any], Any]) -> Any:
    """The recursion of the textbook: Nocedal and Wright, Numerical Optimization, algorithm 7.4."""
    if not history.slots:
        return -precondition(gradient[None])[0]
    steps, changes = history.steps, history.gradient_changes
    direction, alphas = gradient.reshape(len(gradient), -1).astype(history.dtype), {}
    for slot in reversed(history.slots):
        curvature = history.inner_products[:, slot, slot]
        alphas[slot] = np.einsum("gp,gp->g", steps[:, slot], direction) / curvature
        direction = direction - alphas[slot][:, None].astype(history.dtype) * changes[:, slot]
    newest = history.slots[-1]
    stacked = np.stack([direction, changes[:, newest]])
    direction, change = precondition(stacked.reshape(2, *gradient.shape)).reshape(stacked.shape)
    norms = np.maximum(np.einsum("gp,gp->g", changes[:, newest], change), 1e-300)
    direction = direction * (history.inner_products[:, newest, newest] / norms)[:, None]
    for slot in history.slots:
        beta = np.einsum("gp,gp->g", changes[:, slot], direction) / history.inner_products[:, slot, slot]
        direction = direction + (alphas[slot] - beta)[:, None] * steps[:, slot]
    return -direction.reshape(gradient.shape)


def plain_curvatures(problem: LogisticProblem, p: Any, _rows: Any) -> Any:
    """p(1 - p), without the residuals of misclassified rows."""
    curvatures = p * (1 - p)
    return curvatures if problem.link == "sigmoid" else curvatures.mean(axis=1)[:, None]


def start_at_last(problem: LogisticProblem, previous_ridge: float, points: list[Any]) -> Any:
    return replace(problem, ridge=previous_ridge).with_ridge(problem.ridge, points[-1])[1] if points else None


NO_BLOCKS: Patches = {(solver, "MAX_BLOCK_COST"): -1.0}
NO_SAMPLE_START: Patches = {(solver, "MIN_PRODUCTS_FOR_WARM_START"): np.inf}
TWO_LOOPS: Patches = {(LBFGSHistory, "direction"): two_loop_direction}
SWITCHES: dict[str, Patches] = {
    "all": {},
    "no class blocks": NO_BLOCKS,
    "no sample start": NO_SAMPLE_START,
    "neither": {**NO_BLOCKS, **NO_SAMPLE_START},
    "two-loop recursion": TWO_LOOPS,
    "curvature p(1 - p)": {(preconditioners, "_compute_curvatures"): plain_curvatures},
    "unshrunk first step": {(solver._LBFGSSearch, "_shrink_first_step"): lambda _search, candidate, *_: candidate},
}
PATH_SWITCHES: dict[str, Patches] = {
    "all": {},
    "no class blocks": NO_BLOCKS,
    "two-loop recursion": TWO_LOOPS,
    "no extrapolation": {(cv, "_extrapolate_start"): start_at_last},
    "history cleared": {(LBFGSHistory, "update_penalty"): lambda history, *_: history.clear()},
}
LABEL_SWITCHES: dict[str, Patches] = {
    "all": {},
    "all labels to the end": {(solver._LBFGSSearch, "_restrict_to_groups"): lambda *_: None},
}
ROW_SPACE_SWITCHES: dict[str, Patches] = {
    "all": {},
    "QR alone": {(solver, "dpotrf"): lambda gram, **_: (gram, 1)},
    "in all columns": {(solver, "MAX_ROW_SPACE_ROWS_PER_CLASS"): -1},
}


@contextmanager
def count_passes(n_rows: int) -> Iterator[list[float]]:
    """Count evaluations of the objective, in passes over all rows."""
    passes = [0.0]
    original = LogisticProblem.evaluate

    def evaluate(problem: LogisticProblem, *args: Any) -> Any:
        passes[0] += problem.n / n_rows
        return original(problem, *args)

    with patch.object(LogisticProblem, "evaluate", evaluate):
        yield passes


def measure(run: Callable[[], Any], n_rows: int, patches: Patches) -> tuple[float, float]:
    """CPU seconds and passes of one run."""
    with ExitStack() as stack:
        for (owner, name), value in patches.items():
            stack.enter_context(patch.object(owner, name, value))
        passes = stack.enter_context(count_passes(n_rows))
        started = time.process_time()
        run()
        return time.process_time() - started, passes[0]


def print_variants(
    title: str, run: Callable[[], Any], n_rows: int, switches: Mapping[str, Patches], rounds: int
) -> None:
    """Run all variants in turns; print the minimum CPU time of each."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in switches}
    for _ in range(rounds):
        for name, patches in switches.items():
            results[name].append(measure(run, n_rows, patches))
    reference = min(results["all"])[0]
    for name, measurements in results.items():
        seconds, passes = min(measurements)
        print(
            f"{title:32} {name:20} {passes:7.1f} passes {seconds:8.3f} s {100 * (seconds / reference - 1):+6.1f} %",
            flush=True,
        )


def measure_fit(rounds: int) -> None:
    for n, d, k in FIT_SIZES:
        for kind in KINDS:
            X, y = make_rows(n, d, k, kind)
            print_variants(f"fit {n} x {d}, {k} {kind}", partial(SoftmaxRegression().fit, X, y), n, SWITCHES, rounds)


def measure_path(rounds: int) -> None:
    """45 strengths on one split."""
    n, d, k = PATH_SIZE
    split = [(np.flatnonzero(np.arange(n) % 5 > 0), np.flatnonzero(np.arange(n) % 5 == 0))]
    for kind in KINDS:
        X, y = make_rows(n, d, k, kind)
        run = partial(SoftmaxRegressionCV(cv=split, refit=False).fit, X, y)
        print_variants(f"path {n} x {d}, {k} {kind}", run, len(split[0][0]), PATH_SWITCHES, rounds)


def measure_labels(rounds: int) -> None:
    """80 labels between 0.2 % and 50 % of the rows, which need different numbers of steps."""
    n, d, k = LABELS_SIZE
    for kind in ("gauss", "relu"):
        X, _ = make_rows(n, d, 8, kind)
        rng, shares = np.random.default_rng(0), np.geomspace(0.002, 0.5, k)
        directions = rng.normal(size=(d, k)) / np.sqrt(d) * rng.permutation(np.geomspace(0.3, 30, k))
        scores = (X - X.mean(axis=0)) / (X.std(axis=0) + 1e-9) @ directions + rng.logistic(size=(n, k))
        Y = (np.argsort(np.argsort(-scores, axis=0), axis=0) < shares * n).astype(int)
        run = partial(SoftmaxRegression().fit, X, Y)
        print_variants(f"labels {n} x {d}, {k} {kind}", run, n, LABEL_SWITCHES, rounds)


def measure_row_space(rounds: int) -> None:
    """Fewer rows than columns; a path too, where the coordinates serve 45 strengths."""
    for n, d, k in ROW_SPACE_SIZES:
        for kind in ("gauss", "relu", "noisy"):
            X, y = make_rows(n, d, k, kind)
            print_variants(
                f"fit {n} x {d}, {k} {kind}", partial(SoftmaxRegression().fit, X, y), n, ROW_SPACE_SWITCHES, rounds
            )
    for n, d, k in ROW_SPACE_SIZES:
        X, y = make_rows(n, d, k, "relu")
        split = [(np.flatnonzero(np.arange(n) % 5 > 0), np.flatnonzero(np.arange(n) % 5 == 0))]
        run = partial(SoftmaxRegressionCV(cv=split, refit=False).fit, X, y)
        print_variants(f"path {n} x {d}, {k} relu", run, n * 4 // 5, {"all": {}}, rounds)
        with patch.object(cv, "project_to_row_space", lambda problem: (problem, np.eye(problem.d))):
            print_variants(f"path {n} x {d}, in all columns", run, n * 4 // 5, {"all": {}}, rounds)


def measure_l1(rounds: int) -> None:
    """The solver with a duality gap against scikit-learn's saga, each to a relative gap of 1e-4."""
    for n, d, k in L1_SIZES:
        for kind in ("gauss", "relu", "noisy"):
            X, y = make_rows(n, d, k, kind)
            X = X.astype(np.float64)
            for C, l1_ratio in ((0.01, 1.0), (0.1, 0.5)):
                objective = partial(penalized_loss, X, y, C, l1_ratio)
                best = objective(SoftmaxRegression(C, l1_ratio=l1_ratio, tol=1e-6).fit(X, y))
                head = SoftmaxRegression(C, l1_ratio=l1_ratio, tol=1e-4)
                seconds = min(measure(partial(head.fit, X, y), n, {})[0] for _ in range(rounds))
                saga = time_saga(X, y, C, l1_ratio, objective, best * (1 + 1e-4))
                print(f"l1 {n} x {d}, {k} {kind}, C={C} l1_ratio={l1_ratio}: {seconds:.2f} s, saga {saga}", flush=True)


def time_saga(X: Any, y: Any, C: float, l1_ratio: float, objective: Callable[[Any], float], target: float) -> str:
    for max_iter in (20, 50, 100, 200, 400):
        head = LogisticRegression(
            penalty="elasticnet", solver="saga", C=C, l1_ratio=l1_ratio, tol=0.0, max_iter=max_iter, random_state=0
        )
        started = time.process_time()
        head.fit(X, y)
        seconds = time.process_time() - started
        if objective(head) <= target:
            return f"{seconds:.2f} s, {max_iter} epochs"
    return f"more than {seconds:.2f} s"


def penalized_loss(X: Any, y: Any, C: float, l1_ratio: float, head: Any) -> float:
    scores = X @ head.coef_.T + head.intercept_
    if scores.shape[1] == 1:
        scores = np.column_stack([np.zeros(len(X)), scores])
    losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(X)), y]
    W = head.coef_
    return float(C * losses.sum() + 0.5 * (1 - l1_ratio) * (W**2).sum() + l1_ratio * np.abs(W).sum())


PARTS = {
    "fit": measure_fit,
    "path": measure_path,
    "labels": measure_labels,
    "row-space": measure_row_space,
    "l1": measure_l1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for part in arguments.parts:
        PARTS[part](arguments.rounds)


if __name__ == "__main__":
    main()
