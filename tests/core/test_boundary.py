"""Broken arrays, which SciPy does not check, and numbers out of range: errors, never a crash."""

import copy

import numpy as np
import pytest
import scipy.sparse as sp

import ngame
from ngame import _core, metrics

GOOD = sp.csr_matrix(np.array([[1, 0, 2], [0, 3, 0]], np.float32))


def broken(**arrays):
    """A CSR matrix with some of its arrays replaced behind SciPy's back."""
    matrix = GOOD.copy()
    for name, values in arrays.items():
        setattr(matrix, name, np.array(values, getattr(matrix, name).dtype))
    matrix.has_sorted_indices = True
    matrix.has_canonical_format = True
    return matrix


CALLS = {
    "in_batch_positives": lambda m: ngame.in_batch_positives(m, [0, 1], [0, 1, 2]),
    "label_pool": lambda m: ngame.label_pool(m, [0, 1]),
    "cluster_shortlist": lambda m: ngame.cluster_shortlist(
        m, ngame.Clusters(np.arange(2), np.array([0, 2]))
    ),
    "keep_topk": lambda m: ngame.keep_topk(m, 1),
    "merge first": lambda m: ngame.merge([m, GOOD]),
    "merge second": lambda m: ngame.merge([GOOD, m]),
    "drop_pairs matrix": lambda m: ngame.drop_pairs(m, GOOD),
    "drop_pairs pairs": lambda m: ngame.drop_pairs(GOOD, m),
    "topk drop": lambda m: ngame.topk(
        np.ones((2, 2), np.float32), np.ones((3, 2), np.float32), 3, drop=m
    ),
    "evaluate truth": lambda m: metrics.evaluate(GOOD, m),
    "evaluate drop": lambda m: metrics.evaluate(GOOD, GOOD, drop=m),
}
ANY_ORDER = CALLS | {"evaluate predictions": lambda m: metrics.evaluate(m, GOOD)}


@pytest.mark.parametrize("call", ANY_ORDER)
def test_column_out_of_range(call):
    with pytest.raises(IndexError, match="column 3 in row 0 is out of range for 3 columns"):
        ANY_ORDER[call](broken(indices=[0, 3, 1]))
    with pytest.raises(IndexError, match="column -1 in row 1 is out of range for 3 columns"):
        ANY_ORDER[call](broken(indices=[0, 2, -1]))


@pytest.mark.parametrize("call", ANY_ORDER)
@pytest.mark.parametrize("indptr", [[2, 0, 3], [0, 2, 0], [-1, 2, 3], [0, 2, 9]])
def test_offsets_that_do_not_ascend(call, indptr):
    with pytest.raises(ValueError, match="does not ascend within the stored entries"):
        ANY_ORDER[call](broken(indptr=indptr))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("indices", [[2, 0, 1], [0, 0, 1]])
def test_order_that_is_not_what_the_flag_says(call, indices):
    with pytest.raises(ValueError, match="in row 0 repeats or is out of order"):
        CALLS[call](broken(indices=indices))


@pytest.mark.parametrize("call", ANY_ORDER)
def test_only_csr_is_taken(call):
    for other, kind in ((GOOD.tocsc(), "csc matrix"), (GOOD.tocoo(), "coo matrix")):
        with pytest.raises(TypeError, match=f"is a {kind}, expected a scipy.sparse CSR"):
            ANY_ORDER[call](other)


def test_masked_arrays_are_refused():
    """Their masks would be dropped without a word."""
    x = np.ma.masked_array(np.eye(3, dtype=np.float32), mask=np.eye(3))
    truth = sp.csr_matrix(np.eye(3, dtype=np.float32))
    for call, name in (
        (lambda: ngame.topk(x, x.data, 1), "queries"),
        (lambda: ngame.topk(x.data, x, 1), "items"),
        (lambda: ngame.balanced_clusters(x, size=1), "x"),
        (lambda: ngame.metrics.evaluate(x, truth, ks=[1]), "predictions"),
        (lambda: ngame.metrics.evaluate(truth, x, ks=[1]), "truth"),
    ):
        with pytest.raises(TypeError, match=rf"^{name} is a masked array, .*\b{name}\.filled\("):
            call()


def test_values_of_another_length():
    matrix = broken()
    matrix.data = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="data and indices differ in length"):
        ngame.keep_topk(matrix, 1)


