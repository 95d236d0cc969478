import functools

import numpy as np
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import ngame
from ngame.shortlist import pair_scores

# What a filter of 8-bit codes finds easy or hard: name -> items [3000, 24] by a generator.
ITEMS = {
    "spread": lambda rng: rng.standard_normal((3000, 24)),
    # Closer together than the codes can tell, nearly all of them candidates.
    "near duplicates": lambda rng: 1 + 1e-3 * rng.standard_normal((3000, 24)),
    "exact duplicates": lambda rng: rng.standard_normal((40, 24))[rng.integers(40, size=3000)],
    # One column leaves few codes to the others.
    "one large column": lambda rng: rng.standard_normal((3000, 24)) * ([30] + 23 * [1]),
    "lengths far apart": lambda rng: (
        rng.standard_normal((3000, 24)) * 10.0 ** rng.uniform(-30, 15, (3000, 1))
    ),
    "beyond what float can scale": lambda rng: (
        rng.standard_normal((3000, 24)) * 10.0 ** rng.choice([-38, -35, 0], (3000, 1))
    ),
    "zero rows": lambda rng: rng.standard_normal((3000, 24)) * (rng.random((3000, 1)) < 0.01),
    # The best come last: whatever was found before falls out.
    "ascending": lambda rng: np.linspace(-1, 1, 3000)[:, None] + 0 * rng.random((3000, 24)),
}


@functools.cache
def filtered_case(kind, metric, dropping):
    """Queries, items, pairs to drop and what the reference finds, for every SIMD level."""
    rng = np.random.default_rng(5)
    x = ITEMS[kind](rng).astype(np.float32)
    q = np.concatenate([rng.standard_normal((12, 24)), np.zeros((1, 24)), np.ones((1, 24))])
    q[:4] *= 10.0 ** np.array([[-36], [-33], [-8], [8]])
    q = q.astype(np.float32)
    drop = rng.random((len(q), len(x))) < 0.05
    drop[5] = True
    return q, x, drop, *reference.topk(q, x, 11, metric, drop if dropping else None)


SHAPES = [(1, 1, 1, 1), (3, 40, 5, 40), (17, 33, 8, 3), (100, 31, 64, 7), (29, 300, 65, 1)]


def random_csr(rng, shape, density=0.3, dtype=np.float32, distinct=9):
    """Entries out of few values, zero among them, so that ties are common."""
    mask = rng.random(shape) < density
    rows, columns = np.nonzero(mask)
    values = rng.integers(-distinct // 2, distinct // 2 + 1, size=len(rows)).astype(dtype)
    offsets = np.concatenate([[0], np.cumsum(mask.sum(1))])
    return sp.csr_matrix((values, columns.astype(np.int32), offsets), shape=shape)


def check_csr(matrix, dtype, shape):
    assert isinstance(matrix, sp.csr_matrix)
    assert matrix.dtype == dtype
    assert matrix.shape == shape
    fresh = sp.csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=shape)
    assert fresh.has_canonical_format


