"""pyxclib's Shortlist over ours."""

from importlib.util import find_spec

import numpy as np
import pytest
import reference
import scipy.sparse as sp

from ngame.compat.xclib.utils.ann import HNSW
from ngame.compat.xclib.utils.shortlist import (
    Shortlist,
    ShortlistCentroids,
    ShortlistInstances,
)

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


@pytest.mark.parametrize("method", METHODS)
def test_the_nearest_centroids(method, vectors, rng, tmp_path):
    points, queries = vectors
    labels = sp.csr_matrix(rng.random((40, 9)) < 0.3)
    centroids = (labels.T @ points) / labels.sum(axis=0).reshape(-1, 1)
    index = ShortlistCentroids(method, 4, num_threads=2)
    index.fit(points, labels)
    expected = reference.topk(queries, np.asarray(centroids), 4)
    ids, scores = index.query(queries)
    assert (ids == expected[1]).all()
    np.testing.assert_allclose(scores, expected[0], atol=1e-6)
    assert (index.pad_ind, index.mapping) == (9, None)
    index.save(tmp_path / "x")
    other = ShortlistCentroids(method, 4)
    other.load(str(tmp_path / "x"))
    assert (other.query(queries)[0] == ids).all()
    other.purge(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_several_centroids_a_label(rng, tmp_path):
    # Label 1 has points in two opposite places: their mean is near neither.
    points = np.float32([[0, 0, 1], [1, 0, 0.1], [-1, 0, 0.1], [1, 0, 0.1], [-1, 0, 0.1]])
    labels = sp.csr_matrix(np.array([[1, 0], [0, 1], [0, 1], [0, 1], [0, 1]]))
    index = ShortlistCentroids("brute", 4, num_clusters=2, threshold=3, pad_val=-7)
    index.fit(points, labels)
    assert index.mapping.tolist() == [0, 1, 1, 1]
    for loaded in (False, True):
        if loaded:
            index.save(tmp_path / "x")
            index = ShortlistCentroids("brute", 4)
            index.load(tmp_path / "x")
        ids, scores = index.query(np.float32([[1, 0, 0.1], [-1, 0, 0.1], [0, 0, 1]]))
        assert ids.tolist() == [[1, 0, 2, 2], [1, 0, 2, 2], [0, 1, 2, 2]]
        np.testing.assert_allclose(scores[:2, 0], 1, rtol=1e-6)
        assert (scores[:, 2:] == -7).all()
    few = ShortlistCentroids("brute", 2, num_clusters=2, threshold=4)
    few.fit(points, labels)
    assert few.mapping is None
    with pytest.raises(TypeError, match="labels is a ndarray"):
        few.fit(points, labels.toarray())


@pytest.mark.parametrize("method", METHODS)
def test_the_labels_of_the_nearest_points(method, vectors, rng, tmp_path):
    points, queries = vectors
    points[3] = 0
    truth = rng.random((40, 9)) < 0.2
    truth[5] = False
    labels = sp.csr_matrix(truth)
    index = ShortlistInstances(method, 3, efS=6, num_threads=2, pad_val=-1)
    index.fit(points, labels)
    ids, scores = index.query(queries)
    valid = np.flatnonzero(truth.any(axis=1) & points.any(axis=1))
    near_scores, near = reference.topk(queries, points[valid], 6)
    for row in range(7):
        votes = near_scores[row] @ truth[valid[near[row]]]
        found = np.flatnonzero(truth[valid[near[row]]].any(axis=0))
        expected = found[np.argsort(-votes[found], kind="stable")][:3]
        count = len(expected)
        assert ids[row, :count].tolist() == expected.tolist()
        assert (ids[row, count:] == 9).all()
        assert (scores[row, count:] == -1).all()
        np.testing.assert_allclose(
            scores[row, :count], votes[expected] / np.abs(votes[found]).max(), rtol=1e-4
        )
    index.save(tmp_path / "x")
    other = ShortlistInstances(method, 1)
    other.load(tmp_path / "x")
    assert (other.query(queries)[0] == ids).all()
    assert other.query(queries, num_neighbours=2)[0].shape == (7, 2)
    other.purge(str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


def test_points_and_centroids_reject(vectors, tmp_path):
    points, queries = vectors
    index = ShortlistInstances("brute", 3)
    with pytest.raises(ValueError, match="nothing is fitted yet"):
        index.query(queries)
    with pytest.raises(ValueError, match="nothing is fitted yet"):
        index.save(tmp_path / "x")
    with pytest.raises(ValueError, match="features has 40 rows, labels has 3"):
        index.fit(points, sp.csr_matrix(np.eye(3)))
    (tmp_path / "x.metadata").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"x.metadata does not hold a shortlist"):
        index.load(tmp_path / "x")


@needs_hnswlib
def test_the_index_of_its_own(vectors, tmp_path):
    items, queries = vectors
    index = HNSW(M=100, efC=300, efS=300, num_neighbours=5, num_threads=2)
    index.fit(items, print_progress=False)
    ids, distances = index.predict(queries)
    expected = reference.topk(queries, items, 5)
    assert (ids == expected[1]).all()
    np.testing.assert_allclose(distances, 1 - expected[0], atol=1e-6)
    assert index.predict(queries, efS=10, num_neighbours=2)[0].shape == (7, 2)
    index.save(tmp_path / "x")
    other = HNSW(100, 300, 300, 5, 0)
    other.load(tmp_path / "x")
    assert (other.predict(queries)[0] == ids).all()
