"""Linear classifiers of sparse rows."""

import numpy as np
import pytest
import reference
import scipy.sparse as sp

import ngame
from ngame import _core
from ngame.arrays import new_csr, pattern

OPTIONS = {"cost": 0.5, "tolerance": 1e-7, "least": 0.0, "passes": 10_000, "seed": 0, "threads": 1}


def csr(dense, dtype=np.float32):
    return sp.csr_matrix(np.asarray(dense, dtype))


def train(points, relevant, compared=None, index=np.int64, **options):
    arguments = [
        None if matrix is None else pattern(matrix, index) for matrix in (relevant, compared)
    ]
    found = _core.train_linear(
        pattern(points, index), points.data, *arguments, **{**OPTIONS, **options}
    )
    return new_csr(*found, (relevant.shape[0], points.shape[1]))


def case(seed, points=40, columns=25, labels=6):
    rng = np.random.default_rng(seed)
    x = sp.random(points, columns, 0.2, "csr", np.float32, rng=rng)
    x.data -= 0.2  # of both signs
    relevant = csr(rng.random((labels, points)) < 0.15)
    compared = csr(rng.random((labels, points)) < 0.5)
    return x, relevant, compared


@pytest.mark.parametrize("cost", [0.5, 8.0])
@pytest.mark.parametrize("seed", range(4))
def test_weights_are_the_best(seed, cost):
    x, relevant, compared = case(seed)
    for others in (compared, None):
        found = train(x, relevant, others, cost=cost).toarray()
        for label, weights in enumerate(found):
            told_from = np.arange(x.shape[0]) if others is None else others[label].indices
            expected = reference.linear_weights(
                x.toarray().astype(float), relevant[label].indices, told_from, cost
            )
            np.testing.assert_allclose(weights, expected, atol=1e-5)


def test_by_hand():
    # Alone, a point x = 1 gives w = 1 - 1 / (2 cost + 1), and one to be told from changes nothing
    # where it shares no word.
    x = csr([[1, 0], [0, 1]])
    found = train(x, csr([[1, 0]]), cost=2.0)
    np.testing.assert_allclose(found.toarray(), [[0.8, 0]])
    # Both have the word: w minimises w**2 / 2 + 2 (1 - w)**2 + 2 w**2.
    found = train(csr([[1], [1]]), csr([[1, 0]]), cost=2.0)
    np.testing.assert_allclose(found.toarray(), [[4 / 9]])