def test_core_checks_for_itself():
    """What the Python functions check already is checked again by the extension."""
    x = np.ones((4, 3), np.float32)
    offsets = np.array([0, 2, 4])
    with pytest.raises(TypeError, match="x has dtype float64"):
        _core.balanced_clusters(x.astype(float), offsets, 0, 20, 0, 1)
    with pytest.raises(ValueError, match="x has 1 dimensions, expected 2"):
        _core.balanced_clusters(x[0], offsets, 0, 20, 0, 1)
    with pytest.raises(ValueError, match="x has rows that are not contiguous"):
        _core.balanced_clusters(np.asfortranarray(x), offsets, 0, 20, 0, 1)
    with pytest.raises(ValueError, match="offsets does not ascend from 0 to 4"):
        _core.balanced_clusters(x, np.array([0, 2, 2, 4]), 0, 20, 0, 1)
    with pytest.raises(ValueError, match="offsets does not ascend from 0 to 4"):
        _core.balanced_clusters(x, np.array([0, 2]), 0, 20, 0, 1)
    with pytest.raises(ValueError, match="offsets does not ascend from 0 to 4"):
        _core.balanced_clusters(x, np.array([], np.int64), 0, 20, 0, 1)
    with pytest.raises(TypeError):
        _core.balanced_clusters(x, offsets.astype(np.int32), 0, 20, 0, 1)
    with pytest.raises(ValueError, match="threads is -1"):
        _core.balanced_clusters(x, offsets, 0, 20, 0, -1)
    order = np.array([0, 1, 2, 4], np.int32)
    with pytest.raises(IndexError, match="order has id 4, out of range for 4"):
        _core.coherence(x, order, offsets, 1)
    with pytest.raises(ValueError, match="order has 3 ids, expected 4"):
        _core.coherence(x, order[:3], offsets, 1)
    with pytest.raises(IndexError, match="order has id 4, out of range for 4"):
        _core.cluster_sums(x, order, offsets, 1)
    for call in (_core.coherence, _core.cluster_sums):
        with pytest.raises(ValueError, match="offsets does not ascend from 0 to 4"):
            call(x, order, np.array([], np.int64), 1)
    with pytest.raises(TypeError, match="must both be int32 or int64"):
        _core.label_pool((GOOD.indptr, GOOD.indices.astype(np.int64), 3), np.array([0]))


X = np.eye(4, dtype=np.float32)
Y = sp.csr_matrix(X)
CLUSTERS = ngame.balanced_clusters(X, size=2)

THREADED = {
    "balanced_clusters": lambda n: ngame.balanced_clusters(X, size=2, threads=n),
    "coherence": lambda n: CLUSTERS.coherence(X, threads=n),
    "topk": lambda n: ngame.topk(X, X, 1, threads=n),
    "cluster_shortlist": lambda n: ngame.cluster_shortlist(Y, CLUSTERS, threads=n),
    "keep_topk": lambda n: ngame.keep_topk(Y, 1, threads=n),
    "merge": lambda n: ngame.merge([Y, Y], threads=n),
    "drop_pairs": lambda n: ngame.drop_pairs(Y, [], threads=n),
    "evaluate": lambda n: metrics.evaluate(Y, Y, threads=n),
    "mine_hard_negatives": lambda n: ngame.mine_hard_negatives(X, X, Y, 1, threads=n),
    "haversine_neighbours": lambda n: ngame.haversine_neighbours([0, 1], [0, 1], 1, threads=n),
}


@pytest.mark.parametrize("call", THREADED)
def test_number_of_threads(call):
    for threads in (1025, 10**6, 2**31, 2**63, 2**70):
        with pytest.raises(ValueError, match=f"threads is {threads}, expected at most 1024"):
            THREADED[call](threads)
    with pytest.raises(ValueError, match="threads is -1, expected 0 or more"):
        THREADED[call](-1)
    for threads in (1.0, "2", None):
        with pytest.raises(TypeError, match=r"threads is a .*, expected an integer"):
            THREADED[call](threads)
    THREADED[call](np.int64(5))


COUNTED = {
    "k": lambda n: ngame.keep_topk(Y, n),
    "limit": lambda n: ngame.cluster_shortlist(Y, CLUSTERS, limit=n),
    "max_iter": lambda n: ngame.balanced_clusters(X, size=2, max_iter=n),
    "ks": lambda n: metrics.evaluate(Y, Y, ks=[1, n]),
    "n": lambda n: ngame.mine_hard_negatives(X, X, Y, n),
}


