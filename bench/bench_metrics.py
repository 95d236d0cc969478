"""`ngame.metrics.evaluate` beside scikit-learn, and how its cost grows.

pytest bench/bench_metrics.py; the predictions are random, 100 a row, and half of the truth is among
them. Needs pytest-benchmark and scikit-learn.
"""

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.metrics import ndcg_score

from ngame import metrics

LABELS = 131_073


def predictions(rows, width=100, dtype=np.float32):
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(LABELS, size=(rows, width)), axis=1).astype(np.int32)
    offsets = np.arange(0, ids.size + 1, width)
    scores = rng.random(ids.size).astype(dtype)
    predicted = sp.csr_matrix((scores, ids.ravel(), offsets), shape=(rows, LABELS))
    predicted.sum_duplicates()
    row = np.repeat(np.arange(rows), rng.poisson(1.3, size=rows) + 1)
    among = ids[row, rng.integers(width, size=row.size)]
    label = np.where(rng.random(row.size) < 0.5, among, rng.integers(LABELS, size=row.size))
    truth = sp.csr_matrix((np.ones(row.size, np.float32), (row, label)), shape=predicted.shape)
    truth.data[:] = 1
    return predicted, truth


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [10_000, 134_835])
def test_rows(benchmark, rows, threads):
    predicted, truth = predictions(rows)
    weights = metrics.inverse_propensity(truth)
    found = benchmark(
        metrics.evaluate, predicted, truth, inverse_propensity=weights, threads=threads
    )
    assert 0 < found["P@5"] < found["P@1"] * 5


@pytest.mark.parametrize("width", [10, 100, 1000])
def test_width(benchmark, width):
    predicted, truth = predictions(20_000, width)
    assert benchmark(metrics.evaluate, predicted, truth)["N@5"] > 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ks", [(1, 3, 5), (1, 3, 5, 10, 100)])
def test_types_and_cutoffs(benchmark, dtype, ks):
    predicted, truth = predictions(134_835, dtype=dtype)
    assert benchmark(metrics.evaluate, predicted, truth, ks=ks)["R@5"] > 0


def test_peer_sklearn_ndcg(benchmark):
    """One measure at one cut-off, on 50 rows, since it takes dense arrays alone."""
    predicted, truth = (matrix[:50] for matrix in predictions(10_000))
    predicted.data += 1  # above the labels that are not predicted
    found = benchmark.pedantic(
        ndcg_score, (truth.toarray(), predicted.toarray()), {"k": 5, "ignore_ties": True}, rounds=3
    )
    assert found == pytest.approx(metrics.evaluate(predicted, truth, ks=[5])["N@5"], rel=1e-6)
