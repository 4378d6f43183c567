from __future__ import annotations

import hashlib
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold, TimeSeriesSplit

from featpipe.errors import ConfigError
from featpipe.splits import compute_group_keys, compute_keys, find_cutoff_time, make_folds, make_holdout, splits


def make_digests(*numbers: int) -> np.ndarray:
    rows = [np.frombuffer(hashlib.sha256(str(number).encode()).digest(), np.uint8) for number in numbers]
    return np.stack(rows) if rows else np.zeros((0, 32), np.uint8)


def make_distinct_digests(n: int) -> np.ndarray:
    return make_digests(*range(n))


def compute_splitmix64(state: int) -> int:
    """The output function of SplitMix64, in Python integers."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_the_reference_implementation_gives_the_published_first_output_of_splitmix64():
    assert compute_splitmix64(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_keys_equal_the_reference_implementation(seed):
    digests = make_distinct_digests(50)
    for row, key in zip(digests, compute_keys(digests, seed), strict=True):
        mixed = compute_splitmix64(seed)
        for word in range(4):
            mixed = compute_splitmix64(mixed ^ int.from_bytes(row[8 * word : 8 * word + 8].tobytes(), "little"))
        assert key == (mixed >> 11) / 2**53


def test_keys_are_uniform_and_independent_between_seeds():
    keys = compute_keys(make_distinct_digests(20_000))
    assert keys.min() >= 0
    assert keys.max() < 1
    counts = np.histogram(keys, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(keys, compute_keys(make_distinct_digests(20_000), seed=1))[0, 1]) < 0.03


def test_a_key_depends_on_every_byte_of_the_digest():
    digests = np.zeros((33, 32), np.uint8)
    digests[np.arange(32), np.arange(32)] = 1
    assert len(np.unique(compute_keys(digests))) == 33


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "0"])
def test_an_invalid_seed_is_refused(seed):
    with pytest.raises(ConfigError, match="seed is"):
        compute_keys(make_distinct_digests(3), seed)


@pytest.mark.parametrize("digests", [np.zeros((3, 31), np.uint8), np.zeros((3, 32), np.int8), np.zeros(32, np.uint8)])
def test_digests_of_another_shape_or_type_are_refused(digests):
    with pytest.raises(ConfigError, match=r"uint8 of shape \(n, 32\)"):
        compute_keys(digests)


def test_test_rows_are_those_with_keys_below_the_share():
    digests = make_distinct_digests(500)
    train, test = make_holdout(digests, test=0.3, seed=5)
    np.testing.assert_array_equal(test, np.flatnonzero(compute_keys(digests, 5) < 0.3))
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(500))
    assert train.dtype == test.dtype == np.int64


def test_a_holdout_keeps_the_share_in_every_class():
    y = np.arange(6000) % 3
    _, test = make_holdout(make_distinct_digests(6000), y, test=0.25)
    np.testing.assert_allclose(np.bincount(y[test]) / 2000, 0.25, atol=0.04)


def test_added_images_do_not_move_old_images_between_training_and_test():
    y = np.arange(900) % 4
    _, old_test = make_holdout(make_distinct_digests(600), y[:600])
    _, new_test = make_holdout(make_distinct_digests(900), y)
    np.testing.assert_array_equal(new_test[new_test < 600], old_test)


def test_a_larger_share_only_adds_test_rows():
    _, small = make_holdout(make_distinct_digests(300), test=0.1)
    _, large = make_holdout(make_distinct_digests(300), test=0.4)
    assert set(small) < set(large)


def test_the_order_of_rows_does_not_change_a_holdout():
    order = np.random.default_rng(0).permutation(200)
    y = np.arange(200) % 5
    train, test = make_holdout(make_distinct_digests(200), y)
    permuted_train, permuted_test = make_holdout(make_distinct_digests(200)[order], y[order])
    np.testing.assert_array_equal(np.sort(order[permuted_test]), test)
    np.testing.assert_array_equal(np.sort(order[permuted_train]), train)


def test_a_small_class_on_one_side_moves_its_image_nearest_to_the_threshold():
    pool = make_distinct_digests(2000)
    keys = compute_keys(pool)
    above = np.flatnonzero(keys > 0.5)[:4]
    below = np.flatnonzero(keys < 0.2)[:4]
    rows = np.concatenate([above, below])
    y = np.array(["all above"] * 4 + ["all below"] * 4)
    train, test = make_holdout(pool[rows], y)
    smallest, largest = above[keys[above].argmin()], below[keys[below].argmax()]
    assert set(rows[test]) == ({*below, smallest} - {largest})
    assert set(rows[train]) == ({*above, largest} - {smallest})


def test_a_class_of_one_distinct_image_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match=r"class 'rare' has one distinct image \(2 rows\)"):
        make_holdout(make_digests(1, 2, 3, 4, 9, 9), ["often"] * 4 + ["rare"] * 2)


def test_messages_use_class_names_if_y_holds_class_codes():
    with pytest.raises(ConfigError, match="class 'rare'"):
        make_holdout(make_digests(1, 2, 3, 4, 9), [0, 0, 0, 0, 2], names=["often", "never", "rare"])
    with pytest.raises(ConfigError, match="class 'rare'"):
        make_folds(make_digests(1, 2, 3, 4, 9), [0, 0, 0, 0, 2], k=2, names=["often", "never", "rare"])


def test_a_holdout_with_an_empty_side_is_refused():
    with pytest.raises(ConfigError, match="leaves 1 for training and 0 for the test"):
        make_holdout(make_distinct_digests(1), test=1e-9)
    with pytest.raises(ConfigError, match="0 rows"):
        make_holdout(make_distinct_digests(0))


@pytest.mark.parametrize("share", [0, 1, -0.1, 2, float("nan")])
def test_a_share_outside_zero_and_one_is_refused(share):
    with pytest.raises(ConfigError, match="test is"):
        make_holdout(make_distinct_digests(9), test=share)


@pytest.mark.parametrize("y", [[0, 1], np.zeros((9, 2)), ["a"] * 8 + [None]])
def test_a_y_without_one_class_per_row_is_refused(y):
    with pytest.raises(ConfigError, match=r"^y (has shape|mixes)"):
        make_holdout(make_distinct_digests(9), y if isinstance(y, np.ndarray) else np.array(y, dtype=object))


def check_partition(parts: list[tuple[np.ndarray, np.ndarray]], n: int) -> None:
    np.testing.assert_array_equal(np.sort(np.concatenate([test for _, test in parts])), np.arange(n))
    for train, test in parts:
        np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(n))
        assert (np.diff(train) > 0).all()
        assert (np.diff(test) > 0).all()


def test_every_row_is_in_one_test_fold_and_classes_differ_by_one_row_at_most():
    y = np.random.default_rng(0).choice(7, 503, p=[0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05])
    parts = make_folds(make_distinct_digests(503), y, k=5)
    check_partition(parts, 503)
    counts = np.array([np.bincount(y[test], minlength=7) for _, test in parts])
    assert np.ptp(counts, axis=0).max() <= 1
    assert np.ptp(counts.sum(axis=1)) <= 1


def test_folds_without_classes_have_equal_sizes():
    parts = make_folds(make_distinct_digests(103), k=4)
    check_partition(parts, 103)
    assert sorted(len(test) for _, test in parts) == [25, 26, 26, 26]


def test_the_order_of_rows_does_not_change_folds():
    order = np.random.default_rng(1).permutation(120)
    digests = make_digests(*(np.arange(120) % 90))
    y = np.arange(120) % 90 % 3
    for (_, plain), (_, permuted) in zip(make_folds(digests, y), make_folds(digests[order], y[order]), strict=True):
        np.testing.assert_array_equal(np.sort(order[permuted]), plain)


def test_another_seed_gives_other_folds():
    assert not np.array_equal(
        make_folds(make_distinct_digests(50), seed=0)[0][1], make_folds(make_distinct_digests(50), seed=1)[0][1]
    )


@pytest.mark.parametrize("seed", range(40))
def test_copies_and_groups_stay_in_one_fold(seed):
    rng = np.random.default_rng(seed)
    n, k = rng.integers(40, 121), int(rng.integers(2, 5))
    images = rng.integers(0, 41, n)
    groups = rng.integers(0, 7, n) * 100 + images // 3
    try:
        parts = make_folds(make_digests(*images), k=k, groups=groups)
    except ConfigError:
        return
    check_partition(parts, n)
    for train, test in parts:
        assert not set(images[train]) & set(images[test])
        assert not set(groups[train]) & set(groups[test])


def test_copies_with_different_labels_stay_together():
    digests = make_digests(*range(30), *range(10))
    y = np.array([0] * 30 + [1] * 10)
    images = np.concatenate([np.arange(30), np.arange(10)])
    parts = make_folds(digests, y, k=5)
    check_partition(parts, 40)
    assert all(not set(images[train]) & set(images[test]) for train, test in parts)
    assert [np.bincount(y[test]).tolist() for _, test in parts] == [[6, 2]] * 5
    train, test = make_holdout(digests, y)
    assert not set(images[train]) & set(images[test])


def test_groups_that_share_an_image_stay_in_one_fold():
    parts = make_folds(make_digests(1, 2, 2, 3, 4, 5), k=2, groups=["a", "a", "b", "b", "c", "d"])
    test_sets = [set(test) for _, test in parts]
    assert any({0, 1, 2, 3} <= test_set for test_set in test_sets)


def test_a_class_with_fewer_images_than_folds_is_an_error_that_suggests_k():
    y = ["cat"] * 10 + ["dog"] * 4
    with pytest.raises(ConfigError, match="class 'dog' has 3 distinct images, fewer than 5 folds; use at most 3"):
        make_folds(make_digests(*range(13), 12), y, k=5)
    assert len(make_folds(make_digests(*range(13), 12), y, k=3)) == 3


def test_a_class_with_one_image_is_an_error_without_a_suggested_k():
    with pytest.raises(ConfigError, match=r"class 'dog' has 1 distinct image, .* leave the class out"):
        make_folds(make_distinct_digests(11), ["cat"] * 10 + ["dog"], k=2)


def test_too_few_groups_are_an_error_that_counts_groups():
    with pytest.raises(ConfigError, match="the data has 2 groups of images, fewer than 3 folds"):
        make_folds(make_distinct_digests(10), k=3, groups=[0] * 5 + [1] * 5)
    with pytest.raises(ConfigError, match="the data has 0"):
        make_folds(make_distinct_digests(0), k=3)


@pytest.mark.parametrize("k", [1, 0, -3, 2.0, True])
def test_fewer_than_two_folds_are_refused(k):
    with pytest.raises(ConfigError, match="k is"):
        make_folds(make_distinct_digests(9), k=k)


def test_the_key_of_a_group_is_that_of_the_sha256_of_its_name():
    hashed = np.frombuffer(hashlib.sha256("Zoë".encode()).digest(), np.uint8)
    assert compute_group_keys(["Zoë", "x"], seed=3)[0] == compute_keys(hashed[None], 3)[0]


def test_a_number_and_its_digits_are_the_same_group():
    np.testing.assert_array_equal(compute_group_keys([7, 12]), compute_group_keys(["7", " 12 "]))
    np.testing.assert_array_equal(compute_group_keys(np.array([7.0, 12.0])), compute_group_keys(["7", "12"]))
    mixed = compute_group_keys(np.array([7, "7", "007"], dtype=object))
    assert mixed[0] == mixed[1] != mixed[2]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["a", "", "b", " "], "2 of 4 rows have no group, the first is row 1"),
        (np.array(["a", "b", "c", None], dtype=object), "1 of 4 rows have no group, the first is row 3"),
        ([1.0, 2.0, float("nan"), 2.0], "1 of 4 rows have no group, the first is row 2"),
        ([1.0, 2.5, 3.0, 3.0], "a group is 2.5"),
        ([True, False, True, False], "a group is True"),
        (["a"] * 3, r"groups have shape \(3,\), the digests have 4 rows"),
    ],
)
def test_a_row_without_a_group_is_refused(groups, message):
    with pytest.raises(ConfigError, match=message):
        make_holdout(make_distinct_digests(4), groups=groups)


def test_test_groups_are_those_with_keys_below_the_share():
    groups = [f"patient {i}" for i in np.random.default_rng(0).integers(0, 60, 500)]
    train, test = make_holdout(make_distinct_digests(500), test=0.3, seed=5, groups=groups)
    np.testing.assert_array_equal(test, np.flatnonzero(compute_group_keys(groups, 5) < 0.3))
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(500))


def test_added_groups_do_not_move_old_groups_between_training_and_test():
    groups = np.random.default_rng(0).integers(0, 80, 900)
    y = groups % 4
    _, old_test = make_holdout(make_distinct_digests(600), y[:600], groups=groups[:600])
    _, new_test = make_holdout(make_distinct_digests(900), y, groups=groups)
    np.testing.assert_array_equal(new_test[new_test < 600], old_test)


Row = st.tuples(st.integers(0, 60), st.integers(0, 25))


@settings(max_examples=60, deadline=None)
@given(st.lists(Row, min_size=8, max_size=80), st.lists(Row, max_size=20), st.integers(0, 3))
def test_an_image_that_joins_two_groups_moves_no_test_row_to_training(old_rows, added_rows, seed):
    images, groups = np.array(old_rows + added_rows).T
    digests, n = make_digests(*images), len(old_rows)
    for rows in (slice(n), slice(None)):  # if all groups were on one side, the split would move one of them
        keys = splits._find_units(digests[rows], groups[rows], seed)[1]
        assume(0 < (keys < 0.4).mean() < 1)
    _, old_test = make_holdout(digests[:n], test=0.4, seed=seed, groups=groups[:n])
    _, new_test = make_holdout(digests, test=0.4, seed=seed, groups=groups)
    assert set(old_test) <= set(new_test)


def find_components(images: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Connected components of rows that share an image or a group, by union-find."""
    parent = list(range(len(images)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, j in product(range(len(images)), repeat=2):
        if images[i] == images[j] or groups[i] == groups[j]:
            parent[root(i)] = root(j)
    return np.array([root(i) for i in range(len(images))])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=40))
