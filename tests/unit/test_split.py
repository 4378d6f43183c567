from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featpipe.errors import ConfigError
from featpipe.split import folds, holdout, key


def digests_of(*numbers: int) -> np.ndarray:
    rows = [np.frombuffer(hashlib.sha256(str(number).encode()).digest(), np.uint8) for number in numbers]
    return np.stack(rows) if rows else np.zeros((0, 32), np.uint8)


def many(n: int) -> np.ndarray:
    return digests_of(*range(n))


def splitmix(state: int) -> int:
    """SplitMix64's output function in Python's own integers."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_the_mixing_is_splitmix64_whose_first_output_from_zero_is_published():
    assert splitmix(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_a_key_is_the_stated_function_of_digest_and_seed(seed):
    digests = many(50)
    for row, found in zip(digests, key(digests, seed), strict=True):
        mixed = splitmix(seed)
        for word in range(4):
            mixed = splitmix(mixed ^ int.from_bytes(row[8 * word : 8 * word + 8].tobytes(), "little"))
        assert found == (mixed >> 11) / 2**53


def test_keys_are_uniform_and_independent_between_seeds():
    keys = key(many(20_000))
    assert keys.min() >= 0
    assert keys.max() < 1
    counts = np.histogram(keys, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(keys, key(many(20_000), seed=1))[0, 1]) < 0.03


def test_a_key_depends_on_every_byte_of_the_digest():
    digests = np.zeros((33, 32), np.uint8)
    digests[np.arange(32), np.arange(32)] = 1
    assert len(np.unique(key(digests))) == 33


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "0"])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(ConfigError, match="seed is"):
        key(many(3), seed)


@pytest.mark.parametrize("digests", [np.zeros((3, 31), np.uint8), np.zeros((3, 32), np.int8), np.zeros(32, np.uint8)])
def test_digests_of_another_shape_or_type_are_refused(digests):
    with pytest.raises(ConfigError, match=r"uint8 of shape \(n, 32\)"):
        key(digests)


def test_a_holdout_is_the_rows_whose_key_is_below_the_share():
    digests = many(500)
    train, test = holdout(digests, test=0.3, seed=5)
    np.testing.assert_array_equal(test, np.flatnonzero(key(digests, 5) < 0.3))
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(500))
    assert train.dtype == test.dtype == np.int64


def test_a_holdout_keeps_the_share_in_every_class():
    y = np.arange(6000) % 3
    _, test = holdout(many(6000), y, test=0.25)
    np.testing.assert_allclose(np.bincount(y[test]) / 2000, 0.25, atol=0.04)


def test_added_images_never_move_old_ones_between_the_sides_of_a_holdout():
    y = np.arange(900) % 4
    _, before = holdout(many(600), y[:600])
    _, after = holdout(many(900), y)
    np.testing.assert_array_equal(after[after < 600], before)


def test_a_larger_share_only_adds_test_rows():
    _, small = holdout(many(300), test=0.1)
    _, large = holdout(many(300), test=0.4)
    assert set(small) < set(large)


def test_permuted_rows_give_the_permuted_holdout():
    order = np.random.default_rng(0).permutation(200)
    y = np.arange(200) % 5
    train, test = holdout(many(200), y)
    permuted_train, permuted_test = holdout(many(200)[order], y[order])
    np.testing.assert_array_equal(np.sort(order[permuted_test]), test)
    np.testing.assert_array_equal(np.sort(order[permuted_train]), train)


def test_a_small_class_without_a_test_row_lends_the_one_with_the_smallest_key():
    pool = many(2000)
    keys = key(pool)
    above = np.flatnonzero(keys > 0.5)[:4]
    below = np.flatnonzero(keys < 0.2)[:4]
    rows = np.concatenate([above, below])
    y = np.array(["all above"] * 4 + ["all below"] * 4)
    train, test = holdout(pool[rows], y)
    smallest, largest = above[keys[above].argmin()], below[keys[below].argmax()]
    assert set(rows[test]) == ({*below, smallest} - {largest})
    assert set(rows[train]) == ({*above, largest} - {smallest})


def test_a_class_of_one_distinct_image_cannot_be_held_out_and_is_named():
    with pytest.raises(ConfigError, match=r"class 'rare' has one distinct image \(2 rows\)"):
        holdout(digests_of(1, 2, 3, 4, 9, 9), ["often"] * 4 + ["rare"] * 2)


def test_classes_are_named_by_names_where_y_holds_their_positions():
    with pytest.raises(ConfigError, match="class 'rare'"):
        holdout(digests_of(1, 2, 3, 4, 9), [0, 0, 0, 0, 2], names=["often", "never", "rare"])
    with pytest.raises(ConfigError, match="class 'rare'"):
        folds(digests_of(1, 2, 3, 4, 9), [0, 0, 0, 0, 2], k=2, names=["often", "never", "rare"])


def test_a_holdout_with_an_empty_side_is_refused():
    with pytest.raises(ConfigError, match="leaves 1 for training and 0 for the test"):
        holdout(many(1), test=1e-9)
    with pytest.raises(ConfigError, match="0 rows"):
        holdout(many(0))


@pytest.mark.parametrize("share", [0, 1, -0.1, 2, float("nan")])
def test_a_share_outside_zero_and_one_is_refused(share):
    with pytest.raises(ConfigError, match="test is"):
        holdout(many(9), test=share)


@pytest.mark.parametrize("y", [[0, 1], np.zeros((9, 2)), ["a"] * 8 + [None]])
def test_a_y_that_is_not_one_class_for_each_row_is_refused(y):
    with pytest.raises(ConfigError, match=r"^y (has shape|mixes)"):
        holdout(many(9), y if isinstance(y, np.ndarray) else np.array(y, dtype=object))


def check_partition(parts: list[tuple[np.ndarray, np.ndarray]], n: int) -> None:
    np.testing.assert_array_equal(np.sort(np.concatenate([test for _, test in parts])), np.arange(n))
    for train, test in parts:
        np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(n))
        assert (np.diff(train) > 0).all()
        assert (np.diff(test) > 0).all()


def test_every_row_is_in_one_test_fold_and_classes_differ_by_one_row_at_most():
    y = np.random.default_rng(0).choice(7, 503, p=[0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05])
    parts = folds(many(503), y, k=5)
    check_partition(parts, 503)
    counts = np.array([np.bincount(y[test], minlength=7) for _, test in parts])
    assert np.ptp(counts, axis=0).max() <= 1
    assert np.ptp(counts.sum(axis=1)) <= 1


def test_folds_without_classes_have_equal_sizes():
    parts = folds(many(103), k=4)
    check_partition(parts, 103)
    assert sorted(len(test) for _, test in parts) == [25, 26, 26, 26]


def test_permuted_rows_give_the_same_folds():
    order = np.random.default_rng(1).permutation(120)
    digests = digests_of(*(np.arange(120) % 90))
    y = np.arange(120) % 90 % 3
    for (_, plain), (_, permuted) in zip(folds(digests, y), folds(digests[order], y[order]), strict=True):
        np.testing.assert_array_equal(np.sort(order[permuted]), plain)


def test_another_seed_gives_other_folds():
    assert not np.array_equal(folds(many(50), seed=0)[0][1], folds(many(50), seed=1)[0][1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6)), min_size=40, max_size=120), st.integers(2, 4))
def test_copies_and_groups_never_straddle_folds(rows, k):
    images = np.array([image for image, _ in rows])
    groups = np.array([group for _, group in rows]) * 100 + images // 3
    try:
        parts = folds(digests_of(*images), k=k, groups=groups)
    except ConfigError:
        return
    check_partition(parts, len(rows))
    for train, test in parts:
        assert not set(images[train]) & set(images[test])
        assert not set(groups[train]) & set(groups[test])


def test_copies_with_different_labels_stay_together_too():
    digests = digests_of(*range(30), *range(10))
    y = np.array([0] * 30 + [1] * 10)
    images = np.concatenate([np.arange(30), np.arange(10)])
    parts = folds(digests, y, k=5)
    check_partition(parts, 40)
    assert all(not set(images[train]) & set(images[test]) for train, test in parts)
    assert [np.bincount(y[test]).tolist() for _, test in parts] == [[6, 2]] * 5
    train, test = holdout(digests, y)
    assert not set(images[train]) & set(images[test])


def test_groups_that_share_an_image_are_one_unit():
    parts = folds(digests_of(1, 2, 2, 3, 4, 5), k=2, groups=["a", "a", "b", "b", "c", "d"])
    sides = [set(test) for _, test in parts]
    assert any({0, 1, 2, 3} <= side for side in sides)


def test_a_class_with_fewer_images_than_folds_is_named_with_the_k_that_works():
    y = ["cat"] * 10 + ["dog"] * 4
    with pytest.raises(ConfigError, match="class 'dog' has 3 distinct images, fewer than k=5 folds; use k=3"):
        folds(digests_of(*range(13), 12), y, k=5)
    assert len(folds(digests_of(*range(13), 12), y, k=3)) == 3


def test_a_class_with_one_image_has_no_k_that_works():
    with pytest.raises(ConfigError, match=r"class 'dog' has 1 distinct image, .* leave the class out"):
        folds(many(11), ["cat"] * 10 + ["dog"], k=2)


def test_too_few_groups_are_counted_as_groups():
    with pytest.raises(ConfigError, match="the data has 2 groups of images, fewer than k=3"):
        folds(many(10), k=3, groups=[0] * 5 + [1] * 5)
    with pytest.raises(ConfigError, match="the data has 0"):
        folds(many(0), k=3)


@pytest.mark.parametrize("k", [1, 0, -3, 2.0, True])
def test_fewer_than_two_folds_are_refused(k):
    with pytest.raises(ConfigError, match="k is"):
        folds(many(9), k=k)
