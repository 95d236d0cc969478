"""Making and changing shortlists, beside SciPy.

    pytest bench/bench_shortlist.py

The peers are a line or two each, so they run in this process.
"""

import inputs
import numpy as np
import pytest
import scipy.sparse as sp

import ngame


def case(rows, size=32):
    """Labels of points, and clusters of random rows: the worst case for the caches."""
    offsets = np.append(np.arange(0, rows, size), rows)
    order = np.random.default_rng(0).permutation(rows).astype(np.int32)
    return inputs.labels(rows), ngame.Clusters(order, offsets)


def timed(benchmark, call, *arguments, **options):
    """Time a call on a matrix of some rows."""
    benchmark.extra_info["size"] = f"{arguments[0].shape[0]:,}, {arguments[0].nnz:,} entries"
    return benchmark.pedantic(call, arguments, options, rounds=5, warmup_rounds=1)


def by_product(y, clusters):
    """Labels of cluster mates by SciPy: a product of matrices, then one's own labels removed."""
    rows, count = y.shape[0], len(clusters)
    ones = np.ones(rows, np.float32)
    member = sp.csr_matrix((ones, (np.arange(rows), clusters.assignment)), shape=(rows, count))
    found = member @ (member.T.tocsr() @ y)
    return found - found.multiply(y)


@pytest.mark.parametrize("who", ["ours", "scipy"])
@pytest.mark.parametrize("rows", [10_000, 294_805])
def test_cluster_shortlist(benchmark, quick, rows, who):
    y, clusters = case(rows // 10 if quick else rows)
    if rows == 10_000:
        difference = abs(ngame.cluster_shortlist(y, clusters) - by_product(y, clusters))
        assert difference.max() == 0
    timed(benchmark, ngame.cluster_shortlist if who == "ours" else by_product, y, clusters)


@pytest.mark.parametrize("size", [8, 32, 128])
def test_limit(benchmark, quick, size):
    found = timed(
        benchmark, ngame.cluster_shortlist, *case(5000 if quick else 100_000, size), limit=5
    )
    assert np.diff(found.indptr).max() == 5


def test_keep_topk(benchmark, quick):
    shortlist = ngame.cluster_shortlist(*case(5000 if quick else 100_000))
    assert np.diff(timed(benchmark, ngame.keep_topk, shortlist, 10).indptr).max() == 10


@pytest.mark.parametrize("who", ["ours", "scipy"])
def test_merge(benchmark, quick, who):
    y, clusters = case(5000 if quick else 100_000)
    shortlist = ngame.cluster_shortlist(y, clusters)
    assert (ngame.merge([shortlist, y]) != shortlist.maximum(y)).nnz == 0
    call = (lambda a, b: ngame.merge([a, b])) if who == "ours" else sp.csr_matrix.maximum
    timed(benchmark, call, shortlist, y)


def test_drop_pairs(benchmark, quick):
    y, clusters = case(5000 if quick else 100_000)
    shortlist = ngame.merge([ngame.cluster_shortlist(y, clusters), y])
    found = timed(benchmark, ngame.drop_pairs, shortlist, y)
    assert found.nnz == shortlist.nnz - y.nnz