@pytest.mark.parametrize("name", COUNTED)
def test_counts_beyond_32_bits(name):
    for count in (2**31, 2**63, 2**70):
        with pytest.raises(ValueError, match=f"{name} is {count}, expected at most 2147483647"):
            COUNTED[name](count)
    if name != "n":  # whose result would have as many columns
        COUNTED[name](2**31 - 1)


def test_any_integer_is_a_seed():
    for seed in (0, -1, 2**63, -(2**70), 2**70):
        assert len(ngame.balanced_clusters(X, size=2, seed=seed)) == 2


def at_odd_address(array):
    """The same values where no number of their type may begin."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    odd = memory[1:].view(array.dtype).reshape(array.shape)
    odd[...] = array
    assert not odd.flags.aligned
    return odd


def of_a_table(array):
    """The same values as a column of a wider array."""
    table = np.zeros((len(array), 2), array.dtype)
    table[:, 1] = array
    return table[:, 1]


def with_room(array):
    """The same values in front of others, which belong to no row."""
    return np.append(array, array[-1:])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_at_odd_addresses_are_copied(rng, dtype):
    x = rng.standard_normal((70, 33)).astype(dtype)
    odd = at_odd_address(x)
    clusters = ngame.balanced_clusters(x, size=7)
    assert ngame.balanced_clusters(odd, size=7) == clusters
    assert clusters.coherence(odd) == clusters.coherence(x)
    for pair in ((odd, x), (x, odd)):
        for ours, expected in zip(
            ngame.topk_arrays(*pair, 5), ngame.topk_arrays(x, x, 5), strict=True
        ):
            assert (ours == expected).all()
    for call in (
        lambda: _core.balanced_clusters(odd, clusters.offsets, 0, 20, 0, 1),
        lambda: _core.topk(x, odd, None, 1, True, None, 1),
        lambda: _core.coherence(x, at_odd_address(clusters.order), clusters.offsets, 1),
    ):
        with pytest.raises(ValueError, match="is not aligned"):
            call()


def test_empty_arrays_may_be_anywhere():
    none = np.zeros(9, np.uint8)[1:1].view(np.float32).reshape(0, 3)
    assert ngame.topk_arrays(none, np.ones((2, 3), np.float32), 1)[0].shape == (0, 1)


WHOLE = sp.csr_matrix(np.array([[1, 0, 2], [0, 3, 0], [4, 5, 0]], np.float32))
OF_WHOLE = {
    **{name: call for name, call in ANY_ORDER.items() if name not in ("topk drop",)},
    "sparse_topk queries": lambda m: ngame.sparse_topk(m, GOOD, 2),
    "sparse_topk items": lambda m: ngame.sparse_topk(GOOD, m, 2),
    "sparse_topk drop": lambda m: ngame.sparse_topk(GOOD, GOOD, 2, drop=m[:, :2]),
    "linear_classifiers points": lambda m: ngame.linear_classifiers(m, GOOD),
    "linear_classifiers labels": lambda m: ngame.linear_classifiers(GOOD, m),
    "pair_scores": lambda m: ngame.ExactIndex(np.eye(3, dtype=np.float32)).pair_scores(
        np.ones((2, 3), np.float32), m
    ),
    "inverse_propensity": lambda m: metrics.propensity_weights(m, 0.5, 0.5),
    "keys": lambda m: ngame.ClusterBatchSampler(2, 1, cluster_size=1, keys=m).plan(),
}


def plain(found):
    """What a call gave, as something to compare."""
    if isinstance(found, tuple | list):
        return [plain(one) for one in found]
    return found.toarray().tolist() if sp.issparse(found) else np.asarray(found).tolist()


@pytest.mark.parametrize("call", OF_WHOLE)
@pytest.mark.parametrize("kind", [at_odd_address, of_a_table, with_room])
@pytest.mark.parametrize("names", [["data"], ["indices"], ["data", "indices"]])
def test_arrays_of_a_matrix_may_lie_anywhere(call, kind, names):
    if kind is with_room:
        names = ["data", "indices"]
    matrix = GOOD.copy()
    for name in names:
        setattr(matrix, name, kind(getattr(matrix, name)))
    before = {name: getattr(matrix, name) for name in ("data", "indices", "indptr")}
    found, expected = OF_WHOLE[call](matrix), OF_WHOLE[call](GOOD)
    if isinstance(found, dict):
        assert found == expected
    else:
        assert plain(found) == plain(expected)
    assert all(getattr(matrix, name) is array for name, array in before.items())


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x", lambda x: ngame.balanced_clusters(x, size=1)),
        ("items", lambda x: ngame.topk(np.eye(3, dtype=np.float32), x, 1)),
        ("source", lambda x: ngame.ClusterBatchSampler(3, 1, cluster_size=1).refresh(x)),
    ],
)
@pytest.mark.parametrize("value", [None, 3, "rows", [[1, 2], [3]], sp.identity(3, format="csr")])
def test_what_is_no_array_of_rows_is_named(name, call, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{name} (is|has|cannot)\b"):
        call(value)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("cost", lambda a: ngame.linear_classifiers(GOOD, GOOD, cost=a)),
        ("tolerance", lambda a: ngame.linear_classifiers(GOOD, GOOD, tolerance=a)),
        ("least", lambda a: ngame.linear_classifiers(GOOD, GOOD, least=a)),
        ("a", lambda a: metrics.propensity_weights(GOOD, a, 1)),
        ("b", lambda b: metrics.propensity_weights(GOOD, 1, b)),
        ("margin", lambda a: ngame.mine_hard_negatives(X, X, [], 1, margin=a)),
        ("max_score", lambda a: ngame.mine_hard_negatives(X, X, [], 1, max_score=a)),
        ("alpha", lambda a: ngame.GroupBatchSampler([0, 0], 2, alpha=a)),
    ],
)
def test_numbers_are_named(name, call):
    for value in ("1", [1.0], 1j):
        with pytest.raises(TypeError, match=rf"^{name} is a {type(value).__name__}, expected a f"):
            call(value)
    for value in (np.nan, np.inf, 10**400):
        with pytest.raises(ValueError, match=rf"^{name} is (nan|inf), expected a finite number$"):
            call(value)


def with_integers(matrix):
    """The matrix with integers, made without SciPy's check of it."""
    matrix = copy.copy(matrix)
    matrix.data = matrix.data.astype(np.int64)
    return matrix