def test_units_equal_those_of_a_union_find_and_are_sorted_by_key(rows):
    images, groups = np.array(rows).T
    components = find_components(images, groups)
    units, keys = splits._find_units(make_digests(*images), groups, 0)
    np.testing.assert_array_equal(units[:, None] == units, components[:, None] == components)
    group_keys = compute_group_keys(groups)
    np.testing.assert_array_equal(keys, [group_keys[components == unit].min() for unit in components])
    np.testing.assert_array_equal(np.argsort(units, kind="stable"), np.argsort(keys, kind="stable"))


def test_a_long_chain_of_groups_with_shared_images_is_one_unit():
    links = np.arange(20_000)
    images, groups = np.concatenate([links, links]), np.concatenate([links, links + 1])
    digests = np.zeros((40_000, 32), np.uint8)
    digests[:, :8] = images[:, None].astype("<u8").view(np.uint8)
    assert splits._find_units(digests, groups, 0)[0].max() == 0


@pytest.mark.parametrize("seed", range(60))
def test_copies_and_groups_stay_on_one_side_of_a_stratified_holdout_in_any_order_of_rows(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(20, 121))
    images, groups, y = rng.integers(0, 61, n), rng.integers(0, 13, n), rng.integers(0, 4, n)
    order = rng.permutation(n)
    try:
        train, test = make_holdout(make_digests(*images), y, groups=groups, test=0.3)
    except ConfigError:
        with pytest.raises(ConfigError):
            make_holdout(make_digests(*images[order]), y[order], groups=groups[order], test=0.3)
        return
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(n))
    assert not set(images[train]) & set(images[test])
    assert not set(groups[train]) & set(groups[test])
    assert set(y[train]) == set(y[test]) == set(y)
    _, permuted = make_holdout(make_digests(*images[order]), y[order], groups=groups[order], test=0.3)
    np.testing.assert_array_equal(np.sort(order[permuted]), test)


