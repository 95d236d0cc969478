"""Prediction: scorers against brute force, chunks, dropped pairs, and the files of a run."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import safetensors.numpy
import scipy.sparse as sp
import tiny
import torch

import ngame
from ngame.config import SCORERS, PredictionConfig
from ngame.encoders.load import load_encoder
from ngame.prediction import model as model_module
from ngame.prediction.fusion import Fusion
from ngame.prediction.lexical import Lexical
from ngame.prediction.model import Explanation, Model


@pytest.fixture(scope="module")
def dataset():
    """The tiny data, with the first word of a label as its title."""
    texts = tiny.dataset().label_texts
    return tiny.dataset(label_titles=[text.split()[0] for text in texts])


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "run"
    ngame.train(dataset, tiny.config("prediction.k=10", "prediction.neighbours=20"), folder=folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return Model.load(folder)


def equal(a, b):
    """Whether two CSR matrices are bit for bit the same."""
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("indptr", "indices", "data")
    )


def slow_votes(model, vectors):
    """Softmax-weighted votes of the nearest points, dense."""
    similar = vectors.astype(float) @ model.point_vectors.astype(float).T
    votes = np.zeros((len(vectors), len(model.label_texts)))
    labels = model.point_labels.toarray()
    for row, scores in enumerate(similar):
        near = np.argsort(-scores, kind="stable")[: model.config.neighbours]
        weights = np.exp(scores[near] / model.config.vote_temperature)
        votes[row] = weights / weights.sum() @ labels[near]
    return votes


def slow_cosines(model, texts):
    """TF-IDF cosines of texts with labels, and with training points, dense."""
    queries = model.lexical.tfidf(texts).toarray()
    return queries @ model.lexical.labels.T.toarray(), queries @ model.lexical.points.T.toarray()


def slow_title_cosines(model, texts):
    """TF-IDF cosines of texts with the titles of labels, dense."""
    titles = [text.split()[0] for text in model.label_texts]
    return model.lexical.tfidf(texts).toarray() @ model.lexical.tfidf(titles).T.toarray()


def slow_tfidf_votes(model, texts):
    """Votes of the points nearest by TF-IDF, weighted by their squared cosines, dense."""
    similar = slow_cosines(model, texts)[1]
    votes = np.zeros((len(texts), len(model.label_texts)))
    labels = model.point_labels.toarray()
    for row, scores in enumerate(similar):
        near = np.argsort(-scores, kind="stable")[: model.config.neighbours]
        weights = scores[near].astype(float) ** 2
        votes[row] = weights / max(weights.sum(), 1e-30) @ labels[near]
    return votes


def slow_linear(model, texts):
    """Scores of the linear classifiers, dense."""
    return model.lexical.tfidf(texts).toarray() @ model.lexical.weights.T.toarray()


def slow_spread(model, candidates, features):
    """What probable labels say of all others, dense."""
    base, rows = model.fusions["base"], candidates.nonzero()[0]
    likely = np.zeros(candidates.shape)
    likely[candidates.nonzero()] = base.probabilities(base(features), rows)
    likely[likely < np.sort(likely, axis=1)[:, -20:-19]] = 0
    labels = model.point_labels.toarray()
    return likely @ ((labels.T @ labels) / (labels.sum(axis=0)[:, None] + 2))


def assert_best(found, scores, k):
    """Check for the k highest non-zero scores of each row; nearly equal scores may swap."""
    for row, values in enumerate(scores):
        expected = np.sort(values[values != 0])[::-1][:k]
        entries = found[row]
        np.testing.assert_allclose(np.sort(entries.data)[::-1], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(values[entries.indices], entries.data, rtol=1e-4, atol=1e-6)


def test_encode(model, dataset):
    vectors = model.encode(dataset.test_texts)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(model.encode(dataset.label_texts), model.label_vectors, atol=1e-6)


def test_scorers_are_exact(model, dataset):
    vectors = model.encode(dataset.test_texts)
    found = model.scores(dataset.test_texts)
    assert set(found) == set(model.scorers) == {*SCORERS, "fused"}
    assert_best(found["encoder"], vectors @ model.label_vectors.T, 10)
    assert_best(found["classifier"], vectors @ model.classifier.T, 10)
    assert_best(found["neighbours"], slow_votes(model, vectors), 10)
    assert_best(found["tfidf"], slow_cosines(model, dataset.test_texts)[0], 10)
    assert_best(found["tfidf_title"], slow_title_cosines(model, dataset.test_texts), 10)
    assert_best(found["tfidf_neighbours"], slow_tfidf_votes(model, dataset.test_texts), 10)
    assert_best(found["tfidf_classifier"], slow_linear(model, dataset.test_texts), 10)


def test_fused_is_the_weighted_sum(model, dataset):
    texts = dataset.test_texts[:20]
    vectors = model.encode(texts)
    encoder, classifier = vectors @ model.label_vectors.T, vectors @ model.classifier.T
    features = {
        "encoder": encoder,
        "classifier": classifier,
        "neighbours": slow_votes(model, vectors),
        "log neighbours": np.log(slow_votes(model, vectors) + 1e-3),
        "tfidf": slow_cosines(model, texts)[0],
        "tfidf_title": slow_title_cosines(model, texts),
        "tfidf_neighbours": slow_tfidf_votes(model, texts),
        "log tfidf_neighbours": np.log(slow_tfidf_votes(model, texts) + 1e-2),
        "tfidf_classifier": slow_linear(model, texts),
    }
    base = model.fusions["base"]
    assert base.weights.keys() == features.keys()
    pattern, found, proposed = model.candidates(texts, vectors)
    candidates = sum(abs(matrix) for matrix in proposed.values()).toarray() > 0
    assert (candidates == (pattern.toarray() != 0)).all()
    spreads = slow_spread(model, pattern, found)
    assert_best(proposed["co_occurrence"], np.where(candidates, spreads, 0), 10)
    features["log co_occurrence"] = np.log(np.minimum(spreads, 0.1) + 1e-3)
    weights = model.fusions["all"].weights
    assert weights.keys() == features.keys()
    fused = sum(weights[name] * features[name] for name in features)
    assert_best(model.scores(texts)["fused"], np.where(candidates, fused, 0), 10)


@pytest.mark.parametrize("seen", [False, True])
def test_k_does_not_change_the_ranking(model, dataset, seen):
    """Fewer labels are the first of more: the pairs to fuse do not depend on k."""
    most = model.scores(dataset.test_texts, tiny.LABELS, seen=seen)
    for k in (1, 2, 7, 10, 15):
        for scorer, found in model.scores(dataset.test_texts, k, seen=seen).items():
            first = ngame.keep_topk(most[scorer], k)
            assert equal(found, first), (scorer, k)


def test_probabilities_rank_as_the_scores(model, dataset):
    scores = model.predict(dataset.test_texts, 5)
    found = model.predict(dataset.test_texts, 5, probabilities=True)
    assert np.array_equal(found.indices, scores.indices)
    assert ((found.data > 0) & (found.data <= 1)).all()
    for row in range(60):
        assert (np.diff(found[row].data[np.argsort(scores[row].data)]) >= 0).all()
    # They do not depend on k, as they are of all candidates.
    most = model.predict(dataset.test_texts, probabilities=True)
    assert equal(ngame.keep_topk(most, 5), found)
    with pytest.raises(ValueError, match="probabilities are of fused scores, scorer is 'encoder'"):
        model.predict(["a"], scorer="encoder", probabilities=True)


def test_predict_gives_the_scores(model, dataset):
    found = model.scores(dataset.test_texts)
    for scorer in model.scorers:
        predicted = model.predict(dataset.test_texts, scorer=scorer)
        assert equal(predicted, found[scorer])
        assert predicted.shape == (60, tiny.LABELS)
        assert predicted.dtype == np.float32
        assert predicted.has_sorted_indices
    assert equal(model.predict(dataset.test_texts), found["fused"])


def test_an_index_is_built_once_for_each_scorer(folder, dataset, monkeypatch):
    built = []

    class CountedIndex(ngame.ExactIndex):
        def __init__(self, items, *arguments, **options):
            built.append(items)
            super().__init__(items, *arguments, **options)

    monkeypatch.setattr(model_module, "ExactIndex", CountedIndex)
    model = Model.load(folder)
    first = model.scores(dataset.test_texts)
    again = model.scores(dataset.test_texts)
    assert all(equal(first[scorer], again[scorer]) for scorer in first)
    assert len(built) == 3
    # New vectors get a new index.
    model.label_vectors = model.label_vectors[::-1].copy()
    changed = model.scores(dataset.test_texts)["encoder"]
    np.testing.assert_array_equal(changed.toarray()[:, ::-1], first["encoder"].toarray())
    assert len(built) == 4
    assert built[3] is model.label_vectors


def test_some_scorers_of_all(model, dataset):
    every = model.scores(dataset.test_texts, probabilities=True)
    some = model.scores(dataset.test_texts, scorers=["fused", "tfidf"], probabilities=True)
    assert list(some) == ["fused", "tfidf"]
    assert all(equal(some[name], every[name]) for name in some)
    (one,) = model.scores(dataset.test_texts, scorers=["encoder"], probabilities=True).values()
    assert equal(one, every["encoder"])


def test_k(model, dataset):
    assert (np.diff(model.predict(dataset.test_texts).indptr) == 10).all()
    few = model.predict(dataset.test_texts, 3)
    assert (np.diff(few.indptr) == 3).all()
    everything = model.predict(dataset.test_texts, tiny.LABELS, scorer="encoder")
    assert (np.diff(everything.indptr) == tiny.LABELS).all()
    more = model.predict(dataset.test_texts, 1000, scorer="encoder")
    assert (more != everything).nnz == 0
    assert len(model.explain(dataset.test_texts[0], 1000)) <= tiny.LABELS
    with pytest.raises(ValueError, match="k is 0"):
        model.predict(dataset.test_texts, 0)


def test_chunks_change_nothing(model, dataset, monkeypatch):
    drop = np.array([[0, 1], [6, 2], [7, 3], [59, 4]])
    whole = model.scores(dataset.test_texts, drop=drop)
    monkeypatch.setattr(model_module, "_QUERIES_PER_CHUNK", 7)
    monkeypatch.setattr(ngame.encoders.vectors, "_PAIRS_PER_CHUNK", 5)
    parts = model.scores(dataset.test_texts, drop=drop)
    assert all(equal(whole[scorer], parts[scorer]) for scorer in whole)


@pytest.mark.parametrize("form", ["pairs", "pairs given twice", "matrix", "weighted matrix"])
def test_dropped_pairs_are_never_predicted(model, dataset, form):
    before = model.scores(dataset.test_texts, 3)
    top = [(row, int(label)) for row in range(60) for label in before["fused"][row].indices]
    drop = {
        "pairs": np.array(top),
        "pairs given twice": np.array(top + top[:5]),
        "matrix": before["fused"],
        "weighted matrix": before["fused"] * 0.25,
    }[form]
    for scorer, found in model.scores(dataset.test_texts, 3, drop=drop).items():
        rows = np.repeat(np.arange(60), np.diff(found.indptr))
        assert not set(zip(rows.tolist(), found.indices.tolist(), strict=True)) & set(top), scorer
        # A text may share words with fewer labels.
        assert np.diff(found.indptr).max() == 3 or scorer.startswith("tfidf")


def test_labels_without_points_are_found_by_their_words(dataset):
    y = dataset.train_labels.tolil()
    y[:, 5] = 0
    changed = tiny.dataset(train_labels=y.tocsr())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # points without a label
        model = ngame.train(changed, tiny.config('prediction.scorers=["tfidf"]'))
    found = model.predict([dataset.label_texts[5]], 1)
    assert found.indices.tolist() == [5]


@tiny.few_held_out
def test_held_out_points_without_any_candidate(dataset):
    """Labels are numbers, and the only scorer goes by the words of their texts."""
    names = [f"n{label}" for label in range(tiny.LABELS)]
    numbered = ngame.Dataset(dataset.train_texts, dataset.train_labels, names)
    model = ngame.train(numbered, tiny.config('prediction.scorers=["tfidf"]'))
    assert model.predict(["no word of a label", "n7"]).toarray().argmax(axis=1).tolist() == [0, 7]


def test_training_texts_get_no_votes_of_neighbours(model, dataset):
    found = model.scores(dataset.train_texts[:30], seen=True)
    serving = {"encoder", "classifier", "tfidf", "tfidf_title"}
    assert set(found) == {*serving, "fused"}
    assert set(model.fusions["trained"].weights) == serving
    predicted = model.predict(dataset.train_texts[:30], seen=True)
    unseen = model.predict(dataset.train_texts[:30])
    assert not equal(predicted, unseen)
    with pytest.raises(ValueError, match="scorer is 'neighbours', expected one of encoder, class"):
        model.predict(dataset.train_texts, scorer="neighbours", seen=True)


@pytest.mark.parametrize(
    "settings",
    [
        ['prediction.scorers=["tfidf_title"]'],
        ['prediction.scorers=["tfidf_title", "classifier"]', "classifier_stage.epochs=0"],
    ],
)
def test_scorers_that_cannot_be_end_a_run_before_it_begins(settings, monkeypatch):
    monkeypatch.setattr("ngame.training.loops.train_encoder", None)  # not reached
    with pytest.raises(ValueError, match=r"scorers is \['.*tfidf_title'\], and there are none"):
        ngame.train(tiny.dataset(), tiny.config(*settings))


def test_scorers_that_are_off(dataset, tmp_path):
    """They are not in the fusion, and the run holds nothing for TF-IDF."""
    config = tiny.config("prediction.k=10", 'prediction.scorers=["tfidf", "encoder"]')
    model = ngame.train(dataset, config, folder=tmp_path / "run")
    for one in (model, Model.load(tmp_path / "run")):
        assert one.scorers == ("encoder", "tfidf", "fused")
        assert set(one.fusions["all"].weights) == {"encoder", "tfidf"}
        assert set(one.metrics) == {"encoder", "tfidf", "fused"}
    assert (tmp_path / "run" / "lexical.safetensors").exists()
    config = tiny.config('prediction.scorers=["neighbours"]')
    model = ngame.train(dataset, config)
    assert model.scorers == ("neighbours", "fused")
    assert model.lexical is None
    with pytest.raises(ValueError, match="scorer is 'encoder', expected one of neighbours, fused"):
        model.predict(["a"], scorer="encoder")
    with pytest.raises(ValueError, match="no scorer is on that serves training points"):
        model.predict(["a"], seen=True)


def test_runs_from_before_tfidf_predict_as_they_did(folder, dataset, tmp_path):
    """Without its file, and with weights of the three other scorers alone."""
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    (old / "lexical.safetensors").unlink()
    weights = {"encoder": 2.0, "classifier": 1.0, "neighbours": 3.0}
    trained = {"encoder": 1.0, "classifier": 1.0}
    (old / "fusion.json").write_text(json.dumps({"all": weights, "trained": trained}))
    settings = (old / "config.toml").read_text()
    (old / "config.toml").write_text(
        "".join(line for line in settings.splitlines(True) if not line.startswith("scorers"))
    )
    model = Model.load(old)
    assert model.scorers == ("encoder", "classifier", "neighbours", "fused")
    vectors = model.encode(dataset.test_texts)
    expected = 2 * vectors @ model.label_vectors.T + vectors @ model.classifier.T
    expected += 3 * slow_votes(model, vectors)
    found = model.scores(dataset.test_texts)
    candidates = sum(abs(found[name]) for name in weights).toarray() > 0
    assert_best(found["fused"], np.where(candidates, expected, 0), 10)


def test_unknown_scorer(model):
    message = "scorer is 'bm25', expected one of encoder, classifier, n"
    with pytest.raises(ValueError, match=message):
        model.predict(["a"], scorer="bm25")
    with pytest.raises(ValueError, match=message):
        model.scores(["a"], scorers=["fused", "bm25"])


@pytest.mark.parametrize("seen", [False, True])
def test_no_texts(model, seen):
    assert model.predict([], seen=seen).shape == (0, tiny.LABELS)
    remembering = {"neighbours", "tfidf_neighbours", "tfidf_classifier", "co_occurrence"}
    scorers = set(model.scorers) - (remembering if seen else set())
    assert set(model.scores([], seen=seen)) == scorers


def test_a_single_string_is_rejected(model):
    with pytest.raises(TypeError, match="texts is a str"):
        model.predict("one text")


def test_one_matrix_to_evaluate(model, dataset):
    with pytest.raises(TypeError, match="predictions is a csr_matrix, expected a mapping of names"):
        model.evaluate(model.predict(dataset.test_texts), dataset.test_labels)


def test_a_lone_surrogate_is_rejected(model):
    message = r"texts\[1\] holds a lone surrogate, which is no character"
    for call in (model.predict, model.encode):
        with pytest.raises(ValueError, match=message):
            call(["ba", "b\udce9"])
    with pytest.raises(ValueError, match=message.replace("1", "0")):
        model.explain("\ud800")


def test_texts_without_known_tokens(model):
    found = model.predict(["", "\u200b", "\u4e16\u754c"], 5)
    assert (np.diff(found.indptr) == 5).all()
    assert np.isfinite(found.data).all()


def test_explanations_add_up(model, dataset):
    text = dataset.test_texts[3]
    found = model.explain(text, 4)
    predicted = model.predict([text], 4)
    assert {one.label: pytest.approx(one.score) for one in found} == dict(
        zip(predicted.indices, predicted.data, strict=True)
    )
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    _, features, _ = model.candidates([text], model.encode([text]))
    mean = model.fusions["all"](features).mean()
    terms = model.lexical.tfidf([text])
    for one in found:
        assert one.text == model.label_texts[one.label]
        assert set(one.parts) == set(model.scorers) - {"fused"}
        assert sum(one.parts.values()) == pytest.approx(one.score - mean, abs=1e-4)
        assert set(one.points) == {"neighbours", "tfidf_neighbours"}
        for name, points in one.points.items():
            near = model._voters(name, model.encode([text]), terms)
            votes = (near @ model.point_labels)[0, one.label]
            assert sum(share for _, share in points) == pytest.approx(votes, abs=1e-6)
            assert all(dataset.train_labels[row, one.label] for row, _ in points)
            assert [share for _, share in points] == sorted((s for _, s in points), reverse=True)


def test_an_explanation_names_rows_of_the_training_set(dataset, tmp_path):
    """Points without a label are dropped, and count."""
    labels = dataset.train_labels.tolil()
    labels[:9] = 0
    labels = labels.tocsr()
    less = ngame.Dataset(dataset.train_texts, labels, dataset.label_texts)
    with pytest.warns(UserWarning, match="training points have no label"):
        ngame.train(less, tiny.config(), folder=tmp_path / "run")
    for one in Model.load(tmp_path / "run").explain(dataset.test_texts[3], 4):
        assert any(one.points.values())
        for points in one.points.values():
            assert all(labels[row, one.label] for row, _ in points)


def test_labels_of_other_points_speak_for_others(folder, dataset):
    """The counts follow the points."""
    model = Model.load(folder)
    before = model.scores(dataset.test_texts)
    model.point_labels = model.point_labels[:, ::-1].tocsr()
    after = model.scores(dataset.test_texts)
    assert equal(before["tfidf"], after["tfidf"])
    assert not equal(before["co_occurrence"], after["co_occurrence"])


def test_an_explanation_is_short_in_print():
    points = {"neighbours": [(7, 0.5), (3, 0.2), (9, 0.1), (4, 0.1)], "tfidf_neighbours": []}
    parts = {"encoder": 0.5, "classifier": -2, "neighbours": 1.25, "tfidf": 0.1, "co_occurrence": 3}
    assert str(Explanation(2, "soup", 8.25, parts, points)).splitlines() == [
        "soup  8.250",
        "  co_occurrence +3.00, classifier -2.00, neighbours +1.25, encoder +0.50",
        "  neighbours: training rows 7, 3, 9, ...",
    ]


def test_explain_checks_its_arguments(model):
    with pytest.raises(TypeError, match="text is a list, expected a str"):
        model.explain(["ba"])
    with pytest.raises(ValueError, match="k is 0, expected 1 or more"):
        model.explain("ba", 0)


@pytest.fixture(scope="module")
def unseen(dataset):
    """A model that three labels were kept from, the same with them, and the test points' truth."""
    seen, hidden = np.arange(21), np.arange(21, 24)
    labels = dataset.train_labels.tocsr()
    rows = np.flatnonzero(labels[:, seen].getnnz(axis=1))
    part = ngame.Dataset(
        [dataset.train_texts[row] for row in rows],
        labels[rows][:, seen],
        dataset.label_texts[:21],
        label_titles=dataset.label_titles[:21],
    )
    before = ngame.train(part, tiny.config())
    more, titles = (
        [texts[label] for label in hidden] for texts in (dataset.label_texts, dataset.label_titles)
    )
    return before, before.with_labels(more, titles=titles), hidden


