"""The fused score is a weighted sum whose weights rank relevant candidates first."""

import json

import numpy as np
import pytest
from scipy.optimize import minimize

import ngame
from ngame.prediction import fusion
from ngame.prediction.calibration import Calibration
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


def slow_loss(weights, features, rows, relevant, gains=None):
    """Of weights in units of the fixed weights: 1 for unit variance, a tenth for votes."""
    gains = np.ones(len(rows)) if gains is None else gains
    prior = [0.1 if name.startswith("log") else 1 for name in features]
    x = np.stack([f.astype(float) / f.astype(float).std() for f in features.values()], axis=1)
    scores = x * prior @ weights
    loss = total = 0
    points = np.unique(rows[relevant])
    for row in points:
        others = np.exp(scores[(rows == row) & ~relevant])
        good = (rows == row) & relevant
        loss += np.mean(gains[good] * np.log1p(others.sum() * np.exp(-scores[good])))
        total += np.mean(gains[good])
    even = np.sum((weights - np.mean(weights)) ** 2) * (15 / len(points)) ** 2
    return loss / total + even + 1e-4 * np.sum((weights - 1) ** 2)


def test_score_is_the_weighted_sum():
    features = {"a": np.array([1, 2], np.float32), "b": np.array([10, -1], np.float32)}
    scores = Fusion({"a": 0.5, "b": 2.0})(features)
    assert scores.tolist() == [20.5, -1.0]
    assert scores.dtype == np.float32


@pytest.mark.parametrize("weighted", [False, True])
def test_weights_minimise_the_loss(rng, weighted):
    features, rows, relevant = candidates(rng)
    features["log votes"] = features["good"] + rng.normal(0, 1, len(rows)).astype(np.float32)
    gains = rng.uniform(1, 9, len(rows)) if weighted else None
    found = Fusion.fit(features, rows, relevant, gains)
    best = minimize(
        slow_loss,
        np.ones(3),
        args=(features, rows, relevant, gains),
        bounds=[(0, None)] * 3,
        method="L-BFGS-B",
    ).x
    scale = np.array([f.astype(float).std() for f in features.values()]) / [1, 1, 0.1]
    expected = best / scale
    np.testing.assert_allclose(list(found.weights.values()), expected, rtol=5e-3, atol=1e-4)
    assert found.weights["good"] * scale[0] > 5 * found.weights["noise"] * scale[1]


def test_no_weight_is_negative(rng):
    """Nor is that of a feature that is high where candidates are irrelevant."""
    features, rows, relevant = candidates(rng, points=200)
    features["misleading"] = -features["good"] + rng.normal(0, 0.3, len(rows)).astype(np.float32)
    weights = Fusion.fit(features, rows, relevant).weights
    assert weights["misleading"] == 0
    assert min(weights.values()) >= 0


@pytest.mark.parametrize("points", [5, 40])
def test_what_is_constant_but_for_rounding_says_nothing(rng, points):
    """Equal shares of votes, say, where all points have all labels."""
    features, rows, relevant = candidates(rng, points)
    of_many, of_one = (np.full(len(rows), share, np.float32) for share in (1 / 15, 1.001))
    for name, constant in {"votes": of_many, "log votes": np.log(of_one)}.items():
        rounded = constant + np.float32(1e-7)
        near = np.where(rng.integers(0, 2, len(rows)), constant, rounded)
        exact = Fusion.fit(features | {name: constant}, rows, relevant)
        found = Fusion.fit(features | {name: near}, rows, relevant)
        np.testing.assert_allclose(list(found.weights.values()), list(exact.weights.values()))


@pytest.mark.parametrize("points", [1, 2, 9])
def test_few_points_leave_the_fixed_weights(rng, points):
    features, rows, relevant = candidates(rng, points=points)
    features = {"good": features["good"], "log votes": features["good"] * 2}
    weights = Fusion.fit(features, rows, relevant).weights
    deviation = features["good"].astype(float).std()
    assert weights == pytest.approx({"good": 1 / deviation, "log votes": 0.05 / deviation})


def test_fixed_weights_of_the_scorers(rng):
    """Those that did best on a hundred small data sets: bench/results/defaults.md."""
    features, rows, relevant = candidates(rng, points=4)
    names = ["encoder", "classifier", "neighbours", "log neighbours", "tfidf", "tfidf_title"]
    names += ["tfidf_neighbours", "log tfidf_neighbours", "tfidf_classifier", "log co_occurrence"]
    weights = Fusion.fit(dict.fromkeys(names, features["good"]), rows, relevant).weights
    deviation = features["good"].astype(float).std()
    expected = [0.5, 0.5, 0.5, 0.1, 1, 0.5, 2, 0.1, 0.5, 0.1]
    np.testing.assert_allclose(np.array(list(weights.values())) * deviation, expected, rtol=1e-5)