@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_the_same_bits_for_any_threads(index):
    x, relevant, compared = case(5, points=300, columns=80, labels=40)
    options = {"tolerance": 0.1, "passes": 100, "seed": 3}
    one = train(x, relevant, compared, np.int64, **options)
    many = train(x, relevant, compared, index, threads=4, **options)
    assert one.nnz > 0
    for a, b in zip(reference.stored(one), reference.stored(many), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rough_weights_are_nearly_the_best():
    x, relevant, _ = case(1, points=400, columns=60)
    best = train(x, relevant).toarray()
    rough = train(x, relevant, tolerance=0.1, passes=100).toarray()
    assert np.linalg.norm(rough - best) < 0.1 * np.linalg.norm(best)
    other = train(x, relevant, tolerance=0.1, passes=100, seed=1).toarray()
    assert not np.array_equal(rough, other)


@pytest.mark.parametrize(("cost", "factor"), [(2.0, 1.01), (8.0, 1.01), (100.0, 2.5)])
def test_rows_put_aside_are_not_forgotten(cost, factor):
    """A hundred passes come near the best, and a smaller tolerance makes nothing worse."""
    x, relevant, _ = case(7, points=400, columns=150)
    dense, own = x.toarray().astype(float), relevant.toarray().T > 0

    def objectives(**options):
        weights = train(x, relevant, cost=cost, **options).toarray().astype(float)
        scores = dense @ weights.T
        over = np.where(own, np.maximum(1 - scores, 0), np.maximum(scores, 0))
        return (weights**2).sum(axis=1) / 2 + cost * (over**2).sum(axis=0)

    best = objectives()
    rough, fine = (objectives(passes=100, tolerance=tolerance) for tolerance in (1e-1, 1e-5))
    assert (fine < factor * best).all()
    assert (fine <= rough).all()


def test_small_weights_are_left_out():
    x, relevant, _ = case(2)
    whole = train(x, relevant).toarray()
    kept = train(x, relevant, least=0.3).toarray()
    large = np.abs(whole) >= 0.3 * np.abs(whole).max(axis=1, keepdims=True)
    np.testing.assert_array_equal(kept, np.where(large, whole, 0))
    assert 0 < large.sum() < np.count_nonzero(whole)


def test_labels_and_points_without_anything():
    x = csr([[1, 0], [0, 0], [0, 2]])
    relevant = csr([[0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    found = train(x, relevant).toarray()
    assert not found[:2].any()  # no point, and one without words
    assert found[2, 1] > 0
    assert (found[3] > 0).all()
    for points, labels in ((0, 2), (3, 0), (0, 0)):
        empty = train(csr(np.zeros((points, 2))), csr(np.zeros((labels, points))))
        assert empty.shape == (labels, 2)
        assert empty.nnz == 0


def test_points_of_a_label_are_not_among_the_others():
    x, relevant, compared = case(3)
    both = csr((compared + relevant).toarray() > 0)
    without = csr((compared.toarray() > 0) & (relevant.toarray() == 0))
    options = {"tolerance": 0.1, "passes": 100}
    found, expected = (train(x, relevant, others, **options) for others in (both, without))
    np.testing.assert_array_equal(found.toarray(), expected.toarray())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers(bad):
    x = csr([[1, 0], [0, 1], [1, 1]])
    x.data[1] = bad
    with pytest.raises(ValueError, match="points has NaN or infinity in row 1"):
        train(x, csr([[1, 1, 0]]))


def test_mistakes():
    x = csr([[1, 0], [0, 1], [1, 1]])
    with pytest.raises(ValueError, match="relevant has another shape"):
        train(x, csr([[1, 0]]))
    with pytest.raises(ValueError, match="compared has another shape"):
        train(x, csr([[1, 0, 0]]), csr([[1, 0, 0], [0, 0, 1]]))
    for column, error in ((3, IndexError), (-1, IndexError)):
        relevant = csr([[1, 0, 0]])
        relevant.indices[0] = column
        with pytest.raises(error, match=r"relevant: column -?\d in row 0 is out of range"):
            train(x, relevant)
    twice = csr([[1, 1, 0]])
    twice.indices[1] = 0
    with pytest.raises(ValueError, match="compared: column 0 in row 0 repeats"):
        train(x, csr([[0, 1, 0]]), twice)


def test_the_door():
    x, relevant, compared = case(4)
    labels, negatives = relevant.T.tocsr(), compared.T.tocsr()
    options = {"cost": 2.0, "tolerance": 0.01, "least": 0.1, "seed": 7}
    found = ngame.linear_classifiers(x, labels, negatives=negatives, **options)
    expected = train(x, relevant, compared, passes=100, **options)
    assert (found != expected).nnz == 0
    pairs = np.argwhere(negatives.toarray())
    by_pairs = ngame.linear_classifiers(x, labels, negatives=pairs, **options)
    assert (by_pairs != expected).nnz == 0
    assert (ngame.linear_classifiers(x, labels) != 0).nnz > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"points": csr(np.eye(3), np.float64)}, TypeError, "points has dtype float64"),
        ({"points": np.eye(3)}, TypeError, "points is a ndarray"),
        ({"labels": csr(np.eye(2))}, ValueError, "labels has 2 rows, points has 3"),
        ({"negatives": csr(np.eye(2))}, ValueError, r"negatives has shape \(2, 2\)"),
        ({"negatives": [(0, 3)]}, IndexError, "negatives"),
        ({"cost": 0}, ValueError, "cost is 0, expected more than 0"),
        ({"tolerance": float("nan")}, ValueError, "tolerance is nan"),
        ({"least": -0.1}, ValueError, "least is -0.1, expected 0 or more"),
        ({"seed": 0.5}, TypeError, "seed is a float"),
        ({"threads": -1}, ValueError, "threads is -1"),
    ],
)
def test_mistakes_at_the_door(change, error, message):
    arguments = {"points": csr(np.eye(3)), "labels": csr(np.eye(3)), **change}
    with pytest.raises(error, match=message):
        ngame.linear_classifiers(**arguments)
