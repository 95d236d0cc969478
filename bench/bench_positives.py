"""`in_batch_positives` and `label_pool` beside SciPy and NumPy.

    pytest bench/bench_positives.py

The batch changes from call to call, as in training. With one batch alone, caches and branch
predictors learn the answer. The peers are one line each, so they run in this process.
"""

import itertools

import inputs
import numpy as np
import pytest
import scipy.sparse as sp

import ngame


def batches(y, size):
    """An endless stream of (rows, their labels): 64 batches in turn."""
    rng = np.random.default_rng(0)
    drawn = [rng.choice(y.shape[0], size, replace=False) for _ in range(64)]
    return itertools.cycle([(rows, np.unique(y[rows].indices)) for rows in drawn])


def timed(benchmark, y, size, call, quick):
    """Time calls on batch after batch."""
    stream = batches(y, size)
    benchmark.extra_info["size"] = f"{size:,} of {y.shape[0]:,}, {y.shape[1]:,} labels"
    rounds = 20 if quick else 300
    benchmark.pedantic(call, setup=lambda: (next(stream), {}), rounds=rounds, warmup_rounds=10)


@pytest.mark.parametrize("who", ["ours", "scipy"])
@pytest.mark.parametrize("size", [64, 1024, 4096])
def test_in_batch_positives(benchmark, quick, size, who):
    y = inputs.labels()

    def ours(rows, columns):
        return ngame.in_batch_positives(y, rows, columns)

    def scipy(rows, columns):
        return y[rows][:, columns]

    batch = next(batches(y, size))
    assert ((ours(*batch) != 0) != (scipy(*batch) != 0)).nnz == 0
    timed(benchmark, y, size, ours if who == "ours" else scipy, quick)


@pytest.mark.parametrize("who", ["ours", "numpy"])
@pytest.mark.parametrize("size", [64, 1024, 4096])
def test_label_pool(benchmark, quick, size, who):
    y = inputs.labels()

    def ours(rows, _):
        return ngame.label_pool(y, rows)

    def numpy(rows, _):
        part = y[rows]
        pool, places = np.unique(part.indices, return_inverse=True)
        ones = np.ones(len(places), np.bool_)
        return pool, sp.csr_matrix((ones, places, part.indptr), shape=(size, len(pool)))

    batch = next(batches(y, size))
    (pool, positives), (expected_pool, expected) = ours(*batch), numpy(*batch)
    assert (pool == expected_pool).all()
    assert (positives != expected).nnz == 0
    timed(benchmark, y, size, ours if who == "ours" else numpy, quick)


@pytest.mark.parametrize("labels", [10_000, 1_000_000, 10_000_000])
def test_labels(benchmark, quick, labels):
    """The cost depends on the batch, not on the number of labels."""
    y = inputs.labels(100_000, labels)
    timed(
        benchmark, y, 1024, lambda rows, columns: ngame.in_batch_positives(y, rows, columns), quick
    )