@pytest.mark.parametrize("points", [4, 40])
def test_an_encoder_taught_by_few_points_weighs_less(rng, points):
    """In proportion below a hundred points; where weights are fitted, they start from there."""
    features, rows, relevant = candidates(rng, points=points)
    good = features["good"]
    learnt = ("encoder", "classifier", "neighbours", "tfidf_classifier")
    features = dict.fromkeys([*learnt, "tfidf", "log neighbours"], good)
    weights = {
        taught: Fusion.fit(features, rows, relevant, taught_by=taught).weights
        for taught in (5, 50, 100, 1000, None)
    }
    assert weights[100] == weights[1000] == weights[None]
    for taught in (5, 50):
        for name in learnt:
            share = weights[taught][name] / weights[None][name]
            if points < fusion.FEWEST_POINTS:
                assert share == pytest.approx(taught / 100)
            else:
                assert share < 1
    if points < fusion.FEWEST_POINTS:
        for name in ("tfidf", "log neighbours"):
            assert weights[5][name] == weights[None][name]


def tiny_topics(seed, points=5, tests=100):
    """Texts of three topics, four of a topic's words and four of all; labels say nothing."""
    rng = np.random.default_rng(seed)
    topics = np.append([0, 1, 2], rng.integers(0, 3, points + tests - 3))
    texts = [
        " ".join(
            rng.permutation(
                [*(f"t{topic}w{word}" for word in rng.choice(8, 4)), *map(str, rng.choice(40, 4))]
            )
        )
        for topic in topics
    ]
    labels = np.eye(3)[topics]
    return ngame.Dataset(
        texts[:points],
        labels[:points],
        ["qua", "xid", "zon"],
        test_texts=texts[points:],
        test_labels=labels[points:],
    )


@pytest.mark.filterwarnings("ignore:held-out points")
def test_five_points_fused_are_not_below_their_best_part():
    """On average: what is best for one set of five points is partly chance."""
    config = ngame.Config.load(sets=["threads=1"], points=5, labels=3)
    found = [ngame.train(tiny_topics(seed), config).metrics for seed in range(4)]
    mean = {name: np.mean([one[name]["P@1"] for one in found]) for name in found[0]}
    assert mean["fused"] >= max(mean.values()) - 0.01, mean


@pytest.mark.parametrize("points", [6, 400])
def test_a_fusion_is_not_below_its_best_part(rng, points):
    """The loss of a pair whose score has heavy tails says little of the best candidate."""
    each = 12
    rows = np.repeat(np.arange(points), each)
    relevant = np.tile(np.arange(each) < 1, points)
    best = np.where(relevant, 1.0, rng.uniform(0, 0.9, len(rows)))
    other = np.where(relevant, rng.uniform(0, 1, len(rows)), rng.uniform(0, 5, len(rows)))
    features = {"best": best.astype(np.float32)}
    features |= {f"other {n}": other.astype(np.float32) for n in range(5)}
    fused = Fusion.fit(features, rows, relevant)(features).reshape(points, each)
    right = (fused.argmax(axis=1) == 0).sum()
    lost = points - right
    assert lost <= np.sqrt(lost)


def test_gains_move_the_weights(rng):
    """A feature that finds what counts more gets more weight."""
    features, rows, relevant = candidates(rng, points=300)
    rare = relevant & (np.arange(len(rows)) % 2 == 0)
    features["rare"] = (rare + rng.normal(0, 0.7, len(rows))).astype(np.float32)
    even = Fusion.fit(features, rows, relevant).weights
    uneven = Fusion.fit(features, rows, relevant, np.where(rare, 20.0, 1.0)).weights
    assert uneven["rare"] / uneven["good"] > 1.5 * even["rare"] / even["good"]


def test_order_of_the_candidates_does_not_matter(rng):
    """Of the weights, with gains or without, and of the probabilities."""
    features, rows, relevant = candidates(rng)
    order = rng.permutation(len(rows))
    shuffled = {name: values[order] for name, values in features.items()}
    for gains in (None, rng.uniform(1, 9, len(rows))):
        first = Fusion.fit(features, rows, relevant, gains)
        second = Fusion.fit(
            shuffled, rows[order], relevant[order], None if gains is None else gains[order]
        )
        np.testing.assert_allclose(
            list(first.weights.values()), list(second.weights.values()), rtol=1e-4
        )
        likely = [each.probabilities(first(features), rows) for each in (first, second)]
        np.testing.assert_allclose(*likely, atol=1e-3)


@pytest.mark.parametrize("points", [1, 20])
@pytest.mark.parametrize("relevant", [[0, 0, 0], [1, 1, 1], [1, 0, 0]])
def test_scores_rank_in_degenerate_cases(points, relevant):
    """Nothing relevant, all relevant, perfect separation, and a constant feature."""
    features = {
        "a": np.tile(np.array([3, 2, 1], np.float32), points),
        "constant": np.full(3 * points, 7, np.float32),
    }
    rows = np.repeat(np.arange(points), 3)
    found = Fusion.fit(features, rows, np.tile(np.array(relevant, bool), points))
    assert np.isfinite(list(found.weights.values())).all()
    scores = found(features)[:3]
    assert scores[0] > scores[1] > scores[2] > 0


