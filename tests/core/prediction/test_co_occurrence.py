"""Labels that occur together against dense counts."""

import numpy as np
import pytest
import scipy.sparse as sp

from ngame.prediction import co_occurrence
from ngame.prediction.co_occurrence import label_shares, log_spread, spread


def slow_shares(labels):
    """Counts of pairs by loops over the points, over two more than the label's points."""
    count = np.zeros((labels.shape[1], labels.shape[1]))
    for point in labels:
        for label in np.flatnonzero(point):
            count[label, np.flatnonzero(point)] += 1
    return count / (np.diag(count)[:, None] + 2)


def made(points, labels, share, seed=0):
    return (np.random.default_rng(seed).random((points, labels)) < share).astype(np.float32)


def test_shares_by_hand():
    labels = sp.csr_matrix(np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]]))
    expected = [[3 / 5, 1 / 5, 1 / 5, 0], [1 / 3, 1 / 3, 0, 0], [1 / 3, 0, 1 / 3, 0], [0] * 4]
    np.testing.assert_allclose(label_shares(labels).toarray(), expected, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_shares_by_loops(monkeypatch, chunk):
    """With labels that have no point, points without a label, and values other than 1."""
    monkeypatch.setattr(co_occurrence, "_LABELS_PER_CHUNK", chunk)
    labels = made(60, 29, 0.1)
    labels[:, [0, 13, 28]] = 0
    labels[5] = 0
    found = label_shares(sp.csr_matrix(labels * 3))
    assert found.dtype == np.float32
    assert found.shape == (29, 29)
    np.testing.assert_allclose(found.toarray(), slow_shares(labels), rtol=1e-6)


@pytest.mark.parametrize(("of_one", "in_all"), [(4, 1000), (200, 60)])
def test_the_highest_shares_are_kept(monkeypatch, of_one, in_all):
    monkeypatch.setattr(co_occurrence, "_KEPT", of_one)
    monkeypatch.setattr(co_occurrence, "_KEPT_IN_ALL", in_all)
    labels = made(200, 15, 0.4)
    found, expected = label_shares(sp.csr_matrix(labels)).toarray(), slow_shares(labels)
    assert ((found > 0).sum(axis=1) == 4).all()
    np.testing.assert_allclose(np.diag(found), np.diag(expected), rtol=1e-6)
    np.testing.assert_allclose(
        np.sort(found, axis=1)[:, -4:], np.sort(expected, axis=1)[:, -4:], rtol=1e-6
    )


def test_spread(monkeypatch):
    """Of the most probable labels alone; a text without candidates has nothing."""
    monkeypatch.setattr(co_occurrence, "_SPEAKERS", 3)
    shares = label_shares(sp.csr_matrix(made(80, 12, 0.2)))
    likely = np.random.default_rng(1).random((9, 12)).astype(np.float32)
    likely[4] = 0
    speak = np.where(likely >= np.sort(likely, axis=1)[:, -3:-2], likely, 0)
    found = spread(sp.csr_matrix(likely), shares)
    assert found.dtype == np.float32
    assert found.has_sorted_indices
    assert found[4].nnz == 0
    np.testing.assert_allclose(found.toarray(), speak @ shares.toarray(), rtol=1e-5)


def test_a_spread_counts_up_to_a_tenth():
    found = log_spread(np.array([0, 0.05, 0.1, 0.4, 3], np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.log([0.001, 0.051, 0.101, 0.101, 0.101]), rtol=1e-6)
