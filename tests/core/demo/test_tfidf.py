"""The demo's baseline against a slow implementation."""

import math
from collections import Counter

import numpy as np
import pytest
import scipy.sparse as sp

from ngame.demo.tfidf import TfIdf, predict

TRAIN = ["Red apple red", "green apple!", "blue sea", "red sea, red sun"]
LABELS = ["apple", "sea", "red sun"]
Y = sp.csr_matrix(np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1]], np.float32))
QUERIES = ["an apple", "RED sun", "nothing known", ""]


def slow_vectors(fitted, texts):
    def words(text):
        return "".join(c if c.isalnum() else " " for c in text.lower()).split()

    documents = Counter(word for text in fitted for word in set(words(text)))
    idf = {w: math.log((1 + len(fitted)) / (1 + n)) + 1 for w, n in documents.items()}
    rows = []
    for text in texts:
        counts = Counter(word for word in words(text) if word in idf)
        row = {word: (1 + math.log(count)) * idf[word] for word, count in counts.items()}
        norm = math.sqrt(sum(value**2 for value in row.values()))
        rows.append([row.get(word, 0) / (norm or 1) for word in sorted(idf)])
    return np.array(rows)


def test_vectors():
    fitted = TRAIN + LABELS
    x = TfIdf(fitted)(QUERIES + TRAIN)
    np.testing.assert_allclose(x.toarray(), slow_vectors(fitted, QUERIES + TRAIN), rtol=1e-5)
    norms = np.sqrt(x.multiply(x).sum(axis=1)).A1
    np.testing.assert_allclose(norms, [1, 1, 0, 0, 1, 1, 1, 1], rtol=1e-5)


@pytest.mark.parametrize("neighbours", [2, 20])
def test_predictions(neighbours):
    found = predict(QUERIES, TRAIN, Y, LABELS, k=2, neighbours=neighbours)
    fitted = TRAIN + LABELS
    q, t, z = (slow_vectors(fitted, texts) for texts in (QUERIES, TRAIN, LABELS))
    near = q @ t.T
    near[near < -np.sort(-near, axis=1)[:, [min(neighbours, 4) - 1]]] = 0
    votes = (near / np.maximum(near.sum(axis=1, keepdims=True), 1e-12)) @ Y.toarray()
    for name, scores in (("TF-IDF", q @ z.T), ("TF-IDF + neighbours", q @ z.T + votes)):
        matrix = found[name]
        assert matrix.shape == (4, 3)
        assert np.diff(matrix.indptr).max() <= 2
        for row in range(4):
            best = np.sort(scores[row][scores[row] > 0])[::-1][:2]
            np.testing.assert_allclose(np.sort(matrix[row].data)[::-1], best, rtol=1e-5)
            for label, value in zip(matrix[row].indices, matrix[row].data, strict=True):
                assert value == pytest.approx(scores[row, label], rel=1e-5)
