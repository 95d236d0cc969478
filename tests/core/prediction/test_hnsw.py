"""The approximate index finds nearly what exact search finds, and never a dropped pair."""

import numpy as np
import pytest
import scipy.sparse as sp

import ngame
from ngame.prediction.hnsw import HnswIndex

pytest.importorskip("hnswlib")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def vectors(rng, rows, dim=24):
    x = rng.standard_normal((rows, dim), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def dropped(rng, shape, share):
    return sp.csr_matrix(rng.random(shape) < share, dtype=np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("share", [0, 0.02])
def test_it_finds_nearly_all(rng, dtype, share):
    items, queries = vectors(rng, 3000).astype(dtype), vectors(rng, 50)
    drop = dropped(rng, (50, 3000), share)
    scores, ids = HnswIndex(items, threads=2).search(queries, 20, drop=drop)
    best, exact = ngame.topk_arrays(queries, items, 20, metric="dot", drop=drop)
    assert scores.dtype == np.float32
    assert ids.dtype == np.int32
    missed = sum(len(set(e) - set(f)) for e, f in zip(exact, ids, strict=True))
    assert missed <= 5  # of 1,000
    np.testing.assert_allclose(scores[:, 0], best[:, 0], atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert not drop[np.repeat(np.arange(50), 20), ids.ravel()].any()


def test_fewer_than_asked_for(rng):
    items, queries = vectors(rng, 6), vectors(rng, 4)
    drop = sp.csr_matrix([[1, 1, 1, 1, 0, 1], [0] * 6, [1] * 6, [0, 0, 1, 0, 0, 0]])
    found = HnswIndex(items).search(queries, 9, drop=drop)
    expected = ngame.topk_arrays(queries, items, 6, metric="dot", drop=drop)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)


def test_duplicates(rng):
    items = np.repeat(vectors(rng, 2), 400, axis=0)
    scores, ids = HnswIndex(items).search(items[:3], 300)
    np.testing.assert_allclose(scores, 1, atol=1e-5)
    assert all(len(set(row)) == 300 for row in ids)


def test_exact_search_if_the_graph_reaches_too_few(rng, monkeypatch):
    index = HnswIndex(vectors(rng, 50))
    queries = vectors(rng, 3)

    class Lost:
        def set_ef(self, _):
            pass

        def knn_query(self, *_, **__):
            raise RuntimeError("Cannot return the results in a contiguous 2D array.")

    monkeypatch.setattr(index, "_graph", Lost())
    _, ids = index.search(queries, 5)
    _, exact = ngame.topk_arrays(queries, index.vectors, 5, metric="dot")
    np.testing.assert_array_equal(ids, exact)


def test_saved_and_loaded(rng, tmp_path):
    items, queries = vectors(rng, 500), vectors(rng, 10)
    index = HnswIndex(items)
    index.save(tmp_path / "index")
    again = HnswIndex.load(tmp_path / "index", items)
    for a, b in zip(index.search(queries, 10), again.search(queries, 10), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="has 500 vectors, the model 499"):
        HnswIndex.load(tmp_path / "index", items[1:])
    (tmp_path / "index").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="index is not an index"):
        HnswIndex.load(tmp_path / "index", items)