@pytest.mark.parametrize("relevant", [[0, 0, 0], [1, 1, 1], [1, 0, 0]])
def test_probabilities_in_degenerate_cases(relevant):
    features = {"a": np.tile(np.array([3, 2, 1], np.float32), 20)}
    rows = np.repeat(np.arange(20), 3)
    fusion = Fusion.fit(features, rows, np.tile(np.array(relevant, bool), 20))
    if not any(relevant):
        assert fusion.calibration is None
        return
    found = fusion.probabilities(fusion(features), rows)
    assert ((found > 0) & (found < 1)).all()
    assert len(fusion.probabilities(found[:0], rows[:0])) == 0


def test_labels_not_seen_are_scored_by_their_texts(rng):
    """What other features would add is the best linear estimate from those by the text."""
    features, rows, relevant = candidates(rng, points=60)
    features["encoder"] = (relevant + rng.normal(0, 0.3, len(rows))).astype(np.float32)
    features["tfidf"] = np.full(len(rows), 0.25, np.float32)  # tells nothing, and must not harm
    found = Fusion.fit(features, rows, relevant)
    by_points = sum(
        found.weights[name] * features[name].astype(float) for name in ("good", "noise")
    )
    x = np.stack([np.ones(len(rows)), features["encoder"]], axis=1)
    constant, slope = np.linalg.lstsq(x, by_points, rcond=None)[0]
    new = rng.uniform(size=len(rows)) < 0.3
    expected = found.weights["encoder"] * features["encoder"] + constant
    expected += slope * features["encoder"] + found.weights["tfidf"] * features["tfidf"]
    scores = found(features, new)
    np.testing.assert_allclose(scores[new], expected[new], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(scores[~new], found(features)[~new])
    parts = dict(found.parts(features, new))
    assert not parts["good"][new].any()
    np.testing.assert_allclose(sum(parts.values()), scores, rtol=1e-5, atol=1e-5)


def test_all_scores_by_the_text_count_for_labels_not_seen(rng):
    """And no others, but for the constant."""
    features, rows, relevant = candidates(rng, points=60)
    by_text = {"encoder", "classifier", "tfidf", "tfidf_title"}
    names = [
        *sorted(by_text),
        "neighbours",
        "tfidf_neighbours",
        "tfidf_classifier",
        "log co_occurrence",
    ]
    features = {
        name: features["good"] + rng.normal(0, 1, len(rows)).astype(np.float32) for name in names
    }
    of_new = Fusion.fit(features, rows, relevant).of_new
    assert of_new is not None
    assert of_new.keys() == by_text | {"constant"}


def test_save_and_load(tmp_path):
    fusions = {
        "all": Fusion(
            {"a": 0.1, "b": -1e-30},
            Calibration(1.5, -0.5, 1 / 3, 0.0, 0.9, 1.1),
            {"constant": 0.1, "a": 0.2},
        ),
        "trained": Fusion({"a": 1 / 3}),
    }
    fusion.save(fusions, tmp_path / "fusion.json")
    assert fusion.load(tmp_path / "fusion.json") == fusions


def test_weights_of_older_runs_are_read(tmp_path):
    (tmp_path / "fusion.json").write_text('{"all": {"encoder": 2.5, "neighbours": -0.5}}')
    loaded = fusion.load(tmp_path / "fusion.json")
    assert loaded == {"all": Fusion({"encoder": 2.5, "neighbours": -0.5})}
    pair = {"encoder": np.ones(1, np.float32), "neighbours": np.zeros(1, np.float32)}
    assert loaded["all"](pair, np.array([True])) == 2.5  # labels not seen score as any other
    with pytest.raises(ValueError, match="there are no probabilities"):
        loaded["all"].probabilities(np.ones(1, np.float32), np.zeros(1, int))
    platt = {"all": {"weights": {"encoder": 2.5}, "calibration": [1.5, -0.5, 0.25]}}
    (tmp_path / "fusion.json").write_text(json.dumps(platt))
    found = fusion.load(tmp_path / "fusion.json")["all"].probabilities(
        np.array([2, 1], np.float32), np.zeros(2, int)
    )
    logits = 1.5 * np.array([2, 1]) - 0.5 * np.log(np.exp(2) + np.exp(1)) + 0.25
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)), rtol=1e-6)


def test_other_weights_fall_no_further_than_they_must():
    """The best feature alone is always right; the other one may have nearly its weight."""
    relevant = np.tile([True, False], 50)
    features = {"a": relevant.astype(np.float32), "b": (~relevant).astype(np.float32)}
    points, gains = np.repeat(np.arange(50), 2), np.ones(100)
    candidates = fusion._Candidates(features, points, relevant, gains, 1.0)
    first, other = candidates.not_below_best(np.array([1.0, 2.0]))
    assert first == 1
    assert 0.8 < other < 1
