"""pyxclib's functions on matrices over ours, sparse and dense, and its SMatrix."""

import tracemalloc

import numpy as np
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from ngame.compat.xclib.utils import dense, sparse
from ngame.compat.xclib.utils.matrix import SMatrix


def example():
    """Row 0 is 5 (column 3), -1 (0), 5 (1); row 1 empty; row 2 has a stored 0 (2)."""
    data, columns = np.float32([5, -1, 5, 0]), [3, 0, 1, 2]
    return sp.csr_matrix((data, columns, [0, 3, 3, 4]), shape=(3, 4))


def same(left, right):
    """Whether two CSR matrices have the same arrays."""
    return all(
        np.array_equal(getattr(left, part), getattr(right, part))
        for part in ("indptr", "indices", "data")
    )


# The best entries


def test_rank():
    X = example()
    ranks = sparse.rank(X)
    assert ranks.data.tolist() == [1, 3, 2, 1]
    assert ranks.indices.tolist() == [3, 0, 1, 2]
    assert same(X, example())
    ranks.indices[0] = 2
    assert same(X, example())


def test_rank_of_small_unsigned_numbers():
    X = sp.csr_matrix(np.uint8([[3, 250, 7]]))
    assert sparse.rank(X).toarray().tolist() == [[3, 1, 2]]


def test_topk():
    ids, values = sparse.topk(example(), 4, pad_ind=9, pad_val=-7, return_values=True)
    assert ids.tolist() == [[1, 3, 0, 9], [9] * 4, [2, 9, 9, 9]]
    assert values.tolist() == [[5, 5, -1, -7], [-7] * 4, [0, -7, -7, -7]]
    assert values.dtype == np.float32
    assert sparse.topk(example(), 1, 9, 0).tolist() == [[1], [9], [2]]
    assert sparse.topk(example(), 0, 9, 0).shape == (3, 0)


def test_topk_of_integers_and_of_the_smallest():
    X = sp.csr_matrix(([3, 2], [1, 0], [0, 2]), shape=(1, 2))
    ids, values = sparse.topk(X, 2, -1, 0, return_values=True, dtype="int64")
    assert (ids.tolist(), values.tolist(), values.dtype) == ([[1, 0]], [[3, 2]], np.int64)
    X = sp.csr_matrix(([-np.inf, 1.0], [0, 1], [0, 2]), shape=(1, 3))
    assert sparse.topk(X, 3, 7, 0).tolist() == [[1, 0, 7]]


@given(st.integers(0, 2**32 - 1))
def test_best_entries_against_the_definitions(seed):
    rng = np.random.default_rng(seed)
    rows, columns, k = rng.integers(1, 9, 3)
    X = sp.random(rows, columns, 0.5, "csr", rng=rng)
    X.data = np.round(X.data - 0.5, 1)
    expected = reference.keep_topk(X, k)
    assert reference.entries(sparse.retain_topk(X, k=k)) == expected
    ids = sparse.topk(X, k, -1, 0)
    ranks = sparse.rank(X)
    for row, best in enumerate(expected):
        ordered = sorted(best, key=lambda c: (-best[c], c))
        assert ids[row].tolist() == ordered + [-1] * (k - len(best))
        places = reference.entries(ranks)[row]
        assert {column for column, place in places.items() if place <= k} == set(best)


def test_retain_topk_copies_unless_told():
    X = example()
    best = sparse.retain_topk(X, k=2)
    assert reference.entries(best) == [{1: 5, 3: 5}, {}, {2: 0}]
    assert best.dtype == np.float32
    assert same(X, example())
    assert sparse.retain_topk(X, copy=False, k=2) is X
    assert same(X, best)
    assert X.has_canonical_format


def test_retain_topk_of_integers():
    X = sp.csr_matrix(np.array([[3, 1, 2]]))
    assert sparse.retain_topk(X, k=2).dtype == X.dtype
    assert sparse.retain_topk(X, k=2).toarray().tolist() == [[3, 0, 2]]


def test_nan_and_other_formats_are_refused():
    X = example()
    X.data[1] = np.nan
    for best in (lambda: sparse.topk(X, 2, 0, 0), lambda: sparse.retain_topk(X)):
        with pytest.raises(ValueError, match="NaN"):
            best()
    with pytest.raises(TypeError, match="X is a csc matrix"):
        sparse.rank(X.tocsc())
    with pytest.raises(ValueError, match="k is -1"):
        sparse.topk(example(), -1, 0, 0)


