"""How often folds over groups have every class in every fold, and what finding them takes.

Beside scikit-learn's ``StratifiedGroupKFold`` (ten shuffles of it too) stand the steps of ``make_folds``: dealing out
units, moving units by steps (tabu search), moving units by an integer program, and both as they are used. A structure
counts as solvable if one of the methods solves it.

    python tests/benchmarks/splits.py
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from time import perf_counter

import numpy as np
from scipy.sparse import coo_array
from sklearn.model_selection import StratifiedGroupKFold

from featpipe.splits import splits

K = 5
DRAWS = 40
Structure = tuple[np.ndarray, np.ndarray]  # codes and groups, one for each row


def draw_patients(rng: np.random.Generator) -> Structure:
    """60 patients with 5 images each of 1 or 2 of 4 classes, one of them rare."""
    codes, groups = [], []
    for patient in range(60):
        own = rng.choice(4, size=rng.integers(1, 3), replace=False, p=[0.45, 0.3, 0.2, 0.05])
        codes += rng.choice(own, 5).tolist()
        groups += [patient] * 5
    return np.array(codes), np.array(groups)


def draw_rare(rng: np.random.Generator) -> Structure:
    """8 classes in 5 groups each, of 24 groups: every class needs every one of its groups elsewhere."""
    pairs = [(code, group) for code in range(8) for group in rng.choice(24, K, replace=False)]
    return np.array([code for code, _ in pairs]), np.array([group for _, group in pairs])


def draw_shared(rng: np.random.Generator) -> Structure:
    """20 classes in 7 groups each, of 30 groups."""
    pairs = [(code, group) for code in range(20) for group in rng.choice(30, 7, replace=False)]
    return np.array([code for code, _ in pairs]), np.array([group for _, group in pairs])


def draw_photographs(rng: np.random.Generator) -> Structure:
    """100 classes of 8 photographs each, of 300 photographs with several objects."""
    pairs = [(code, group) for code in range(100) for group in rng.choice(300, 8, replace=False)]
    return np.array([code for code, _ in pairs]), np.array([group for _, group in pairs])


def is_complete(folds: np.ndarray, codes: np.ndarray) -> bool:
    """Whether every class is in every fold."""
    return not len(splits._find_missing_classes(folds, codes, K))


def run_sklearn(codes: np.ndarray, groups: np.ndarray, shuffles: int) -> bool:
    for seed in range(shuffles):
        folds = np.empty(len(codes), np.int64)
        splitter = StratifiedGroupKFold(K, shuffle=shuffles > 1, random_state=seed if shuffles > 1 else None)
        for i, (_, test) in enumerate(splitter.split(codes, codes, groups)):
            folds[test] = i
        if is_complete(folds, codes):
            return True
    return False


def prepare(codes: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The dealt folds and the unit of each row."""
    rows = b"".join(hashlib.sha256(str(row).encode()).digest() for row in range(len(codes)))
    units, keys = splits._find_units(np.frombuffer(rows, np.uint8).reshape(-1, 32), groups, 0)
    return splits._assign_folds(keys, codes, units, K), units


def run_dealing(codes: np.ndarray, groups: np.ndarray) -> bool:
    return is_complete(prepare(codes, groups)[0], codes)


def run_moves(codes: np.ndarray, groups: np.ndarray, method: str) -> bool:
    folds, units = prepare(codes, groups)
    if is_complete(folds, codes):
        return True
    unit_folds, costs = folds[np.unique(units, return_index=True)[1]], np.bincount(units).astype(float)
    if method == "both":
        return splits._rearrange(unit_folds, costs, codes, units, K) is not None
    shape = (int(codes.max()) + 1, len(unit_folds))
    membership = coo_array((np.ones(len(codes), np.int64), (codes, units)), shape=shape).tocsr()
    membership.data[:] = 1
    if method == "steps":
        return splits._rearrange_greedily(unit_folds, costs, membership, K) is not None
    return splits._rearrange_exactly(unit_folds, costs, membership, np.arange(len(unit_folds)), K) is not None


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], bool]] = {
    "StratifiedGroupKFold": lambda codes, groups: run_sklearn(codes, groups, 1),
    "the best of ten shuffles": lambda codes, groups: run_sklearn(codes, groups, 10),
    "dealing alone": run_dealing,
    "dealing, steps": lambda codes, groups: run_moves(codes, groups, "steps"),
    "dealing, program": lambda codes, groups: run_moves(codes, groups, "program"),
    "dealing, both (make_folds)": lambda codes, groups: run_moves(codes, groups, "both"),
}


def main() -> None:
    warnings.simplefilter("ignore")
    for draw in (draw_patients, draw_rare, draw_shared, draw_photographs):
        solved = {name: np.zeros(DRAWS, bool) for name in METHODS}
        seconds = dict.fromkeys(METHODS, 0.0)
        for seed in range(DRAWS):
            codes, groups = draw(np.random.default_rng(seed))
            for name, method in METHODS.items():
                start = perf_counter()
                solved[name][seed] = method(codes, groups)
                seconds[name] += perf_counter() - start
        solvable = np.any(list(solved.values()), axis=0)
        print(f"{draw.__name__.removeprefix('draw_')}: {solvable.sum()} of {DRAWS} solvable")
        for name, is_solved in solved.items():
            print(f"  {name:28} {is_solved.sum():3}   {1000 * seconds[name] / DRAWS:8.1f} ms")


if __name__ == "__main__":
    main()
