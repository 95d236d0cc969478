"""The approximate index: nearly what exact search finds, and never what was left out."""

import sys

import numpy as np
import pytest
import scipy.sparse as sp
import tiny

import ngame
from ngame.encoders.vectors import unit
from ngame.prediction.hnsw import HnswIndex
from ngame.prediction.model import Model


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def vectors(rng, rows, dim=24):
    return unit(rng.standard_normal((rows, dim), dtype=np.float32))


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


def test_copies_of_one_vector(rng):
    items = np.repeat(vectors(rng, 2), 400, axis=0)
    scores, ids = HnswIndex(items).search(items[:3], 300)
    np.testing.assert_allclose(scores, 1, atol=1e-5)
    assert all(len(set(row)) == 300 for row in ids)


def test_a_walk_that_cannot_end_is_made_exact(rng, monkeypatch):
    index = HnswIndex(vectors(rng, 50))
    queries = vectors(rng, 3)

    class Lost:
        def set_ef(self, _):
            pass

        def knn_query(self, *_):
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
    with pytest.raises(ValueError, match="index holds no index"):
        HnswIndex.load(tmp_path / "index", items)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hnsw") / "run"
    config = tiny.config("prediction.search=hnsw", "prediction.k=10")
    ngame.train(tiny.dataset(), config, folder=folder)
    return folder


def test_a_model_predicts_by_it(folder, monkeypatch):
    model = Model.load(folder)
    texts = tiny.dataset().test_texts
    monkeypatch.setattr(HnswIndex, "__init__", None)  # the indexes of the run are read, not made
    found = model.scores(model.encode(texts))
    exact = Model.load(folder)
    exact.config = tiny.config("prediction.k=10").prediction
    expected = exact.scores(exact.encode(texts))
    assert found.keys() == expected.keys()
    for name, matrix in found.items():
        # So few vectors that every walk meets them all.
        np.testing.assert_allclose(matrix.toarray(), expected[name].toarray(), atol=1e-5)


def test_indexes_follow_the_model(folder, tmp_path):
    model = Model.load(folder)
    queries = model.encode(tiny.dataset().test_texts)
    model.point_vectors = model.point_vectors[::-1].copy()
    model.point_labels = model.point_labels[::-1].tocsr()
    before = Model.load(folder).scores(queries)["neighbours"].toarray()
    np.testing.assert_allclose(model.scores(queries)["neighbours"].toarray(), before, atol=1e-5)
    model.save(tmp_path)
    assert sorted(file.name for file in (tmp_path / "index").iterdir()) == [
        "classifier.hnsw",
        "encoder.hnsw",
        "neighbours.hnsw",
    ]
    model.config = tiny.config().prediction
    model.save(tmp_path)
    assert not (tmp_path / "index").exists()


def test_a_missing_library_is_said_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = tiny.config("prediction.search=hnsw")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "ngame\[ann\]"'):
        ngame.train(tiny.dataset(), config, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
