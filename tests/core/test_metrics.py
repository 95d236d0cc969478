import numpy as np
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from ngame import metrics


def random_case(rng, rows, labels, dtype=np.float32):
    """Predictions from few scores (ties, stored zeros, empty rows) and truth, both CSR."""
    mask = rng.random((rows, labels)) < 0.4
    scores = rng.integers(-2, 3, (rows, labels)).astype(dtype)
    row, column = np.nonzero(mask)
    predictions = sp.csr_matrix((rows, labels), dtype=dtype)
    predictions.data = scores[mask]
    predictions.indices = column.astype(np.int32)
    predictions.indptr = np.searchsorted(row, np.arange(rows + 1)).astype(np.int32)
    truth = sp.csr_matrix((rng.random((rows, labels)) < 0.25).astype(np.float32))
    return predictions, truth


@given(seed=st.integers(0, 2**32), dtype=st.sampled_from("fd"), data=st.data())
def test_matches_reference(seed, dtype, data):
    rng = np.random.default_rng(seed)
    rows, labels = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 15))
    predictions, truth = random_case(rng, rows, labels, dtype)
    ks = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    weights = data.draw(st.sampled_from([None, rng.random(labels).astype(np.float32) + 0.1]))
    dropped = rng.random((rows, labels)) < data.draw(st.sampled_from([0, 0.3, 1]))
    expected = reference.evaluate(
        predictions, truth, sorted(set(ks)), weights, np.argwhere(dropped)
    )
    for drop in (np.argwhere(dropped), sp.csr_matrix(dropped)):
        found = metrics.evaluate(predictions, truth, ks=ks, inverse_propensity=weights, drop=drop)
        assert list(found) == list(expected)
        assert list(found.values()) == pytest.approx(list(expected.values()))
        assert all(0 <= value <= 1 + 1e-12 for value in found.values())
        of_rows = metrics.evaluate_rows(
            predictions, truth, ks=ks, inverse_propensity=weights, drop=drop, threads=2
        )
        assert list(of_rows) == list(expected)
        assert [values.mean() for values in of_rows.values()] == pytest.approx(
            list(expected.values())
        )
        for row in range(rows) if weights is None else ():
            own = drop.toarray()[row : row + 1] if sp.issparse(drop) else dropped[row : row + 1]
            one = reference.evaluate(
                predictions[row], truth[row], sorted(set(ks)), None, np.argwhere(own)
            )
            assert [values[row] for values in of_rows.values()] == pytest.approx(list(one.values()))


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("dropped_share", [0, 0.3])
def test_rows_with_many_positives(rng, index, dropped_share):
    # Near the number of positives above which rows are sorted.
    labels = 200
    truth = sp.csr_matrix((np.arange(labels) < np.array([[63], [64], [65], [180]])).astype(np.int8))
    predictions = sp.csr_matrix(rng.integers(1, 9, (4, labels)).astype(np.float32))
    predictions.indices = predictions.indices.astype(index)
    predictions.indptr = predictions.indptr.astype(index)
    dropped = np.argwhere(rng.random((4, labels)) < dropped_share)
    weights = rng.random(labels).astype(np.float32) + 0.1
    expected = reference.evaluate(predictions, truth, [1, 7, 150, 300], weights, dropped)
    found = metrics.evaluate(
        predictions, truth, ks=[1, 7, 150, 300], inverse_propensity=weights, drop=dropped
    )
    assert found == pytest.approx(expected)
    # Every entry twice, with a lower score: it lowers the ranks of others and is no second hit.
    twice = sp.csr_matrix((4, labels), dtype=np.float32)
    twice.indptr = 2 * predictions.indptr
    twice.indices = np.repeat(predictions.indices, 2)
    twice.data = np.repeat(predictions.data, 2) - np.tile([0, 10], predictions.nnz)
    twice.data = twice.data.astype(np.float32)
    again = metrics.evaluate(
        twice, truth, ks=[1, 7, 150, 300], inverse_propensity=weights, drop=dropped
    )
    assert again == pytest.approx(expected)


