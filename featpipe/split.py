"""Train, validation and test rows, and folds, decided by what the images are and not by where they stand.

Every function takes the digests of the images' own bytes, so that the same image falls on the same side whatever
its name, its folder, its row and its neighbours, and byte-identical copies are never on both sides.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featpipe.errors import ConfigError

__all__ = ["folds", "holdout", "key"]

Rows = NDArray[np.int64]


def key(digests: NDArray[np.uint8], seed: int = 0) -> NDArray[np.float64]:
    """A number in [0, 1) for each image, uniform, that depends on its digest and the seed alone.

    Parameters
    ----------
    digests : ndarray of shape (n, 32), uint8
        SHA-256 of each image's bytes.
    seed : int
        From 0 to 2**64 - 1. Another seed gives an independent number.

    Returns
    -------
    ndarray of shape (n,), float64
        Equal for equal digests.

    Notes
    -----
    The digest is read as four little-endian words w of 64 bits; from h = mix(seed), h = mix(h ^ w) for each, with
    the output function of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    OOPSLA 2014) as mix; the upper 53 bits are the number. This is part of what a seed means: it never changes.

    Examples
    --------
    >>> key(np.zeros((1, 32), np.uint8), seed=1) == key(np.zeros((2, 32), np.uint8), seed=1)
    array([ True,  True])
    """
    digests = _digests(digests)
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise ConfigError(f"seed is {seed!r}; give a whole number from 0 to 2**64 - 1")
    mixed = _mix(np.full(len(digests), seed, np.uint64))
    for word in digests.view("<u8").astype(np.uint64).T:
        mixed = _mix(mixed ^ word)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def holdout(
    digests: NDArray[np.uint8],
    y: ArrayLike | None = None,
    *,
    test: float = 0.2,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> tuple[Rows, Rows]:
    """Divide rows into training and test.

    Parameters
    ----------
    digests : ndarray of shape (n, 32), uint8
        SHA-256 of each image's bytes.
    y : array-like of shape (n,), optional
        Classes. With them every class is found on both sides.
    test : float
        The share of the test rows, between 0 and 1; kept in expectation, in the whole and in every class.
    seed : int
        For a validation set inside the training rows call again on those rows with another seed: under the same
        one their keys are all above the threshold.
    names : sequence of str, optional
        What messages call the classes, where y holds their positions 0, 1, …

    Returns
    -------
    train, test : ndarray of int64
        Row numbers, ascending; together every row once.

    Raises
    ------
    ConfigError
        If a class has a single distinct image, or one side would be empty.

    Notes
    -----
    A row is a test row when its `key` is below `test`. So its side depends on its own bytes and the seed, not on
    the other rows: images that are added, removed or renamed move no other, and a larger `test` only adds test rows.
    The price is that the shares are those of independent draws (at n = 1000 and 0.2, within 0.2 ± 0.025 nineteen
    times of twenty), not exact.

    There is one exception, for small classes. A class that has no row below the threshold lends the test side its
    image with the smallest key, and one that has no row above lends the training side the one with the largest.
    Only that lent image can go back, when the class later gets an image that lies on the missing side or nearer
    to it.
    """
    if not 0 < test < 1:
        raise ConfigError(f"test is {test!r}; give a share between 0 and 1, such as 0.2")
    keys = key(digests, seed)
    is_test = keys < test
    if y is not None:
        codes, distinct = _codes(y, len(keys))
        is_test = _both_sides(keys, codes, _called(distinct, names), is_test)
    train_rows, test_rows = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    if not len(train_rows) or not len(test_rows):
        raise ConfigError(
            f"a test share of {test} of {len(keys)} rows ({len(np.unique(keys))} distinct images) leaves "
            f"{len(train_rows)} for training and {len(test_rows)} for the test; add images or change the share"
        )
    return train_rows.astype(np.int64), test_rows.astype(np.int64)


def folds(
    digests: NDArray[np.uint8],
    y: ArrayLike | None = None,
    *,
    k: int = 5,
    seed: int = 0,
    groups: ArrayLike | None = None,
    names: Sequence[str] | None = None,
) -> list[tuple[Rows, Rows]]:
    """Divide rows into k folds, each once the test of the others.

    Parameters
    ----------
    digests : ndarray of shape (n, 32), uint8
        SHA-256 of each image's bytes.
    y : array-like of shape (n,), optional
        Classes, spread evenly over the folds: without duplicates and groups the numbers of rows of a class in any
        two folds differ by one at most.
    k : int
        Number of folds, at least 2.
    seed : int
    groups : array-like of shape (n,), optional
        Rows of one group (a patient, a scene) stay together.
    names : sequence of str, optional
        What messages call the classes, where y holds their positions 0, 1, …

    Returns
    -------
    list of k tuples (train, test) of ndarray of int64
        Row numbers, ascending. Every row is in exactly one test fold.

    Raises
    ------
    ConfigError
        If a class has fewer images (distinct ones, or groups) than there are folds.

    Notes
    -----
    What is dealt out is a unit: rows connected by equal digests or equal groups. Units of several rows come first,
    larger ones before smaller ones and then in the order of their smallest `key`, then single rows in the order of
    their key; each goes to the fold that has the smallest share of its classes, then the fewest rows. The folds
    depend on the set of images and the seed, not on the order of the rows.
    """
    if not isinstance(k, Integral) or isinstance(k, bool) or k < 2:
        raise ConfigError(f"k is {k!r}; give a whole number of folds, 2 or more")
    keys = key(digests, seed)
    codes, distinct = _codes(np.zeros(len(keys), np.int64) if y is None else y, len(keys))
    units = _units(keys, None if groups is None else _codes(groups, len(keys), "groups")[0])
    _check_enough(units, codes, None if y is None else _called(distinct, names), k, grouped=groups is not None)
    fold = _deal(keys, codes, units, int(k))
    return [(np.flatnonzero(fold != i).astype(np.int64), np.flatnonzero(fold == i).astype(np.int64)) for i in range(k)]


def _digests(digests: NDArray[np.uint8]) -> NDArray[np.uint8]:
    digests = np.asarray(digests)
    if digests.dtype != np.uint8 or digests.ndim != 2 or digests.shape[1] != 32:
        raise ConfigError(
            f"digests are {digests.dtype} of shape {digests.shape}; give uint8 of shape (n, 32), a SHA-256 for each row"
        )
    return np.ascontiguousarray(digests)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _codes(values: ArrayLike, n: int, name: str = "y") -> tuple[NDArray[np.int64], NDArray[np.generic]]:
    """Numbers 0, 1, … for the distinct values, and the values."""
    array = np.asarray(values)
    if array.shape != (n,):
        raise ConfigError(
            f"{name} has shape {array.shape}, the digests have {n} rows; give one value a row, or leave {name} out "
            "(several labels or targets a row are not stratified)"
        )
    try:
        distinct, codes = np.unique(array, return_inverse=True)
    except TypeError:
        raise ConfigError(f"{name} mixes types or has rows without a value; give the rows that have one") from None
    return codes.astype(np.int64), distinct


def _called(distinct: NDArray[np.generic], names: Sequence[str] | None) -> list[str]:
    """What messages call the distinct values of y."""
    values = distinct.tolist()
    return [str(value) if names is None else names[int(value)] for value in values]


def _both_sides(
    keys: NDArray[np.float64], codes: NDArray[np.int64], names: list[str], is_test: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Lend each class that lacks a side one image, whole: every row with that key goes along."""
    is_test = is_test.copy()
    for code, rows in enumerate(_rows_by_code(codes, len(names))):
        if keys[rows].min() == keys[rows].max():
            raise ConfigError(
                f"class {names[code]!r} has one distinct image ({len(rows)} rows); a test set needs two: "
                "add images or leave the class out"
            )
        if not is_test[rows].any():
            is_test[keys == keys[rows].min()] = True
        elif is_test[rows].all():
            is_test[keys == keys[rows].max()] = False
    tests = np.bincount(codes, weights=is_test, minlength=len(names))
    sizes = np.bincount(codes, minlength=len(names))
    one_sided = np.flatnonzero((tests == 0) | (tests == sizes))
    if len(one_sided):
        raise ConfigError(
            f"class {names[one_sided[0]]!r} shares its few images with other classes, so that it cannot be on "
            "both sides; correct the labels of identical images or add images"
        )
    return is_test


