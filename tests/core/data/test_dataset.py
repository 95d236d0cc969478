"""Data sets in memory: what is kept, and what every fault is answered with."""

import numpy as np
import pytest
from scipy import sparse

from ngame.data.dataset import Dataset, Points

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


def columns(rows):
    """Rows in the forms that tables and libraries have them in."""
    array = np.empty(len(rows), object)
    array[:] = rows
    yield rows
    yield tuple(map(tuple, rows))
    yield [{*row} for row in rows]
    yield [np.array(row, None if row else np.int64) for row in rows]
    yield iter(rows)
    yield array


@pytest.mark.parametrize("rows", [[[0, 2, 0], [], [1]], [["x", "z", "x"], [], ["y"]]])
def test_rows_of_labels(rows):
    for given in columns(rows):
        data = Dataset(["a", "b", "c"], given, ["x", "y", "z"], test_texts=["d"], test_labels=[[]])
        matrix = data.train_labels
        assert matrix.has_canonical_format
        assert matrix.dtype == np.float32
        np.testing.assert_array_equal(matrix.toarray(), Y)
        assert data.test_labels.shape == (1, 3)


def test_rows_of_a_table():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": ["a", "b", "c"], "tags": [["x", "z"], [], ["y"]]})
    for labels in (table.tags, pandas.DataFrame(Y), pandas.DataFrame(Y.astype(object))):
        data = Dataset(table.text, labels, ["x", "y", "z"])
        np.testing.assert_array_equal(data.train_labels.toarray(), Y)


def test_rows_of_equal_length():
    """Neither their length nor their numbers alone make them a matrix."""
    names = ["x", "y", "z"]
    for rows in ([[0, 1, 2], [2, 1, 0]], [[0], [1]], [["x"], ["y"]], [[0, 1], [1, 0]], [[], []]):
        matrix = Dataset(["a", "b"], rows, names).train_labels
        ids = [[names.index(label) if label in names else label for label in row] for row in rows]
        assert [row.indices.tolist() for row in matrix] == [sorted(row) for row in ids]
    np.testing.assert_array_equal(
        Dataset(["a", "b"], np.array([["x", "y"], ["x", "z"]]), names).train_labels.toarray(),
        [[1, 1, 0], [1, 0, 1]],
    )


@pytest.mark.parametrize(
    ("labels", "names", "error", "message"),
    [
        ([[0], [0]], ["x"], ValueError, "train_labels has no 1; expected a matrix"),
        ([[1, 0], [1, 1]], ["x", "y", "z"], ValueError, "has 2 columns, label_texts has 3 entries"),
        ([[2, 0, 0], [0, 1, 0]], ["x", "y", "z"], ValueError, "adds up to 2 in row 0, column 0"),
        ([[0], [3]], ["x", "y", "z"], IndexError, "label id 3 in row 1; there are 3 labels"),
        ([[0], [-1, 1]], ["x", "y"], IndexError, "label id -1 in row 1; there are 2 labels"),
        ([["x"], ["w"]], ["x", "y"], ValueError, r"\[1\] has 'w', which is not in label_texts"),
        ([["y"], ["x"]], ["x", "y", "x"], ValueError, r"\[1\] has 'x', which is several times in"),
        (["x", "y"], ["x", "y"], TypeError, r"\[0\] is a str, expected a list of label ids or"),
        ([["x"], np.nan], ["x", "y"], TypeError, r"\[1\] is a float, expected a list"),
        ([["x"], {"x": 0}], ["x", "y"], TypeError, r"\[1\] is a dict, expected a list"),
        ([[0], [True, False]], ["x", "y"], TypeError, r"\[1\] has True, which is no label id"),
        ([[["x"]], [["y"]]], ["x", "y"], TypeError, r"\[0\] has \['x'\], which is no label id"),
        ([[0], [0], [0, 1]], ["x", "y"], ValueError, "has 3 rows, train_texts has 2 entries"),
        (None, ["x", "y"], TypeError, "has dtype object; .* or a row of label ids or names for"),
    ],
)
def test_bad_rows_of_labels(labels, names, error, message):
    with pytest.raises(error, match=f"train_labels.*{message.removeprefix('train_labels')}"):
        Dataset(["a", "b"], labels, names)


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


def test_repr_tells_of_pairs_left_out():
    data = Dataset(
        ["a"], [[1]], ["x"], test_texts=["b", "c"], test_labels=[[0], []],
        val_texts=["d"], val_labels=[[0]],
        drop_train=[], drop_test=[(0, 0), (1, 0)], drop_val=[(0, 0)],
    )  # fmt: skip
    assert repr(data).endswith("1 labels, pairs left out: 1 validation, 2 test>")


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
        ({"train_labels": np.ones((1, 3))}, ValueError, "has 3 columns, label_texts has 2 entries"),
        ({"train_labels": [[1, 0]] * 2}, ValueError, "has 2 rows, train_texts has 1 entries"),
        (
            {"train_labels": np.ones(2)},
            ValueError,
            "has 1 dimensions; expected a matrix of 0 and 1",
        ),
        ({"train_labels": [1, 0]}, TypeError, r"train_labels\[0\] is a int, expected a list"),
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


def test_a_model_that_lacks_labels_of_the_data_gets_the_pairs_of_its_own():
    """In its predictions the others would be out of range."""
    pairs = np.array([[0, 1], [0, 4], [1, 3], [1, 2]])
    points = Points(["a", "b"], sparse.csr_matrix((2, 5)), pairs)
    assert points.predictable(3).tolist() == [[0, 1], [1, 2]]
    assert points._replace(drop=None).predictable(3) is None