def test_by_hand():
    # Row 0 ranks 2, 0, 3 (3 ties with 4 and has the lower id); positives 0 and 4.
    # Row 1 has no positives; row 2 no predictions; row 3 predicts its only positive first.
    scores = np.array([[3, 0, 5, 1, 1], [1, 0, 0, 0, 0], [0] * 5, [0, 0.5, 0, 0, 0]])
    predictions = sp.csr_matrix(scores)
    truth = sp.csr_matrix(np.array([[1, 0, 0, 0, 1], [0] * 5, [0, 0, 1, 0, 0], [0, 1, 0, 0, 0]]))
    weights = np.array([1, 2, 3, 4, 5], np.float32)
    log3 = np.log2(3)
    found = metrics.evaluate(predictions, truth, ks=[1, 3], inverse_propensity=weights)
    assert found == pytest.approx(
        {
            "P@1": 1 / 4,
            "P@3": (1 + 1) / 3 / 4,
            "N@1": 1 / 4,
            "N@3": ((1 / log3) / (1 + 1 / log3) + 1) / 4,
            "R@1": 1 / 4,
            "R@3": (1 / 2 + 1) / 4,
            "MRR@1": 1 / 4,
            "MRR@3": (1 / 2 + 1) / 4,
            "MAP@1": 1 / 4,
            "MAP@3": (1 / 2 / 2 + 1) / 4,
            "HR@1": 1 / 4,
            "HR@3": 2 / 4,
            "PSP@1": 2 / (5 + 3 + 2),
            "PSP@3": (1 + 2) / (6 + 3 + 2),
            "PSN@1": 2 / (5 + 3 + 2),
            "PSN@3": ((1 / log3) / (1 + 1 / log3) + 2) / ((5 + 1 / log3) / (1 + 1 / log3) + 3 + 2),
        }
    )


def test_perfect_and_worst_predictions(rng):
    _, truth = random_case(rng, 50, 20)
    truth = truth[np.diff(truth.indptr) > 0]
    weights = metrics.inverse_propensity(truth)
    best = truth.multiply(weights).tocsr().astype(np.float32)
    found = metrics.evaluate(best, truth, ks=[1, 5, 20], inverse_propensity=weights)
    assert found["P@1"] == 1
    for name in ("N@1", "N@5", "N@20", "R@20", "PSP@1", "PSP@5", "PSN@1"):
        assert found[name] == pytest.approx(1)
    wrong = sp.csr_matrix(1 - truth.toarray())
    found = metrics.evaluate(wrong, truth, inverse_propensity=weights)
    assert set(found.values()) == {0.0}


def test_no_truth_at_all_is_zero():
    predictions = sp.csr_matrix(np.ones((3, 4)))
    found = metrics.evaluate(
        predictions, sp.csr_matrix((3, 4)), inverse_propensity=np.ones(4, np.float32)
    )
    assert set(found.values()) == {0.0}


def test_order_of_storage_does_not_count(rng):
    predictions, truth = random_case(rng, 40, 30)
    shuffled = predictions.copy()
    for row in range(40):
        part = slice(shuffled.indptr[row], shuffled.indptr[row + 1])
        order = rng.permutation(part.stop - part.start)
        shuffled.indices[part] = shuffled.indices[part][order]
        shuffled.data[part] = shuffled.data[part][order]
    shuffled.has_sorted_indices = False
    before = shuffled.indices.copy()
    assert metrics.evaluate(shuffled, truth) == metrics.evaluate(predictions, truth)
    assert (shuffled.indices == before).all()


def test_types_of_index_and_container(rng):
    predictions, truth = random_case(rng, 40, 30)
    expected = metrics.evaluate(predictions, truth, drop=[[0, 1]])
    wide = predictions.copy()
    wide.indices, wide.indptr = wide.indices.astype(np.int64), wide.indptr.astype(np.int64)
    for other in (wide, sp.csr_array(predictions), predictions.astype(np.float64)):
        assert metrics.evaluate(other, truth, drop=[[0, 1]]) == expected
    for other in (truth.astype(bool), sp.csr_array(truth), truth.astype(np.int64) * 7):
        assert metrics.evaluate(predictions, other, drop=[[0, 1]]) == expected


