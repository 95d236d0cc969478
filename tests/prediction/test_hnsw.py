"""Training and prediction with the approximate index."""

import sys

import numpy as np
import pytest
import tiny

import ngame
from ngame.prediction.hnsw import HnswIndex
from ngame.prediction.model import Model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hnsw") / "run"
    config = tiny.config("prediction.search=hnsw", "prediction.k=10")
    ngame.train(tiny.dataset(), config, folder=folder)
    return folder


def test_predictions_are_nearly_exact(folder, monkeypatch):
    model = Model.load(folder)
    texts = tiny.dataset().test_texts
    monkeypatch.setattr(HnswIndex, "__init__", None)  # the run has the indexes: none is built
    found = model.scores(texts)
    exact = Model.load(folder)
    exact.config = tiny.config("prediction.k=10").prediction
    expected = exact.scores(texts)
    assert found.keys() == expected.keys()
    for name, matrix in found.items():
        # With so few vectors every search reaches all of them.
        np.testing.assert_allclose(matrix.toarray(), expected[name].toarray(), atol=1e-5)


def test_indexes_follow_the_model(folder, tmp_path):
    model = Model.load(folder)
    queries = tiny.dataset().test_texts
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


def test_a_missing_library_is_reported_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = tiny.config("prediction.search=hnsw")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "ngame\[ann\]"'):
        ngame.train(tiny.dataset(), config, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