# What is done to every entry


def test_binarize_and_frequency():
    X = example()
    assert sparse.frequency(X).tolist() == [1, 1, 1, 1]
    assert sparse.frequency(X, axis=1).tolist() == [3, 0, 1]
    assert same(X, example())
    ones = sparse.binarize(X, copy=True)
    assert ones.data.tolist() == [1] * 4
    assert same(X, example())
    assert sparse.binarize(X) is X
    assert X.data.tolist() == [1] * 4
    with pytest.raises(TypeError, match="X is a ndarray"):
        sparse.binarize(X.toarray())


def test_sigmoid():
    X = example()
    expected = 1 / (1 + np.exp([-5, 1, -5, 0]))
    np.testing.assert_allclose(sparse.sigmoid(X, copy=True).data, expected, rtol=1e-6)
    assert same(X, example())
    assert sparse.sigmoid(X) is X
    np.testing.assert_allclose(X.data, expected, rtol=1e-6)
    assert X.dtype == np.float32


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_normalize(norm):
    def size(rows):
        rows = np.abs(rows.astype(float))
        return {"l1": rows.sum(1), "l2": np.sqrt((rows**2).sum(1)), "max": rows.max(1)}[norm]

    expected = example().toarray() / np.maximum(size(example().toarray()), 1e-9)[:, None]
    for given_matrix in (example(), example().toarray()):
        before = given_matrix.copy()
        scaled = sparse.normalize(given_matrix, norm, copy=True)
        shown = scaled.toarray() if sp.issparse(scaled) else scaled
        np.testing.assert_allclose(shown, expected, rtol=1e-6)
        assert shown.dtype == np.float32
        unchanged = given_matrix.toarray() if sp.issparse(before) else given_matrix
        np.testing.assert_array_equal(unchanged, example().toarray())
        assert sparse.normalize(given_matrix, norm) is given_matrix
        shown = given_matrix.toarray() if sp.issparse(before) else given_matrix
        np.testing.assert_allclose(shown, expected, rtol=1e-6)


def test_normalize_integers_and_other_formats():
    whole = np.array([[3, 4], [0, 0]])
    assert sparse.normalize(whole).tolist() == [[0.6, 0.8], [0, 0]]
    assert sparse.normalize(sp.csc_matrix(whole)).toarray().tolist() == [[0.6, 0.8], [0, 0]]
    assert whole.tolist() == [[3, 4], [0, 0]]
    with pytest.raises(ValueError, match="norm is 'l3'"):
        sparse.normalize(whole, "l3")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("binarized", [False, True])
def test_centroids(rng, reduction, binarized):
    X = rng.standard_normal((6, 3)).astype(np.float32)
    Y = sp.random(6, 4, 0.5, "csr", rng=rng)
    Y = sp.csr_matrix(Y.multiply(np.array([1, 1, 0, 1])))
    Y.eliminate_zeros()  # a label without rows
    weights = (Y.toarray() != 0) * 1.0 if binarized else Y.toarray()
    expected = weights.T @ X
    if reduction == "mean":
        expected /= np.maximum((Y.toarray() != 0).sum(0), 1)[:, None]
    before = Y.copy()
    found = sparse.compute_centroid(sp.csr_matrix(X), Y, reduction, binarized)
    assert found.format == "csr"
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-5, atol=1e-6)
    for function in (sparse.compute_centroid, dense.compute_centroid):
        found = function(X, Y, reduction, binarized)
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert same(Y, before)


def test_bad_centroids():
    with pytest.raises(ValueError, match="reduction is 'max'"):
        dense.compute_centroid(np.ones((3, 2)), example(), "max")
    with pytest.raises(ValueError, match="X has 2 rows, Y has 3"):
        sparse.compute_centroid(np.ones((2, 2)), example())


# How they are made


