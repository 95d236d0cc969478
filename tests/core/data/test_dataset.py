"""Data sets in memory: what is kept, and what every fault is answered with."""

import numpy as np
import pytest
from scipy import sparse

from ngame.data.dataset import Dataset

Y = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32)


@pytest.mark.parametrize(
    "labels",
    [
        Y,
        Y.astype(bool),
        Y.tolist(),
        sparse.coo_array(Y),
        sparse.csc_matrix(Y.astype(np.int64)),
        sparse.lil_matrix(Y.astype(bool)),
        sparse.csr_array((np.ones(3), [2, 0, 1], [0, 2, 2, 3]), shape=(3, 3)),
        sparse.csr_matrix((np.array([1, 0, 1, 1]), [0, 1, 2, 1], [0, 3, 3, 4]), shape=(3, 3)),
    ],
    ids=["dense", "bool", "lists", "coo", "csc", "lil", "unsorted", "explicit zero"],
)
def test_labels_of_any_kind_become_the_same_matrix(labels):
    matrix = Dataset(["a", "b", "c"], labels, ["x", "y", "z"]).train_labels
    assert matrix.format == "csr"
    assert matrix.dtype == np.float32
    assert matrix.has_canonical_format
    assert (matrix.data == 1).all()
    np.testing.assert_array_equal(matrix.toarray(), Y)


def test_labels_given_are_not_modified():
    unsorted = sparse.csr_matrix(
        (np.ones(3, np.float32), np.array([2, 0, 1]), np.array([0, 2, 2, 3])), shape=(3, 3)
    )
    Dataset(["a", "b", "c"], unsorted, ["x", "y", "z"])
    assert unsorted.indices.tolist() == [2, 0, 1]


def test_canonical_labels_are_shared():
    labels = sparse.csr_matrix(Y)
    matrix = Dataset(["a", "b", "c"], labels, ["x", "y", "z"]).train_labels
    assert np.shares_memory(matrix.indices, labels.indices)
    assert np.shares_memory(matrix.data, labels.data)


def test_points_and_labels_that_stand_alone_are_kept():
    data = Dataset(["a", "b"], [[0, 0], [0, 1]], ["x", "y"], test_texts=["c"], test_labels=[[0, 0]])
    assert data.train_labels.shape == (2, 2)
    assert data.test_labels.shape == (1, 2)
    assert data.drop_train is None


@pytest.mark.parametrize(
    ("labels", "names", "error", "message"),
    [
        ([[0], [0]], ["x"], ValueError, "train_labels has no 1"),
        ([[0], [2]], ["x", "y", "z"], ValueError, "has 1 columns, label_texts has 3 entries"),
        ([[0], [0, 1]], ["x", "y"], ValueError, "train_labels has rows of different lengths"),
        ([[0, 2], [1, 2]], ["x", "y"], ValueError, "adds up to 2 in row 0, column 1"),
        ([["x"], ["y"]], ["x", "y"], TypeError, "train_labels has dtype <U1"),
        ([["x"], []], ["x", "y"], ValueError, "train_labels has rows of different lengths"),
        (["x", "y"], ["x", "y"], TypeError, "train_labels has dtype <U1"),
    ],
)
def test_lists_of_labels_are_no_matrix(labels, names, error, message):
    wanted = (
        rf"expected a matrix of 0 and 1, 2 points by {len(names)} labels \(lists of labels or of "
        r"their ids are none\)"
    )
    with pytest.raises(error, match=f"{message}.*; {wanted}"):
        Dataset(["a", "b"], labels, names)
    # What is no list is not told of lists.
    with pytest.raises(ValueError, match=r"2 points by 3 labels$"):
        Dataset(["a", "b"], np.eye(2), ["x", "y", "z"])


def test_pairs_become_int64():
    data = Dataset(["a"], [[1]], ["x"], drop_train=[(0, 0)])
    assert data.drop_train.dtype == np.int64
    assert data.drop_train.tolist() == [[0, 0]]
    assert Dataset(["a"], [[1]], ["x"], drop_train=[]).drop_train.shape == (0, 2)


