"""Sparse shortlists: labels of cluster mates; keep, merge and drop entries."""

import numpy as np
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import ngame


def random_csr(rng, shape, density=0.3, dtype=np.float32, distinct=9):
    """Few distinct values, including zero, so that ties are common."""
    mask = rng.random(shape) < density
    rows, columns = np.nonzero(mask)
    values = rng.integers(-distinct // 2, distinct // 2 + 1, size=len(rows)).astype(dtype)
    offsets = np.concatenate([[0], np.cumsum(mask.sum(1))])
    return sp.csr_matrix((values, columns.astype(np.int32), offsets), shape=shape)


@given(seed=st.integers(0, 2**32), data=st.data())
def test_cluster_shortlist(seed, data):
    rng = np.random.default_rng(seed)
    rows, labels = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12))
    y = random_csr(rng, (rows, labels), data.draw(st.sampled_from([0.0, 0.2, 0.7])))
    x = rng.standard_normal((rows, 3), dtype=np.float32)
    clusters = ngame.balanced_clusters(x, size=data.draw(st.integers(1, rows)))
    limit = data.draw(st.none() | st.integers(0, labels))
    found = ngame.cluster_shortlist(y, clusters, limit=limit)
    reference.check_csr(found, np.float32, y.shape)
    assert reference.entries(found) == reference.cluster_shortlist(y, clusters, limit)


def test_cluster_shortlist_rejects_bad_input(rng):
    y = random_csr(rng, (6, 4))
    clusters = ngame.balanced_clusters(np.ones((5, 2), np.float32), size=2)
    with pytest.raises(ValueError, match="labels has 6 rows, clusters has 5"):
        ngame.cluster_shortlist(y, clusters)
    with pytest.raises(ValueError, match="limit is -1, expected 0 or more"):
        ngame.cluster_shortlist(y[:5], clusters, limit=-1)
    with pytest.raises(TypeError, match=r"clusters is a list, expected ngame\.Clusters"):
        ngame.cluster_shortlist(y, [[0, 1]])


@given(seed=st.integers(0, 2**32), k=st.integers(0, 9), dtype=st.sampled_from("fd"))
def test_keep_topk(seed, k, dtype):
    matrix = random_csr(np.random.default_rng(seed), (15, 12), dtype=dtype)
    before = matrix.copy()
    found = ngame.keep_topk(matrix, k)
    reference.check_csr(found, dtype, matrix.shape)
    assert reference.entries(found) == reference.keep_topk(matrix, k)
    assert (matrix.data == before.data).all()
    assert (matrix.indices == before.indices).all()


def test_keep_topk_takes_infinities_and_rejects_nan(rng):
    matrix = sp.csr_matrix(np.array([[1, -np.inf, np.inf], [1, 2, 3]], np.float32))
    assert reference.entries(ngame.keep_topk(matrix, 2))[0] == {0: 1, 2: np.inf}
    matrix.data[[4, 5]] = np.nan
    with pytest.raises(ValueError, match=r"matrix has NaN in row 1$"):
        ngame.keep_topk(matrix, 1)
    with pytest.raises(ValueError, match="k is -1, expected 0 or more"):
        ngame.keep_topk(matrix, -1)


@given(seed=st.integers(0, 2**32), count=st.integers(1, 4), how=st.sampled_from(["sum", "max"]))
def test_merge(seed, count, how):
    rng = np.random.default_rng(seed)
    parts = [random_csr(rng, (9, 14), density) for density in (0.1, 0.5, 0, 0.9)[:count]]
    copies = [part.copy() for part in parts]
    found = ngame.merge(parts, how)
    reference.check_csr(found, np.float32, (9, 14))
    assert reference.entries(found) == reference.merge(parts, how)
    assert all((a.data == b.data).all() for a, b in zip(parts, copies, strict=True))
    assert not any(np.shares_memory(found.data, part.data) for part in parts)


def test_merge_keeps_nan():
    nan, one = (sp.csr_matrix(np.array([[value]], np.float32)) for value in (np.nan, 1))
    for pair in ((nan, one), (one, nan)):
        assert np.isnan(ngame.merge(pair, "max").data).all()
        assert np.isnan(ngame.merge(pair, "sum").data).all()


def test_merge_of_mixed_types(rng):
    single, double = random_csr(rng, (5, 6)), random_csr(rng, (5, 6), dtype=np.float64)
    double.indices, double.indptr = double.indices.astype("i8"), double.indptr.astype("i8")
    found = ngame.merge([sp.csr_array(single), double], "sum")
    reference.check_csr(found, np.float64, (5, 6))
    assert reference.entries(found) == reference.merge([single, double], "sum")


def test_merge_rejects_bad_input(rng):
    matrix = random_csr(rng, (5, 6))
    with pytest.raises(ValueError, match="shortlists is empty"):
        ngame.merge([])
    with pytest.raises(ValueError, match="how is 'min'"):
        ngame.merge([matrix], "min")
    with pytest.raises(ValueError, match=r"shortlists\[1\] has shape \(4, 6\)"):
        ngame.merge([matrix, matrix[1:]])
    with pytest.raises(TypeError, match=r"shortlists\[0\] has dtype int64"):
        ngame.merge([matrix.astype(np.int64)])


@given(seed=st.integers(0, 2**32), density=st.sampled_from([0, 0.1, 0.9, 1]))
def test_drop_pairs(seed, density):
    rng = np.random.default_rng(seed)
    matrix = random_csr(rng, (11, 8))
    mask = rng.random((11, 8)) < density
    expected = reference.drop_pairs(matrix, np.argwhere(mask))
    twice = np.concatenate([np.argwhere(mask)] * 2)
    for pairs in (sp.csr_matrix(mask), sp.csr_array(mask), twice, twice.astype(np.uint8)):
        found = ngame.drop_pairs(matrix, pairs)
        reference.check_csr(found, np.float32, matrix.shape)
        assert reference.entries(found) == expected


def test_drop_pairs_rejects_bad_input(rng):
    matrix = random_csr(rng, (5, 6))
    assert ngame.drop_pairs(matrix, []).nnz == matrix.nnz
    with pytest.raises(IndexError, match=r"pairs\[0\] has row 5, out of range for 5"):
        ngame.drop_pairs(matrix, [[5, 0]])
    with pytest.raises(IndexError, match=r"pairs\[1\] has column -1, out of range for 6"):
        ngame.drop_pairs(matrix, [[4, 0], [0, -1]])
    with pytest.raises(ValueError, match=r"pairs has shape \(1, 3\), expected \[n, 2\]"):
        ngame.drop_pairs(matrix, [[1, 2, 3]])
    with pytest.raises(TypeError, match="pairs has dtype float64, expected integer pairs"):
        ngame.drop_pairs(matrix, [[0.5, 1]])


def test_merge_wants_a_list():
    with pytest.raises(TypeError, match=r"shortlists is a csr_matrix, expected a list: \[...\]"):
        ngame.merge(sp.csr_matrix((2, 3), dtype=np.float32))
    with pytest.raises(TypeError, match="how is a csr_matrix, expected"):
        ngame.merge([sp.csr_matrix((2, 3))], sp.csr_matrix((2, 3)))
