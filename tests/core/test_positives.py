import numpy as np
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import ngame


def random_labels(rng, rows, labels, index=np.int32):
    dense = rng.random((rows, labels)) < 0.3
    matrix = sp.csr_matrix(dense.astype(np.float32))
    matrix.indices, matrix.indptr = matrix.indices.astype(index), matrix.indptr.astype(index)
    return matrix


def check_mask(found, expected):
    assert isinstance(found, sp.csr_matrix)
    assert found.dtype == np.bool_
    assert found.shape == expected.shape
    assert found.data.all()
    fresh = sp.csr_matrix((found.data, found.indices, found.indptr), shape=found.shape)
    assert fresh.has_canonical_format
    assert (found.toarray() == expected).all()


@given(seed=st.integers(0, 2**32), index=st.sampled_from([np.int32, np.int64]), data=st.data())
def test_match_reference(seed, index, data):
    rng = np.random.default_rng(seed)
    rows, labels = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 50))
    y = random_labels(rng, rows, labels, index)
    batch = rng.integers(rows, size=data.draw(st.integers(0, 40)))
    columns = rng.integers(labels, size=data.draw(st.integers(0, 80)))
    check_mask(
        ngame.in_batch_positives(y, batch, columns),
        reference.in_batch_positives(y, batch, columns),
    )
    pool, positives = ngame.label_pool(y, batch)
    expected_pool, expected = reference.label_pool(y, batch)
    assert pool.dtype == np.int32
    assert pool.tolist() == expected_pool.tolist()
    check_mask(positives, expected)


def test_large_label_ids():
    labels = np.array([3, 2**31 - 2, 5, 2**31 - 3], np.int64)
    y = sp.csr_matrix((np.ones(4), labels, [0, 2, 4]), shape=(2, 2**31 - 1))
    y.sort_indices()
    pool, positives = ngame.label_pool(y, [1, 0])
    assert pool.tolist() == sorted(labels)
    assert positives.toarray().tolist() == [[False, True, True, False], [True, False, False, True]]
    found = ngame.in_batch_positives(y, [0, 1], [2**31 - 2, 0, 2**31 - 3])
    assert found.toarray().tolist() == [[True, False, False], [False, False, True]]


def test_rows_of_all_lengths(rng):
    # Short rows are copied in one step; longer rows and the last one, entry by entry.
    lengths = [0, 1, 7, 8, 9, 40, 0, 3]
    dense = np.zeros((8, 50), bool)
    for row, length in enumerate(lengths):
        dense[row, rng.choice(50, length, replace=False)] = True
    for index in (np.int32, np.int64):
        y = sp.csr_matrix(dense.astype(np.float32))
        y.indices, y.indptr = y.indices.astype(index), y.indptr.astype(index)
        batch = rng.integers(8, size=60)
        for columns in (np.arange(50), rng.permutation(50), rng.integers(50, size=90)):
            expected = reference.in_batch_positives(y, batch, columns)
            check_mask(ngame.in_batch_positives(y, batch, columns), expected)
        pool, positives = ngame.label_pool(y, batch)
        expected_pool, expected = reference.label_pool(y, batch)
        assert pool.tolist() == expected_pool.tolist()
        check_mask(positives, expected)


def test_ids_beyond_32_bits_are_out_of_range():
    y = sp.csr_matrix((np.ones(1), np.array([3], np.int64), np.array([0, 1], np.int64)), (1, 9))
    y.indices, y.indptr = np.array([2**32 + 3], np.int64), np.array([0, 1], np.int64)
    y.has_canonical_format = True
    for call in (lambda: ngame.label_pool(y, [0]), lambda: ngame.in_batch_positives(y, [0], [3])):
        with pytest.raises(IndexError, match="column 4294967299 in row 0 is out of range for 9"):
            call()


def test_values_are_ignored_and_indices_sorted():
    y = sp.csr_matrix((np.array([0.0, 2, 1]), [2, 0, 0], [0, 2, 3]), shape=(2, 3))
    columns = y.indices.copy()
    expected = [[True, True], [False, True]]
    for matrix in (y, sp.csr_array(y)):
        assert ngame.in_batch_positives(matrix, [0, 1], [2, 0]).toarray().tolist() == expected
        assert (matrix.indices == columns).all()
    pool, positives = ngame.label_pool(y, [0, 1])
    assert pool.tolist() == [0, 2]
    assert positives.toarray().tolist() == [[True, True], [True, False]]


def test_duplicates_count_once():
    y = sp.csr_matrix((np.ones(3), [1, 1, 2], [0, 3]), shape=(1, 3))
    assert ngame.in_batch_positives(y, [0], [1, 2]).nnz == 2
    assert ngame.label_pool(y, [0])[1].nnz == 2
    assert y.nnz == 3


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint64])
def test_any_integers(rng, dtype):
    y = random_labels(rng, 9, 9)
    ids = np.array([8, 0, 3], dtype)
    check_mask(ngame.in_batch_positives(y, ids, ids), reference.in_batch_positives(y, ids, ids))


def test_rejects_bad_input(rng):
    y = random_labels(rng, 5, 7)
    with pytest.raises(IndexError, match=r"rows\[1\] is 5, out of range for 5"):
        ngame.in_batch_positives(y, [0, 5], [0])
    with pytest.raises(IndexError, match=r"columns\[0\] is -1, out of range for 7"):
        ngame.in_batch_positives(y, [0], [-1])
    with pytest.raises(IndexError, match=r"rows\[0\] is -1, out of range for 5"):
        ngame.label_pool(y, [-1])
    with pytest.raises(TypeError, match="columns has dtype float64, expected integers"):
        ngame.in_batch_positives(y, [0], [0.5])
    with pytest.raises(TypeError, match="rows has dtype bool, expected integers"):
        ngame.label_pool(y, [True])
    with pytest.raises(ValueError, match=r"rows has shape \(1, 1\), expected one dimension"):
        ngame.label_pool(y, [[0]])
