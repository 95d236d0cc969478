"""Exact search among sparse rows."""

import pickle
import threading

import numpy as np
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import ngame
from ngame import _core


def random_rows(rng, rows, cols, density, kind):
    """Random rows; few distinct values, so that ties are common, or any, or of both signs."""
    mask = rng.random((rows, cols)) < density * rng.random(cols) ** 2 * 2
    values = {
        "few": lambda: rng.integers(1, 4, mask.shape).astype(np.float32),
        "any": lambda: rng.random(mask.shape, dtype=np.float32),
        "signed": lambda: rng.standard_normal(mask.shape, dtype=np.float32),
        "wide": lambda: np.exp(8 * rng.standard_normal(mask.shape)).astype(np.float32),
        "tiny": lambda: np.full(mask.shape, 1e-40, np.float32),
    }[kind]()
    return sp.csr_matrix(values * mask)


def check(queries, items, k, drop=None):
    found = ngame.sparse_topk(queries, items, k, drop=drop, threads=2)
    reference.check_csr(found, np.float32, (queries.shape[0], items.shape[0]))
    expected = reference.sparse_topk(queries, items, k, None if drop is None else drop.toarray())
    assert reference.entries(found) == expected
    return found


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(0, 60),
    cols=st.integers(1, 40),
    k=st.integers(1, 12),
    kind=st.sampled_from(["few", "any", "signed", "wide", "tiny"]),
    density=st.sampled_from([0.02, 0.2, 1]),
    dropping=st.booleans(),
)
def test_against_the_reference(seed, rows, cols, k, kind, density, dropping):
    rng = np.random.default_rng(seed)
    queries = random_rows(rng, 7, cols, density, kind)
    items = random_rows(rng, rows, cols, density, kind)
    drop = sp.csr_matrix(rng.random((7, rows)) < 0.3) if dropping else None
    check(queries, items, k, drop)


@pytest.mark.parametrize("kind", ["any", "few", "signed"])
def test_several_blocks_with_frequent_columns(rng, simd, kind):
    """Enough items for blocks in which frequent columns are left out of the sums."""
    rows, cols = 40_000, 3000
    share = 0.6 / np.arange(1, cols + 1)
    picks = [np.flatnonzero(rng.random(rows) < p) for p in share]
    column = np.repeat(np.arange(cols), [len(p) for p in picks])
    value = 0.1 + rng.random(len(column), dtype=np.float32)
    if kind == "few":
        value = np.ceil(2 * value)
    elif kind == "signed":
        value *= rng.choice(np.array([-1, 1], np.float32), len(value))
    value *= np.log(1 / share)[column].astype(np.float32) + 0.2
    items = sp.csr_matrix((value.astype(np.float32), (np.concatenate(picks), column)), (rows, cols))
    queries = items[rng.integers(rows, size=300)]
    found = ngame.sparse_topk(queries, items, 20)
    product = (queries.astype(np.float64) @ items.T.astype(np.float64)).toarray()
    for row, scores in enumerate(product.astype(np.float32)):
        best = np.lexsort((np.arange(rows), -scores))
        best = best[scores[best] != 0][:20]
        ours = found[row]
        assert sorted(best) == ours.indices.tolist()
        assert (scores[ours.indices] == ours.data).all()


def test_sums_that_cancel(rng):
    """Rounded sums cannot tell these items apart. Exact ones go by column, not by frequency."""
    items = sp.csr_matrix(rng.random((400, 3)) < [0.9, 0.5, 1], dtype=np.float32)
    queries = sp.csr_matrix(np.array([[1e16, 1.5, -1e16]], np.float32))
    found = check(queries, items, 3)
    assert found.data.tolist() == [2, 2, 2]  # 1.5, if the large ones came first


def test_fewer_scores_than_k(rng):
    items = random_rows(rng, 200, 30, 0.01, "any")
    found = check(random_rows(rng, 20, 30, 0.1, "any"), items, 500)
    assert np.diff(found.indptr).max() < 200


