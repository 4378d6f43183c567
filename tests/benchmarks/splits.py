"""How often folds over groups have every class in every fold, and what finding them takes.

Compared are scikit-learn's ``StratifiedGroupKFold``, the best of ten shuffles of it, and the steps of ``make_folds``:
the assignment of units to folds, then moves by a tabu search, or by an integer program. A structure counts as solvable
if one of the methods solves it.

    python tests/benchmarks/splits.py
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from time import perf_counter

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, eye_array, kron
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
    """The assigned folds and the unit of each row."""
    rows = b"".join(hashlib.sha256(str(row).encode()).digest() for row in range(len(codes)))
    units, keys = splits._find_units(np.frombuffer(rows, np.uint8).reshape(-1, 32), groups, 0)
    return splits._assign_folds(keys, codes, units, K), units


def run_assignment(codes: np.ndarray, groups: np.ndarray) -> bool:
    return is_complete(prepare(codes, groups)[0], codes)


def run_moves(codes: np.ndarray, groups: np.ndarray, move: Callable[..., np.ndarray | None]) -> bool:
    folds, units = prepare(codes, groups)
    if is_complete(folds, codes):
        return True
    unit_folds, costs = folds[np.unique(units, return_index=True)[1]], np.bincount(units).astype(float)
    return move(unit_folds, costs, codes, units, K) is not None


def move_by_integer_program(
    sides: np.ndarray, costs: np.ndarray, codes: np.ndarray, units: np.ndarray, k: int
) -> np.ndarray | None:
    """Minimise the cost of the moves by an integer program in x[unit, side], 0 or 1."""
    shape = (int(codes.max()) + 1, len(sides))
    membership = coo_array((np.ones(len(codes)), (codes, units)), shape=shape).tocsr()
    one_side_per_unit = LinearConstraint(kron(eye_array(len(sides)), np.ones((1, k)), format="csr"), 1, 1)
    every_class_on_every_side = LinearConstraint(kron(membership > 0, eye_array(k), format="csr"), 1, np.inf)
    objective = np.zeros((len(sides), k))
    objective[np.arange(len(sides)), sides] = -costs
    solution = milp(
        objective.ravel(),
        integrality=np.ones(objective.size),
        bounds=Bounds(0, 1),
        constraints=[one_side_per_unit, every_class_on_every_side],
        options={"node_limit": 1000, "mip_rel_gap": 0},
    )
    return None if solution.x is None else solution.x.reshape(-1, k).argmax(axis=1)


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], bool]] = {
    "StratifiedGroupKFold": lambda codes, groups: run_sklearn(codes, groups, 1),
    "the best of ten shuffles": lambda codes, groups: run_sklearn(codes, groups, 10),
    "assignment alone": run_assignment,
    "with tabu steps (make_folds)": lambda codes, groups: run_moves(codes, groups, splits._rearrange),
    "with an integer program": lambda codes, groups: run_moves(codes, groups, move_by_integer_program),
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
