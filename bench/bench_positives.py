"""`in_batch_positives` and `label_pool` beside SciPy's indexing. Needs pytest-benchmark.

Batches change from call to call, as they do in training: on one batch alone, caches and branch
predictors learn the answer.
"""

import itertools

import numpy as np
import pytest
import scipy.sparse as sp

import ngame


def batches(size, rows=294_805, labels=131_073):
    """Labels, and an endless stream of (rows, distinct labels drawn from them)."""
    rng = np.random.default_rng(0)
    row = np.repeat(np.arange(rows), rng.poisson(1.3, size=rows) + 1)
    y = sp.csr_matrix(
        (np.ones(row.size, np.float32), (row, rng.integers(labels, size=row.size))),
        shape=(rows, labels),
    )
    y.data[:] = 1
    drawn = [rng.choice(rows, size, replace=False) for _ in range(64)]
    return y, itertools.cycle([(ids, np.unique(y.indices[y.indptr[ids]])) for ids in drawn])


@pytest.mark.parametrize("who", ["ours", "scipy"])
@pytest.mark.parametrize("size", [64, 1024, 4096])
def test_in_batch_positives(benchmark, size, who):
    y, stream = batches(size)

    def scipy(ids, columns):
        return y[ids][:, columns]

    def ours(ids, columns):
        return ngame.in_batch_positives(y, ids, columns)

    ids, columns = next(stream)
    assert ((ours(ids, columns) != 0) != (scipy(ids, columns) != 0)).nnz == 0
    call = ours if who == "ours" else scipy
    benchmark.pedantic(call, setup=lambda: (next(stream), {}), rounds=300, warmup_rounds=10)


@pytest.mark.parametrize("who", ["ours", "numpy"])
@pytest.mark.parametrize("size", [64, 1024, 4096])
def test_label_pool(benchmark, size, who):
    y, stream = batches(size)

    def numpy(ids, _):
        part = y[ids]
        pool, places = np.unique(part.indices, return_inverse=True)
        ones = np.ones(len(places), np.bool_)
        return pool, sp.csr_matrix((ones, places, part.indptr), shape=(size, len(pool)))

    def ours(ids, _):
        return ngame.label_pool(y, ids)

    ids, columns = next(stream)
    for found, expected in zip(ours(ids, columns), numpy(ids, columns), strict=True):
        difference = found != expected
        assert not (difference.nnz if sp.issparse(difference) else difference.any())
    call = ours if who == "ours" else numpy
    benchmark.pedantic(call, setup=lambda: (next(stream), {}), rounds=300, warmup_rounds=10)


@pytest.mark.parametrize("labels", [10_000, 1_000_000, 100_000_000])
def test_cost_does_not_grow_with_the_labels(benchmark, labels):
    y, stream = batches(1024, labels=labels)
    benchmark.pedantic(
        lambda ids, columns: ngame.in_batch_positives(y, ids, columns),
        setup=lambda: (next(stream), {}),
        rounds=300,
        warmup_rounds=10,
    )
