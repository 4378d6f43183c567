"""Data that a model retains from training: selection, size, and safe loading."""

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
def training_rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(K), [20, 8, 15, 1])
    return (3 * rng.normal(size=(K, D))[y] + rng.normal(size=(len(y), D))).astype(np.float32), y


@pytest.fixture(scope="module")
def memory(training_rows: Any) -> ReplayMemory:
    return collect_replay_memory(
        RetentionPolicy.from_text("all"), heads.build("logistic").fit(*training_rows), *training_rows, K
    )


def test_a_retention_policy_is_parsed_from_text() -> None:
    assert RetentionPolicy.from_text("rows") == RetentionPolicy(rows=20)
    assert RetentionPolicy.from_text("all") == RetentionPolicy(True, True, 20)
    assert not RetentionPolicy.from_text("none")
    for invalid_text in ("some", "rows=0", "rows=-1", "rows=x", "statistics=3", "none,rows", "row=5"):
        with pytest.raises(ConfigError, match="expected none, all, or a list of statistics"):
            RetentionPolicy.from_text(invalid_text)


def test_herding_is_closer_to_the_mean_than_random_selection_and_selections_are_nested() -> None:
    Z = np.random.default_rng(0).normal(size=(200, 30))

    def distance(selected: np.ndarray) -> float:
        return float(np.linalg.norm(Z[selected].mean(axis=0) - Z.mean(axis=0)))

    selected = select_by_herding(Z, 20)
    assert len(set(selected.tolist())) == 20
    assert np.array_equal(select_by_herding(Z, 7), selected[:7])
    random_distances = [distance(np.random.default_rng(seed).permutation(200)[:20]) for seed in range(50)]
    assert distance(selected) < 0.5 * min(random_distances)
    remaining = list(range(200))
    for count in range(1, 6):  # as defined in the paper
        best = min(
            remaining, key=lambda i: np.linalg.norm(Z.mean(axis=0) - Z[[*selected[: count - 1], i]].mean(axis=0))
        )
        assert best == selected[count - 1]
        remaining.remove(best)


def test_exemplar_weights_sum_to_the_images_of_each_class(memory: ReplayMemory) -> None:
    assert np.bincount(memory.codes).tolist() == [20, 8, 15, 1]
    truncated = memory.truncate(5)
    assert np.bincount(truncated.codes).tolist() == [5, 5, 5, 1]
    assert np.allclose(np.bincount(truncated.codes, truncated.exemplar_weights()), [20, 8, 15, 1])


def test_retained_data_survive_a_round_trip_and_report_their_size(memory: ReplayMemory) -> None:
    loaded = ReplayMemory.from_bytes(memory.to_bytes(), K)
    for name, array in memory.to_arrays().items():
        assert np.array_equal(loaded.to_arrays()[name], array), name
        assert loaded.to_arrays()[name].dtype == array.dtype
    summary = memory.to_summary()
    assert summary["images"] == 44
    assert summary["rows"] == 44
    assert summary["bytes"]["rows"] == 44 * (4 * D + 4)
    assert summary["bytes"]["importances"] == 4 * K * (D + 1)
    assert sum(summary["bytes"].values()) + 8 * K == memory.nbytes


@pytest.mark.parametrize("name", ["counts", "rows", "codes", "importances", "statistics.sums", "statistics.gram"])
def test_inconsistent_arrays_are_refused(name: str, memory: ReplayMemory) -> None:
    assert_damaged_arrays_are_refused(name, memory)


@pytest.mark.filterwarnings("ignore:Only one sample available")  # scikit-learn warns about the class with one image
def test_an_inconsistent_scatter_matrix_is_refused(training_rows: Any) -> None:
    assert_damaged_arrays_are_refused(
        "statistics.apart",
        collect_replay_memory(
            RetentionPolicy.from_text("all"), heads.build("lda").fit(*training_rows), *training_rows, K
        ),
    )


