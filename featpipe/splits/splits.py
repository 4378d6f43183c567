"""Train, validation and test rows and folds, determined by the content of the samples and not by their positions.

Every function uses the digests of the images' own bytes. An image is therefore always on the same side, independent of
its name, folder, row and neighbours, and byte-identical copies are never on both sides. If images belong to groups (a
patient, a photograph, a burst), the name of the group determines the side instead. If they have times, test images are
later than training images.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featpipe.errors import ConfigError

# Placing small classes that share groups on every side is a combinatorial problem. These limits take about a second;
# an integer program solves the same structures of tests/benchmarks/splits.py, but can take minutes.
MAX_SEARCH_STEPS = 4000
SEARCH_STEPS_PER_CHOICE = 40

MAX_LISTED_GROUPS = 5

RowIndices = NDArray[np.int64]


def compute_keys(digests: NDArray[np.uint8], seed: int = 0) -> NDArray[np.float64]:
    """Compute a uniform number in [0, 1) for each image that depends only on its digest and the seed.

    Parameters
    ----------
    digests : ndarray of shape (n, 32), uint8
        SHA-256 of each image's bytes.
    seed : int
        From 0 to 2**64 - 1. Different seeds give independent numbers.

    Returns
    -------
    ndarray of shape (n,), float64
        Equal for equal digests.

    Notes
    -----
    The digest is read as four little-endian words w of 64 bits; from h = mix(seed), h = mix(h ^ w) for each, with
    the output function of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    OOPSLA 2014) as mix; the upper 53 bits are the number. Splits depend on this definition: it never changes.

    Examples
    --------
    >>> compute_keys(np.zeros((1, 32), np.uint8), seed=1) == compute_keys(np.zeros((2, 32), np.uint8), seed=1)
    array([ True,  True])
    """
    digests = _check_digests(digests)
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise ConfigError(f"seed is {seed!r}; give a whole number from 0 to 2**64 - 1")
    mixed = _splitmix64(np.full(len(digests), seed, np.uint64))
    for word in digests.view("<u8").astype(np.uint64).T:
        mixed = _splitmix64(mixed ^ word)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def compute_group_keys(groups: ArrayLike, seed: int = 0) -> NDArray[np.float64]:
    """Compute a number in [0, 1) for each row, uniform over groups, from the group's name and the seed only.

    Parameters
    ----------
    groups : array-like of shape (n,)
        Text or whole numbers; 7, 7.0 and "7" are one group.
    seed : int

    Returns
    -------
    ndarray of shape (n,), float64
        The :func:`compute_keys` of the SHA-256 of the name in UTF-8.

    Examples
    --------
    >>> compute_group_keys(["patient 7", "patient 8", "patient 7"])
    array([0.70682047, 0.84688462, 0.70682047])
    """
    names, codes = _encode_groups(groups, len(np.asarray(groups)))
    return _compute_name_keys(names, seed)[codes]


def make_holdout(
    digests: NDArray[np.uint8],
    y: ArrayLike | None = None,
    *,
    test: float = 0.2,
    seed: int = 0,
    groups: ArrayLike | None = None,
    times: ArrayLike | None = None,
    since: Any = None,
    names: Sequence[str] | None = None,
) -> tuple[RowIndices, RowIndices]:
    """Split rows into training and test rows.

    Parameters
    ----------
    digests : ndarray of shape (n, 32), uint8
        SHA-256 of each image's bytes.
    y : array-like of shape (n,), optional
        Classes. If given, every class is on both sides, unless the split is by time.
    test : float
        The expected share of test rows, between 0 and 1, overall and in every class. With groups it is the expected
        share of the groups.
    seed : int
        To split a validation set from the training rows, call the function on these rows with another seed: with the
        same seed all their keys are above the threshold.
    groups : array-like of shape (n,), optional
        Text or whole numbers. Rows of one group (a patient, a photograph, a burst) stay together.
    times : array-like of shape (n,), optional
        Numbers or numpy dates. The latest rows, from `since` on, are the test rows. `seed` is not used.
    since : number or date, optional
        The earliest time of a test row. By default :func:`find_cutoff_time` finds the time that gives a share of
        about `test`; that time changes when images are added, so pass it if old test images must stay test images.
    names : sequence of str, optional
        What messages call the classes, where y holds their positions 0, 1, …

    Returns
    -------
    train, test : ndarray of int64
        Row numbers, ascending; every row is on exactly one side. With times, rows before `since` that have a copy or
        a row of the same group in the test are on neither side.

    Raises
    ------
    ConfigError
        If a class has a single distinct image (or group), if classes share their few images so that they cannot all
        be on both sides, or if one side would be empty.

    Notes
    -----
    A row is a test row if its key (:func:`compute_keys`) is below `test`. Its side depends on its own bytes and the
    seed, not on other rows: adding, removing or renaming images moves no other image, and a larger `test` only adds
    test rows. In return, the shares are those of independent draws (at n = 1000 and 0.2, within 0.2 ± 0.025 in nineteen
    of twenty cases), not exact.

    With groups the key is that of the group (:func:`compute_group_keys`). Groups that have a byte-identical image in
    common are merged, and the merged group has the smallest of their keys. An image that joins two groups can therefore
    move old training rows to the test, but no old test row to training.

    Small classes are an exception. If a class has no row below the threshold, its image (or group) with the smallest
    key moves to the test; if it has no row above, the one with the largest key moves to training. Only such images can
    move back later, when the class gets an image on the missing side or nearer to it. (No rule could avoid this: if any
    two of three images can be a complete class, two of them have the same side.) If another class then lacks a side,
    images (or groups) of these classes change sides, preferably those with keys near the threshold, until every class
    is on both sides. It is an error if that is impossible or, with very many classes of a few groups each, if no
    solution is found.
    """
    _check_share(test)
    units, keys = _find_units(digests, groups, seed)
    codes, distinct = _encode_classes(np.zeros(len(keys), np.int64) if y is None else y, len(keys))
    if times is not None:
        row_times = _check_times(times, len(keys))
        cutoff = find_cutoff_time(row_times, test) if since is None else _parse_cutoff(since, row_times)
        return _split_by_time(row_times, units, [cutoff], codes)[0]
    if since is not None:
        raise ConfigError(f"since is {since!r}, but the rows have no times; pass times too")
    is_test = keys < test
    if y is not None or len(np.unique(keys)) > 1:
        unit_name = "image" if groups is None else "group"
        is_test = _ensure_both_sides(
            keys, test, codes, _format_class_names(distinct, names if y is not None else ["the data"]), unit_name
        )
    train_rows, test_rows = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    if not len(train_rows) or not len(test_rows):
        kind = "distinct images" if groups is None else "groups"
        raise ConfigError(
            f"a test share of {test} of {len(keys)} rows ({len(np.unique(keys))} {kind}) leaves "
            f"{len(train_rows)} for training and {len(test_rows)} for the test; add images or change the share"
        )
    return train_rows.astype(np.int64), test_rows.astype(np.int64)


def make_folds(
    digests: NDArray[np.uint8],
    y: ArrayLike | None = None,
    *,
    k: int = 5,
    seed: int = 0,
    groups: ArrayLike | None = None,
    times: ArrayLike | None = None,
    names: Sequence[str] | None = None,
) -> list[tuple[RowIndices, RowIndices]]:
    """Split rows into k folds, each the test set of one split; with times, forward chaining.

    Parameters
    ----------
    digests : ndarray of shape (n, 32), uint8
        SHA-256 of each image's bytes.
    y : array-like of shape (n,), optional
        Classes, distributed evenly over the folds: without duplicates and groups the numbers of rows of a class in
        any two folds differ by at most one. Every class is in every fold, unless the split is by time.
    k : int
        Number of folds, at least 2.
    seed : int
    groups : array-like of shape (n,), optional
        Text or whole numbers. Rows of one group (a patient, a photograph, a burst) stay together.
    times : array-like of shape (n,), optional
        Numbers or numpy dates. The rows are divided into k + 1 spans of time with about equal numbers of rows; fold i
        trains on the first i + 1 spans and tests on the next. Equal times are in the same span. `seed` is not used,
        and a class may be missing on a side.
    names : sequence of str, optional
        What messages call the classes, where y holds their positions 0, 1, …

    Returns
    -------
    list of k tuples (train, test) of ndarray of int64
        Row numbers, ascending. Every row is in exactly one test fold. With times, rows of the first span are in no
        test fold, and a fold does not train on rows that have a copy or a row of the same group in its test.

    Raises
    ------
    ConfigError
        If a class has fewer distinct images (or groups) than there are folds, or cannot be in every fold because it
        shares them with other classes; if there are too few times, or no training rows before one of them.

    Notes
    -----
    Units are assigned to folds: rows connected by equal digests or equal groups. Units of several rows come first, in
    descending order of size and then in the order of their keys (with groups the smallest key of a group), then single
    rows in the order of their keys. Each unit goes to the fold that minimises the sum of squares of the folds' shares
    of the classes; ties go to the fold with the fewest rows. If a class is then missing in a fold, a few rows change
    folds. The folds depend on the set of images and the seed, not on the order of the rows.
    """
    if not isinstance(k, Integral) or isinstance(k, bool) or k < 2:
        raise ConfigError(f"k is {k!r}; give a whole number of folds, 2 or more")
    units, keys = _find_units(digests, groups, seed)
    codes, distinct = _encode_classes(np.zeros(len(keys), np.int64) if y is None else y, len(keys))
    if times is not None:
        row_times = _check_times(times, len(keys))
        return _split_by_time(row_times, units, _find_cutoff_times(row_times, int(k)), codes)
    class_names = None if y is None else _format_class_names(distinct, names)
    _check_enough_units(units, codes, class_names, k, grouped=groups is not None)
    fold_indices = _assign_folds(keys, codes, units, int(k))
    fold_indices = _ensure_every_fold(fold_indices, codes, units, class_names or ["the data"], int(k))
    return [
        (np.flatnonzero(fold_indices != i).astype(np.int64), np.flatnonzero(fold_indices == i).astype(np.int64))
        for i in range(k)
    ]


def apply_predefined_split(
    digests: NDArray[np.uint8],
    train: NDArray[np.bool_],
    test: NDArray[np.bool_],
    *,
    groups: ArrayLike | None = None,
) -> tuple[RowIndices, RowIndices]:
    """Apply the split that came with the labels; copies of training rows are left out of the test.

    Parameters
    ----------
    digests : ndarray of shape (n, 32), uint8
        SHA-256 of each image's bytes.
    train, test : ndarray of shape (n,), bool
        How each row is marked; a row may be neither.
    groups : array-like of shape (n,), optional

    Returns
    -------
    train, test : ndarray of int64
        Row numbers, ascending. A test row with a byte-identical copy that is marked for training is left out.

    Raises
    ------
    ConfigError
        If a row is marked as both, a group is on both sides, or a side is empty.
    """
    image_units, _ = _find_units(digests, None, 0)
    if (train & test).any():
        raise ConfigError(f"{int((train & test).sum())} rows are marked for training and for the test; mark them once")
    for side, is_marked in (("training", train), ("the test", test)):
        if not is_marked.any():
            raise ConfigError(f"the split that came with the labels has no row for {side}; mark some")
    if groups is not None:
        names, codes = _encode_groups(groups, len(image_units))
        shared_codes = np.intersect1d(codes[train], codes[test])
        if len(shared_codes):
            listed = ", ".join(repr(str(names[code])) for code in shared_codes[:MAX_LISTED_GROUPS])
            raise ConfigError(
                f"{len(shared_codes)} of {len(names)} groups are on both sides of the split that came with the labels, "
                f"the first {'is' if len(shared_codes) == 1 else 'are'} {listed}; mark each group once, or leave out "
                "the groups or the split"
            )
    has_training_copy = np.isin(image_units, image_units[train])
    if not (test & ~has_training_copy).any():
        raise ConfigError(
            f"all {int(test.sum())} images that are marked for the test are, byte by byte, also marked for training; "
            "mark others"
        )
    return np.flatnonzero(train).astype(np.int64), np.flatnonzero(test & ~has_training_copy).astype(np.int64)


def find_cutoff_time(times: ArrayLike, test: float = 0.2) -> Any:
    """Find the earliest time of a test row: the time for which the share of rows at or after it is nearest to `test`.

    Parameters
    ----------
    times : array-like of shape (n,)
        Numbers or numpy dates.
    test : float

    Examples
    --------
    >>> find_cutoff_time([2019, 2020, 2020, 2021, 2022], test=0.4)
    2021.0
    """
    _check_share(test)
    return _find_cutoff_times(_check_times(times, len(np.asarray(times))), 1, 1 - test)[0]


def _check_share(test: float) -> None:
    if not 0 < test < 1:
        raise ConfigError(f"test is {test!r}; give a share between 0 and 1, such as 0.2")


def _check_digests(digests: NDArray[np.uint8]) -> NDArray[np.uint8]:
    digests = np.asarray(digests)
    if digests.dtype != np.uint8 or digests.ndim != 2 or digests.shape[1] != 32:
        raise ConfigError(
            f"digests are {digests.dtype} of shape {digests.shape}; give uint8 of shape (n, 32), a SHA-256 for each row"
        )
    return np.ascontiguousarray(digests)


def _splitmix64(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _encode_classes(y: ArrayLike, n: int) -> tuple[NDArray[np.int64], NDArray[np.generic]]:
    """Encode classes as 0, 1, …; returns the codes and the distinct classes."""
    array = np.asarray(y)
    if array.shape != (n,):
        raise ConfigError(
            f"y has shape {array.shape}, the digests have {n} rows; give one value per row, or omit y (several "
            "labels or targets per row cannot be stratified)"
        )
    try:
        distinct, codes = np.unique(array, return_inverse=True)
    except TypeError:
        raise ConfigError("y mixes types or has rows without a value; leave these rows out") from None
    return codes.astype(np.int64), distinct


def _format_class_names(distinct: NDArray[np.generic], names: Sequence[str] | None) -> list[str]:
    """The names of the distinct values of y in messages."""
    values = distinct.tolist()
    return [str(value) if names is None else names[int(value)] for value in values]


def _encode_groups(groups: ArrayLike, n: int) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct names of the groups, and for each row the index of its group."""
    array = np.asarray(groups)
    if array.shape != (n,):
        raise ConfigError(f"groups have shape {array.shape}, the digests have {n} rows; give one group per row")
    names = np.array([_format_group_name(value) for value in array.tolist()], dtype=np.str_)
    rows_without_group = np.flatnonzero(names == "")
    if len(rows_without_group):
        raise ConfigError(
            f"{len(rows_without_group)} of {n} rows have no group, the first is row {rows_without_group[0]}; "
            "give every row a group; an image that belongs to no group needs its own"
        )
    distinct, codes = np.unique(names, return_inverse=True)
    return distinct.tolist(), codes.astype(np.int64)


