"""Labels of samples, and columns of strings."""

from __future__ import annotations

import numpy as np
import pytest

from featpipe.data import Labels, order_classes
from featpipe.errors import ConfigError
from featpipe.storage import StringColumn


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["b", "a", "C"], ("C", "a", "b")),
        (["10", "9", "1"], ("1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["010", "9"], ("010", "9")),
        (["-1", "2"], ("-1", "2")),
        (["é", "z", "ab"], ("ab", "z", "é")),
        (["²", "1"], ("1", "²")),
        ([], ()),
    ],
)
def test_classes_are_ordered_by_code_point_or_by_value_if_all_are_integers(names, expected):
    assert order_classes(names) == expected


def test_class_names_are_encoded_and_decoded():
    labels = Labels.from_class_names(["dog", None, "ape", "dog"])
    assert labels.values.tolist() == [1, -1, 0, 1]
    assert labels.known.tolist() == [True, False, True, True]
    assert labels.y.tolist() == ["dog", None, "ape", "dog"]
    assert labels.take([3, 2]).y.tolist() == ["dog", "ape"]


def test_unlabelled_samples_have_no_known_labels():
    labels = Labels.from_class_names([None, None])
    assert labels.y.tolist() == [None, None]
    assert not labels.known.any()


def test_the_error_for_a_label_outside_the_given_classes_names_it():
    with pytest.raises(ConfigError, match="'cat' is not one of the 2 classes"):
        Labels.from_class_names(["cat"], ["ape", "dog"])


def test_label_sets_become_a_binary_matrix():
    labels = Labels.from_label_sets([{"b", "a"}, None, set(), {"b"}])
    assert labels.classes == ("a", "b")
    assert labels.values.tolist() == [[1, 1], [-1, -1], [0, 0], [0, 1]]
    assert labels.known.tolist() == [True, False, True, True]


def test_regression_targets_keep_their_values_and_nan_is_unlabelled():
    labels = Labels.from_targets([1.5, float("nan"), -2], ["age"])
    assert labels.y[0] == 1.5
    assert labels.y.shape == (3,)
    assert labels.known.tolist() == [True, False, True]
    assert Labels.from_targets([[1, 2], [3, 4]], ["a", "b"]).y.shape == (2, 2)


def test_same_as_compares_task_classes_and_values():
    labels = Labels.from_targets([1.0, float("nan")], ["age"])
    assert labels.same_as(Labels.from_targets([1.0, float("nan")], ["age"]))
    assert not labels.same_as(Labels.from_targets([1.0, float("nan")], ["size"]))
    assert not Labels.unlabeled(2).same_as(Labels.from_class_names([None, None]))


TEXTS = ["", "a", "naïve", "日本", "a\nb", "x" * 10_000, "\udcff.jpg"]


def test_a_string_column_returns_its_strings():
    column = StringColumn.from_strings(TEXTS)
    expected = [*TEXTS[:-1], "\\udcff.jpg"]
    assert list(column) == expected
    assert [column[i] for i in range(len(column))] == expected
    assert column[-2] == expected[-2]
    assert column[1:3] == expected[1:3]
    assert column == expected
    assert column.take(np.array([3, 1])) == ["日本", "a"]
    with pytest.raises(IndexError):
        column[len(TEXTS)]


def test_a_long_string_column_is_iterated_completely():
    texts = [str(i) for i in range(150_000)]
    assert list(StringColumn.from_strings(texts)) == texts


def test_an_empty_string_column_is_empty():
    assert list(StringColumn.from_strings([])) == []
    assert StringColumn.from_strings([]) == StringColumn.from_strings([])