def has_arrangement(units: np.ndarray, y: np.ndarray, k: int) -> bool:
    """Whether an arrangement of the units has every class on each of k sides, by exhaustive search."""
    for side_by_unit in product(range(k), repeat=int(units.max()) + 1):
        side_by_row = np.array(side_by_unit)[units]
        if all(len(set(side_by_row[y == label])) == k for label in set(y)):
            return True
    return False


ClassesAndGroups = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=2, max_size=16)


@settings(max_examples=150, deadline=None)
@given(ClassesAndGroups, st.integers(0, 5))
def test_a_holdout_has_every_class_on_both_sides_whenever_an_arrangement_exists(rows, seed):
    groups, y = np.array(rows).T
    units = np.unique(groups, return_inverse=True)[1]
    if has_arrangement(units, y, 2):
        train, test = make_holdout(make_distinct_digests(len(rows)), y, groups=groups, seed=seed)
        assert set(y[train]) == set(y[test]) == set(y)
    else:
        with pytest.raises(ConfigError, match=r"^class '"):
            make_holdout(make_distinct_digests(len(rows)), y, groups=groups, seed=seed)


@settings(max_examples=80, deadline=None)
@given(ClassesAndGroups, st.integers(2, 3))
def test_folds_have_every_class_whenever_an_arrangement_exists(rows, k):
    groups, y = np.array(rows).T
    units = np.unique(groups, return_inverse=True)[1]
    if has_arrangement(units, y, k):
        for train, test in make_folds(make_distinct_digests(len(rows)), y, groups=groups, k=k):
            assert set(y[train]) == set(y[test]) == set(y)
    else:
        with pytest.raises(ConfigError, match=r"^class '"):
            make_folds(make_distinct_digests(len(rows)), y, groups=groups, k=k)