def _format_group_name(value: object) -> str:
    """The name of a group as text; empty for a missing value."""
    if isinstance(value, str):
        return value.strip()
    if value is None or value != value:
        return ""
    if (isinstance(value, Integral) and not isinstance(value, bool)) or (
        isinstance(value, float) and value.is_integer()
    ):
        return str(int(value))
    raise ConfigError(f"a group is {value!r} ({type(value).__name__}); give text or whole numbers")


def _compute_name_keys(names: Sequence[str], seed: int) -> NDArray[np.float64]:
    hashes = b"".join(hashlib.sha256(name.encode("utf-8", "backslashreplace")).digest() for name in names)
    return compute_keys(np.frombuffer(hashes, np.uint8).reshape(-1, 32), seed)


def _find_units(
    digests: NDArray[np.uint8], groups: ArrayLike | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each row its unit (rows that must stay together), numbered in the order of their keys, and the unit's key."""
    keys = compute_keys(digests, seed)
    distinct, images = np.unique(keys, return_inverse=True)
    if groups is None:
        return images.astype(np.int64), keys
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names, codes = _encode_groups(groups, len(keys))
    n_nodes = len(distinct) + len(names)
    adjacency = coo_array((np.ones(len(keys), bool), (images, len(distinct) + codes)), shape=(n_nodes, n_nodes))
    component = connected_components(adjacency, directed=False)[1][images]
    component_keys = np.full(n_nodes, np.inf)
    np.minimum.at(component_keys, component, _compute_name_keys(names, seed)[codes])
    keys = component_keys[component]
    order = np.lexsort((component, keys))
    changes = np.diff(component[order], prepend=component[order[:1]]) != 0
    units = np.empty(len(keys), np.int64)
    units[order] = np.cumsum(changes)
    return units, keys


def _ensure_both_sides(
    keys: NDArray[np.float64], test: float, codes: NDArray[np.int64], class_names: list[str], unit_name: str
) -> NDArray[np.bool_]:
    """A mask of the test rows. A class that lacks a side gets one image or group there: all rows with that key."""
    is_test = keys < test
    for code, rows in enumerate(_split_rows_by_code(codes, len(class_names))):
        if keys[rows].min() == keys[rows].max():
            single_unit = "one distinct image" if unit_name == "image" else "one group of images"
            raise ConfigError(
                f"class {class_names[code]!r} has {single_unit} ({len(rows)} rows); a test set needs two: "
                f"add {unit_name}s or leave the class out"
            )
        if not is_test[rows].any():
            is_test[keys == keys[rows].min()] = True
        elif is_test[rows].all():
            is_test[keys == keys[rows].max()] = False
    missing_classes = _find_missing_classes(is_test.astype(np.int64), codes, 2)
    if not len(missing_classes):
        return is_test
    distinct, units = np.unique(keys, return_inverse=True)
    sides = _rearrange((distinct < test).astype(np.int64), np.abs(distinct - test), codes, units.astype(np.int64), 2)
    if sides is None:
        raise ConfigError(
            f"class {class_names[missing_classes[0]]!r} shares its few {unit_name}s with other classes, and no split "
            f"has every class on both sides; correct the labels of identical images, add {unit_name}s or leave a class "
            "out"
        )
    return sides[units] == 1


def _find_missing_classes(sides: NDArray[np.int64], codes: NDArray[np.int64], k: int) -> NDArray[np.intp]:
    counts = np.bincount(codes * k + sides, minlength=(int(codes.max(initial=-1)) + 1) * k)
    return np.flatnonzero((counts.reshape(-1, k) == 0).any(axis=1))


def _ensure_every_fold(
    fold_indices: NDArray[np.int64], codes: NDArray[np.int64], units: NDArray[np.int64], class_names: list[str], k: int
) -> NDArray[np.int64]:
    missing_classes = _find_missing_classes(fold_indices, codes, k)
    if not len(missing_classes):
        return fold_indices
    first_rows = np.unique(units, return_index=True)[1]
    unit_folds = _rearrange(fold_indices[first_rows], np.bincount(units).astype(np.float64), codes, units, k)
    if unit_folds is None:
        raise ConfigError(
            f"class {class_names[missing_classes[0]]!r} shares its few groups or images with other classes, and no "
            f"assignment has every class in each of k={k} folds; use a smaller k, add images or leave a class out"
        )
    return unit_folds[units]


def _rearrange(
    sides: NDArray[np.int64], costs: NDArray[np.float64], codes: NDArray[np.int64], units: NDArray[np.int64], k: int
) -> NDArray[np.int64] | None:
    """Move units between k sides until every class is on every side (tabu search); None if no arrangement is found.

    Each step moves a unit of a class to a side where the class is missing: the unit whose move makes the fewest classes
    go missing, and among equals the one with the smallest cost. Moves that turn out to be unnecessary are undone.

    Parameters
    ----------
    sides, costs : ndarray of shape (u,)
        The preferred side of each unit, and the cost of moving it.
    codes, units : ndarray of shape (n,)
        Class and unit of each row.
    """
    pair_classes, pair_units = np.unique(np.stack([codes, units]), axis=1)
    units_by_class = [pair_units[pairs] for pairs in _split_rows_by_code(pair_classes, int(codes.max()) + 1)]
    classes_by_unit = [pair_classes[pairs] for pairs in _split_rows_by_code(pair_units, len(sides))]
    counts = np.zeros((len(units_by_class), k), np.int64)  # units of each class on each side
    np.add.at(counts, (pair_classes, sides[pair_units]), 1)
    preferred_sides, sides = sides, sides.copy()

    def move(unit: int, side: int) -> None:
        counts[classes_by_unit[unit], sides[unit]] -= 1
        counts[classes_by_unit[unit], side] += 1
        sides[unit] = side

    movable_from_step = np.zeros(len(sides), np.int64)
    for step in range(min(MAX_SEARCH_STEPS, SEARCH_STEPS_PER_CHOICE * len(sides) * k)):
        missing = np.argwhere(counts == 0)
        if not len(missing):
            break
        missing_class, side = missing[step % len(missing)]
        candidates = units_by_class[missing_class]
        moves = []
        for unit in candidates[sides[candidates] != side].tolist():
            classes = classes_by_unit[unit]
            newly_missing = int(np.sum(counts[classes, sides[unit]] == 1) - np.sum(counts[classes, side] == 0))
            moves.append((bool(movable_from_step[unit] > step), newly_missing, float(costs[unit]), unit))
        if not moves:
            return None
        unit = min(moves)[-1]
        move(unit, int(side))
        movable_from_step[unit] = step + 5 + step % 7  # not moved back for some steps, which prevents cycles
    else:
        return None
    moved_units = np.flatnonzero(sides != preferred_sides)
    for unit in moved_units[np.argsort(-costs[moved_units], kind="stable")].tolist():
        if (counts[classes_by_unit[unit], sides[unit]] > 1).all():
            move(unit, int(preferred_sides[unit]))
    return sides


def _split_rows_by_code(codes: NDArray[np.int64], n_codes: int) -> list[NDArray[np.intp]]:
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.cumsum(np.bincount(codes, minlength=n_codes))[:-1])