def test_stored_zeros_count_in_predictions_but_not_in_truth():
    predictions = sp.csr_matrix((np.zeros(1), [1], [0, 1]), shape=(1, 3))
    truth = sp.csr_matrix((np.array([0.0, 1.0]), [0, 1], [0, 2]), shape=(1, 3))
    assert set(metrics.evaluate(predictions, truth, ks=[1]).values()) == {1.0}
    assert truth.nnz == 2


def test_label_predicted_twice_counts_once():
    predictions = sp.csr_matrix((np.array([2.0, 1.0, 0.5]), [1, 1, 0], [0, 3]), shape=(1, 3))
    truth = sp.csr_matrix(np.array([[1, 1, 0]]))
    found = metrics.evaluate(predictions, truth, ks=[2, 3])
    assert found["P@2"] == 1 / 2
    assert found["R@3"] == 1


@given(seed=st.integers(0, 2**32), many=st.booleans())
def test_labels_predicted_twice_match_reference(seed, many):
    """Also beyond as many ranks as there are columns."""
    rng = np.random.default_rng(seed)
    rows, labels = 3, 90 if many else 4
    columns = rng.integers(0, labels, (rows, 2 * labels)).ravel()
    scores = rng.integers(-2, 3, columns.shape).astype(np.float32)
    predictions = sp.csr_matrix((rows, labels), dtype=np.float32)
    predictions.indptr = (np.arange(rows + 1) * 2 * labels).astype(np.int32)
    predictions.indices, predictions.data = columns.astype(np.int32), scores
    truth = sp.csr_matrix((rng.random((rows, labels)) < 0.9).astype(np.float32))
    weights = rng.random(labels).astype(np.float32) + 0.1
    dropped = np.argwhere(rng.random((rows, labels)) < 0.1)
    ks = [1, labels, labels + 2, 2 * labels, 3 * labels]
    found = metrics.evaluate(predictions, truth, ks=ks, inverse_propensity=weights, drop=dropped)
    assert found == pytest.approx(reference.evaluate(predictions, truth, ks, weights, dropped))


def test_infinite_scores_are_ranked():
    predictions = sp.csr_matrix(np.array([[-np.inf, 1, np.inf]]))
    truth = sp.csr_matrix(np.array([[1, 0, 0]]))
    assert metrics.evaluate(predictions, truth, ks=[2, 3])["R@2"] == 0
    assert metrics.evaluate(predictions, truth, ks=[2, 3])["R@3"] == 1


@given(seed=st.integers(0, 2**32), a=st.floats(0.1, 2), b=st.floats(0.1, 5))
def test_inverse_propensity_matches_reference(seed, a, b):
    _, labels = random_case(np.random.default_rng(seed), 30, 12)
    found = metrics.inverse_propensity(labels, a, b)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference.inverse_propensity(labels, a, b), rtol=1e-6)


def test_what_is_left_to_the_defaults(rng):
    """Figures of papers: propensities with A 0.55 and B 1.5, and ranks 1, 3 and 5."""
    predictions, truth = random_case(rng, 30, 12)
    weights = metrics.inverse_propensity(truth)
    np.testing.assert_allclose(weights, reference.inverse_propensity(truth), rtol=1e-6)
    found = metrics.evaluate(predictions, truth, inverse_propensity=weights)
    assert found == metrics.evaluate(predictions, truth, ks=[1, 3, 5], inverse_propensity=weights)


def test_stored_zeros_are_no_points_of_a_label(rng):
    _, labels = random_case(rng, 30, 12)
    stored = labels.copy()
    stored.data[::3] = 0
    without = stored.copy()
    without.eliminate_zeros()
    np.testing.assert_array_equal(
        metrics.inverse_propensity(stored), metrics.inverse_propensity(without)
    )


