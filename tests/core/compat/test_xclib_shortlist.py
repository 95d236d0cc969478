"""pyxclib's Shortlist over ours."""

from importlib.util import find_spec

import numpy as np
import pytest
import reference

from ngame.compat.xclib.utils.shortlist import Shortlist

needs_hnswlib = pytest.mark.skipif(find_spec("hnswlib") is None, reason="hnswlib is not installed")
HNSWLIB = pytest.param("hnswlib", marks=needs_hnswlib)
METHODS = ("brute", "brute_gpu", HNSWLIB, pytest.param("hnsw", marks=needs_hnswlib))


@pytest.fixture
def vectors(rng):
    items = rng.standard_normal((40, 6)).astype(np.float32)
    return items, rng.standard_normal((7, 6)).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("space", ["cosine", "ip"])
def test_the_nearest(method, space, vectors):
    items, queries = vectors
    before = items.copy(), queries.copy()
    index = Shortlist(method, 5, M=100, efC=300, efS=300, num_threads=2, space=space)
    index.fit(items)
    ids, scores = index.query(queries)
    expected = reference.topk(queries, items, 5, "cosine" if space == "cosine" else "dot")
    assert (ids == expected[1]).all()
    assert ids.dtype == np.int64
    np.testing.assert_allclose(scores, expected[0], rtol=1e-5)
    assert scores.dtype == np.float32
    raw = index.query(queries, return_raw_score=True)[1]
    np.testing.assert_allclose(raw, scores if method == "brute_gpu" else 1 - scores, atol=1e-6)
    assert index.query(queries, num_neighbours=2)[0].shape == (7, 2)
    assert index.query(queries.astype(np.float64))[0].shape == (7, 5)
    assert (items == before[0]).all()
    assert (queries == before[1]).all()


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded(method, vectors, tmp_path):
    items, queries = vectors
    index = Shortlist(method, 3)
    index.fit(items)
    assert index.model_size == items.nbytes / 2**20
    index.save(str(tmp_path / "model.index"))
    other = Shortlist(method, 1)
    other.load(str(tmp_path / "model.index"))
    for one, two in zip(index.query(queries), other.query(queries), strict=True):
        np.testing.assert_array_equal(one, two)
    index.reset()
    assert index.model_size == 0
    with pytest.raises(ValueError, match="nothing is fitted yet"):
        index.query(queries)
    with pytest.raises(ValueError, match="nothing is fitted yet"):
        index.save(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"no index")
    with pytest.raises(ValueError, match="x does not hold an index"):
        other.load(tmp_path / "x")


def test_what_inherits_from_it(vectors):
    """As the trainers do: items without zero rows, ids mapped back."""

    class Valid(Shortlist):
        def __init__(self, method, num_neighbours):
            super().__init__(method, num_neighbours, 100, 300, 300, 16, "cosine")

        def fit(self, X):
            self.valid = np.flatnonzero(np.square(X).sum(axis=1))
            super().fit(X[self.valid])

        def query(self, X):
            ids, similarity = super().query(X)
            return self.valid[ids], similarity

    items, queries = vectors
    items[::2] = 0
    index = Valid("brute", 20)
    index.fit(items)
    ids, _ = index.query(queries)
    assert sorted(ids[0].tolist()) == list(range(1, 40, 2))
    raw, distances = index.index.predict(queries)
    assert (index.valid[raw] == ids).all()
    assert (np.diff(distances, axis=1) >= 0).all()


@pytest.mark.parametrize("method", ["brute", HNSWLIB])
def test_bad_arguments(method, vectors):
    items, queries = vectors
    index = Shortlist(method, 50)
    index.fit(items)
    with pytest.raises(ValueError, match=r"is 50, (items has only|there are) 40"):
        index.query(queries)
    with pytest.raises(ValueError, match="5 columns"):
        index.query(queries[:, :5], num_neighbours=3)
    with pytest.raises(TypeError, match="data has dtype int64"):
        index.fit(np.ones((3, 2), np.int64))
    with pytest.raises(ValueError, match="num_neighbours is 0"):
        index.query(queries, num_neighbours=0)
    queries[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        index.query(queries, num_neighbours=3)
    items[3, 2] = np.inf
    with pytest.raises(ValueError, match="data has NaN or infinity"):
        index.fit(items)
    with pytest.raises(ValueError, match="method is 'faiss', expected one of brute"):
        Shortlist("faiss", 3)
    with pytest.raises(ValueError, match="space is 'l2'"):
        Shortlist(method, 3, space="l2")
    with pytest.raises(ValueError, match="num_neighbours is 0"):
        Shortlist(method, 0)
