from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from featpipe.heads import SoftmaxRegression


def make_rows(n: int, d: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, k, n)
    return (3 + rng.normal(size=(k, d))[y] + 2 * rng.normal(size=(n, d))).astype(np.float16), y


class MappedRows:
    """Rows of a memory map, which are read by slices and by sorted row numbers."""

    def __init__(self, path, shape):
        self.map = np.memmap(path, np.float16, "r", shape=shape)
        self.shape = shape
        self.max_rows = 0

    def __getitem__(self, rows):
        actual = np.array(self.map[rows])
        self.max_rows = max(self.max_rows, len(actual))
        return actual


@pytest.mark.parametrize("k", [2, 12])
def test_rows_in_a_file_give_the_same_predictions_as_rows_in_memory(tmp_path, k):
    X, y = make_rows(4000, 24, k)
    X.tofile(tmp_path / "rows")
    scaler = StandardScaler().fit(X.astype(np.float64))
    head_in_memory = SoftmaxRegression().fit(scaler.transform(X.astype(np.float64)), y)
    head = SoftmaxRegression()._fit_rows(
        MappedRows(tmp_path / "rows", X.shape), y, center=scaler.mean_, scale=scaler.scale_
    )
    np.testing.assert_allclose(
        head.predict_proba(scaler.transform(X.astype(float))),
        head_in_memory.predict_proba(scaler.transform(X.astype(float))),
        atol=1e-4,
    )


def test_memory_does_not_grow_with_the_rows_of_a_file(tmp_path, monkeypatch):
    from featpipe.heads.logistic import preconditioners

    monkeypatch.setattr(preconditioners, "MAX_VALUES_FROM_FILE", 1e5)
    X, y = make_rows(150_000, 32, 5)
    X.tofile(tmp_path / "rows")
    source = MappedRows(tmp_path / "rows", X.shape)
    del X
    tracemalloc.start()
    SoftmaxRegression(tol=1e-4)._fit_rows(source, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The labels, their weights and a few blocks; the rows alone are 19 MB in float32.
    assert peak < 12e6
    assert source.max_rows <= 12_000
