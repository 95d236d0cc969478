"""Probabilities of fused scores: right on average, and in the order of the scores."""

import numpy as np
import pytest
from scipy.optimize import minimize

from ngame.prediction.calibration import Calibration

RANKS = 10


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slow_probabilities(w, scores):
    """Of one point's candidates, by the definition."""
    scores = np.asarray(scores, float)
    found = []
    for i, score in enumerate(scores):
        others = np.log(max(np.exp(np.delete(scores, i)).sum(), np.exp(score - 30)))
        p = sigmoid(w[0] * score + w[1] * others + w[2] * np.log(np.exp(scores).sum()) + w[3])
        found.append(sigmoid(w[4] * np.log(p) - w[5] * np.log(1 - p)))
    return np.array(found)


def independent(rng, points, each=8):
    """Each candidate is relevant by its own chance, whose logit is its score."""
    chances = rng.uniform(0, 1, (points, each)) ** 3
    return np.log(chances / (1 - chances)), rng.uniform(size=chances.shape) < chances


def competing(rng, points, each=8):
    """One candidate of each point is relevant, drawn by the softmax of the scores."""
    scores = rng.normal(0, 2.5, (points, each))
    chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    right = (chances.cumsum(axis=1) > rng.uniform(size=(points, 1))).argmax(axis=1)
    return scores, np.arange(each) == right[:, None]


def accompanied(rng, points, each=8):
    """Candidates are relevant where the others of the point have high scores."""
    scores = rng.normal(0, 2.5, (points, each))
    parts = np.exp(scores)
    others = np.log(parts.sum(axis=1, keepdims=True) - parts)
    return scores, rng.uniform(size=scores.shape) < sigmoid(2 * others - 8)


def overconfident(rng, points, each=8):
    """As `independent`, but scores far up say no more than those a little up."""
    scores, _ = independent(rng, points, each)
    chances = sigmoid(np.where(scores > 0, 0.4 * scores, scores))
    return scores, rng.uniform(size=scores.shape) < chances


def flat(scores, relevant):
    rows = np.repeat(np.arange(len(scores)), scores.shape[1])
    return scores.ravel().astype(np.float32), rows, relevant.ravel()


def test_probabilities_are_what_is_written(rng):
    """Equal scores, a single candidate and one far above all others are among the points."""
    points = [[1.0, 2.0, 2.0, -1.0], [0.5], [60.0, 1.0, 0.0], [3.0, 3.0]]
    w = [0.9, -0.4, -0.2, 0.3, 0.8, 1.2]
    scores = np.concatenate(points).astype(np.float32)
    rows = np.repeat([0, 1, 4, 7], [len(point) for point in points])
    found = Calibration(*w)(scores, rows)
    assert found.dtype == np.float32
    expected = np.concatenate([slow_probabilities(w, point) for point in points])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [independent, competing, overconfident])
def test_probabilities_are_calibrated(rng, kind):
    """Of candidates given about the same probability that share is relevant, on other points.

    A sigmoid of the score and the sum of all alone is off by 0.1 and more on the last two kinds.
    """
    scores, rows, relevant = flat(*kind(rng, 20_000))
    half = rows < 10_000
    calibration = Calibration.fit(scores[half], rows[half], relevant[half])
    found = calibration(scores[~half], rows[~half])
    bins = np.minimum((10 * found).astype(int), 9)
    counts = np.bincount(bins, minlength=10)
    off = np.bincount(bins, found - relevant[~half], minlength=10) / np.maximum(counts, 1)
    assert np.abs(off[counts > 300]).max() < 0.04
    assert (counts > 300).sum() >= 9


def test_fit_is_the_most_likely_one(rng):
    """Nothing that a search without gradients finds is better, ranks below the tenth left out."""
    by_point, right = overconfident(rng, 15, each=14)
    scores, rows, relevant = flat(by_point, right)
    best = np.argsort(-by_point, axis=1)[:, :RANKS]
    good = np.take_along_axis(right, best, axis=1)
    target = np.where(good, (good.sum() + 1) / (good.sum() + 2), 1 / ((~good).sum() + 2))

    def loss(w):
        bends = np.exp(w[4:])
        found = np.stack([slow_probabilities([*w[:4], *bends], point) for point in by_point])
        p = np.take_along_axis(found, best, axis=1)
        value = -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean()
        return value + 3 / good.size * (w[4:] ** 2).sum()

    found = Calibration.fit(scores, rows, relevant)
    w = np.array([found.score, found.others, found.every, found.constant])
    w = np.append(w, np.log([found.low, found.high]))
    bounds = [(1e-3, None), (None, 0), (None, None), (None, None), (-2, 2), (-2, 2)]
    options = {"maxiter": 400}
    searched = minimize(loss, w, method="Nelder-Mead", bounds=bounds, options=options)
    assert loss(w) < searched.fun + 1e-6


@pytest.mark.parametrize("kind", [independent, competing, accompanied])
def test_probabilities_rank_as_the_scores(rng, kind):
    scores, rows, relevant = flat(*kind(rng, 200))
    found = Calibration.fit(scores, rows, relevant)(scores, rows)
    for point in range(200):
        own = rows == point
        assert np.array_equal(np.argsort(-found[own]), np.argsort(-scores[own]))


def test_points_are_independent_of_each_other(rng):
    """A text's probabilities do not change with the texts asked for beside it."""
    scores, rows, relevant = flat(*competing(rng, 60))
    calibration = Calibration.fit(scores, rows, relevant)
    alone = [calibration(scores[rows == point], rows[rows == point]) for point in range(60)]
    np.testing.assert_array_equal(np.concatenate(alone), calibration(scores, rows))


def test_one_label_of_all():
    """With a single label every point has one candidate, and nothing else to compare it with."""
    scores = np.linspace(-2, 2, 100).astype(np.float32)
    found = Calibration.fit(scores, np.arange(100), scores > 0)(scores, np.arange(100))
    assert np.isfinite(found).all()
    assert (np.diff(found) >= 0).all()
    assert found[0] < 0.1
    assert found[-1] > 0.9
