"""Exact search: `topk`, `topk_arrays` and `pair_scores`."""

import functools

import numpy as np
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import ngame
from ngame.topk import pair_scores

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
        reference.check_csr(ngame.topk(x[:0], x, 2), np.float32, (0, 4))

    def test_sparse_result(self, rng):
        q = rng.standard_normal((12, 6), dtype=np.float32)
        x = rng.standard_normal((30, 6), dtype=np.float32)
        x[3] = 0
        drop = np.zeros((12, 30), bool)
        drop[0, 4:] = True
        drop[1, :] = True
        found = ngame.topk(q, x, 8, drop=sp.csr_matrix(drop))
        reference.check_csr(found, np.float32, (12, 30))
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