def test_with_labels(unseen, dataset):
    """Every scorer of texts finds the new labels; the others score old labels as before."""
    before, after, hidden = unseen
    texts, k = dataset.test_texts, len(after.label_texts)
    assert after.label_texts == dataset.label_texts
    found, old = after.scores(texts, k), before.scores(texts, k)
    vectors = after.encode(texts)
    expected = vectors @ after.encode(dataset.label_texts).T
    np.testing.assert_allclose(found["encoder"].toarray(), expected, rtol=1e-4, atol=1e-6)
    for scorer, matrix in found.items():
        if scorer in ("fused", "co_occurrence"):  # the new labels are among what they compare
            continue
        np.testing.assert_allclose(
            matrix.toarray()[:, :21], old[scorer].toarray(), rtol=1e-6, atol=1e-7
        )
        by_text = scorer in ("encoder", "classifier", "tfidf", "tfidf_title")
        assert matrix[:, hidden].count_nonzero() > 0 if by_text else matrix[:, hidden].nnz == 0
    assert before.new_labels == 0
    assert len(before.label_vectors) == 21
    titles = slow_title_cosines(after, texts)
    np.testing.assert_allclose(found["tfidf_title"].toarray(), titles, rtol=1e-4, atol=1e-6)
    # Without titles the whole texts are compared.
    plain = before.with_labels(after.label_texts[21:]).predict(texts, k, scorer="tfidf_title")
    whole = slow_cosines(after, texts)[0][:, hidden]
    np.testing.assert_allclose(plain.toarray()[:, hidden], whole, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["tfidf"].toarray()[:, hidden], whole, rtol=1e-4, atol=1e-6)