def _rows_by_code(codes: NDArray[np.int64], n_codes: int) -> list[NDArray[np.intp]]:
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.cumsum(np.bincount(codes, minlength=n_codes))[:-1])


def _units(keys: NDArray[np.float64], groups: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Number the sets of rows that must stay together, shape (n,): in the order of their smallest key."""
    _, images = np.unique(keys, return_inverse=True)
    label = images.astype(np.int64)
    while groups is not None:
        # The smallest label flows through groups and images in turn until nothing changes: connected components.
        spread = _minimum_within(images, _minimum_within(groups, label))
        if np.array_equal(spread, label):
            break
        label = spread
    return np.unique(label, return_inverse=True)[1].astype(np.int64)


def _minimum_within(codes: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    smallest = np.full(int(codes.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, codes, values)
    return smallest[codes]


def _check_enough(
    units: NDArray[np.int64], codes: NDArray[np.int64], names: list[str] | None, k: int, *, grouped: bool
) -> None:
    """Refuse fewer units than folds, in any class; without names all rows are one class."""
    pairs = np.unique(np.stack([codes, units]), axis=1)
    available = np.bincount(pairs[0], minlength=1)
    scarcest = int(available.argmin())
    found = int(available[scarcest])
    if found >= k:
        return
    whose = "the data" if names is None or not names else f"class {names[scarcest]!r}"
    plural = "" if found == 1 else "s"
    what = f"{found} group{plural} of images" if grouped else f"{found} distinct image{plural}"
    advice = f"use k={found}, or add images" if found > 1 else "no number of folds works: add images"
    if names and found == 1:
        advice += " or leave the class out"
    raise ConfigError(f"{whose} has {what}, fewer than k={k} folds; {advice}")


def _deal(keys: NDArray[np.float64], codes: NDArray[np.int64], units: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """The test fold of each row, shape (n,)."""
    fold = np.full(len(keys), -1, np.int64)
    sizes = np.bincount(units)
    class_sizes = np.bincount(codes)
    counts = np.zeros((len(class_sizes), k), np.int64)
    members = _rows_by_code(units, len(sizes))
    large = [unit for unit in np.argsort(-sizes, kind="stable") if sizes[unit] > 1]
    for unit in large:
        rows = members[unit]
        present, weights = np.unique(codes[rows], return_counts=True)
        share = (counts[present] / class_sizes[present, None]).sum(axis=0)
        chosen = int(np.lexsort((counts.sum(axis=0), share))[0])
        fold[rows] = chosen
        counts[present, chosen] += weights
    single = np.flatnonzero(sizes[units] == 1)
    single = single[np.lexsort((keys[single], codes[single]))]
    totals = counts.sum(axis=0).tolist()
    for rows in np.split(single, np.flatnonzero(np.diff(codes[single])) + 1):
        if len(rows):
            fold[rows] = _level(counts[codes[rows[0]]].tolist(), totals, len(rows))
    return fold


def _level(counts: list[int], totals: list[int], n: int) -> list[int]:
    """Folds for n single rows of one class, each to the one with the fewest of the class; ``totals`` is updated."""
    heap = [(count, total, fold) for fold, (count, total) in enumerate(zip(counts, totals, strict=True))]
    heapq.heapify(heap)
    dealt = []
    for _ in range(n):
        count, total, fold = heap[0]
        heapq.heapreplace(heap, (count + 1, total + 1, fold))
        dealt.append(fold)
        totals[fold] += 1
    return dealt
