"""The fused score is a weighted sum whose weights rank relevant candidates first."""

import numpy as np
import pytest
from scipy.optimize import minimize

from ngame.prediction import fusion
from ngame.prediction.fusion import Fusion


def candidates(rng, points=40, each=12):
    """One informative feature and one of noise; two relevant candidates per point."""
    rows = np.repeat(np.arange(points), each)
    relevant = np.tile(np.arange(each) < 2, points)
    features = {
        "good": (relevant + rng.normal(0, 0.7, len(rows))).astype(np.float32),
        "noise": (100 * rng.normal(size=len(rows))).astype(np.float32),
    }
    return features, rows, relevant


def slow_loss(weights, features, rows, relevant):
    x = np.stack([f.astype(float) / f.astype(float).std() for f in features.values()], axis=1)
    scores = x @ weights
    per_point = []
    for row in np.unique(rows[relevant]):
        others = np.exp(scores[(rows == row) & ~relevant])
        good = scores[(rows == row) & relevant]
        per_point.append(np.mean(np.log1p(others.sum() * np.exp(-good))))
    return np.mean(per_point) + 1e-4 * np.sum(weights**2)


def test_score_is_the_weighted_sum():
    features = {"a": np.array([1, 2], np.float32), "b": np.array([10, -1], np.float32)}
    scores = Fusion({"a": 0.5, "b": 2.0})(features)
    assert scores.tolist() == [20.5, -1.0]
    assert scores.dtype == np.float32


def test_weights_minimise_the_loss(rng):
    features, rows, relevant = candidates(rng)
    found = Fusion.fit(features, rows, relevant)
    best = minimize(slow_loss, np.zeros(2), args=(features, rows, relevant)).x
    scale = [f.astype(float).std() for f in features.values()]
    np.testing.assert_allclose(list(found.weights.values()), best / scale, rtol=2e-3, atol=1e-5)
    assert found.weights["good"] * scale[0] > 10 * abs(found.weights["noise"] * scale[1])


def test_order_of_the_candidates_does_not_matter(rng):
    features, rows, relevant = candidates(rng)
    first = Fusion.fit(features, rows, relevant)
    order = rng.permutation(len(rows))
    shuffled = {name: values[order] for name, values in features.items()}
    second = Fusion.fit(shuffled, rows[order], relevant[order])
    np.testing.assert_allclose(
        list(first.weights.values()), list(second.weights.values()), rtol=1e-4
    )


@pytest.mark.parametrize("relevant", [[0, 0, 0], [1, 1, 1], [1, 0, 0]])
def test_weights_are_finite_in_degenerate_cases(relevant):
    """Nothing relevant, all relevant, perfect separation, and a constant feature."""
    features = {
        "a": np.array([3, 2, 1], np.float32),
        "constant": np.full(3, 7, np.float32),
    }
    found = Fusion.fit(features, np.zeros(3, int), np.array(relevant, bool))
    assert np.isfinite(list(found.weights.values())).all()
    if relevant == [1, 0, 0]:
        assert found(features)[0] > found(features)[1:].max()


def test_save_and_load(tmp_path):
    fusions = {"all": Fusion({"a": 0.1, "b": -1e-30}), "trained": Fusion({"a": 1 / 3})}
    fusion.save(fusions, tmp_path / "fusion.json")
    assert fusion.load(tmp_path / "fusion.json") == fusions