def test_rejects_bad_input(rng):
    predictions, truth = random_case(rng, 3000, 6)
    weights = np.ones(6, np.float32)
    bad = predictions.copy()
    bad.data[bad.indptr[[1500, 2800]]] = np.nan
    first = int(np.searchsorted(bad.indptr, np.flatnonzero(np.isnan(bad.data))[0], "right")) - 1
    with pytest.raises(ValueError, match=f"predictions has NaN in row {first}$"):
        metrics.evaluate(bad, truth, threads=2)
    with pytest.raises(ValueError, match=r"truth has shape \(2999, 6\), predictions has"):
        metrics.evaluate(predictions, truth[1:])
    with pytest.raises(ValueError, match="predictions has no rows"):
        metrics.evaluate(predictions[:0], truth[:0])
    with pytest.raises(ValueError, match="ks is 0, expected 1 or more"):
        metrics.evaluate(predictions, truth, ks=[1, 0])
    with pytest.raises(ValueError, match="ks is empty"):
        metrics.evaluate(predictions, truth, ks=[])
    with pytest.raises(TypeError, match="predictions has dtype complex128, expected numbers"):
        metrics.evaluate(predictions.astype(complex), truth)
    with pytest.raises(TypeError, match="predictions has dtype bool, expected scores or label ids"):
        metrics.evaluate(predictions.toarray() > 0, truth)
    with pytest.raises(TypeError, match="truth is a csc matrix, expected a scipy"):
        metrics.evaluate(predictions, truth.tocsc())
    with pytest.raises(ValueError, match=r"inverse_propensity has shape \(5,\), expected \(6,\)"):
        metrics.evaluate(predictions, truth, inverse_propensity=weights[1:])
    with pytest.raises(ValueError, match="not positive and finite"):
        metrics.evaluate(predictions, truth, inverse_propensity=0 * weights)
    with pytest.raises(IndexError, match=r"drop\[0\] has column 6, out of range for 6"):
        metrics.evaluate(predictions, truth, drop=[[0, 6]])
    with pytest.raises(ValueError, match="train_labels has 0 rows, expected 3 or more"):
        metrics.inverse_propensity(truth[:0])
    with pytest.raises(ValueError, match="a and b are"):
        metrics.inverse_propensity(truth, b=-1)


def test_rows_by_hand():
    # Of row 0 the positives 0 and 4 are ranked second and last; row 1 has no positives.
    predictions = sp.csr_matrix(np.array([[3, 0, 5, 1, 1.0], [1, 2, 3, 4, 5]]))
    truth = sp.csr_matrix(np.array([[1, 0, 0, 0, 1], [0] * 5]))
    found = metrics.evaluate_rows(
        predictions, truth, ks=[1, 4], inverse_propensity=np.array([1, 2, 3, 4, 5])
    )
    assert {name: values[0] for name, values in found.items() if name.endswith("@4")} == (
        pytest.approx(
            {
                "P@4": 2 / 4,
                "N@4": (1 / np.log2(3) + 1 / np.log2(5)) / (1 + 1 / np.log2(3)),
                "R@4": 1,
                "MRR@4": 1 / 2,
                "MAP@4": (1 / 2 + 2 / 4) / 2,
                "HR@4": 1,
                # The mean over both rows of the best possible gain is half of row 0's.
                "PSP@4": 2,
                "PSN@4": 2 * (1 / np.log2(3) + 5 / np.log2(5)) / (5 + 1 / np.log2(3)),
            }
        )
    )
    assert all(values[1] == 0 for values in found.values())
    assert found["P@1"].tolist() == [0, 0]
    assert found["P@1"].dtype == np.float64


@given(seed=st.integers(0, 2**32), k=st.integers(1, 8))
def test_every_form_of_predictions(seed, k):
    """Each gives what the CSR matrix with the same ranking gives."""
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(8.0), (5, 1)), axis=1)
    truth = sp.csr_matrix(rng.random((5, 8)) < 0.3)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, ids, 1)
    kept = np.full(scores.shape, -1.0)
    np.put_along_axis(kept, ids, best + 1, 1)
    matrix = sp.csr_matrix(np.where(kept < 0, 0, kept))
    expected = metrics.evaluate(matrix, truth, ks=[1, 3, 8])
    shuffled = rng.permuted(np.arange(k))
    forms = [
        (best, ids),
        (best[:, shuffled].astype(np.float32), ids[:, shuffled].astype(np.int32)),
        (best.astype(np.int64), np.insert(ids, k, -1, axis=1)[:, :k]),
        ids,
        ids.astype(np.uint16),
        ids.tolist(),
        [row[:2] for row in ids.tolist()] if k == 2 else list(ids),
        matrix.astype(np.int64),
        sp.csr_array(matrix),
    ]
    if k == 8:
        forms += [scores, scores.astype(np.float16), scores.tolist(), tuple(scores.tolist())]
    for form in forms:
        assert metrics.evaluate(form, truth, ks=[1, 3, 8]) == pytest.approx(expected)
    labels = [row.indices for row in truth]
    for positives in (truth.toarray(), truth.toarray() * 1, truth.toarray() * 1.0, labels):
        assert metrics.evaluate(ids, positives, ks=[1, 3, 8]) == pytest.approx(expected)