def test_csr_from_arrays():
    ids, values = np.array([[2, 0], [1, 1]], np.int32), np.array([[5.0, 6], [1, 2]])
    X = sparse.csr_from_arrays(ids, values)
    assert X.toarray().tolist() == [[6, 0, 5], [0, 3, 0]]
    assert X.has_canonical_format
    assert X.dtype == np.float32
    assert ids.tolist() == [[2, 0], [1, 1]]
    wide = sparse.csr_from_arrays(ids.astype(np.uint64), values, (2, 9), dtype="float64")
    assert (wide.shape, wide.dtype) == ((2, 9), np.float64)
    own = values.copy()
    sparse.csr_from_arrays(ids, own, dtype="float64")
    assert (own == values).all()
    assert sparse.csr_from_arrays(np.empty((3, 0), int), np.empty((3, 0))).shape == (3, 0)


@pytest.mark.parametrize(
    ("ids", "values", "shape", "error", "message"),
    [
        ([[0, 1]], [[1.0]], None, ValueError, r"shapes \(1, 2\) and \(1, 1\)"),
        ([0, 1], [1.0, 2], None, ValueError, "two dimensions"),
        ([[0.0]], [[1.0]], None, TypeError, "indices has dtype float64"),
        ([[0]], [[1.0]], (2, 3), ValueError, "indices has 1 rows"),
        ([[3]], [[1.0]], (1, 3), IndexError, "indices has id 3, out of range for 3"),
        ([[-1]], [[1.0]], None, IndexError, "indices has id -1"),
    ],
)
def test_bad_arrays(ids, values, shape, error, message):
    with pytest.raises(error, match=message):
        sparse.csr_from_arrays(ids, values, shape)


def test_from_lists():
    X = sparse.ll_to_sparse([[2, 0], [], (1,), np.array([2])])
    assert X.toarray().tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert X.dtype == np.float32
    X = sparse.tuples_to_sparse([[(2, 0.5), (0, 3)], []], shape=(3, 4), dtype="float64")
    assert X.toarray().tolist() == [[3, 0, 0.5, 0], [0] * 4, [0] * 4]
    assert X.dtype == np.float64
    back = sparse.ll_to_sparse(X.tolil().rows, shape=X.shape)
    assert (back.toarray() == (X.toarray() != 0)).all()
    assert sparse.ll_to_sparse([]).shape == (0, 0)
    assert sparse.ll_to_sparse([[], []], shape=(2, 3)).nnz == 0


def test_ids_that_count_from_one():
    assert sparse.ll_to_sparse([[1, 3]], zero_based=False).toarray().tolist() == [[1, 0, 1]]
    assert sparse.ll_to_sparse([[1, 3]], zero_based="auto").shape == (1, 3)
    assert sparse.ll_to_sparse([[1, 3], [0]], zero_based="auto").shape == (2, 4)
    with pytest.raises(IndexError, match="X has id -1"):
        sparse.ll_to_sparse([[0]], zero_based=False)
    with pytest.raises(ValueError, match="zero_based is 'no'"):
        sparse.ll_to_sparse([[0]], zero_based="no")


def test_an_id_just_beyond_the_shape():
    # From callers who take the largest id for the number of labels.
    with pytest.warns(UserWarning, match=r"X has id 3 and shape is \(2, 3\): .* a column more, 4"):
        found = sparse.ll_to_sparse([[3], [0, 3]], shape=(2, 3))
    assert found.toarray().tolist() == [[0, 0, 0, 1], [1, 0, 0, 1]]
    with pytest.raises(IndexError, match="X has id 4, out of range for 3 columns"):
        sparse.ll_to_sparse([[4]], shape=(1, 3))
    with pytest.raises(ValueError, match="X has 2 rows"):
        sparse.ll_to_sparse([[0], [0]], shape=(1, 3))
    with pytest.raises(TypeError, match="X has dtype float64"):
        sparse.ll_to_sparse([[0.5]])


# Dense


def test_dense_topk():
    values = np.float32([[1, 3, 3, 0], [-1, -2, -3, -4]])
    ids, best = dense.topk(values, k=2)
    assert ids.tolist() == [[1, 2], [0, 1]]
    assert best.tolist() == [[3, 3], [-1, -2]]
    ids, best = dense.topk(values, indices=np.arange(8).reshape(2, 4) * 10, k=-1)
    assert ids.tolist() == [[10, 20, 0, 30], [40, 50, 60, 70]]
    assert best.dtype == np.float32
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k is {k}, values has 4 columns"):
            dense.topk(values, k=k)
    with pytest.raises(ValueError, match="indices has shape"):
        dense.topk(values, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="values has shape"):
        dense.topk(values[0])