@pytest.mark.parametrize("k", [5, 40])
@pytest.mark.parametrize("kind", ["few", "any", "signed", "wide", "tiny"])
def test_long_queries(rng, kind, k):
    """Between short ones. With k = 5 sums are rounded first, with 40 they are exact at once."""
    long, short = random_rows(rng, 4, 4000, 1, kind), random_rows(rng, 4, 4000, 0.05, kind)
    queries = sp.vstack([long, short], "csr")[[0, 4, 1, 5, 2, 3, 6, 7]]
    assert np.diff(queries.indptr).max() > 700
    check(queries, random_rows(rng, 80, 4000, 0.3, kind), k)


def test_long_queries_among_many_items(rng):
    """Sums tell nearly all of them apart; several blocks."""
    cols = 3000
    items = sp.random_array((40_000, cols), density=0.01, rng=rng, dtype=np.float32, format="csr")
    queries = sp.random_array((6, cols), density=0.4, rng=rng, dtype=np.float32, format="csr")
    found = ngame.sparse_topk(queries, items, 20)
    product = (queries.astype(np.float64) @ items.T.astype(np.float64)).toarray()
    for row, scores in enumerate(product.astype(np.float32)):
        best = np.lexsort((np.arange(len(scores)), -scores))[:20]
        assert sorted(best) == found[[row]].indices.tolist()


def test_empty_matrices():
    for queries, items, cols in ((0, 3, 4), (3, 0, 4), (3, 3, 0), (2, 5, 4)):
        shape = [(queries, cols), (items, cols)]
        assert check(*(sp.csr_matrix(s, dtype=np.float32) for s in shape), 2).nnz == 0


def test_an_index_gives_the_same(rng):
    queries, items = random_rows(rng, 30, 50, 0.2, "any"), random_rows(rng, 90, 50, 0.2, "any")
    index = ngame.SparseIndex(items)
    assert len(index) == 90
    expected = ngame.sparse_topk(queries, items, 4)
    for _ in range(2):
        found = index.search(queries, 4)
        assert (found != expected).nnz == 0
    one = index.search(queries[3], 4)
    assert (one != expected[3]).nnz == 0


def test_order_duplicates_and_index_types(rng):
    queries, items = random_rows(rng, 9, 12, 0.5, "few"), random_rows(rng, 20, 12, 0.5, "few")
    expected = ngame.sparse_topk(queries, items, 3)
    halves = (items.data / 2).repeat(2)
    doubled = sp.csr_matrix((halves, items.indices.repeat(2), items.indptr * 2), items.shape)
    doubled.indices = doubled.indices.astype(np.int64)
    doubled.indptr = doubled.indptr.astype(np.int64)
    backwards = queries.copy()
    for row in range(9):
        part = slice(*queries.indptr[row : row + 2])
        backwards.indices[part] = queries.indices[part][::-1]
        backwards.data[part] = queries.data[part][::-1]
    backwards.has_sorted_indices = False
    backwards.has_canonical_format = False
    found = ngame.sparse_topk(sp.csr_array(backwards), doubled, 3)
    assert reference.entries(found) == reference.entries(expected)
    assert doubled.nnz == 2 * items.nnz


def test_rejects_bad_input(rng):
    queries, items = random_rows(rng, 4, 6, 0.9, "any"), random_rows(rng, 5, 6, 0.9, "any")
    with pytest.raises(TypeError, match="queries has dtype float64, expected float32"):
        ngame.sparse_topk(queries.astype(np.float64), items, 1)
    with pytest.raises(TypeError, match="items is a ndarray, expected a scipy"):
        ngame.sparse_topk(queries, items.toarray(), 1)
    with pytest.raises(ValueError, match="queries has 5 columns, items has 6"):
        ngame.sparse_topk(queries[:, :5], items, 1)
    with pytest.raises(ValueError, match="k is 0, expected 1 or more"):
        ngame.sparse_topk(queries, items, 0)
    with pytest.raises(IndexError, match=r"drop\[0\] has column 5, out of range for 5"):
        ngame.sparse_topk(queries, items, 1, drop=[[0, 5]])
    for value in (np.nan, np.inf):
        bad = items.copy()
        bad.data[bad.indptr[3]] = value
        with pytest.raises(ValueError, match="items has NaN or infinity in row 3"):
            ngame.sparse_topk(queries, bad, 1)
        with pytest.raises(ValueError, match="queries has NaN or infinity in row 3"):
            ngame.sparse_topk(bad, items, 1)
    with pytest.raises(ValueError, match="queries has values in row 0 whose products"):
        ngame.sparse_topk(queries * np.float32(1e30), items * np.float32(1e30), 1)