def _check_times(times: ArrayLike, n: int) -> NDArray[Any]:
    """Validate times: float64 or numpy dates of shape (n,), without missing values."""
    array = np.asarray(times)
    if array.shape != (n,):
        raise ConfigError(f"times have shape {array.shape}, the digests have {n} rows; give one time per row")
    if array.dtype.kind not in "iufM":
        raise ConfigError(f"times are {array.dtype}; give numbers or numpy dates")
    if array.dtype.kind != "M":
        array = array.astype(np.float64)
    rows_without_time = np.flatnonzero(~np.isfinite(array))
    if len(rows_without_time):
        raise ConfigError(
            f"{len(rows_without_time)} of {n} rows have no time, the first is row {rows_without_time[0]}; give every "
            "row a time"
        )
    return array


def _parse_cutoff(since: Any, times: NDArray[Any]) -> Any:
    """Convert a cutoff time so that it can be compared with the times."""
    try:
        cutoff = np.datetime64(since) if times.dtype.kind == "M" else np.float64(since)
    except (TypeError, ValueError):
        cutoff = np.float64("nan")
    if not np.isfinite(cutoff):
        kind = "a date such as 2021-03-04" if times.dtype.kind == "M" else "a number"
        raise ConfigError(f"since is {since!r}; expected {kind}, like the times")
    return cutoff