# SMatrix


@pytest.mark.parametrize("on_disk", [False, True])
def test_smatrix(tmp_path, on_disk):
    X = SMatrix(4, 5, 2, fname=str(tmp_path / "scores") if on_disk else None)
    assert X.in_memory != on_disk
    assert (len(X), X.shape) == (4, (4, 5))
    assert X.data().nnz == 0
    X.update_block(0, None, np.float32([[1, 5, 3, 2, 4], [0, 0, 0, 0, -1]]))
    X.update_block(2, np.array([[4, 3, 1]]), np.array([[0.5, 2, -9]]))
    assert X[0][0].tolist() == [1, 4]
    assert X[0][1].tolist() == [5, 4]
    assert X.data("dense")[0].tolist() == [[1, 4], [0, 1], [3, 4], [5, 5]]
    assert X.data("dense")[1][3].tolist() == [-1e5, -1e5]
    found = X.data()
    assert reference.entries(found) == [{1: 5, 4: 4}, {0: 0, 1: 0}, {3: 2, 4: 0.5}, {}]
    assert (found.shape, found.dtype) == ((4, 5), np.float32)
    assert found.has_sorted_indices
    if on_disk:
        stored = np.fromfile(tmp_path / "scores.ind", np.int64).reshape(4, 2)
        assert (stored == X.indices).all()


def test_smatrix_fewer_values_than_places():
    X = SMatrix(2, 5, 3)
    X.update_block(0, np.array([[4, 2]]), np.array([[1.0, 2]]))
    assert X.indices.tolist() == [[2, 4, 5], [5, 5, 5]]
    X.update(np.full((2, 3), 5), np.zeros((2, 3)))
    assert X.data().nnz == 0


def test_smatrix_takes_another_choice():
    class First(SMatrix):
        def topk(self, ind, val):
            return ind[:, : self.nnz], val[:, : self.nnz]

    X = First(1, 9, 1)
    X.update_block(0, np.array([[7, 8]]), np.array([[1.0, 2]]))
    assert X.indices.tolist() == [[7]]


