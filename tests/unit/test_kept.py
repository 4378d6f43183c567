"""What a model keeps of its training data: chosen well, sized, and safe to read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from featpipe import heads
from featpipe.errors import ConfigError
from featpipe.heads import layer as layers
from featpipe.heads.layer import LastLayer, fisher, hidden, last_layer, with_layer
from featpipe.kept import Keep, Kept, herd, keep_of

K, D = 4, 6


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(K), [20, 8, 15, 1])
    return (3 * rng.normal(size=(K, D))[y] + rng.normal(size=(len(y), D))).astype(np.float32), y


@pytest.fixture(scope="module")
def kept(rows: Any) -> Kept:
    return keep_of(Keep.of("all"), heads.build("logistic").fit(*rows), *rows, K)


def test_what_to_keep_is_typed_in_words() -> None:
    assert Keep.of("rows") == Keep(rows=20)
    assert Keep.of("all") == Keep(True, True, 20)
    assert not Keep.of("none")
    for wrong in ("some", "rows=0", "rows=-1", "rows=x", "statistics=3", "none,rows", "row=5"):
        with pytest.raises(ConfigError, match="give none, all, or some of statistics"):
            Keep.of(wrong)


def test_herded_rows_are_nearer_to_the_mean_than_random_ones_and_fewer_are_the_first_of_more() -> None:
    Z = np.random.default_rng(0).normal(size=(200, 30))

    def distance(chosen: np.ndarray) -> float:
        return float(np.linalg.norm(Z[chosen].mean(axis=0) - Z.mean(axis=0)))

    chosen = herd(Z, 20)
    assert len(set(chosen.tolist())) == 20
    assert np.array_equal(herd(Z, 7), chosen[:7])
    at_random = [distance(np.random.default_rng(seed).permutation(200)[:20]) for seed in range(50)]
    assert distance(chosen) < 0.5 * min(at_random)
    left = list(range(200))
    for count in range(1, 6):  # by the letter of the paper
        best = min(left, key=lambda i: np.linalg.norm(Z.mean(axis=0) - Z[[*chosen[: count - 1], i]].mean(axis=0)))
        assert best == chosen[count - 1]
        left.remove(best)


def test_rows_stand_for_all_images_of_their_class(kept: Kept) -> None:
    assert np.bincount(kept.codes).tolist() == [20, 8, 15, 1]
    few = kept.first(5)
    assert np.bincount(few.codes).tolist() == [5, 5, 5, 1]
    assert np.allclose(np.bincount(few.codes, few.weights()), [20, 8, 15, 1])


def test_what_is_kept_is_read_again_as_it_was_and_its_size_is_told(kept: Kept) -> None:
    again = Kept.loads(kept.dumps(), K)
    for name, array in kept.arrays().items():
        assert np.array_equal(again.arrays()[name], array), name
        assert again.arrays()[name].dtype == array.dtype
    facts = kept.facts()
    assert facts["images"] == 44
    assert facts["rows"] == 44
    assert facts["bytes"]["rows"] == 44 * (4 * D + 4)
    assert facts["bytes"]["importances"] == 4 * K * (D + 1)
    assert sum(facts["bytes"].values()) + 8 * K == kept.nbytes


@pytest.mark.parametrize("name", ["counts", "rows", "codes", "importances", "statistics.sums", "statistics.gram"])
def test_arrays_that_do_not_fit_are_refused(name: str, kept: Kept) -> None:
    _refused_unless_they_fit(name, kept)


@pytest.mark.filterwarnings("ignore:Only one sample available")  # scikit-learn's, of the class of one image
def test_a_scatter_that_does_not_fit_is_refused(rows: Any) -> None:
    _refused_unless_they_fit("statistics.apart", keep_of(Keep.of("all"), heads.build("lda").fit(*rows), *rows, K))


def _refused_unless_they_fit(name: str, kept: Kept) -> None:
    arrays = kept.arrays()
    with pytest.raises(ValueError):  # noqa: PT011 - each has words of its own
        Kept.of(arrays | {name: arrays[name][:-1]}, K)
    for wrong in (np.nan, -7):
        if name.startswith(("statistics.", "rows", "importances")) and wrong == -7:
            continue
        if arrays[name].dtype.kind == "i" and wrong != -7:
            continue
        with pytest.raises(ValueError):  # noqa: PT011
            Kept.of(arrays | {name: np.full_like(arrays[name], wrong)}, K)
    with pytest.raises(ValueError):  # noqa: PT011
        Kept.loads(kept.dumps(), K + 1)
    with pytest.raises(ValueError):  # noqa: PT011
        Kept.loads(kept.dumps()[:-9], K)


def test_importances_are_means_of_squared_gradients_row_by_row(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd, one row and one answer at a time; and whatever the batch."""
    X, y = rows
    pipeline = heads.build("logistic").fit(X, y)
    layer, Z = last_layer(pipeline[-1]), np.asarray(pipeline[0].transform(X), np.float64)
    assert layer is not None
    W, b = (torch.tensor(array, requires_grad=True) for array in (layer.W, layer.b))
    total = np.zeros((K, D + 1))
    for z in torch.tensor(Z):
        scores = torch.log_softmax(W @ z + b, dim=0)
        for answer in range(K):
            by_W, by_b = torch.autograd.grad(scores[answer], [W, b], retain_graph=True)
            squared = np.column_stack([by_W.numpy() ** 2, by_b.numpy() ** 2])
            total += float(scores[answer].detach().exp()) * squared
    assert np.allclose(fisher(layer, Z), total / len(Z), rtol=1e-10, atol=1e-14)
    for batch in (1, 5, 44):
        monkeypatch.setattr(layers, "ROWS_AT_ONCE", batch)
        assert np.allclose(fisher(layer, Z), total / len(Z), rtol=1e-10, atol=1e-14)


def test_importances_of_classes_that_are_new_are_zero_and_those_of_merged_ones_add_up(kept: Kept) -> None:
    grown = kept.regrouped(np.array([1, 0, 1, -1]), 5)
    assert grown.importances is not None
    assert kept.importances is not None
    assert np.allclose(grown.importances[1], kept.importances[0] + kept.importances[2])
    assert not grown.importances[2:].any()
    assert grown.counts.tolist() == [8, 35, 0, 0, 0]
    assert np.bincount(grown.codes).tolist() == [8, 35]


@pytest.mark.parametrize("name", ["logistic", "linear", "mlp", "sklearn.linear_model.LogisticRegression"])
@pytest.mark.parametrize("k", [2, 4])
def test_the_last_layer_of_a_head_gives_its_probabilities(name: str, k: int, rows: Any) -> None:
    from scipy.special import softmax

    X, y = rows
    params = {"epochs": 3} if name in ("linear", "mlp") else {}
    head = heads.build(name, params=params).fit(X, y % k)[-1]
    layer = last_layer(head)
    assert layer is not None
    p = softmax(layer.scores(np.asarray(hidden(head, X), np.float64)), axis=1)
    assert np.allclose(p, head.predict_proba(X), atol=1e-5)
    wider = LastLayer(np.vstack([layer.W, layer.W[:1]]), np.append(layer.b, layer.b[0] - 1))
    grown = with_layer(head, wider)
    assert grown.predict_proba(X).shape == (len(X), k + 1)
    assert np.allclose(grown.predict_proba(X)[:, k] / grown.predict_proba(X)[:, 0], np.exp(-1), atol=1e-4)
    assert np.allclose(with_layer(head, layer).predict_proba(X), head.predict_proba(X), atol=1e-5)