class TestTopk:
    @pytest.mark.parametrize(("queries", "items", "dim", "k"), SHAPES)
    @pytest.mark.parametrize("metric", ["cosine", "dot"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_matches_reference(self, rng, simd, queries, items, dim, k, metric, dtype):
        q = rng.standard_normal((queries, dim)).astype(dtype)
        x = rng.standard_normal((items, dim)).astype(dtype)
        scores, ids = ngame.topk_arrays(q, x, k, metric=metric)
        expected, expected_ids = reference.topk(q, x, k, metric)
        assert scores.dtype == np.float32
        assert ids.dtype == np.int32
        assert (scores == expected).all()
        assert (ids == expected_ids).all()

    @pytest.mark.parametrize("kind", ITEMS)
    @pytest.mark.parametrize("metric", ["cosine", "dot"])
    @pytest.mark.parametrize("dropping", [False, True])
    def test_filters_lose_nothing(self, simd, kind, metric, dropping):
        q, x, drop, expected, expected_ids = filtered_case(kind, metric, dropping)
        pairs = sp.csr_matrix(drop) if dropping else None
        scores, ids = ngame.topk_arrays(q, x, 11, metric=metric, drop=pairs)
        assert (scores == expected).all()
        assert (ids == expected_ids).all()

    def test_more_candidates_than_are_gathered(self, rng, simd):
        q = rng.standard_normal((3, 8), dtype=np.float32)
        x = rng.standard_normal((20_000, 8), dtype=np.float32)
        scores, ids = ngame.topk_arrays(q, x, 1200)
        expected, expected_ids = reference.topk(q, x, 1200)
        assert (scores == expected).all()
        assert (ids == expected_ids).all()

    @pytest.mark.parametrize("dim", [131_072, 131_073])
    def test_many_columns(self, simd, dim):
        # The sums of 8-bit codes come near to 2**31, and one column later would be left to float.
        x = np.ones((40, dim), np.float32)
        x[:20] = -1
        x[30, 0] = 2
        scores, ids = ngame.topk_arrays(x[-1:], x, 2, metric="dot")
        assert scores.tolist() == [[dim + 1, dim]]
        assert ids.tolist() == [[30, 20]]

    @given(seed=st.integers(0, 2**32), data=st.data())
    def test_ties_and_dropped_pairs(self, seed, data):
        # Small integers: products are exact, so ties are ties, and many.
        rng = np.random.default_rng(seed)
        n, m, d = (data.draw(st.integers(1, limit)) for limit in (20, 90, 4))
        k = data.draw(st.integers(1, m))
        q = rng.integers(-2, 3, (n, d)).astype(np.float32)
        x = rng.integers(-2, 3, (m, d)).astype(np.float32)
        drop = rng.random((n, m)) < data.draw(st.sampled_from([0, 0.2, 0.9, 1]))
        expected, expected_ids = reference.topk(q, x, k, "dot", drop)
        for pairs in (sp.csr_matrix(drop), np.argwhere(drop)):
            scores, ids = ngame.topk_arrays(q, x, k, metric="dot", drop=pairs)
            assert (scores == expected).all()
            assert (ids == expected_ids).all()

    def test_many_items_and_equal_scores(self):
        # More items than one stretch holds, all equal: the lowest ids are the answer.
        x = np.ones((70_000, 32), np.float32)
        scores, ids = ngame.topk_arrays(x[:3], x, 500)
        assert (ids == np.arange(500)).all()
        assert np.allclose(scores, 1)

    def test_best_come_late(self):
        x = np.linspace(-1, 1, 70_000, dtype=np.float32)[:, None] * np.ones(32, np.float32)
        ids = ngame.topk_arrays(np.ones((2, 32), np.float32), x, 40, metric="dot")[1]
        assert (ids == np.arange(69_999, 69_959, -1)).all()

    def test_scores_do_not_depend_on_the_company(self, rng, simd):
        q = rng.standard_normal((61, 37), dtype=np.float32)
        x = rng.standard_normal((203, 37), dtype=np.float32)
        scores, ids = ngame.topk_arrays(q, x, 203)
        for start, stop in ((0, 1), (5, 20), (60, 61)):
            part, part_ids = ngame.topk_arrays(q[start:stop], x, 203)
            assert (part == scores[start:stop]).all()
            assert (part_ids == ids[start:stop]).all()
        some, some_ids = ngame.topk_arrays(q, x[50:], 153)
        keep = ids >= 50
        assert (some.ravel() == scores[keep]).all()
        assert (some_ids.ravel() == ids[keep] - 50).all()

    def test_zero_rows_score_zero(self):
        q = np.array([[0, 0], [1, 0]], np.float32)
        scores, ids = ngame.topk_arrays(q, np.array([[-1, 0], [0, 0]], np.float32), 2)
        assert scores.tolist() == [[0, 0], [0, -1]]
        assert ids.tolist() == [[0, 1], [1, 0]]

    def test_no_queries_and_no_columns(self):
        x = np.ones((4, 3), np.float32)
        scores, ids = ngame.topk_arrays(x[:0], x, 2)
        assert scores.shape == ids.shape == (0, 2)
        no_strides = np.zeros((0, 3), np.float16).astype(np.float32)
        assert ngame.topk_arrays(no_strides, x, 2)[1].shape == (0, 2)
        scores, ids = ngame.topk_arrays(x[:, :0], x[:, :0], 2)
        assert scores.tolist() == [[0, 0]] * 4
        assert ids.tolist() == [[0, 1]] * 4
        check_csr(ngame.topk(x[:0], x, 2), np.float32, (0, 4))

    def test_sparse_result(self, rng):
        q = rng.standard_normal((12, 6), dtype=np.float32)
        x = rng.standard_normal((30, 6), dtype=np.float32)
        x[3] = 0
        drop = np.zeros((12, 30), bool)
        drop[0, 4:] = True
        drop[1, :] = True
        found = ngame.topk(q, x, 8, drop=sp.csr_matrix(drop))
        check_csr(found, np.float32, (12, 30))
        scores, ids = ngame.topk_arrays(q, x, 8, drop=sp.csr_matrix(drop))
        assert [set(row) for row in reference.entries(found)] == [set(row) - {-1} for row in ids]
        assert np.diff(found.indptr).tolist() == [4, 0] + [8] * 10
        for row, column, score in zip(*np.indices(ids.shape)[:1], ids, scores, strict=True):
            kept = column >= 0
            assert (found.toarray()[row[kept], column[kept]] == score[kept]).all()

    def test_rejects_bad_input(self, rng):
        q = rng.standard_normal((4, 3), dtype=np.float32)
        x = rng.standard_normal((5, 3), dtype=np.float32)
        bad = x.copy()
        bad[2:, 1] = np.nan
        with pytest.raises(ValueError, match=r"items has NaN or infinity in row 2$"):
            ngame.topk(q, bad, 1)
        with pytest.raises(ValueError, match=r"queries has NaN or infinity in row 2$"):
            ngame.topk(bad, x, 1, metric="dot")
        with pytest.raises(ValueError, match="may overflow float32"):
            ngame.topk(np.float32(1e30) * q, np.float32(1e30) * x, 1, metric="dot")
        assert np.isfinite(ngame.topk(np.float32(1e30) * q, np.float32(1e30) * x, 1).data).all()
        with pytest.raises(ValueError, match="k is 6, items has only 5 rows"):
            ngame.topk(q, x, 6)
        with pytest.raises(ValueError, match="k is 0, expected 1 or more"):
            ngame.topk(q, x, 0)
        with pytest.raises(ValueError, match="queries has 2 columns, items has 3"):
            ngame.topk(q[:, :2], x, 1)
        with pytest.raises(ValueError, match="metric is 'l2'"):
            ngame.topk(q, x, 1, metric="l2")
        with pytest.raises(TypeError, match="items has dtype float64"):
            ngame.topk(q, x.astype(np.float64), 1)
        with pytest.raises(ValueError, match=r"drop has shape \(4, 4\), expected \(4, 5\)"):
            ngame.topk(q, x, 1, drop=sp.csr_matrix((4, 4)))
        with pytest.raises(IndexError, match=r"drop\[1\] has column 5, out of range for 5"):
            ngame.topk(q, x, 1, drop=[[0, 0], [1, 5]])


class TestPairScores:
    @pytest.mark.parametrize("metric", ["cosine", "dot"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_every_pair_scores_as_in_the_search(self, rng, simd, metric, dtype):
        q = rng.standard_normal((70, 37)).astype(dtype)
        x = rng.standard_normal((91, 37)).astype(dtype)
        q[3] = x[8] = 0
        scores, ids = ngame.topk_arrays(q, x, 91, metric=metric)
        searched = np.empty_like(scores)
        np.put_along_axis(searched, ids.astype(np.int64), scores, 1)
        asked = rng.random(searched.shape) < 0.3
        asked[5:9] = False
        for threads in (1, 7):
            found = pair_scores(q, x, sp.csr_matrix(asked), metric=metric, threads=threads)
            assert found.dtype == np.float32
            assert (found == searched[asked]).all()

    def test_no_pairs(self):
        x = np.ones((4, 3), np.float32)
        assert pair_scores(x, x, sp.csr_matrix((4, 4))).shape == (0,)
        assert pair_scores(x, x[:0], sp.csr_matrix((4, 0))).shape == (0,)

    def test_rejects_bad_input(self):
        x = np.ones((4, 3), np.float32)
        pairs = sp.identity(4, format="csr")
        with pytest.raises(ValueError, match="queries has 3 columns, items has 2"):
            pair_scores(x, x[:, :2], pairs)
        with pytest.raises(ValueError, match=r"pairs has shape \(4, 4\), expected \(4, 3\)"):
            pair_scores(x, x[:3], pairs)
        with pytest.raises(ValueError, match="metric is 'l2'"):
            pair_scores(x, x, pairs, metric="l2")
        with pytest.raises(ValueError, match="items has NaN or infinity in row 2"):
            pair_scores(x, np.where(np.arange(4)[:, None] == 2, np.nan, x), pairs)
        with pytest.raises(ValueError, match="may overflow float32"):
            pair_scores(x * 1e20, x * 1e20, pairs, metric="dot")


@given(seed=st.integers(0, 2**32), data=st.data())
def test_cluster_shortlist(seed, data):
    rng = np.random.default_rng(seed)
    rows, labels = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12))
    y = random_csr(rng, (rows, labels), data.draw(st.sampled_from([0.0, 0.2, 0.7])))
    x = rng.standard_normal((rows, 3), dtype=np.float32)
    clusters = ngame.balanced_clusters(x, size=data.draw(st.integers(1, rows)))
    limit = data.draw(st.none() | st.integers(0, labels))
    found = ngame.cluster_shortlist(y, clusters, limit=limit)
    check_csr(found, np.float32, y.shape)
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
    check_csr(found, dtype, matrix.shape)
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
    check_csr(found, np.float32, (9, 14))
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
    check_csr(found, np.float64, (5, 6))
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
        check_csr(found, np.float32, matrix.shape)
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
    with pytest.raises(TypeError, match="pairs has dtype float64, expected integers"):
        ngame.drop_pairs(matrix, [[0.5, 1]])