def test_new_labels_compete_with_those_of_training(unseen, dataset):
    """Without an estimate of what points would say they come behind."""
    _, after, hidden = unseen
    truth = dataset.test_labels.tocsr()[:, hidden]
    rows = np.flatnonzero(truth.getnnz(axis=1))
    texts = [dataset.test_texts[row] for row in rows]

    def found(model):
        best = model.predict(texts, 1).astype(bool)[:, hidden]
        return best.multiply(truth[rows]).sum() / truth.nnz

    plain = {
        name: dataclasses.replace(fusion, of_new=None) for name, fusion in after.fusions.items()
    }
    assert found(after) > 1.5 * found(dataclasses.replace(after, fusions=plain)) > 0


def test_new_labels_are_explained_and_kept(unseen, dataset, tmp_path):
    _, after, hidden = unseen
    row = dataset.test_labels.tocsc()[:, hidden[0]].indices[0]
    text = dataset.test_texts[row]
    scores = after.predict([text], 24)
    for explanation in after.explain(text, 24):
        assert explanation.score == scores[0, explanation.label]
        assert sum(explanation.parts.values()) == pytest.approx(
            explanation.score - scores.data.mean(), abs=1e-4
        )
    dataclasses.replace(after, metrics={"fused": {"P@1": 1.0}}).save(tmp_path / "run")
    after.save(tmp_path / "run")
    loaded = Model.load(tmp_path / "run")
    assert loaded.run_config == tiny.config()  # of the run, not the defaults
    assert loaded.new_labels == 3
    assert loaded.metrics == {}
    assert equal(loaded.predict(dataset.test_texts), after.predict(dataset.test_texts))
    again = loaded.with_labels(["another one"])
    assert again.new_labels == 4
    assert again.predict(["another one"], 1).indices.tolist() == [24]
    assert equal(after.with_labels([]).predict([text]), after.predict([text]))