def _find_cutoff_times(times: NDArray[Any], k: int, first_share: float | None = None) -> list[Any]:
    """The k times between k + 1 spans with about equal numbers of rows, or with a share `first_share` in the first."""
    distinct, counts = np.unique(times, return_counts=True)
    if len(distinct) <= k:
        needing = "a test set" if k == 1 else f"k={k} folds"
        advice = f"use k={len(distinct) - 1}, or " if len(distinct) > 2 else ""
        raise ConfigError(
            f"the {len(times)} rows have {len(distinct)} distinct times, and {needing} by time must have at least "
            f"{k + 1}; {advice}give more precise times"
        )
    rows_before = np.concatenate([[0], np.cumsum(counts)[:-1]])
    cut_positions: list[int] = []
    for cut_number in range(1, k + 1):
        target_rows = len(times) * (cut_number / (k + 1) if first_share is None else first_share)
        low, high = (cut_positions[-1] + 1 if cut_positions else 1), len(distinct) - (k - cut_number)
        cut_positions.append(low + int(np.abs(rows_before[low:high] - target_rows).argmin()))
    return [distinct[position].item() if times.dtype.kind == "f" else distinct[position] for position in cut_positions]


def _split_by_time(
    times: NDArray[Any], units: NDArray[np.int64], cutoffs: list[Any], codes: NDArray[np.int64]
) -> list[tuple[RowIndices, RowIndices]]:
    """Train before each cutoff and test until the next; training rows with a copy or group in the test are left out."""
    has_several_classes = len(np.unique(codes)) > 1
    splits = []
    for start, stop in pairwise([*cutoffs, None]):
        is_later = times >= start
        is_test = is_later if stop is None else is_later & (times < stop)
        is_unit_tested = np.zeros(int(units.max(initial=-1)) + 1, bool)
        is_unit_tested[units[is_test]] = True
        is_train = ~is_later & ~is_unit_tested[units]
        if not is_test.any():
            raise ConfigError(f"no row has a time from {start} on; the times range from {times.min()} to {times.max()}")
        if not is_train.any():
            raise ConfigError(
                f"no training rows remain before {start}: each of the {int((~is_later).sum())} earlier rows has a "
                "copy, or a row of its group, in the test; use another cutoff time, fewer folds, or no groups"
            )
        if has_several_classes and len(np.unique(codes[is_train])) < 2:
            raise ConfigError(
                f"the {int(is_train.sum())} training rows before {start} have a single class; use a later cutoff time "
                "or fewer folds"
            )
        splits.append((np.flatnonzero(is_train).astype(np.int64), np.flatnonzero(is_test).astype(np.int64)))
    return splits