def assert_damaged_arrays_are_refused(name: str, memory: ReplayMemory) -> None:
    arrays = memory.to_arrays()
    with pytest.raises(ValueError):  # noqa: PT011 - each has its own message
        ReplayMemory.from_bytes(safetensors.numpy.save(arrays | {name: arrays[name][:-1]}), K)
    for invalid_value in (np.nan, -7):
        if name.startswith(("statistics.", "rows", "importances")) and invalid_value == -7:
            continue
        if arrays[name].dtype.kind == "i" and invalid_value != -7:
            continue
        with pytest.raises(ValueError):  # noqa: PT011
            ReplayMemory.from_bytes(
                safetensors.numpy.save(arrays | {name: np.full_like(arrays[name], invalid_value)}), K
            )
    with pytest.raises(ValueError):  # noqa: PT011
        ReplayMemory.from_bytes(memory.to_bytes(), K + 1)
    with pytest.raises(ValueError):  # noqa: PT011
        ReplayMemory.from_bytes(memory.to_bytes()[:-9], K)


def test_importances_are_mean_squared_gradients(training_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with autograd, one row and one class at a time, for several block sizes."""
    X, y = training_rows
    pipeline = heads.build("logistic").fit(X, y)
    layer, Z = extract_last_layer(pipeline[-1]), np.asarray(pipeline[0].transform(X), np.float64)
    assert layer is not None
    W, b = (torch.tensor(array, requires_grad=True) for array in (layer.W, layer.b))
    total = np.zeros((K, D + 1))
    for z in torch.tensor(Z):
        scores = torch.log_softmax(W @ z + b, dim=0)
        for code in range(K):
            by_W, by_b = torch.autograd.grad(scores[code], [W, b], retain_graph=True)
            squared = np.column_stack([by_W.numpy() ** 2, by_b.numpy() ** 2])
            total += float(scores[code].detach().exp()) * squared
    assert np.allclose(compute_fisher_diagonal(layer, Z), total / len(Z), rtol=1e-10, atol=1e-14)
    for batch in (1, 5, 44):
        monkeypatch.setattr(last_layer, "FEATURE_BLOCK_ROWS", batch)
        assert np.allclose(compute_fisher_diagonal(layer, Z), total / len(Z), rtol=1e-10, atol=1e-14)


def test_importances_of_new_classes_are_zero_and_those_of_merged_classes_add_up(memory: ReplayMemory) -> None:
    remapped = memory.remap_classes(np.array([1, 0, 1, -1]), 5)
    assert remapped.importances is not None
    assert memory.importances is not None
    assert np.allclose(remapped.importances[1], memory.importances[0] + memory.importances[2])
    assert not remapped.importances[2:].any()
    assert remapped.counts.tolist() == [8, 35, 0, 0, 0]
    assert np.bincount(remapped.codes).tolist() == [8, 35]


@pytest.mark.parametrize("name", ["logistic", "linear", "mlp", "sklearn.linear_model.LogisticRegression"])
@pytest.mark.parametrize("k", [2, 4])
def test_the_last_layer_of_a_head_gives_its_probabilities(name: str, k: int, training_rows: Any) -> None:
    from scipy.special import softmax

    X, y = training_rows
    params = {"epochs": 3} if name in ("linear", "mlp") else {}
    head = heads.build(name, params=params).fit(X, y % k)[-1]
    layer = extract_last_layer(head)
    assert layer is not None
    p = softmax(layer.compute_scores(np.asarray(compute_hidden_features(head, X), np.float64)), axis=1)
    assert np.allclose(p, head.predict_proba(X), atol=1e-5)
    wider_layer = LastLayer(np.vstack([layer.W, layer.W[:1]]), np.append(layer.b, layer.b[0] - 1))
    wider_head = replace_last_layer(head, wider_layer)
    assert wider_head.predict_proba(X).shape == (len(X), k + 1)
    assert np.allclose(wider_head.predict_proba(X)[:, k] / wider_head.predict_proba(X)[:, 0], np.exp(-1), atol=1e-4)
    assert np.allclose(replace_last_layer(head, layer).predict_proba(X), head.predict_proba(X), atol=1e-5)