@settings(max_examples=60, deadline=None)
@given(ClassesAndGroups, st.integers(2, 3), st.randoms(use_true_random=False))
def test_every_moved_group_is_needed_on_its_new_side(rows, k, random):
    groups, y = np.array(rows).T
    units = np.unique(groups, return_inverse=True)[1]
    codes = np.unique(y, return_inverse=True)[1]
    n_units, n_classes = int(units.max()) + 1, int(codes.max()) + 1
    preferred_sides = np.array([random.randrange(k) for _ in range(n_units)])
    costs = np.array([random.random() for _ in range(n_units)])
    new_sides = splits._rearrange(preferred_sides, costs, codes, units, k)
    if new_sides is None:
        assert not has_arrangement(units, y, k)
        return
    is_present = np.zeros((n_classes, k), bool)
    is_present[codes, new_sides[units]] = True
    assert is_present.all()
    for unit in np.flatnonzero(new_sides != preferred_sides):
        undone_sides = new_sides.copy()
        undone_sides[unit] = preferred_sides[unit]
        is_present = np.zeros((n_classes, k), bool)
        is_present[codes, undone_sides[units]] = True
        assert not is_present.all()


@pytest.mark.parametrize("k", [2, 3, 5])
def test_many_classes_of_few_groups_are_on_all_sides(k):
    rng = np.random.default_rng(k)
    solution = rng.integers(0, k, 400)  # a valid arrangement
    groups_by_class = [
        np.concatenate([*(rng.choice(np.flatnonzero(solution == i), 1) for i in range(k)), rng.choice(400, 2)])
        for _ in range(150)
    ]
    groups = np.concatenate(groups_by_class)
    y = np.repeat(np.arange(150), k + 2)
    for seed in range(5):
        parts = make_folds(make_distinct_digests(len(y)), y, groups=groups, k=k, seed=seed)
        assert all(set(y[train]) == set(y[test]) == set(y) for train, test in parts)
        assert all(not set(groups[train]) & set(groups[test]) for train, test in parts)
        train, test = make_holdout(make_distinct_digests(len(y)), y, groups=groups, seed=seed)
        assert set(y[train]) == set(y[test]) == set(y)