def test_with_labels_checks_its_arguments(model):
    with pytest.raises(TypeError, match="texts is a str, expected a sequence of str"):
        model.with_labels("ba")
    with pytest.raises(ValueError, match="titles has 1 entries, texts has 2"):
        model.with_labels(["x", "y"], titles=["x"])
    with pytest.raises(ValueError, match="texts has an empty text"):
        model.with_labels(["x", " "])
    for texts in (["x ", "x"], ["y", model.label_texts[0]]):
        with pytest.raises(ValueError, match=f"texts has '{texts[1]}', which is a label already"):
            model.with_labels(texts)


def test_evaluate(model, dataset):
    found = model.scores(dataset.test_texts)
    scored = model.evaluate(found, dataset.test_labels, ks=[1, 5])
    truth = dataset.test_labels.toarray()
    for scorer, matrix in found.items():
        best = ngame.keep_topk(matrix, 1).astype(bool).toarray()
        assert scored[scorer]["P@1"] == pytest.approx((truth * best).sum() / 60)
        assert {"P@5", "N@1", "R@5", "PSP@1", "PSN@5"} <= scored[scorer].keys()
    weights = ngame.metrics.inverse_propensity(dataset.train_labels)
    expected = ngame.metrics.evaluate(
        found["fused"], dataset.test_labels, ks=[1, 5], inverse_propensity=weights
    )
    assert scored["fused"] == expected
    wrong = ngame.keep_topk(found["encoder"], 1).astype(bool) > dataset.test_labels.astype(bool)
    dropped = model.evaluate(found, dataset.test_labels, ks=[1], drop=sp.csr_matrix(wrong))
    assert dropped["encoder"]["P@1"] > scored["encoder"]["P@1"]


