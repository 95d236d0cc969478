"""Labels of a batch against dense masks."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from ngame.negatives import batch_labels


@st.composite
def batch_cases(draw):
    points, labels = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    positives = rng.random((points, labels)) < 0.3
    known = positives | (rng.random((points, labels)) < 0.2)
    rows = rng.integers(points, size=draw(st.integers(0, 10)))
    shared = rng.choice(labels, draw(st.integers(0, labels)), replace=False)
    return rng, positives, known, rows, shared


@given(batch_cases(), st.booleans(), st.booleans())
def test_pool_known_and_targets(case, one, draw_some):
    rng, positives, known, rows, shared = case
    pool, masked, targets = batch_labels(
        sp.csr_matrix(positives.astype(np.float32)),
        rows,
        known=sp.csr_matrix(known.astype(np.float32)),
        shared=shared if draw_some else None,
        rng=rng if one else None,
    )
    chosen = np.zeros((len(rows), positives.shape[1]), bool)
    chosen[targets.rows, pool[targets.columns]] = True
    assert not (chosen & ~positives[rows]).any()
    if one:
        np.testing.assert_array_equal(chosen.sum(axis=1), positives[rows].any(axis=1))
    else:
        np.testing.assert_array_equal(chosen, positives[rows])
    expected = set(np.flatnonzero(chosen.any(axis=0))) | (set(shared) if draw_some else set())
    assert pool.dtype == np.int32
    assert pool.tolist() == sorted(expected)
    mask = np.zeros((len(rows), len(pool)), bool)
    mask[masked.rows, masked.columns] = True
    np.testing.assert_array_equal(mask, known[np.ix_(rows, pool)])


def test_the_one_positive_is_drawn_uniformly():
    labels = sp.csr_matrix(np.array([[1, 1, 0, 1]], np.float32))
    rows = np.zeros(3000, int)
    pool, _, targets = batch_labels(labels, rows, rng=np.random.default_rng(0))
    counts = np.bincount(pool[targets.columns], minlength=4)
    assert counts[2] == 0
    assert (abs(counts[[0, 1, 3]] - 1000) < 100).all()


def test_ids_out_of_range():
    labels = sp.csr_matrix(np.eye(3, dtype=np.float32))
    with pytest.raises(IndexError):
        batch_labels(labels, np.array([3]))
    with pytest.raises(IndexError):
        batch_labels(labels, np.array([0]), shared=np.array([3]))
