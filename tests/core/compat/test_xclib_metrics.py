"""pyxclib's metrics over ours: cases by hand, every form of predictions, the slow definitions."""

import numpy as np
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import ngame.compat.xclib.evaluation.xc_metrics as xc_metrics

# Row 0 ranks labels 2, 0, 3, 1; row 1 ranks 0, 1, 3, 2; row 2 has no positives.
SCORES = np.array([[0.7, 0.1, 0.9, 0.3], [0.8, 0.6, 0.2, 0.4], [0.1, 0.2, 0.3, 0.4]])
TRUTH = np.array([[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
ORDER = np.argsort(-SCORES, axis=1)
WEIGHTS = np.array([1.0, 2.0, 4.0, 8.0])
LOG3 = np.log2(3)


def forms(scores, k):
    """The same predictions in every form, with the argument that goes with it."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, 1)
    shuffled = np.roll(order, 1, axis=1)
    labels = scores.shape[1]
    return [
        (sp.csr_matrix(scores), False),
        (sp.csc_matrix(scores.astype(np.float32)), False),
        (scores, False),
        (scores.astype(np.float16), False),
        (order, True),
        (order[:, :k].astype(np.uint64), True),
        (np.insert(order, 0, labels, axis=1)[:, 1:], True),
        ({"indices": order, "scores": ranked}, True),
        ({"indices": order, "scores": None}, True),
        (
            {"indices": shuffled, "scores": np.take_along_axis(scores, shuffled, 1)},
            False,
        ),
    ]


@pytest.mark.parametrize("form", range(10))
def test_by_hand_in_every_form(form):
    X, ranked = forms(SCORES, 4)[form]
    check = np.testing.assert_allclose
    check(xc_metrics.precision(X, TRUTH, 4, ranked), [0, 1 / 6, 2 / 9, 3 / 12])
    check(xc_metrics.recall(X, TRUTH, 4, ranked), [0, 0.5 / 3, 1 / 3, 2 / 3])
    check(xc_metrics.hits(X, TRUTH, 4, ranked), [0, 1 / 3, 1 / 3, 2 / 3])
    ideal = 1 + 1 / LOG3
    row_0 = [0, 1 / LOG3 / ideal, (1 / LOG3 + 1 / 2) / ideal, (1 / LOG3 + 1 / 2) / ideal]
    row_1 = [0, 0, 0, 1 / np.log2(5)]
    check(xc_metrics.ndcg(X, TRUTH, 4, ranked), np.add(row_0, row_1) / 3)
    # Best possible: row 0 ranks label 3 (8), then 0 (1); row 1 has label 2 (4).
    best = np.array([12, 13 / 2, 13 / 3, 13 / 4])
    got = np.array([0, 1 / 2, 9 / 3, 13 / 4])
    check(xc_metrics.psprecision(X, TRUTH, WEIGHTS, 4, ranked), got / best)
    psn = (1 / LOG3 + 8 / 2) / ideal + 4 / np.log2(5)
    assert xc_metrics.psndcg(X, TRUTH, WEIGHTS, 4, ranked)[3] == pytest.approx(
        psn / ((8 + 1 / LOG3) / ideal + 4)
    )
    two = xc_metrics.Metrics(TRUTH).eval(X, 4, ranked)
    four = xc_metrics.Metrics(TRUTH, WEIGHTS).eval(X, 4, ranked)
    assert (len(two), len(four)) == (2, 4)
    check(four[0], xc_metrics.precision(X, TRUTH, 4, ranked))
    check(four[1], two[1])
    check(four[1], xc_metrics.ndcg(X, TRUTH, 4, ranked))
    check(four[2], got / best)
    check(four[3], xc_metrics.psndcg(X, TRUTH, WEIGHTS, 4, ranked))


@pytest.mark.parametrize("form", range(10))
def test_recall_at_as_many_as_there_are(form):
    """Row 0 has two positives, of which its best two hold one; row 1 has one, which is last."""
    X, ranked = forms(SCORES, 2)[form]
    assert xc_metrics.recall_at_gt(X, TRUTH, 10**8, ranked) == pytest.approx(0.5 / 3)
    assert xc_metrics.micro_recall_at_gt(X, TRUTH, 10**8, ranked) == pytest.approx(1 / 3)
    # Fewer predictions than positives, stored zeros among these, and none at all.
    truth = sp.csr_matrix(np.array([[1, 1, 1, 2]]))
    truth.data[3] = 0
    best = sp.csr_matrix(([0.5], ([0], [1])), (1, 4))
    assert xc_metrics.recall_at_gt(best, truth, pad_val=9) == pytest.approx(1 / 3)
    for metric in (xc_metrics.recall_at_gt, xc_metrics.micro_recall_at_gt):
        assert metric(best, np.zeros((1, 4)), pad_val=9) == 0


@given(st.integers(0, 2**32 - 1))
def test_against_the_definitions(seed):
    rng = np.random.default_rng(seed)
    rows, labels, k = rng.integers(1, 9, 3)
    # Few values, so that there are ties.
    X = sp.random(rows, labels, 0.6, "csr", rng=rng)
    X.data = np.round(X.data, 1)
    Y = sp.csr_matrix(rng.random((rows, labels)) < 0.4)
    weights = 1 + rng.random(labels)
    expected = reference.evaluate(X, Y, range(1, k + 1), weights)
    found = xc_metrics.Metrics(Y, weights).eval(X, k)
    for family, values in zip(("P", "N", "PSP", "PSN"), found, strict=True):
        wanted = [expected[f"{family}@{j}"] for j in range(1, k + 1)]
        np.testing.assert_allclose(values, wanted, rtol=1e-6)
    recall = [expected[f"R@{j}"] for j in range(1, k + 1)]
    np.testing.assert_allclose(xc_metrics.recall(X, Y, k), recall)
    # A hit is a row whose precision is not 0.
    single = [
        [reference.evaluate(X[row], Y[row], [j])[f"P@{j}"] > 0 for j in range(1, k + 1)]
        for row in range(rows)
    ]
    np.testing.assert_allclose(xc_metrics.hits(X, Y, k), np.mean(single, axis=0))


@pytest.mark.parametrize("form", range(10))
def test_rows_without_positives_are_left_out_where_asked(form):
    X, ranked = forms(SCORES, 4)[form]
    if isinstance(X, dict) and X["scores"] is None:
        X["scores"] = np.zeros_like(X["indices"])
    scorer = xc_metrics.Metrics(TRUTH, WEIGHTS, remove_invalid=True)
    for family, values in enumerate(scorer.eval(X, 3, ranked)):
        scale = 1 if family >= 2 else 1.5  # a ratio of means does not know of such rows
        everything = xc_metrics.Metrics(TRUTH, WEIGHTS).eval(X, 3, ranked)[family]
        np.testing.assert_allclose(values, scale * everything)
    rows = X["indices"] if isinstance(X, dict) else X
    assert rows.shape[0] == 3


def test_padding_is_no_prediction():
    ids = np.array([[4, 2, -1, 0], [4, 4, 4, 4], [3, 4, 4, 4]])
    values = xc_metrics.precision(ids, TRUTH, 4, sorted=True)
    np.testing.assert_allclose(values, [0, 1 / 6, 1 / 9, 1 / 12])
    scores = np.full(ids.shape, -1e5)
    scores[0] = 9, 2, 9, 1
    np.testing.assert_allclose(
        xc_metrics.precision({"indices": ids, "scores": scores}, TRUTH, 4), values
    )


def test_fewer_predictions_than_k_are_misses():
    for X, ranked in ((ORDER[:, :2], True), (sp.csr_matrix(SCORES * (SCORES > 0.5)), False)):
        values = xc_metrics.precision(X, TRUTH, 4, ranked)
        np.testing.assert_allclose(values, [0, 1 / 6, 1 / 9, 1 / 12])
    np.testing.assert_allclose(
        xc_metrics.hits(ORDER[:, :2], TRUTH, 4, sorted=True), [0, 1 / 3, 1 / 3, 1 / 3]
    )


def test_the_callers_matrices_stay():
    X = sp.csr_matrix((np.array([1.0, 3, 2]), [3, 1, 0], [0, 3, 3, 3]), shape=(3, 4))
    Y = sp.csr_matrix((np.array([1.0, 1]), [3, 1], [0, 2, 2, 2]), shape=(3, 4))
    xc_metrics.Metrics(Y, WEIGHTS).eval(X, 2)
    xc_metrics.hits(X, Y, 2)
    assert X.indices.tolist() == [3, 1, 0]
    assert Y.indices.tolist() == [3, 1]


def test_indices_that_were_widened_by_hand():
    X, Y = sp.csr_matrix(SCORES), sp.csr_matrix(TRUTH)
    X.indices, Y.indices = X.indices.astype(np.int64), Y.indices.astype(np.int64)
    for metric in (xc_metrics.precision, xc_metrics.recall, xc_metrics.hits):
        np.testing.assert_array_equal(metric(X, Y, 3), metric(SCORES, TRUTH, 3))


def test_truth_that_is_not_binary_counts_once():
    values = xc_metrics.Metrics(TRUTH * 3.0).eval(SCORES, 4)
    np.testing.assert_array_equal(values, xc_metrics.Metrics(TRUTH).eval(SCORES, 4))


def test_no_positives_at_all_are_zero():
    nothing = np.zeros_like(TRUTH)
    assert not np.any(xc_metrics.Metrics(nothing, WEIGHTS).eval(SCORES, 2))
    assert not xc_metrics.hits(SCORES, nothing, 2).any()


def test_inverse_propensities(rng):
    labels = sp.csr_matrix(rng.random((40, 7)) < 0.3)
    expected = reference.inverse_propensity(labels, 0.5, 0.4)
    for given_labels in (labels, labels.toarray().astype(float), labels.tocsc()):
        weights = xc_metrics.compute_inv_propesity(given_labels, 0.5, 0.4)
        assert weights.dtype == np.float64
        np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_format():
    assert xc_metrics.format([0.5, 0.12345], [1]) == "50.00,12.35\n100.00"
    assert xc_metrics.format(np.array([0.5]), decimal_points="%0.1f") == "50.0"


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (SCORES[:2], ValueError, r"X has shape \(2, 4\), true_labels has \(3, 4\)"),
        (sp.csr_matrix(SCORES[:, :3]), ValueError, r"X has shape \(3, 3\)"),
        (ORDER, ValueError, "say so by sorted=True"),
        (SCORES.tolist(), TypeError, "X is a list"),
        (SCORES > 0, TypeError, "X is an array of bool"),
        (np.where(SCORES > 0.8, np.nan, SCORES), ValueError, "NaN"),
        ({"indices": SCORES, "scores": SCORES}, TypeError, "ids of dtype float64"),
        ({"indices": ORDER[:2], "scores": SCORES[:2]}, ValueError, r"expected \[3, m\]"),
        ({"indices": ORDER, "scores": SCORES[:, :2]}, ValueError, r"scores of shape \(3, 2\)"),
        ({"indices": ORDER + 2, "scores": SCORES}, IndexError, "id 5 in row 0; there are 4"),
        ({"indices": ORDER - 2, "scores": SCORES}, IndexError, "id -2 in row 0"),
    ],
)
def test_bad_predictions(X, error, message):
    for metric in (xc_metrics.precision, xc_metrics.hits):
        with pytest.raises(error, match=message):
            metric(X, TRUTH, 2)


def test_bad_arguments():
    with pytest.raises(TypeError, match="true_labels is a list"):
        xc_metrics.recall(SCORES, TRUTH.tolist())
    with pytest.raises(ValueError, match="k is 0, expected 1 or more"):
        xc_metrics.ndcg(SCORES, TRUTH, 0)
    with pytest.raises(ValueError, match=r"inverse_propensity has shape \(3,\)"):
        xc_metrics.psndcg(SCORES, TRUTH, WEIGHTS[:3])
    with pytest.raises(ValueError, match="true_labels has no rows"):
        xc_metrics.precision(SCORES[:0], TRUTH[:0])
    with pytest.raises(ValueError, match="true_labels has no rows"):
        xc_metrics.hits(SCORES[:0], TRUTH[:0])


# The steps that some codes call themselves


@given(seed=st.integers(0, 2**32), k=st.integers(1, 6))
def test_the_steps_of_a_metric(seed, k):
    """As ViXML and mogicX put them together; rows have labels, as there."""
    rng = np.random.default_rng(seed)
    scores, weights = rng.random((6, 7)), rng.random(7) + 0.1
    dense = rng.random((6, 7)) < 0.4
    dense[np.arange(6), rng.integers(0, 7, 6)] = True
    truth = sp.csr_matrix(dense, dtype=np.float32)
    ids, wider, best, psp = xc_metrics._setup_metric(
        sp.csr_matrix(scores), truth, inv_psp=weights, k=k
    )
    flags = xc_metrics._eval_flags(ids, wider, None)
    assert (wider.shape, ids.shape, flags.shape) == ((6, 8), (6, k), (6, k))
    expected = reference.evaluate(sp.csr_matrix(scores), truth, range(1, k + 1), weights)

    def check(found, name):
        assert found == pytest.approx([expected[f"{name}@{j}"] for j in range(1, k + 1)], rel=1e-5)

    positives = np.asarray(wider.sum(axis=1), np.int32)
    n = np.cumsum(1 / np.log2(np.arange(1, wider.shape[1] + 1) + 1))[positives - 1]
    check(xc_metrics._precision(flags, k), "P")
    check(xc_metrics._recall(flags, 1 / wider.sum(axis=1), k), "R")
    check(xc_metrics._hits(flags), "HR")
    check(xc_metrics._ndcg(flags, n, k), "N")
    gains = [xc_metrics._eval_flags(order, wider, psp) for order in (ids, best)]
    check(xc_metrics._precision(gains[0], k) / xc_metrics._precision(gains[1], k), "PSP")
    check(xc_metrics._ndcg(gains[0], n, k) / xc_metrics._ndcg(gains[1], n, k), "PSN")
    dense_flags = xc_metrics._eval_flags(ids, wider.toarray())
    assert (dense_flags == flags).all()


def test_the_steps_pad():
    predictions = sp.csr_matrix(np.array([[0.5, 0, 0], [0, 0, 0]]))
    ids, wider, best, psp = xc_metrics._setup_metric(predictions, np.eye(2, 3), None, 2)
    assert ids.tolist() == [[0, 3], [3, 3]]
    assert (best, psp) == (None, None)
    assert xc_metrics._eval_flags(ids, wider).tolist() == [[1, 0], [0, 0]]
    with pytest.raises(ValueError, match=r"inv_psp has shape \(2,\), expected \(3,\)"):
        xc_metrics._setup_metric(predictions, np.eye(2, 3), np.ones(2))
    with pytest.raises(ValueError, match="true_labels has no rows"):
        xc_metrics._setup_metric(predictions[:0], np.eye(0, 3))


def test_the_old_name():
    with pytest.warns(FutureWarning, match="Metrices is now Metrics"):
        old = xc_metrics.Metrices(TRUTH, inv_propensity_scores=WEIGHTS, remove_invalid=True)
    new = xc_metrics.Metrics(TRUTH, WEIGHTS, remove_invalid=True)
    assert np.array_equal(old.eval(SCORES, 3), new.eval(SCORES, 3))