@pytest.mark.parametrize("kind", ["any", "signed"])
def test_pair_scores(rng, kind):
    queries, items = random_rows(rng, 70, 12, 0.5, kind), random_rows(rng, 20, 12, 0.5, kind)
    index = ngame.SparseIndex(items)
    pairs = sp.csr_matrix(rng.random((70, 20)) < 0.3)
    scores = index.pair_scores(queries, pairs, threads=2)
    assert scores.dtype == np.float32
    product = (queries.astype(np.float64) @ items.T.astype(np.float64)).toarray()
    np.testing.assert_array_equal(scores, product[pairs.nonzero()].astype(np.float32))
    found = index.search(queries, 5)
    np.testing.assert_array_equal(index.pair_scores(queries, found), found.data)
    with pytest.raises(ValueError, match=r"pairs has shape \(70, 19\), expected \(70, 20\)"):
        index.pair_scores(queries, pairs[:, :19])


def test_short_queries_and_long_items(rng):
    """Long items are searched for the columns of a short query: the same bits, also at the ends."""
    items = random_rows(rng, 30, 400, 0.7, "signed")
    queries = random_rows(rng, 60, 400, 0.01, "any")
    ends = sp.csr_matrix(([1, 2], ([0, 0], [0, 399])), (1, 400))
    queries = sp.vstack([queries, ends], "csr").astype(np.float32)
    assert (np.diff(queries.indptr) == 0).any()  # some match nothing
    product = (queries.astype(np.float64) @ items.T.astype(np.float64)).toarray()
    index, every = ngame.SparseIndex(items), sp.csr_matrix(np.ones(product.shape))
    found = index.pair_scores(queries, every).reshape(product.shape)
    np.testing.assert_array_equal(found, product.astype(np.float32))
    searched = index.search(queries, 30)
    np.testing.assert_array_equal(searched.data, found[searched.nonzero()])


def test_core_checks_what_belongs_together(rng):
    items = random_rows(rng, 5, 6, 0.9, "any")
    arrays = (items.indptr, items.indices, 6)
    prepared = _core.prepare_sparse_items(arrays, items.data)
    fewer = (items.indptr[:-1], items.indices, 6)
    with pytest.raises(ValueError, match="prepared does not belong to items"):
        _core.sparse_topk(arrays, items.data, fewer, items.data, prepared, 1, None, 1)
    narrow = (items.indptr, items.indices, 5)
    with pytest.raises(ValueError, match="queries and items differ in columns"):
        _core.sparse_topk(narrow, items.data, arrays, items.data, prepared, 1, None, 1)


def test_one_index_in_several_threads(rng):
    queries, items = random_rows(rng, 200, 50, 0.2, "any"), random_rows(rng, 900, 50, 0.2, "any")
    index, found = ngame.SparseIndex(items), []
    workers = [
        threading.Thread(target=lambda: found.append(index.search(queries, 4))) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all((one != found[0]).nnz == 0 for one in found)


def test_an_index_travels_to_other_processes():
    rng = np.random.default_rng(0)
    queries, items = (random_rows(rng, rows, 30, 0.3, "any") for rows in (5, 40))
    index = ngame.SparseIndex(items)
    again = pickle.loads(pickle.dumps(index))
    assert (again.search(queries, 3) != index.search(queries, 3)).nnz == 0


def test_pairs_are_a_matrix():
    x = sp.csr_matrix(np.eye(3, dtype=np.float32))
    with pytest.raises(TypeError, match="pairs is a list, expected a CSR matrix"):
        ngame.SparseIndex(x).pair_scores(x, [(1, 1), (0, 0)])
