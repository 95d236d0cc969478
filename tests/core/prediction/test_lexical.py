"""TF-IDF rows against scikit-learn's formula, and what is searched and voted by them."""

import re
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp

from ngame.prediction import lexical as lexical_module
from ngame.prediction.lexical import Lexical, Tfidf, titles_apart

TEXTS = ["Red apple, red pear", "green pear", "", "red apple red", "Öl und Essig"]


def slow_rows(fitted, texts):
    """Unit TF-IDF rows of words and pairs of words: a dictionary a text."""

    def terms(text):
        words = re.findall(r"\w+", text.lower())
        return words + [f"{a} {b}" for a, b in pairwise(words)]

    frequency = {}
    for text in fitted:
        for term in set(terms(text)):
            frequency[term] = frequency.get(term, 0) + 1
    rows = []
    for text in texts:
        counts = {term: terms(text).count(term) for term in terms(text) if term in frequency}
        row = {
            term: (1 + np.log(count)) * (np.log((1 + len(fitted)) / (1 + frequency[term])) + 1)
            for term, count in counts.items()
        }
        norm = np.sqrt(sum(value**2 for value in row.values()))
        rows.append({term: value / norm for term, value in row.items()})
    return rows


def slow_cosines(fitted, left, right):
    left, right = slow_rows(fitted, left), slow_rows(fitted, right)
    return np.array([[sum(a[term] * b.get(term, 0) for term in a) for b in right] for a in left])


QUERIES = ["a red apple", "pear green pear", "unknown words", "", "ÖL UND"]


def test_rows_are_tf_idf():
    tfidf, rows = Tfidf.fit(TEXTS)
    x, y = tfidf(QUERIES), tfidf(TEXTS)
    assert x.dtype == np.float32
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(rows, part), getattr(y, part))
    np.testing.assert_allclose((x @ y.T).toarray(), slow_cosines(TEXTS, QUERIES, TEXTS), rtol=1e-5)
    norms = np.sqrt(np.asarray(x.multiply(x).sum(axis=1)).ravel())
    np.testing.assert_allclose(norms, [1, 1, 0, 0, 1], rtol=1e-6)


@pytest.mark.parametrize("texts", [[], [""], ["", "?!"]])
def test_texts_without_words(texts):
    tfidf, rows = Tfidf.fit(texts)
    assert rows.shape == (len(texts), 0)
    assert tfidf(["red"]).shape == (1, 0)
    assert tfidf([]).shape == (0, 0)


def test_terms_of_saved_models_are_known_for_ever():
    """A run holds hashes, not words: with others it would find none of its terms in any text."""
    assert Tfidf.fit(["Red apple", "Öl"])[0].terms.tolist() == [
        -6681078847286810355,
        -2328654269316264298,
        2547543847350197722,
        3212127467558369503,
    ]


@pytest.fixture
def lexical():
    return Lexical.fit(TEXTS, ["apple", "green pear", "oil"])


def test_labels_are_searched_exactly(lexical):
    fitted = [*TEXTS, "apple", "green pear", "oil"]
    expected = slow_cosines(fitted, QUERIES, ["apple", "green pear", "oil"])
    queries = lexical.tfidf(QUERIES)
    np.testing.assert_allclose(
        lexical.index("tfidf").search(queries, 3).toarray(), expected, rtol=1e-5, atol=1e-7
    )


def test_titles_are_searched_apart(lexical):
    labels = ["apple", "green pear", "oil"]
    assert titles_apart(["apple", "green", ""], labels)
    assert not titles_apart(["apple", "green", "oil"], labels)
    assert not titles_apart(None, labels)
    titled = Lexical.fit(TEXTS, labels, ["apple", "green", ""])
    fitted = [*TEXTS, "apple", "green pear", "oil"]
    expected = slow_cosines(fitted, QUERIES, ["apple", "green", ""])
    queries = titled.tfidf(QUERIES)
    for each in (titled, Lexical.from_arrays(titled.arrays()), titled.take(np.array([0]))):
        found = each.index("tfidf_title").search(queries, 3)
        np.testing.assert_allclose(found.toarray(), expected, rtol=1e-5, atol=1e-7)
    assert (titled.labels != lexical.labels).nnz == 0


@pytest.mark.parametrize("k", [1, 2, 5])
def test_votes(lexical, k):
    labels = sp.csr_matrix(np.eye(5, 4, dtype=np.float32) + np.eye(5, 4, 1, dtype=np.float32))
    queries = lexical.tfidf(QUERIES)
    found = lexical.voters(queries, k) @ labels
    cosines = (queries @ lexical.points.T).toarray()
    for row, scores in enumerate(cosines):
        near = np.argsort(-scores, kind="stable")[:k]
        weights = scores[near] ** 2
        votes = weights / max(weights.sum(), 1e-30) @ labels.toarray()[near]
        np.testing.assert_allclose(found[row].toarray()[0], votes, rtol=1e-5)