def test_a_class_of_one_group_is_an_error_that_names_it():
    groups = ["p1", "p2", "p3", "p4", "p5", "p5"]
    with pytest.raises(ConfigError, match=r"class 'rare' has one group of images \(2 rows\); .* add groups or leave"):
        make_holdout(make_distinct_digests(6), ["often"] * 4 + ["rare"] * 2, groups=groups)


def test_classes_that_cannot_be_on_both_sides_are_an_error_that_names_one():
    # Two of three groups are on the same side, and every two of them contain all rows of a class.
    with pytest.raises(ConfigError, match=r"class '[abc]' shares its few groups with other classes"):
        make_holdout(make_distinct_digests(6), ["a", "b", "b", "c", "c", "a"], groups=[1, 1, 2, 2, 3, 3])


def test_a_holdout_of_few_groups_without_classes_has_no_empty_side():
    for seed in range(20):
        train, test = make_holdout(make_distinct_digests(30), groups=np.arange(30) % 3, seed=seed)
        assert len(train)
        assert len(test)
    with pytest.raises(ConfigError, match=r"30 rows \(1 groups\) leaves (30|0) for training"):
        make_holdout(make_distinct_digests(30), groups=["only"] * 30)


def test_grouped_folds_are_as_even_as_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    spreads, sklearn_spreads = [], []
    for _ in range(8):
        n, n_groups, n_classes = rng.integers(300, 900), rng.integers(30, 90), rng.integers(2, 8)
        groups = rng.choice(n_groups, n, p=rng.dirichlet(np.ones(n_groups)))
        mixtures = rng.dirichlet(np.ones(n_classes), n_groups)
        y = np.array([rng.choice(n_classes, p=mixtures[group]) for group in groups])
        spread_pair = []
        for parts in (
            make_folds(make_distinct_digests(n), y, groups=groups),
            list(StratifiedGroupKFold(5, shuffle=True, random_state=0).split(y, y, groups)),
        ):
            check_partition(parts, n)
            assert all(not set(groups[train]) & set(groups[test]) for train, test in parts)
            shares = np.array([np.bincount(y[test], minlength=n_classes) for _, test in parts]) / np.bincount(y)
            spread_pair.append(shares.std(axis=0).mean())
        spreads.append(spread_pair[0])
        sklearn_spreads.append(spread_pair[1])
    assert np.mean(spreads) < 1.1 * np.mean(sklearn_spreads)