def test_titles_that_say_nothing_new_are_not_kept():
    for titles in (["x", "y z"], ["", ""], ["x", ""]):
        assert Dataset(["a"], [[1, 0]], ["x", "y z"], label_titles=titles).label_titles is None
    assert Dataset(["a"], [[1, 0]], ["x", "y z"], label_titles=["", "y"]).label_titles == ["", "y"]


def test_repr_is_short():
    data = Dataset(["a"] * 1000, np.ones((1000, 1)), ["x"], name="many")
    assert repr(data) == "<Dataset many: 1000 training points, 0 test points, 1 labels>"


OUT_OF_RANGE = sparse.csr_matrix((1, 2), dtype=np.float32)
OUT_OF_RANGE.indices, OUT_OF_RANGE.data = np.array([2], np.int32), np.ones(1, np.float32)
OUT_OF_RANGE.indptr = np.array([0, 1], np.int32)
TWICE = ([True, True], ([0, 0], [1, 1]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train_texts": "a"}, TypeError, "train_texts is a str, expected a sequence"),
        ({"train_texts": [b"a"]}, TypeError, r"train_texts\[0\] is a bytes, expected a str"),
        ({"train_texts": []}, ValueError, "train_texts has no entries"),
        ({"label_texts": ["x", "\ud800"]}, ValueError, r"label_texts\[1\] holds a lone surrogate"),
        ({"label_titles": ["x"]}, ValueError, "label_titles has 1 entries, label_texts has 2"),
        (
            {"label_titles": ["x", "z"]},
            ValueError,
            "label_titles has 'z' for label 1, whose text begins otherwise: 'y'",
        ),
        ({"label_texts": ["x"]}, ValueError, "has 2 columns, label_texts has 1 entries"),
        ({"train_labels": [[1, 0]] * 2}, ValueError, "has 2 rows, train_texts has 1 entries"),
        ({"train_labels": [1, 0]}, ValueError, "has 1 dimensions; expected a matrix of 0 and 1"),
        (
            {"train_labels": [["1", "0"]]},
            TypeError,
            "train_labels has dtype <U1; expected a matrix",
        ),
        ({"train_labels": [[0.5, 1]]}, ValueError, "adds up to 0.5 in row 0, column 0"),
        ({"train_labels": [[np.nan, 1]]}, ValueError, "adds up to nan in row 0, column 0"),
        (
            {"train_labels": sparse.coo_matrix(TWICE, shape=(1, 2))},
            ValueError,
            "adds up to 2 in row 0, column 1, each pair must come once; expected a matrix",
        ),
        ({"train_labels": OUT_OF_RANGE}, IndexError, "label id 2 in row 0; there are 2 labels"),
        ({"test_texts": ["t"]}, ValueError, "test_texts and test_labels must be given together"),
        ({"drop_test": [(0, 0)]}, ValueError, "drop_test was given without test_texts"),
        ({"val_labels": [[1]]}, ValueError, "val_texts and val_labels must be given together"),
        ({"drop_val": [(0, 0)]}, ValueError, "drop_val was given without val_texts"),
        (
            {"drop_train": [(0.0, 1.0)]},
            TypeError,
            "drop_train has dtype float64; expected integers",
        ),
        ({"drop_train": [0, 1]}, ValueError, r"drop_train has shape \(2,\); expected \[n, 2\]"),
        ({"drop_train": [(0, 1), (1, 0)]}, IndexError, r"drop_train\[1\] is row 1, label 0"),
        ({"drop_train": [(0, -1)]}, IndexError, "label -1; there are 1 rows and 2 labels"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"train_texts": ["a"], "train_labels": [[1, 0]], "label_texts": ["x", "y"]}
    with pytest.raises(error, match=message):
        Dataset(**(arguments | change))