def test_some_points_and_arrays(lexical):
    queries = lexical.tfidf(QUERIES)
    some = lexical.take(np.array([0, 3]))
    assert (some.points != lexical.points[[0, 3]]).nnz == 0
    same = Lexical.from_arrays(lexical.arrays())
    assert (same.tfidf(QUERIES) != queries).nnz == 0
    found, expected = (each.index("tfidf").search(queries, 2) for each in (same, lexical))
    assert (found != expected).nnz == 0
    assert same.titles is same.weights is None
    assert (same.voters(queries, 2) != lexical.voters(queries, 2)).nnz == 0


def test_the_shortlist_is_what_the_nearest_points_have():
    texts = ["red apple", "red apple tart", "green pear", "red pear", "oil"]
    lexical = Lexical.fit(texts, ["a", "b", "c", "d"])
    labels = sp.csr_matrix(np.eye(5, 4, dtype=np.float32))
    known = sp.csr_matrix(([1.0], ([0], [3])), (5, 4)) + labels
    voted = sp.csr_matrix(np.diag([1, 0, 1, 1, 1]) @ labels.toarray(), dtype=np.float32)
    found, fewer = lexical.shortlists([labels, voted], sp.csr_matrix(known), 5)
    # The first shares words with the second and fourth, whose label is known of it; the last with
    # none; itself does not vote.
    assert found.toarray().astype(bool).tolist() == [
        [False, True, False, False],
        [True, False, False, True],
        [False, False, False, True],
        [True, True, True, False],
        [False, False, False, False],
    ]
    assert fewer.toarray()[:, 1].tolist() == [0, 0, 0, 0, 0]
    np.testing.assert_array_equal(
        fewer.toarray()[:, [0, 2, 3]] > 0, found.toarray()[:, [0, 2, 3]] > 0
    )
    assert lexical.shortlists([labels], labels, 1)[0].nnz == 4


def test_the_shortlist_does_not_depend_on_the_chunks(monkeypatch):
    """In none of them does a point find itself."""
    texts = ["red apple", "red tart", "green pear", "red pear", "green apple", "red"]
    lexical = Lexical.fit(texts, ["a"])
    labels, known = sp.identity(6, np.float32, "csr"), sp.csr_matrix((6, 6), dtype=np.float32)
    (whole,) = lexical.shortlists([labels], known, 2)
    assert not whole.diagonal().any()
    monkeypatch.setattr(lexical_module, "_POINTS_PER_CHUNK", 4)
    (parts,) = lexical.shortlists([labels], known, 2)
    np.testing.assert_array_equal(parts.toarray(), whole.toarray())


def test_classifiers_ignore_what_one_point_alone_has():
    texts = ["red apple", "red plum", "green pear", "green fig"]
    lexical = Lexical.fit(texts, ["red", "green"])
    labels = sp.csr_matrix(np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32))
    others = sp.csr_matrix(1 - labels.toarray())
    found = lexical.classified(labels, others)
    assert lexical.weights is None
    red, green, apple = (lexical.tfidf([word]) for word in ("red", "green", "apple"))
    assert (red @ found.weights.T).toarray()[0, 0] > 0.4
    assert (green @ found.weights.T).toarray()[0, 1] > 0.4
    assert (apple @ found.weights.T).nnz == 0
    same = Lexical.from_arrays(found.arrays())
    assert (same.weights != found.weights).nnz == 0
    scores = same.index("tfidf_classifier").search(lexical.tfidf(["a red pear"]), 2)
    assert scores.indices.tolist() == [0]


def test_classifiers_learn_from_unit_rows_by_their_seed(monkeypatch):
    """After the terms of one point alone are out; what is left of a row may be nothing."""
    given = []

    def recorded(x, *arguments, **options):
        given.extend([x.toarray(), options["seed"]])
        return sp.csr_matrix((1, x.shape[1]), dtype=np.float32)

    monkeypatch.setattr(lexical_module, "linear_classifiers", recorded)
    texts = ["red apple tart of mine", "red", "green red", "blue"]
    lexical = Lexical.fit(texts, ["a"])
    lexical.classified(sp.csr_matrix((4, 1)), sp.csr_matrix((4, 1)), seed=5)
    np.testing.assert_allclose(np.linalg.norm(given[0], axis=1), [1, 1, 1, 0], rtol=1e-6)
    assert given[1] == 5
    np.testing.assert_allclose(np.linalg.norm(lexical.points.toarray(), axis=1), 1, rtol=1e-6)