def test_metrics_file(folder, model):
    written = json.loads((folder / "metrics.json").read_text())
    families = ("P", "N", "MRR", "MAP", "HR", "PSP", "PSN")
    assert written == model.metrics
    names = {f"{family}@{k}" for family in families for k in (1, 3, 5)}
    for scorer in (*SCORERS, "fused"):
        assert set(written[scorer]) == names | {"R@10", "R@100"}


def test_save_and_load_predict_the_same(model, dataset, folder, tmp_path):
    trained = ngame.train(dataset, tiny.config("prediction.k=10", "prediction.neighbours=20"))
    trained.save(tmp_path / "copy")
    copy = Model.load(tmp_path / "copy")
    for loaded in (model, copy):
        before = trained.scores(dataset.test_texts)
        after = loaded.scores(dataset.test_texts)
        assert before.keys() == after.keys()
        assert all(equal(before[scorer], after[scorer]) for scorer in before)
        assert loaded.metrics == trained.metrics
        assert loaded.label_texts == dataset.label_texts
    copy.save(tmp_path / "copy")  # over itself
    assert Model.load(tmp_path / "copy").config == trained.config


def test_saving_over_a_model_leaves_one_of_the_two(dataset, folder, tmp_path, monkeypatch):
    """Wherever it stops: the old one or none until the last file is there, never a mixture."""
    settings = "seed=1", "prediction.k=10", "prediction.neighbours=20"
    other = ngame.train(dataset, tiny.config(*settings))
    wanted = [Model.load(folder).predict(dataset.test_texts), other.predict(dataset.test_texts)]
    replace, states, stop_at = os.replace, [], 0

    def stops(source, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stops)
    while not states or states[-1] != "new":
        copy, left = tmp_path / str(stop_at), stop_at
        shutil.copytree(folder, copy)
        with contextlib.suppress(KeyboardInterrupt):
            other.save(copy)
        try:
            found = Model.load(copy).predict(dataset.test_texts)
        except FileNotFoundError:
            states.append("none")
        else:
            states.append("old" if equal(found, wanted[0]) else "new")
            assert equal(found, wanted[states[-1] == "new"])
        assert not list(copy.rglob(".partial-*"))
        stop_at += 1
    assert [state for state, _ in itertools.groupby(states)] == ["old", "none", "new"]
    assert len(states) > 10