BY_SCIPY = {  # whose compiled code trusts what it is given
    "labels": lambda m: ngame.linear_classifiers(GOOD, m),
    "negatives": lambda m: ngame.linear_classifiers(GOOD, GOOD, negatives=m),
    "positives": lambda m: ngame.mine_hard_negatives(X[:2, :3], X[:3, :3], m, 1),
    "predictions": lambda m: metrics.evaluate(with_integers(m), GOOD),
    "truth": lambda m: metrics.evaluate_each({"a": GOOD}, m, GOOD, ks=[1], drop=GOOD),
}


@pytest.mark.parametrize("name", BY_SCIPY)
def test_scipy_gets_no_broken_matrix(name):
    for column in (3, -1, 2**31 - 1, -(2**31)):
        with pytest.raises(IndexError, match=rf"^{name}: column {column} in row 0 is out of range"):
            BY_SCIPY[name](broken(indices=[0, column, 1]))
    for indptr in ([2, 0, 3], [0, 2**30, 3], [-(2**30), 2, 3], [0, 2, 2**31 - 1]):
        with pytest.raises(ValueError, match=rf"^{name}: indptr of row \d does not ascend"):
            BY_SCIPY[name](broken(indptr=indptr))


def test_core_checks_numbers_and_shapes():
    x, csr = np.eye(3, dtype=np.float32), (GOOD.indptr, GOOD.indices, 3)
    prepared = _core.prepare_sparse_items(csr, GOOD.data)
    for call, message in (
        (lambda: _core.topk(x, x, None, 0, True, None, 1), "k is 0, expected 1 or more"),
        (lambda: _core.topk(x, x[:, :2], None, 1, True, None, 1), "differ in columns"),
        (lambda: _core.topk(x, x, None, 1, True, csr, 1), "drop has another shape"),
        (lambda: _core.pair_scores(x, x, None, csr, True, 1), "pairs has another shape"),
        (
            lambda: _core.sparse_topk(csr, GOOD.data, csr, GOOD.data, prepared, 0, None, 1),
            "k is 0, expected 1 or more",
        ),
        (lambda: _core.keep_topk(csr, GOOD.data, -1, 1), "k is -1, expected 0 or more"),
        (
            lambda: _core.evaluate(csr, GOOD.data, csr, None, None, np.array([1, 0]), False, 1),
            "ks is 0, expected 1 or more",
        ),
        (
            lambda: _core.cluster_shortlist(
                csr, np.arange(2, dtype=np.int32), np.array([0, 2]), -1, 1
            ),
            "limit is -1, expected 0 or more",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
