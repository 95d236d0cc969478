"""Predictions written and read again, and files of predictions that are something else."""

import json

import numpy as np
import pytest
import scipy.sparse as sp

from ngame.data.predictions import SUFFIXES, read_predictions, write_predictions

TEXTS = ["one pear", "a\ttab and  spaces", "nothing found", "last"]
LABELS = ["red", "green apple", "blue", "grey"]


def found():
    """Rows with ties, with none, and with scores that six digits do not tell apart."""
    return sp.csr_matrix(
        (
            np.array([0.5, 0.5, 2, 1.0000001, 1.0000002, -3, -4], np.float32),
            np.array([0, 1, 3, 1, 2, 0, 2]),
            np.array([0, 3, 5, 5, 7]),
        ),
        shape=(4, 4),
    )


def ranking(matrix):
    """Labels of every row, best first."""
    return [row.indices[np.argsort(-row.data, kind="stable")].tolist() for row in matrix]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_is_read(tmp_path, suffix):
    path = tmp_path / f"found{suffix}"
    write_predictions(path, TEXTS, found(), LABELS)
    read = read_predictions(path, TEXTS, LABELS)
    assert read.shape == (4, 4)
    assert ranking(read) == ranking(found()) == [[3, 0, 1], [2, 1], [], [0, 2]]


def test_arrays_of_ids_and_scores(tmp_path):
    ids, scores = np.array([[2, 0], [-1, 3]]), np.array([[1, 4], [7, 0.5]])
    np.savez(tmp_path / "found.npz", ids=ids, scores=scores)
    read = read_predictions(tmp_path / "found.npz", TEXTS[:2], LABELS)
    np.testing.assert_array_equal(read.toarray(), [[4, 0, 1, 0], [0, 0, 0, 0.5]])
    for arrays, message in (
        ({"ids": ids, "scores": scores[:, :1]}, r"scores \(2, 1\), expected integers"),
        ({"ids": ids + 0.5, "scores": scores}, "ids is float64"),
        ({"ids": ids + 1, "scores": scores}, "label id 4 in row 1 is out of range; there are 4"),
        ({"order": ids}, "its arrays are order"),
    ):
        np.savez(tmp_path / "found.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            read_predictions(tmp_path / "found.npz", TEXTS[:2], LABELS)


def test_lines_of_labels_alone(tmp_path):
    path = tmp_path / "found.jsonl"
    path.write_text('{"labels": ["blue", "red"]}\n{"labels": []}\n')
    assert ranking(read_predictions(path, TEXTS[:2], LABELS)) == [[2, 0], []]
    with pytest.raises(ValueError, match=r'found.jsonl:1: no "ids", and some labels have the same'):
        read_predictions(path, TEXTS[:2], [*LABELS, "red"])


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"ids": [4]}, r":1: label id 4 is out of range; there are 4 labels"),
        ({"ids": [-1]}, r":1: label id -1 is out of range"),
        ({"ids": [1, 1]}, ":1: label 1 comes twice"),
        ({"ids": [1, True]}, "ids is not a list of integers"),
        ({"ids": 1}, "ids is not a list"),
        ({"ids": [1], "scores": [1, 2]}, "scores is not a list as long as ids"),
        ({"ids": [1, 2], "scores": [1, 2]}, "the scores do not fall, expected labels best first"),
        ({"ids": [1], "scores": ["high"]}, "scores is not a list of numbers"),
        ({"ids": [1], "labels": ["red"]}, ":1: label 1 is 'red', in the data 'green apple'"),
        ({"labels": ["mauve"]}, "'mauve' is no label of the data"),
        ({"labels": [1]}, "1 is no label of the data"),
        (
            {"label": ["red"], "text": "one pear"},
            r'neither "ids" nor "labels" is among its fields, label, text',
        ),
        ({"ids": [1], "text": "two pears"}, "the text is 'two pears', that of test point 0 'one"),
        ({"ids": [1], "text": 5}, "text is not a string"),
    ],
)
def test_lines_that_do_not_fit(tmp_path, first, message):
    path = tmp_path / "found.jsonl"
    path.write_text(json.dumps(first) + '\n{"ids": [0]}\n')
    with pytest.raises(ValueError, match=message):
        read_predictions(path, TEXTS[:2], LABELS)


def test_as_many_lines_as_test_points(tmp_path):
    path = tmp_path / "found.jsonl"
    path.write_text('{"ids": [0]}\n' * 3)
    assert read_predictions(path, TEXTS[:3], LABELS).nnz == 3
    with pytest.raises(ValueError, match="has 3 lines, the data have 4 test points"):
        read_predictions(path, TEXTS, LABELS)
    with pytest.raises(ValueError, match="jsonl:3: row 2; there are 2 test points"):
        read_predictions(path, TEXTS[:2], LABELS)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("label\tid\n", "tsv:1: the columns are label, id, expected row, id"),
        ("row,id\n", "the columns are row,id, expected row, id and others, with tabs between"),
        ("row\tid\n0\t1\n4\t1\n", "tsv:3: row 4; there are 4 test points"),
        ("row\tid\n-1\t1\n", "row -1; there are 4 test points"),
        ("row\tid\n0\t1\n0\tone\n", "tsv:3: .*'one'"),
        ("row\tid\n0\t1\t2\n", "tsv:2: 3 columns, the header has 2"),
        ("row\tid\tscore\n0\t1\t0.5\n0\t2\t0.7\n", "tsv:3: the scores do not fall"),
        ("row\tid\tlabel\n0\t1\tred\n", "label 1 is 'red', in the data 'green apple'"),
        ("row\tid\ttext\n0\t1\tother\n", "the text is 'other', that of test point 0 'one pear'"),
        ("", "tsv:1: the file is empty"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, table, message):
    path = tmp_path / "found.tsv"
    path.write_text(table)
    with pytest.raises(ValueError, match=message):
        read_predictions(path, TEXTS, LABELS)


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found\.csv: no such file"):
        read_predictions(tmp_path / "found.csv", TEXTS, LABELS)
    (tmp_path / "found.csv").write_text("row,id\n")
    with pytest.raises(ValueError, match=r"ends in none of \.jsonl, \.tsv, \.npz"):
        read_predictions(tmp_path / "found.csv", TEXTS, LABELS)


def test_sparse_text(tmp_path):
    path = tmp_path / "found.txt"
    path.write_text("4 4\n3:0.5 0:2\n\n1:0 2:-1\n\n")
    for texts, labels in ((TEXTS, LABELS), ([None] * 4, [None] * 4)):
        read = read_predictions(path, texts, labels)
        assert ranking(read) == [[0, 3], [], [1, 2], []]
    for content, message in (
        ("4 4\n0:1\n", "the file ends after 1 rows; the header says 4"),
        ("2 5\n\n\n", "found.txt has 2 rows and 5 labels, the data have 4 test points and 4"),
        ("one text\n", ":1: header 'one text'; expected rows and columns"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_predictions(path, TEXTS, LABELS)


def test_without_texts_only_ids_count(tmp_path):
    path = tmp_path / "found.jsonl"
    path.write_text('{"text": "any", "ids": [2, 0], "labels": ["x", "y"]}\n')
    assert ranking(read_predictions(path, [None], [None] * 3)) == [[2, 0]]
    path.write_text('{"labels": ["x", "y"]}\n')
    with pytest.raises(ValueError, match='no "ids", and the data have no texts of labels'):
        read_predictions(path, [None], [None] * 3)