def _check_enough_units(
    units: NDArray[np.int64], codes: NDArray[np.int64], class_names: list[str] | None, k: int, *, grouped: bool
) -> None:
    """Raise if a class has fewer units than there are folds; without names all rows are one class."""
    pairs = np.unique(np.stack([codes, units]), axis=1)
    n_units = np.bincount(pairs[0], minlength=1)
    smallest_class = int(n_units.argmin())
    n_available = int(n_units[smallest_class])
    if n_available >= k:
        return
    subject = "the data" if class_names is None or not class_names else f"class {class_names[smallest_class]!r}"
    plural = "" if n_available == 1 else "s"
    amount = f"{n_available} group{plural} of images" if grouped else f"{n_available} distinct image{plural}"
    advice = f"use at most {n_available} folds, or add images" if n_available > 1 else "add images"
    if class_names and n_available == 1:
        advice += " or leave the class out"
    raise ConfigError(f"{subject} has {amount}, fewer than {k} folds; {advice}")


def _assign_folds(
    keys: NDArray[np.float64], codes: NDArray[np.int64], units: NDArray[np.int64], k: int
) -> NDArray[np.int64]:
    """The test fold of each row, shape (n,)."""
    fold_indices = np.full(len(keys), -1, np.int64)
    sizes = np.bincount(units)
    class_sizes = np.bincount(codes)
    counts = np.zeros((len(class_sizes), k), np.int64)
    rows_by_unit = _split_rows_by_code(units, len(sizes))
    multi_row_units = [unit for unit in np.argsort(-sizes, kind="stable") if sizes[unit] > 1]
    for unit in multi_row_units:
        rows = rows_by_unit[unit]
        present, class_counts = np.unique(codes[rows], return_counts=True)
        load = (counts[present] * (class_counts / class_sizes[present] ** 2)[:, None]).sum(axis=0)
        best_fold = int(np.lexsort((counts.sum(axis=0), load))[0])
        fold_indices[rows] = best_fold
        counts[present, best_fold] += class_counts
    single_rows = np.flatnonzero(sizes[units] == 1)
    single_rows = single_rows[np.lexsort((keys[single_rows], codes[single_rows]))]
    totals = counts.sum(axis=0).tolist()
    for rows in np.split(single_rows, np.flatnonzero(np.diff(codes[single_rows])) + 1):
        if len(rows):
            fold_indices[rows] = _assign_single_rows(counts[codes[rows[0]]].tolist(), totals, len(rows))
    return fold_indices


def _assign_single_rows(counts: list[int], totals: list[int], n: int) -> list[int]:
    """Assign n single rows of a class, each to the fold with the fewest rows of the class; ``totals`` is updated."""
    heap = [(count, total, fold) for fold, (count, total) in enumerate(zip(counts, totals, strict=True))]
    heapq.heapify(heap)
    assigned_folds = []
    for _ in range(n):
        count, total, fold = heap[0]
        heapq.heapreplace(heap, (count + 1, total + 1, fold))
        assigned_folds.append(fold)
        totals[fold] += 1
    return assigned_folds