def test_forms_of_other_lengths():
    expected = metrics.evaluate([[2, 0], [], [1]], [[0, 2], [1], [1]], ks=[2])
    assert expected == pytest.approx(
        {"P@2": 0.5, "N@2": 2 / 3, "R@2": 2 / 3, "MRR@2": 2 / 3, "MAP@2": 2 / 3, "HR@2": 2 / 3}
    )
    padded = np.array([[2, 0], [-1, -1], [1, -1]])
    assert metrics.evaluate(padded, [[0, 2], [1], [1]], ks=[2]) == expected
    assert metrics.evaluate(padded, [[0, 2], [1], [1], []][:3], ks=[2]) == expected
    scores = np.array([[9, 8], [-np.inf, -np.inf], [7, -np.inf]])
    assert metrics.evaluate((scores, padded), [[0, 2], [1], [1]], ks=[2]) == expected


def test_rejects_forms():
    truth = sp.csr_matrix(np.eye(3))

    def error(kind, message, predictions, truth=truth):
        with pytest.raises(kind, match=message):
            metrics.evaluate(predictions, truth)

    counts = np.array([[2, 1, 0], [5, 5, 1], [0, 0, 0]])
    error(ValueError, "predictions holds integers, one for every label, with repeats in row 1: "
          "integers are label ids; give scores as floats", counts)  # fmt: skip
    error(ValueError, "predictions is a ragged list of floats", [[0.5, 0.1, 0.2], [0.5], [1.0]])
    error(ValueError, r"predictions has shape \(3,\), expected two", np.ones(3))
    error(TypeError, "predictions is a dict, expected scores or label ids", {0: [1], 1: [0]})
    with pytest.raises(TypeError, match=r"drop has dtype float64, expected integer pairs \[n, 2\]"):
        metrics.evaluate(np.eye(3), truth, drop=np.eye(3))
    error(TypeError, r"predictions\[0\] has dtype <U1, expected integers", [["a"], ["b"], ["c"]])
    error(IndexError, "predictions has label id 3 in row 2, out of range for 3", [[0], [1], [3]])
    error(IndexError, "predictions has label id -2 in row 1", np.array([[0], [-2], [1]]))
    error(ValueError, r"truth has shape \(3, 3\), predictions has \(2, 3\)", [[0], [1]])
    error(TypeError, "predictions has two parts of dtypes int64 and float64, expected scores",
          (np.array([[0]] * 3), np.ones((3, 1))))  # fmt: skip
    error(ValueError, r"predictions has scores of shape \(3, 2\) and ids of shape \(3, 1\)",
          (np.ones((3, 2)), np.array([[0]] * 3)))  # fmt: skip
    error(
        ValueError, "truth is a list of 0 and 1 for every label", np.ones((3, 3)), [[1, 0, 0]] * 3
    )
    error(ValueError, "truth holds 2: an array has 0 and 1", [[0], [1]], np.array([[2], [1]]))
    error(ValueError, r"truth has shape \(3,\), expected", [[0]] * 3, np.array([2, 1, 0]))
    error(IndexError, r"truth has label id 3 in row 0", np.ones((1, 3)), [[3]])
    error(TypeError, r"truth\[0\] has dtype float64", np.ones((1, 3)), [[0.5]])
    error(TypeError, "truth is a str", np.ones((1, 3)), "1")