def test_smatrix_bad_blocks():
    X = SMatrix(3, 5, 2)
    with pytest.raises(IndexError, match=r"rows 2 \.\. 4 are out of range for 3 rows"):
        X.update_block(2, None, np.ones((2, 5)))
    with pytest.raises(IndexError, match="out of range for 3 rows"):
        X.update_block(-1, None, np.ones((1, 5)))
    with pytest.raises(ValueError, match="indices has shape"):
        X.update_block(0, np.zeros((1, 4), int), np.ones((1, 5)))
    with pytest.raises(ValueError, match="NaN"):
        X.update_block(0, None, np.full((1, 5), np.nan))
    with pytest.raises(ValueError, match=r"val has shape \(3, 3\), expected \(3, 2\)"):
        X.update(np.zeros((3, 2)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="nnz is 0"):
        SMatrix(3, 5, 0)
    X.update_block(0, np.array([[9, 1]]), np.ones((1, 2)))
    with pytest.raises(IndexError, match="indices has id 9"):
        X.data()


# Moved columns and rows


@pytest.mark.parametrize("kind", ["csr", "csc", "coo"])
def test_moved_columns_and_rows(kind):
    X = sp.csr_matrix(np.array([[1, 2, 0], [0, 0, 3]])).asformat(kind)
    found = sparse._map_cols(X, np.array([4, 0, 2]), (2, 5))
    assert found.toarray().tolist() == [[2, 0, 0, 0, 1], [0, 0, 3, 0, 0]]
    assert (found.format, found.has_sorted_indices) == ("csr", True)
    assert (sparse._map(X, [4, 0, 2], (2, 5)) != found).nnz == 0
    found = sparse._map(X, [3, 1], (4, 3), axis=0)
    assert found.toarray().tolist() == [[0] * 3, [0, 0, 3], [0] * 3, [1, 2, 0]]
    assert (sparse._map_rows(X, [3, 1], (4, 3)) != found).nnz == 0
    assert sparse._map_cols(X, [0, 0, 1], (2, 2)).toarray().tolist() == [[3, 0], [0, 3]]
    for oformat in ("csr", "csc", "lil", "coo"):
        found = sparse._map_cols(X, [4, 0, 2], (2, 5), oformat)
        assert found.format == oformat
        assert found.toarray().tolist() == [[2, 0, 0, 0, 1], [0, 0, 3, 0, 0]]
        assert sparse._map_rows(X, [3, 1], (4, 3), oformat=oformat).format == oformat


def test_moved_columns_reject():
    X = sp.csr_matrix(np.eye(2))
    with pytest.raises(ValueError, match=r"mapping has 3 entries, X has shape \(2, 2\)"):
        sparse._map_cols(X, [0, 1, 2], (2, 3))
    with pytest.raises(IndexError, match=r"mapping has 3, shape is \(2, 3\)"):
        sparse._map_cols(X, [0, 3], (2, 3))
    with pytest.raises(ValueError, match="oformat is 'bsr', expected csr, csc, lil or coo"):
        sparse._map(X, [0, 1], (2, 2), oformat="bsr")
    with pytest.raises(ValueError, match="axis is 2, expected 0 or 1"):
        sparse._map(X, [0, 1], (2, 2), axis=2)
    with pytest.raises(TypeError, match="X is a ndarray"):
        sparse._map(np.eye(2), [0, 1], (2, 2))


@pytest.mark.parametrize("kind", [sp.csr_array, sp.csc_array, sp.coo_array])
def test_sparse_arrays_count_like_matrices(kind):
    given = np.array([[1, 2, 0], [0, 4, 3]], np.float32)
    X, Y = sp.csr_array(np.eye(2, dtype=np.float32)), kind(given)
    for axis in (0, 1):
        expected = sparse.frequency(sp.csr_matrix(given), axis=axis)
        assert sparse.frequency(Y, axis=axis).tolist() == expected.tolist()
    expected = [[1, 0], [1, 2], [0, 3]]
    assert sparse.compute_centroid(X, Y, "mean").toarray().tolist() == expected
    assert dense.compute_centroid(X.toarray(), Y, "mean", binarize=False).tolist() == expected


@pytest.mark.parametrize(("value", "dtype"), [(300, np.float16), (1e30, np.float32)])
@pytest.mark.parametrize("norm", ["l2", "l1", "max"])
def test_norms_beyond_the_type_of_an_array(value, dtype, norm):
    rows = np.full((2, 400), value, dtype)
    scaled = sparse.normalize(rows, norm, copy=True)
    assert scaled.dtype == dtype
    np.testing.assert_allclose(scaled, {"l2": 0.05, "l1": 1 / 400, "max": 1}[norm], rtol=1e-3)
    assert sparse.normalize(rows, norm) is rows


def test_arrays_are_normalized_a_few_rows_at_a_time(rng, monkeypatch):
    """Whatever rows come together; and without a copy of the whole in float64."""
    rows = rng.standard_normal((7, 5)).astype(np.float32)
    rows[3] = 0
    for norm in ("l2", "l1", "max"):
        whole = sparse.normalize(rows, norm, copy=True)
        with monkeypatch.context() as patched:
            patched.setattr(sparse, "_VALUES_AT_ONCE", 10)
            np.testing.assert_array_equal(sparse.normalize(rows, norm, copy=True), whole)
    many = np.ones((20_000, 64), np.float32)
    tracemalloc.start()
    try:
        sparse.normalize(many)
        assert tracemalloc.get_traced_memory()[1] < many.nbytes
    finally:
        tracemalloc.stop()


def test_in_place_whatever_the_arrays(rng):
    table = rng.random((6, 2)).astype(np.float32)
    matrix = sp.csr_matrix((table[:, 0], np.arange(6) % 3, [0, 3, 6]), shape=(2, 3))
    assert sparse.retain_topk(matrix, copy=False, k=1) is matrix
    assert matrix.nnz == 2


@pytest.mark.parametrize("call", [lambda m: sparse.topk(m, 2, 3, 0), sparse.retain_topk])
def test_integers_with_duplicates_stay_as_they_are(call):
    arrays = np.array([1, 5, 1]), np.array([2, 0, 2]), np.array([0, 3])
    matrix = sp.csr_matrix(tuple(array.copy() for array in arrays), shape=(1, 3))
    call(matrix)
    for name, array in zip(("data", "indices", "indptr"), arrays, strict=True):
        assert getattr(matrix, name).tolist() == array.tolist()