def test_folds_by_distinct_times_equal_those_of_scikit_learn():
    order = np.random.default_rng(0).permutation(60)
    parts = make_folds(make_distinct_digests(60), times=order, k=4)
    for (train, test), (expected_train, expected_test) in zip(
        parts, TimeSeriesSplit(4).split(np.arange(60)), strict=True
    ):
        np.testing.assert_array_equal(np.sort(order[train]), expected_train)
        np.testing.assert_array_equal(np.sort(order[test]), expected_test)


TimedRows = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15), st.integers(0, 9)), min_size=6, max_size=60)


@settings(max_examples=100, deadline=None)
@given(TimedRows, st.integers(2, 4), st.booleans())
def test_a_fold_by_time_trains_on_all_earlier_rows_without_groups_or_copies_in_its_test(rows, k, grouped):
    images, groups, times = np.array(rows).T
    groups = groups if grouped else None
    digests = make_digests(*images)
    try:
        parts = make_folds(digests, times=times, groups=groups, k=k)
    except ConfigError:
        message = "distinct times" if len(set(times)) <= k else "no training rows remain"
        with pytest.raises(ConfigError, match=message):
            make_folds(digests, times=times, groups=groups, k=k)
        return
    components = find_components(images, np.arange(len(rows)) if groups is None else groups)
    tests = np.concatenate([test for _, test in parts])
    first = times[parts[0][1]].min()
    np.testing.assert_array_equal(np.sort(tests), np.flatnonzero(times >= first))
    for train, test in parts:
        expected = (times < times[test].min()) & ~np.isin(components, components[test])
        np.testing.assert_array_equal(train, np.flatnonzero(expected))
    for (_, earlier), (_, later) in pairwise(parts):
        assert times[earlier].max() < times[later].min()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=40), st.floats(0.05, 0.95))
