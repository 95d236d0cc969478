"""Shortlists from clusters and what is done to them, beside SciPy. Needs pytest-benchmark."""

import numpy as np
import pytest
import scipy.sparse as sp

import ngame

LABELS = 131_073


def case(rows, size=32):
    rng = np.random.default_rng(0)
    row = np.repeat(np.arange(rows), rng.poisson(1.3, size=rows) + 1)
    label = rng.integers(LABELS, size=row.size)
    y = sp.csr_matrix((np.ones(row.size, np.float32), (row, label)), shape=(rows, LABELS))
    y.data[:] = 1
    offsets = np.append(np.arange(0, rows, size), rows)
    return y, ngame.Clusters(rng.permutation(rows).astype(np.int32), offsets)


def by_product(y, clusters):
    """Cluster mates' labels as SciPy gives them: members x labels, then less one's own."""
    rows, count = y.shape[0], len(clusters)
    ones = np.ones(rows, np.float32)
    member = sp.csr_matrix((ones, (np.arange(rows), clusters.assignment)), shape=(rows, count))
    found = member @ (member.T.tocsr() @ y)
    return found - found.multiply(y)


@pytest.mark.parametrize("who", ["ours", "scipy"])
@pytest.mark.parametrize("rows", [10_000, 294_805])
def test_cluster_shortlist(benchmark, rows, who):
    y, clusters = case(rows)
    if rows == 10_000:
        difference = abs(ngame.cluster_shortlist(y, clusters) - by_product(y, clusters))
        assert difference.max() == 0
    call = ngame.cluster_shortlist if who == "ours" else by_product
    benchmark.pedantic(call, (y, clusters), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("size", [8, 32, 128])
def test_limit(benchmark, size):
    y, clusters = case(100_000, size)
    found = benchmark.pedantic(
        ngame.cluster_shortlist, (y, clusters), {"limit": 20}, rounds=5, warmup_rounds=1
    )
    assert np.diff(found.indptr).max() == 20 or size == 8


def test_keep_topk(benchmark):
    shortlist = ngame.cluster_shortlist(*case(100_000))
    found = benchmark.pedantic(ngame.keep_topk, (shortlist, 10), rounds=5, warmup_rounds=1)
    assert np.diff(found.indptr).max() == 10


@pytest.mark.parametrize("who", ["ours", "scipy"])
def test_merge(benchmark, who):
    y, clusters = case(100_000)
    shortlist = ngame.cluster_shortlist(y, clusters)
    assert (ngame.merge([shortlist, y]) != shortlist.maximum(y)).nnz == 0
    if who == "ours":
        benchmark.pedantic(ngame.merge, ([shortlist, y],), rounds=5, warmup_rounds=1)
    else:
        benchmark.pedantic(shortlist.maximum, (y,), rounds=5, warmup_rounds=1)


def test_drop_pairs(benchmark):
    y, clusters = case(100_000)
    shortlist = ngame.merge([ngame.cluster_shortlist(y, clusters), y])
    found = benchmark.pedantic(ngame.drop_pairs, (shortlist, y), rounds=5, warmup_rounds=1)
    assert found.nnz == shortlist.nnz - y.nnz