def test_saving_that_fails_keeps_the_old_model(dataset, folder, model, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "copy")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model_module.fusion, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        model.save(tmp_path / "copy")
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", full)
    named = f"{tmp_path / 'copy' / 'config.toml'}"
    (tmp_path / "copy" / "config.toml").unlink()
    with pytest.raises(OSError, match=re.escape(f"{named} cannot be written: No space")):
        model.save(tmp_path / "copy")
    shutil.copy(folder / "config.toml", named)
    named = re.escape(f"{tmp_path / 'copy'}/")
    with pytest.raises(OSError, match=rf"^{named}[^.].* cannot be written: No space"):
        model.save(tmp_path / "copy")
    monkeypatch.undo()
    assert equal(
        Model.load(tmp_path / "copy").predict(dataset.test_texts), model.predict(dataset.test_texts)
    )


def test_saving_over_links(dataset, folder, model, tmp_path):
    """They are replaced, and what they lead to stays."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(folder, run)
    elsewhere.mkdir()
    for name in ("encoder", "vectors.safetensors", "fusion.json"):
        shutil.move(run / name, elsewhere / name)
        (run / name).symlink_to(elsewhere / name)
    before = sorted(elsewhere.rglob("*"))
    model.save(run)
    assert not (run / "encoder").is_symlink()
    assert sorted(elsewhere.rglob("*")) == before
    assert equal(Model.load(run).predict(dataset.test_texts), model.predict(dataset.test_texts))


@pytest.mark.parametrize(
    ("file", "shape", "expected"),
    [
        ("lexical", r"\(25, \d+\)", r"\(24, \d+\)"),
        ("classifier", r"\(24, 8\)", r"\(24, 16\)"),
        ("vectors", r"\(24, 8\)", r"\(24, 16\)"),
    ],
)
def test_files_of_two_models_are_told(dataset, folder, tmp_path, file, shape, expected):
    """Where a file was swapped by hand."""
    shutil.copytree(folder, tmp_path / "copy")
    settings = "encoder.dim=8", "prediction.scorers=['classifier', 'tfidf']"
    other = ngame.train(dataset, tiny.config(*settings))
    if file == "lexical":
        other = other.with_labels(["one more"])
    other.save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / f"{file}.safetensors", tmp_path / "copy")
    if file == "vectors":  # or its classifier would be seen first
        (tmp_path / "copy" / "classifier.safetensors").unlink()
        shutil.copy(tmp_path / "other" / "classifier.safetensors", tmp_path / "copy")
    message = rf"{file}\.safetensors is damaged: it is of another model: shape {shape}, expected "
    with pytest.raises(ValueError, match=message + expected):
        Model.load(tmp_path / "copy")


@pytest.mark.parametrize("file", ["classifier", "lexical"])
def test_a_file_that_was_not_copied(folder, tmp_path, file):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / f"{file}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file}\.safetensors: no such file, and .*needs"):
        Model.load(tmp_path / "copy")


def test_a_rotten_byte_is_told(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "lexical.safetensors"
    arrays = safetensors.numpy.load_file(path)
    arrays["points.indices"][3] = 1 << 22
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(ValueError, match=r"lexical\.safetensors is damaged: indices must be <"):
        Model.load(tmp_path / "copy")


def test_evaluate_takes_what_metrics_take(model, dataset):
    """And refuses what they refuse: nothing is cut or widened on the way."""
    truth, found = dataset.test_labels, model.predict(dataset.test_texts)
    expected = ngame.metrics.evaluate(found, truth, ks=[1])["P@1"]
    pairs = ngame.topk_arrays(model.encode(dataset.test_texts), model.label_vectors, 5)
    for given, wanted in ((found.toarray(), expected), (pairs, None)):
        scores = model.evaluate({"own": given}, truth, ks=[1])["own"]
        assert scores["PSP@1"] > 0
        assert wanted is None or scores["P@1"] == wanted
    for wrong in (found[:, :10], sp.hstack([found, found], format="csr")):
        with pytest.raises(ValueError, match="truth has shape"):
            model.evaluate({"own": wrong}, truth, ks=[1])
    with pytest.raises(TypeError, match="csc"):
        model.evaluate({"own": found.tocsc()}, truth, ks=[1])


def test_words_alone_need_no_encoder(folder, dataset, model, monkeypatch):
    expected = model.scores(dataset.test_texts, scorers=["tfidf", "tfidf_neighbours"])
    monkeypatch.setattr(Model, "encode", None)
    alone = Model.load(folder).scores(dataset.test_texts, scorers=["tfidf", "tfidf_neighbours"])
    assert all(equal(alone[name], expected[name]) for name in expected)


def test_threshold(model, dataset):
    every = model.predict(dataset.test_texts, probabilities=True)
    found = model.predict(dataset.test_texts, probabilities=True, threshold=0.3)
    assert 0 < found.nnz < every.nnz
    assert found.toarray().tolist() == np.where(every.toarray() >= 0.3, every.toarray(), 0).tolist()
    with pytest.raises(ValueError, match="it needs probabilities=True"):
        model.predict(["a"], threshold=0.3)
    with pytest.raises(ValueError, match="threshold is nan, expected a probability"):
        model.predict(["a"], probabilities=True, threshold=np.nan)


def test_a_scorer_alone_asks_no_other(folder, dataset, model, monkeypatch):
    """The others' indexes are not even made, which takes most of the time of a first prediction."""
    all_of_them = model.scores(dataset.test_texts, 5)
    for scorer in SCORERS:
        alone = Model.load(folder)
        assert equal(alone.predict(dataset.test_texts, 5, scorer=scorer), all_of_them[scorer])
    made = []
    index = Lexical.index
    monkeypatch.setattr(Lexical, "index", lambda self, name: made.append(name) or index(self, name))
    monkeypatch.setattr(Model, "candidates", None)
    alone = Model.load(folder)
    alone.predict(dataset.test_texts, scorer="encoder")
    assert made == []
    alone.scores(dataset.test_texts, scorers=["tfidf", "classifier"])
    assert made == ["tfidf"]


