"""What a model keeps of its training data: chosen well, sized, and safe to read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from featpipe import heads
from featpipe.errors import ConfigError
from featpipe.heads import last_layer
from featpipe.heads.last_layer import (
    LastLayer,
    compute_fisher_diagonal,
    compute_hidden_features,
    extract_last_layer,
    replace_last_layer,
)
from featpipe.model import ReplayMemory, RetentionPolicy, collect_replay_memory, select_by_herding

K, D = 4, 6


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(K), [20, 8, 15, 1])
    return (3 * rng.normal(size=(K, D))[y] + rng.normal(size=(len(y), D))).astype(np.float32), y


@pytest.fixture(scope="module")
def kept(rows: Any) -> ReplayMemory:
    return collect_replay_memory(RetentionPolicy.from_text("all"), heads.build("logistic").fit(*rows), *rows, K)


def test_what_to_keep_is_typed_in_words() -> None:
    assert RetentionPolicy.from_text("rows") == RetentionPolicy(rows=20)
    assert RetentionPolicy.from_text("all") == RetentionPolicy(True, True, 20)
    assert not RetentionPolicy.from_text("none")
    for wrong in ("some", "rows=0", "rows=-1", "rows=x", "statistics=3", "none,rows", "row=5"):
        with pytest.raises(ConfigError, match="expected none, all, or a list of statistics"):
            RetentionPolicy.from_text(wrong)


def test_herded_rows_are_nearer_to_the_mean_than_random_ones_and_fewer_are_the_first_of_more() -> None:
    Z = np.random.default_rng(0).normal(size=(200, 30))

    def distance(chosen: np.ndarray) -> float:
        return float(np.linalg.norm(Z[chosen].mean(axis=0) - Z.mean(axis=0)))

    chosen = select_by_herding(Z, 20)
    assert len(set(chosen.tolist())) == 20
    assert np.array_equal(select_by_herding(Z, 7), chosen[:7])
    at_random = [distance(np.random.default_rng(seed).permutation(200)[:20]) for seed in range(50)]
    assert distance(chosen) < 0.5 * min(at_random)
    left = list(range(200))
    for count in range(1, 6):  # by the letter of the paper
        best = min(left, key=lambda i: np.linalg.norm(Z.mean(axis=0) - Z[[*chosen[: count - 1], i]].mean(axis=0)))
        assert best == chosen[count - 1]
        left.remove(best)


def test_rows_stand_for_all_images_of_their_class(kept: ReplayMemory) -> None:
    assert np.bincount(kept.codes).tolist() == [20, 8, 15, 1]
    few = kept.truncate(5)
    assert np.bincount(few.codes).tolist() == [5, 5, 5, 1]
    assert np.allclose(np.bincount(few.codes, few.exemplar_weights()), [20, 8, 15, 1])


def test_what_is_kept_is_read_again_as_it_was_and_its_size_is_told(kept: ReplayMemory) -> None:
    again = ReplayMemory.from_bytes(kept.to_bytes(), K)
    for name, array in kept.to_arrays().items():
        assert np.array_equal(again.to_arrays()[name], array), name
        assert again.to_arrays()[name].dtype == array.dtype
    facts = kept.to_summary()
    assert facts["images"] == 44
    assert facts["rows"] == 44
    assert facts["bytes"]["rows"] == 44 * (4 * D + 4)
    assert facts["bytes"]["importances"] == 4 * K * (D + 1)
    assert sum(facts["bytes"].values()) + 8 * K == kept.nbytes


@pytest.mark.parametrize("name", ["counts", "rows", "codes", "importances", "statistics.sums", "statistics.gram"])
def test_arrays_that_do_not_fit_are_refused(name: str, kept: ReplayMemory) -> None:
    _refused_unless_they_fit(name, kept)


@pytest.mark.filterwarnings("ignore:Only one sample available")  # scikit-learn's, of the class of one image
def test_a_scatter_that_does_not_fit_is_refused(rows: Any) -> None:
    _refused_unless_they_fit(
        "statistics.apart",
        collect_replay_memory(RetentionPolicy.from_text("all"), heads.build("lda").fit(*rows), *rows, K),
    )


def _refused_unless_they_fit(name: str, kept: ReplayMemory) -> None:
    arrays = kept.to_arrays()
    with pytest.raises(ValueError):  # noqa: PT011 - each has words of its own
        ReplayMemory.from_bytes(safetensors.numpy.save(arrays | {name: arrays[name][:-1]}), K)
    for wrong in (np.nan, -7):
        if name.startswith(("statistics.", "rows", "importances")) and wrong == -7:
            continue
        if arrays[name].dtype.kind == "i" and wrong != -7:
            continue
        with pytest.raises(ValueError):  # noqa: PT011
            ReplayMemory.from_bytes(safetensors.numpy.save(arrays | {name: np.full_like(arrays[name], wrong)}), K)
    with pytest.raises(ValueError):  # noqa: PT011
        ReplayMemory.from_bytes(kept.to_bytes(), K + 1)
    with pytest.raises(ValueError):  # noqa: PT011
        ReplayMemory.from_bytes(kept.to_bytes()[:-9], K)


def test_importances_are_means_of_squared_gradients_row_by_row(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd, one row and one answer at a time; and whatever the batch."""
    X, y = rows
    pipeline = heads.build("logistic").fit(X, y)
    layer, Z = extract_last_layer(pipeline[-1]), np.asarray(pipeline[0].transform(X), np.float64)
    assert layer is not None
    W, b = (torch.tensor(array, requires_grad=True) for array in (layer.W, layer.b))
    total = np.zeros((K, D + 1))
    for z in torch.tensor(Z):
        scores = torch.log_softmax(W @ z + b, dim=0)
        for answer in range(K):
            by_W, by_b = torch.autograd.grad(scores[answer], [W, b], retain_graph=True)
            squared = np.column_stack([by_W.numpy() ** 2, by_b.numpy() ** 2])
            total += float(scores[answer].detach().exp()) * squared
    assert np.allclose(compute_fisher_diagonal(layer, Z), total / len(Z), rtol=1e-10, atol=1e-14)
    for batch in (1, 5, 44):
        monkeypatch.setattr(last_layer, "BLOCK_ROWS", batch)
        assert np.allclose(compute_fisher_diagonal(layer, Z), total / len(Z), rtol=1e-10, atol=1e-14)


def test_importances_of_classes_that_are_new_are_zero_and_those_of_merged_ones_add_up(kept: ReplayMemory) -> None:
    grown = kept.remap_classes(np.array([1, 0, 1, -1]), 5)
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
    layer = extract_last_layer(head)
    assert layer is not None
    p = softmax(layer.compute_scores(np.asarray(compute_hidden_features(head, X), np.float64)), axis=1)
    assert np.allclose(p, head.predict_proba(X), atol=1e-5)
    wider = LastLayer(np.vstack([layer.W, layer.W[:1]]), np.append(layer.b, layer.b[0] - 1))
    grown = replace_last_layer(head, wider)
    assert grown.predict_proba(X).shape == (len(X), k + 1)
    assert np.allclose(grown.predict_proba(X)[:, k] / grown.predict_proba(X)[:, 0], np.exp(-1), atol=1e-4)
    assert np.allclose(replace_last_layer(head, layer).predict_proba(X), head.predict_proba(X), atol=1e-5)