def test_rejects_a_truth_that_is_none():
    """Scores where the truth is expected, NaN and negative values: none is a positive."""
    scores = np.array([[0.9, 0.2, 0.1], [0.3, 0.8, 0.4]])
    truth = sp.csr_matrix(np.array([[1.0, 0, 0], [0, 1, 1]]))
    for swapped in (scores, scores.astype(np.float32)):
        with pytest.raises(ValueError, match=r"truth holds 0.9: .* scores are predictions, the"):
            metrics.evaluate(truth, swapped)
    with pytest.raises(ValueError, match=r"truth holds 0.9 and predictions nothing but 1: they l"):
        metrics.evaluate(truth, sp.csr_matrix(scores))
    for odd in (-1.0, np.nan):
        for form in (np.array, sp.csr_matrix):
            with pytest.raises(ValueError, match=f"truth holds {odd:.4g}"):
                metrics.evaluate_rows(sp.csr_matrix(scores), form([[odd, 0, 0], [0, 1, 1.0]]))
        with pytest.raises(ValueError, match=f"train_labels holds {odd:.4g}"):
            metrics.inverse_propensity(sp.csr_matrix([[odd, 1.0]]))
    with pytest.raises(ValueError, match=r"truth holds -1: .* give label ids as lists"):
        metrics.evaluate(scores, np.array([[0, -1, 0], [1, 0, 0]]))
    graded = truth.multiply(0.5).tocsr()  # how relevant: positives all the same
    assert metrics.evaluate(sp.csr_matrix(scores), graded) == metrics.evaluate(scores, truth)


def test_one_cut_off_is_a_list_too():
    x = sp.csr_matrix(np.eye(3, dtype=np.float32))
    with pytest.raises(TypeError, match=r"ks is 1, expected integers, such as \[1\]"):
        metrics.evaluate(x, x, ks=1)


def test_weights_beyond_float_are_refused():
    labels = sp.csr_matrix(np.eye(4))
    for a, b in ((1e4, 1), (2**31, 2), (3, 1e300)):
        with pytest.raises(ValueError, match=r"of which the weights are beyond float32$"):
            metrics.inverse_propensity(labels, a, b)


@pytest.mark.parametrize("kind", [np.array(["1", "2"]), np.array([1j, 2j]), np.array([None, 1])])
def test_weights_are_numbers(kind):
    with pytest.raises(TypeError, match=rf"^inverse_propensity has dtype {kind.dtype}"):
        metrics.evaluate(np.eye(2), np.eye(2), inverse_propensity=kind)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8, bool])
def test_truth_of_any_type_of_number(dtype):
    truth = np.array([[1, 0, 0], [0, 1, 1]], dtype)
    found = metrics.evaluate(np.array([[3.0, 2, 1], [3, 2, 1]]), truth, ks=[1, 2])
    assert found["P@1"] == 0.5
    assert found["R@2"] == 0.75


def test_stored_zeros_are_pairs_to_drop():
    truth = sp.csr_matrix(np.eye(2))
    drop = sp.csr_matrix((np.zeros(1), [1], [0, 0, 1]), shape=(2, 2))
    labelled = sp.csr_matrix(np.ones((4, 2)))
    with pytest.warns(UserWarning, match="1 of 2 test points have no label"):
        found = metrics.evaluate_each({"a": truth}, truth, labelled, ks=[1], drop=drop)
    assert found["a"]["P@1"] == 0.5


def test_truth_with_duplicates_stays_as_it_is():
    truth = sp.csr_matrix((np.ones(3), [0, 0, 2], [0, 2, 3]), shape=(2, 3))
    metrics.evaluate_each(
        {"a": sp.csr_matrix(np.eye(2, 3))}, truth, sp.csr_matrix(np.ones((4, 3))), ks=[1]
    )
    assert truth.indices.tolist() == [0, 0, 2]


@pytest.mark.parametrize("dtype", [np.int64, np.int8, bool])
def test_predictions_of_integers_with_duplicates_stay_as_they_are(dtype):
    scores = np.array([1, 1, 1, 0], dtype)
    arrays = scores, np.array([2, 0, 2, 1]), np.array([0, 3, 4])
    predictions = sp.csr_matrix(tuple(array.copy() for array in arrays), shape=(2, 3))
    truth = sp.csr_matrix(np.array([[0, 0, 1], [0, 1, 0]]))
    found = metrics.evaluate(predictions, truth, ks=[1, 2])
    as_floats = sp.csr_matrix((scores.astype(float), *arrays[1:]), shape=(2, 3))
    assert found == metrics.evaluate(as_floats, truth, ks=[1, 2])
    for name, array in zip(("data", "indices", "indptr"), arrays, strict=True):
        assert getattr(predictions, name).tolist() == array.tolist()