def test_the_cutoff_time_gives_the_share_nearest_to_the_requested_one(times, share):
    assume(len(set(times)) > 1)
    cutoff = find_cutoff_time(times, share)
    shares = {time: np.mean(np.array(times) >= time) for time in sorted(set(times))[1:]}
    assert abs(shares[cutoff] - share) == pytest.approx(min(abs(value - share) for value in shares.values()))
    train, test = make_holdout(make_distinct_digests(len(times)), times=times, test=share)
    np.testing.assert_array_equal(test, np.flatnonzero(np.array(times) >= cutoff))
    np.testing.assert_array_equal(train, np.flatnonzero(np.array(times) < cutoff))


def test_with_a_fixed_cutoff_added_rows_do_not_move_old_rows():
    times = np.random.default_rng(0).normal(size=300)
    train, test = make_holdout(make_distinct_digests(200), times=times[:200], since=0.5)
    np.testing.assert_array_equal(test, np.flatnonzero(times[:200] >= 0.5))
    more_train, more_test = make_holdout(make_distinct_digests(300), times=times, since=0.5)
    np.testing.assert_array_equal(more_test[more_test < 200], test)
    np.testing.assert_array_equal(more_train[more_train < 200], train)


def test_an_early_row_with_a_group_or_copy_in_the_test_is_on_neither_side():
    train, test = make_holdout(
        make_digests(1, 2, 3, 4, 4, 5), times=[1, 1, 1, 1, 9, 9], groups=["a", "b", "b", "c", "d", "a"], since=5
    )
    assert test.tolist() == [4, 5]
    assert train.tolist() == [1, 2]  # row 0 is of group a, row 3 a copy of row 4


def test_dates_are_accepted_as_times_and_as_the_cutoff():
    days = np.array(["2021-01-05", "2021-03-01", "2021-02-01", "2020-01-01"], "datetime64[D]")
    _, test = make_holdout(make_distinct_digests(4), times=days, since="2021-02-01")
    assert test.tolist() == [1, 2]
    assert find_cutoff_time(days, 0.25) == np.datetime64("2021-03-01")
    with pytest.raises(ConfigError, match="since is 5; expected a date such as 2021-03-04"):
        make_holdout(make_distinct_digests(4), times=days, since=5)
    with pytest.raises(ConfigError, match="since is 'May'; expected a number, like the times"):
        make_holdout(make_distinct_digests(4), times=[1, 2, 3, 4], since="May")
    with pytest.raises(ConfigError, match="no row has a time from 2022-01-01 on; the times range from 2020-01-01 to"):
        make_holdout(make_distinct_digests(4), times=days, since="2022-01-01")


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0, float("nan"), 3.0, 4.0], "1 of 4 rows have no time, the first is row 1"),
        (np.array(["2021-01-01", "NaT", "NaT", "2021-01-01"], "datetime64[s]"), "2 of 4 rows have no time"),
        (["a"] * 4, "times are <U1; give numbers or numpy dates"),
        ([1, 2, 3], r"times have shape \(3,\)"),
        ([5, 5, 5, 5], "the 4 rows have 1 distinct times, and a test set by time must have at least 2; give more"),
    ],
)
def test_invalid_times_are_refused(times, message):
    with pytest.raises(ConfigError, match=message):
        make_holdout(make_distinct_digests(4), times=times)


