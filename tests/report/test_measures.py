"""What a report measures, against cases worked out by hand and against `ngame.metrics`."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp

from ngame import metrics
from ngame.report.measures import (
    LabelCounts,
    Reliability,
    RunReport,
    ScoredPoints,
    are_right,
    best_ids,
    confused_labels,
    frequency_groups,
    mean_and_spread,
    missing_positives,
    point_scores,
    settings_that_differ,
    unlabelled_agreements,
    worst_labels,
)

TRUTH = sp.csr_matrix(
    np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], np.float32)
)
NONE = sp.csr_matrix(TRUTH.shape, dtype=np.float32)
IDS = np.array([[0, 2, -1], [0, 3, 2], [2, 1, 0], [3, -1, -1]])


def test_best_ids():
    found = sp.csr_matrix(np.array([[1, 3, 3, 2], [0, 0, 0, 0], [0, -1, 0, 5]], np.float32))
    assert best_ids(found, 3).tolist() == [[1, 2, 3], [-1, -1, -1], [3, 1, -1]]


def test_scores_of_points_have_the_means_of_the_metrics(rng):
    truth = sp.random(50, 30, 0.1, "csr", rng=rng, dtype=np.float32)
    truth.data[:] = 1
    found = sp.random(50, 30, 0.4, "csr", rng=rng, dtype=np.float32)
    expected = metrics.evaluate(found, truth, ks=[1, 3, 5, 10])
    scores = point_scores(are_right(best_ids(found, 10), truth), truth)
    assert scores.keys() == {"P@1", "P@3", "P@5", "N@5", "R@10"}
    for name, values in scores.items():
        assert mean_and_spread(values)[0] == pytest.approx(expected[name], abs=1e-6)


def test_spread():
    assert mean_and_spread(np.array([0.0, 1.0] * 50)) == pytest.approx((0.5, 1.96 * 0.050252), 1e-4)
    assert mean_and_spread(np.array([1.0])) == (1, 0)
    assert mean_and_spread(np.empty(0)) == (0, 0)


def test_frequency_groups():
    assert frequency_groups(np.array([1, 9, 3, 3, 2, 0, 9])).tolist() == [2, 0, 2, 2, 2, 2, 1]
    assert frequency_groups(np.zeros(3, np.int64)).tolist() == [0, 0, 0]


def test_counts_of_labels():
    counts = LabelCounts.of(IDS, TRUTH)
    assert counts.true.tolist() == [1, 2, 1, 0]
    assert counts.predicted.tolist() == [3, 1, 3, 2]
    assert counts.right.tolist() == [1, 0, 1, 0]
    np.testing.assert_allclose(counts.precision, [1 / 3, 0, 1 / 3, 0])
    np.testing.assert_allclose(counts.recall, [1, 0, 1, np.nan])
    precision, recall = counts.by(np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(precision, [1 / 4, 1 / 5, np.nan])
    np.testing.assert_allclose(recall, [1 / 3, 1, np.nan])


def test_worst_and_confused_labels():
    counts = LabelCounts.of(IDS, TRUTH)
    assert worst_labels(counts, 5) == [1]
    # Point 1 has label 1, and label 0 comes first; point 0 misses label 1, but its first is right.
    twice = np.vstack([IDS, IDS]), sp.vstack([TRUTH, TRUTH], format="csr")
    assert confused_labels(*twice, 5) == [(1, 0, 2, 1)]
    assert confused_labels(IDS, TRUTH, 5) == []  # seen once
    many = LabelCounts(np.array([9, 4, 5, 5]), np.array([9, 0, 9, 9]), np.array([8, 0, 1, 1]))
    assert worst_labels(many, 2) == [2, 3]  # label 1 has too few points


def test_reliability():
    rows, columns = np.array([[0, 0], [0, 2], [1, 1], [2, 0], [2, 2]]).T
    said = np.array([1.0, 0.95, 0.3, 0.05, 0.09])
    found = Reliability.of(sp.csr_matrix((said, (rows, columns)), (4, 4)), TRUTH)
    assert found.points == 4
    assert found.predictions.tolist() == [2, 0, 0, 1, 0, 0, 0, 0, 0, 2]
    nothing = [np.nan] * 5
    np.testing.assert_allclose(found.said, [0.07, np.nan, np.nan, 0.3, *nothing, 0.975])
    np.testing.assert_allclose(found.right, [0.5, np.nan, np.nan, 1, *nothing, 0.5])


def test_reliability_without_predictions():
    """As where no test point has a word that the run knows."""
    run = RunReport.__new__(RunReport)
    calibrated = SimpleNamespace(calibration=object())
    run.model = SimpleNamespace(fusions={"all": calibrated}, predict=lambda *_, **__: NONE)
    scores = np.zeros((4, 1), np.float32)
    run.test = ScoredPoints(["a"] * 4, TRUTH, NONE, {"fused": IDS}, scores)
    assert run.reliability is None


def test_agreements_that_the_data_do_not_have():
    scores = np.array([[0.9], [0.5], [0.7], [0.8]], np.float32)
    test = ScoredPoints(["a"] * 4, TRUTH, NONE, {"encoder": IDS, "fused": IDS}, scores)
    assert unlabelled_agreements(test, 5) == [(3, 3), (1, 0)]
    other = np.where(IDS == 3, 1, IDS)
    test = ScoredPoints(["a"] * 4, TRUTH, NONE, {"encoder": other, "fused": IDS}, scores)
    assert unlabelled_agreements(test, 5) == [(1, 0)]


@pytest.mark.parametrize("kept", [1.0, 0.7])
def test_missing_positives_by_points_that_say_the_same(rng, kept):
    """Each point is there twice, and each of its labels with probability `kept`."""
    vectors = rng.standard_normal((400, 16), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = rng.random((400, 50)) < 0.2
    twice = np.repeat(labels, 2, axis=0)
    twice &= rng.random(twice.shape) < kept
    model = SimpleNamespace(
        point_vectors=np.repeat(vectors, 2, axis=0).astype(np.float16),
        point_labels=sp.csr_matrix(twice, dtype=np.float32),
        threads=1,
    )
    found = missing_positives(model)
    assert found.pairs == 800
    assert found.by_duplicates == pytest.approx(1 - kept, abs=0.03)
    frequencies = twice.sum(axis=0)
    weights = metrics.inverse_propensity(model.point_labels)
    share = 1 - frequencies.sum() / (frequencies * weights).sum()
    assert found.by_propensity == pytest.approx(share)


def test_too_few_points_that_say_the_same():
    model = SimpleNamespace(
        point_vectors=np.eye(3, dtype=np.float16),
        point_labels=sp.csr_matrix(np.eye(3, dtype=np.float32)),
        threads=1,
    )
    assert missing_positives(model).by_duplicates is None


def test_settings_that_differ():
    a = {"seed": 0, "stage": {"epochs": 2, "schedule": {1: 4}}}
    b = {"seed": 0, "stage": {"epochs": 3, "schedule": {}}}
    assert settings_that_differ([a, b]) == [
        ("stage.epochs", [2, 3]),
        ("stage.schedule", [{1: 4}, {}]),
    ]
