"""pyxclib's balanced clusters over ours: sizes, order, quality, and what it gets wrong."""

import functools
import itertools

import numpy as np
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import ngame
from ngame.compat.xclib.utils.clustering import b_kmeans_dense, b_kmeans_sparse, cluster_balance


def halving(n, leaves):
    """Sizes of the leaves when the left half of every node has one more."""
    if leaves == 1:
        return [n]
    return halving((n + 1) // 2, leaves // 2) + halving(n // 2, leaves // 2)


@given(
    n=st.integers(1, 40),
    wanted=st.one_of(st.integers(1, 16), st.floats(0.1, 16)),
    is_sparse=st.booleans(),
)
def test_every_row_once_in_clusters_of_even_size(n, wanted, is_sparse):
    x = np.random.default_rng(n).standard_normal((n, 3)).astype(np.float32)
    leaves = 1
    while leaves < wanted:
        leaves *= 2
    X, splitter = (sp.csr_matrix(x), b_kmeans_sparse) if is_sparse else (x, b_kmeans_dense)
    if leaves > n:
        with pytest.raises(ValueError, match=f"num_clusters, rounded up, is {leaves}"):
            cluster_balance(X, [np.arange(n)], wanted, splitter)
        return
    clusters, mapping = cluster_balance(X, [np.arange(n)], wanted, splitter)
    assert sorted(map(len, clusters)) == sorted(halving(n, leaves))
    assert mapping.dtype == np.int64
    assert sorted(np.concatenate(clusters).tolist()) == list(range(n))
    for number, ids in enumerate(clusters):
        assert (mapping[ids] == number).all()


def test_dense_is_the_core(mixture):
    x = mixture(500, 16)
    begin = [np.arange(500)]
    clusters, _ = cluster_balance(x, begin, 32, b_kmeans_dense, seed=0)
    ours = ngame.balanced_clusters(x, n_clusters=32)
    assert [ids.tolist() for ids in clusters] == [ids.tolist() for ids in ours]
    partial = cluster_balance(x, begin, 32, functools.partial(b_kmeans_dense), seed=0)[0]
    assert [ids.tolist() for ids in partial] == [ids.tolist() for ids in clusters]
    float64 = cluster_balance(x.astype(float), begin, 32, b_kmeans_dense, seed=0)[0]
    assert [ids.tolist() for ids in float64] == [ids.tolist() for ids in clusters]


def test_the_seed_and_not_the_threads_decide(mixture):
    x = mixture(300, 8)
    args = [np.arange(300)], 16
    for X, first, second in (
        (x, {"splitter": b_kmeans_dense, "seed": 0}, {"splitter": b_kmeans_dense, "seed": 1}),
        (
            sp.csr_matrix(x),
            {"splitter": b_kmeans_sparse, "seed": 0},
            {"splitter": b_kmeans_sparse, "seed": 1},
        ),
        (
            sp.csr_matrix(x),
            {"splitter": functools.partial(b_kmeans_sparse, seed=0), "seed": 7},
            {"splitter": functools.partial(b_kmeans_sparse, seed=1), "seed": 7},
        ),
    ):
        state = np.random.get_state()[1].tolist()  # noqa: NPY002
        one = cluster_balance(X, *args, **first, num_threads=1)[1]
        assert (one == cluster_balance(X, *args, **first, num_threads=-1)[1]).all()
        assert (one != cluster_balance(X, *args, **second)[1]).any()
        assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


@pytest.mark.parametrize("is_sparse", [False, True])
def test_without_a_seed_each_call_draws_one(mixture, is_sparse):
    """NGAME's second stage clusters the same vectors again and again, for other mates."""
    x = mixture(300, 8)
    X, splitter = (sp.csr_matrix(x), b_kmeans_sparse) if is_sparse else (x, b_kmeans_dense)

    def mappings(threads):
        np.random.seed(5)  # noqa: NPY002
        return [
            cluster_balance(X, [np.arange(300)], 16, splitter, num_threads=threads)[1]
            for _ in range(3)
        ]

    found = mappings(1)
    assert all((one != other).any() for one, other in itertools.combinations(found, 2))
    assert np.array_equal(found, mappings(-1))
    np.random.seed(5)  # noqa: NPY002
    halves = [splitter(X, np.arange(300))[0].tolist() for _ in range(6)]
    assert len({tuple(half) for half in halves}) > 1
    np.random.seed(5)  # noqa: NPY002
    assert [splitter(X, np.arange(300))[0].tolist() for _ in range(6)] == halves


@pytest.mark.parametrize("is_sparse", [False, True])
def test_quality(mixture, is_sparse):
    x = mixture(600, 12)
    X, splitter = (sp.csr_matrix(x), b_kmeans_sparse) if is_sparse else (x, b_kmeans_dense)
    clusters, _ = cluster_balance(X, [np.arange(600)], 32, splitter)
    slow = reference.balanced_clusters(x, halving(600, 32))
    assert reference.coherence(x, clusters) > 0.95 * reference.coherence(x, slow)


def test_clusters_to_begin_with():
    x = np.eye(8, dtype=np.float32)
    begin = [np.array([7, 5, 3, 1]), np.array([0, 2])]
    clusters, mapping = cluster_balance(x, begin, 4, b_kmeans_dense)
    assert [len(ids) for ids in clusters] == [2, 2, 1, 1]
    assert sorted(np.concatenate(clusters[:2]).tolist()) == [1, 3, 5, 7]
    assert mapping[[4, 6]].tolist() == [-1, -1]
    assert cluster_balance(x, begin, 2, b_kmeans_dense)[0][0].tolist() == [7, 5, 3, 1]
    lists = cluster_balance(x, [ids.tolist() for ids in begin], 2, b_kmeans_dense)[0]
    assert [ids.tolist() for ids in lists] == [ids.tolist() for ids in begin]


@pytest.mark.parametrize("dtype", [np.int32, np.uint64])
@pytest.mark.parametrize("splitter", [b_kmeans_dense, b_kmeans_sparse])
def test_ids_keep_their_type(splitter, dtype):
    """As codes that save them, or compare files, expect."""
    x = np.eye(8, dtype=np.float32)
    X = sp.csr_matrix(x) if splitter is b_kmeans_sparse else x
    clusters, mapping = cluster_balance(X, [np.arange(8, dtype=dtype)], 4, splitter)
    assert {ids.dtype for ids in clusters} == {np.dtype(dtype)}
    assert mapping.dtype == np.int64
    mixed = [np.arange(4, dtype=dtype), np.arange(4, 8)]
    assert cluster_balance(X, mixed, 4, splitter)[0][0].dtype == dtype


def test_a_splitter_of_ones_own():
    calls = []

    def odd_and_even(X, ids):
        calls.append(X.ravel().tolist())
        return [ids[::2], ids[1::2]]

    X = np.arange(8)[:, None] * 10
    clusters, mapping = cluster_balance(X, [np.arange(8)], 3, odd_and_even, num_threads=1)
    assert [ids.tolist() for ids in clusters] == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert mapping.tolist() == [0, 2, 1, 3, 0, 2, 1, 3]
    assert calls[1] == [0, 20, 40, 60]
    with pytest.raises(ValueError, match="the splitter makes no more of 1 clusters"):
        cluster_balance(X, [np.arange(8)], 3, lambda X, ids: [ids])


@pytest.mark.parametrize("splitter", [b_kmeans_dense, b_kmeans_sparse])
def test_one_split(splitter):
    x = np.float32([[1, 0], [0, 1], [1, 0.1], [0.1, 1], [0.9, 0]])
    X = sp.csr_matrix(x) if splitter is b_kmeans_sparse else x
    ids = np.array(list("abcde"))
    halves = splitter(X, ids)
    assert [len(half) for half in halves] == [3, 2]
    assert sorted("".join(halves[0]) + "".join(halves[1])) == list("abcde")
    halves = splitter(X[:4], ids[:4])
    assert sorted("".join(half) for half in halves) == ["ac", "bd"]
    assert [half.tolist() for half in splitter(X[:1], ids[:1])] == [["a"]]
    assert [len(half) for half in splitter(X[:2], ids[:2])] == [1, 1]
    with pytest.raises(ValueError, match="metric is 'l2'"):
        splitter(X, ids, "l2")
    with pytest.raises(ValueError, match=r"index has shape \(4,\), X has 5 rows"):
        splitter(X, ids[:4])
    with pytest.raises(ValueError, match="has no rows"):
        splitter(X[:0], ids[:0])
    x[2, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        splitter(sp.csr_matrix(x) if sp.issparse(X) else x, ids)


def test_what_leaks_into_the_other_half():
    angles = np.radians([0, 10, 44, 46, 80, 90])
    X = sp.csr_matrix(np.column_stack([np.cos(angles), np.sin(angles)]))
    ids = np.arange(6) * 2
    own = sorted(half.tolist() for half in b_kmeans_sparse(X, ids))
    assert own == [[0, 2, 4], [6, 8, 10]]
    leaked = sorted(half.tolist() for half in b_kmeans_sparse(X, ids, leakage=0.3))
    assert leaked == [[0, 2, 4, 6], [6, 8, 10, 4]]
    assert sorted(half.tolist() for half in b_kmeans_sparse(X, ids, leakage=0)) == own


def test_bad_arguments():
    x = np.eye(4, dtype=np.float32)
    with pytest.raises(ValueError, match="clusters is empty"):
        cluster_balance(x, [], 2, b_kmeans_dense)
    with pytest.raises(IndexError, match=r"clusters\[0\] has id 4, out of range for 4 rows"):
        cluster_balance(x, [np.array([0, 4])], 2, b_kmeans_dense)
    with pytest.raises(TypeError, match=r"clusters\[0\] has dtype float64"):
        cluster_balance(x, [np.array([0.0])], 2, b_kmeans_dense)
    for wrong in (0, -1, np.inf, np.nan):
        with pytest.raises(ValueError, match="num_clusters is"):
            cluster_balance(x, [np.arange(4)], wrong, b_kmeans_dense)
    with pytest.raises(TypeError, match="X is a ndarray"):
        cluster_balance(x, [np.arange(4)], 2, b_kmeans_sparse)
    with pytest.raises(TypeError, match="x has dtype int64"):
        cluster_balance(x.astype(np.int64), [np.arange(4)], 2, b_kmeans_dense)