def test_too_few_distinct_times_are_an_error_that_suggests_k():
    with pytest.raises(ConfigError, match="9 rows have 4 distinct times, and k=5 folds by time must have at least 6"):
        make_folds(make_distinct_digests(9), times=[1, 1, 2, 2, 3, 3, 4, 4, 4], k=5)
    with pytest.raises(ConfigError, match="use k=3"):
        make_folds(make_distinct_digests(9), times=[1, 1, 2, 2, 3, 3, 4, 4, 4], k=5)
    assert len(make_folds(make_distinct_digests(9), times=[1, 1, 2, 2, 3, 3, 4, 4, 4], k=3)) == 3


def test_a_cutoff_without_training_rows_is_refused():
    with pytest.raises(ConfigError, match=r"no training rows remain before 3.0: each of the 4 earlier rows has a copy"):
        make_holdout(make_distinct_digests(8), times=[1, 1, 2, 2, 3, 3, 4, 4], groups=list("abababab"), since=3)


def test_a_cutoff_with_a_single_training_class_is_refused():
    with pytest.raises(ConfigError, match=r"the 2 training rows before 3.0 have a single class"):
        make_holdout(make_distinct_digests(4), list("aabb"), times=[1, 2, 3, 4], since=3)


def test_since_without_times_is_refused():
    with pytest.raises(ConfigError, match="since is 3, but the rows have no times; pass times too"):
        make_holdout(make_distinct_digests(4), since=3)


def test_a_predefined_split_leaves_out_test_rows_with_training_copies():
    marks = np.array(list("ttteex"))
    train, test = splits.apply_predefined_split(make_digests(1, 2, 3, 3, 4, 4), marks == "t", marks == "e")
    assert train.tolist() == [0, 1, 2]
    assert test.tolist() == [4]


def test_a_predefined_split_that_divides_a_group_is_an_error_that_names_the_group():
    marks = np.array(list("ttteee"))
    with pytest.raises(ConfigError, match=r"1 of 5 groups are on both sides .* the first is 'p3'"):
        splits.apply_predefined_split(
            make_distinct_digests(6), marks == "t", marks == "e", groups=["p1", "p2", "p3", "p3", "p4", "p5"]
        )
    train, test = splits.apply_predefined_split(
        make_distinct_digests(6), marks == "t", marks == "e", groups=["p1", "p2", "p2", "p3", "p4", "p5"]
    )
    assert (train.tolist(), test.tolist()) == ([0, 1, 2], [3, 4, 5])


def test_a_predefined_split_with_an_empty_side_or_conflicting_marks_is_refused():
    marks = np.array(list("ttte"))
    with pytest.raises(ConfigError, match="has no row for the test"):
        splits.apply_predefined_split(make_distinct_digests(4), marks == "t", marks == "none")
    with pytest.raises(ConfigError, match="all 1 images that are marked for the test are, byte by byte, also"):
        splits.apply_predefined_split(make_digests(1, 2, 3, 3), marks == "t", marks == "e")
    with pytest.raises(ConfigError, match="3 rows are marked for training and for the test"):
        splits.apply_predefined_split(make_distinct_digests(4), marks == "t", marks == "t")