def test_loading_and_asking_does_not_import_the_compiler(folder):
    """PyTorch's takes longer than both."""
    code = """
        import sys, ngame
        ngame.Model.load(sys.argv[1]).predict(["a text"])
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), folder], check=True)


def test_labels_with_line_breaks_come_back(tmp_path):
    texts = ["a\nb", "c\u2028d", 'e"\\', "Öl"]
    eye = np.eye(4, dtype=np.float32)
    model = Model(
        encoder=ngame.BagEncoder.fit(texts, dim=4),
        label_texts=texts,
        label_vectors=eye,
        point_vectors=eye.astype(np.float16),
        point_labels=sp.csr_matrix(eye),
        point_rows=np.arange(4),
        classifier=None,
        fusions={"all": Fusion({"encoder": 1.0}), "trained": Fusion({"encoder": 1.0})},
        config=PredictionConfig(k=2),
    )
    model.save(tmp_path / "first")
    loaded = Model.load(tmp_path / "first")
    assert loaded.label_texts == texts
    assert loaded.classifier is None
    assert loaded.scorers == ("encoder", "neighbours", "fused")
    assert loaded.config.k == 2
    # What was changed since then is kept too, where the folder holds no settings of its own.
    changed = dataclasses.replace(loaded, config=PredictionConfig(k=3), threads=1)
    changed.save(tmp_path / "second")
    again = Model.load(tmp_path / "second")
    assert (again.config.k, again.threads) == (3, 1)


def test_folders_without_a_model(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"holds no finished run: it has no fusion\.json"):
        Model.load(tmp_path)
    with pytest.raises(ValueError, match="holds no encoder that ngame saved: pass your own"):
        load_encoder(tmp_path)
    assert isinstance(load_encoder(folder / "encoder"), ngame.BagEncoder)


def test_users_own_encoder(folder, dataset, model):
    own = load_encoder(folder / "encoder")
    loaded = Model.load(folder, encoder=own)
    assert loaded.encoder is own
    assert equal(loaded.predict(dataset.test_texts), model.predict(dataset.test_texts))


def test_prediction_has_no_effect_on_the_encoder(model, dataset):
    model.encoder.train()
    generator = torch.get_rng_state()
    model.predict(dataset.test_texts[:3])
    assert model.encoder.training
    assert torch.equal(torch.get_rng_state(), generator)
    model.encoder.eval()
