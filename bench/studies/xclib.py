"""Time ngame.compat.xclib beside plain NumPy and SciPy, and print a table.

    python bench/studies/xclib.py

The answers of both sides are compared first. Then they run in turn, three times. Medians of the
wall clock, and of the CPU time of all threads, which a busy machine distorts less.
"""

import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from ngame import Clusters
from ngame.compat.xclib.data import data_utils
from ngame.compat.xclib.evaluation import xc_metrics
from ngame.compat.xclib.utils import sparse
from ngame.compat.xclib.utils.clustering import b_kmeans_dense, cluster_balance


def predictions(rows, labels, k, rng):
    """Random scores of k labels a row, and 2.3 positives a row, half of them among these."""
    ids = np.sort(rng.integers(labels, size=(rows, k)), axis=1)
    scores = sparse.csr_from_arrays(ids, rng.random((rows, k)))
    counts = rng.poisson(1.3, rows) + 1
    points = np.repeat(np.arange(rows), counts)
    known = ids[points, rng.integers(k, size=len(points))]
    drawn = np.where(rng.random(len(points)) < 0.5, known, rng.integers(labels, size=len(points)))
    truth = sp.csr_matrix((np.ones(len(points)), (points, drawn)), shape=(rows, labels))
    truth.data[:] = 1
    return scores, truth


def mixture(rows, dim, rng):
    """Unit vectors around topics."""
    centres = rng.standard_normal((rows // 50, dim), dtype=np.float32)
    x = centres[rng.integers(len(centres), size=rows)]
    x += rng.standard_normal((rows, dim), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def plain_topk(X, k):
    """Columns of the best k a row, each row sorted by itself."""
    ids = np.full((X.shape[0], k), X.shape[1])
    for row, (first, last) in enumerate(pairwise(X.indptr.tolist())):
        best = np.argsort(-X.data[first:last], kind="stable")[:k]
        ids[row, : len(best)] = X.indices[first:last][best]
    return ids


def plain_retain(X, k):
    best = X.copy()
    for first, last in pairwise(X.indptr.tolist()):
        best.data[first + np.argsort(-X.data[first:last], kind="stable")[k:]] = 0
    best.eliminate_zeros()
    return best


def plain_metrics(X, Y, weights, k):
    ids = plain_topk(X, k)
    rows = np.arange(len(ids))[:, None]
    wide = sp.csr_matrix((Y.data, Y.indices, Y.indptr), shape=(Y.shape[0], Y.shape[1] + 1))
    hits = wide[rows, ids].toarray()
    gains = hits * np.append(weights, 0)[ids]
    positives = Y.getnnz(axis=1)
    weighted = Y @ sp.diags(weights)
    best_ids = plain_topk(weighted.tocsr(), k)
    best = (best_ids < Y.shape[1]) * np.append(weights, 0)[best_ids]
    ranks = np.arange(1, k + 1)
    discount = 1 / np.log2(ranks + 1)
    ideal = np.cumsum(discount)[np.minimum(np.maximum(positives, 1)[:, None], ranks) - 1]
    dcg = [np.cumsum(flags * discount, axis=1) / ideal for flags in (hits, gains, best)]
    mean = [np.cumsum(flags, axis=1) / ranks for flags in (hits, gains, best)]
    return [
        mean[0].mean(0),
        dcg[0].mean(0),
        mean[1].mean(0) / mean[2].mean(0),
        dcg[1].mean(0) / dcg[2].mean(0),
    ]


def plain_clusters(x, leaves, rng):
    parts = [np.arange(len(x))]
    while len(parts) < leaves:
        halves = []
        for ids in parts:
            rows = x[ids]
            centres, before = rows[rng.choice(len(ids), 2, replace=False)], -np.inf
            while True:
                near = rows @ centres.T
                split = np.array_split(np.argsort(near[:, 1] - near[:, 0]), 2)
                centres = np.stack([rows[half].mean(0) for half in split])
                centres /= np.linalg.norm(centres, axis=1, keepdims=True)
                mean = sum(
                    (rows[half] @ centre).sum() for half, centre in zip(split, centres, strict=True)
                )
                if mean / len(ids) - before < 1e-4:
                    break
                before = mean / len(ids)
            halves += [ids[half] for half in split]
        parts = halves
    return parts


def plain_read(path):
    ids, values, ends = [], [], [0]
    with open(path) as file:
        shape = tuple(map(int, next(file).split()))
        for line in file:
            for pair in line.split():
                column, value = pair.split(":")
                ids.append(int(column))
                values.append(float(value))
            ends.append(len(ids))
    return sp.csr_matrix((np.array(values, np.float32), ids, ends), shape=shape)


def timed(function):
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def compare(name, ours, plain, same):
    """One row of the table."""
    assert same(ours(), plain()), name
    runs = [(timed(ours)[1:], timed(plain)[1:]) for _ in range(3)]
    (our_wall, our_cpu), (wall, cpu) = (
        tuple(statistics.median(run[side][clock] for run in runs) for clock in (0, 1))
        for side in (0, 1)
    )
    cells = f"{our_wall:.3f} | {our_cpu:.3f} | {wall:.3f} | {cpu:.3f} | {cpu / our_cpu:.1f}"
    print(f"| {name} | {cells} |", flush=True)


def close(left, right):
    return all(np.allclose(a, b, rtol=1e-5) for a, b in zip(left, right, strict=True))


def equal(left, right):
    return (left != right).nnz == 0


def tight(x, clusters):
    order, sizes = np.concatenate(clusters), [*map(len, clusters)]
    return Clusters(order, np.cumsum([0, *sizes])).coherence(x)


def main():
    rng = np.random.default_rng(0)
    print(
        "| | wall | CPU | plain: wall | plain: CPU | ratio of CPU |\n|---|---:|---:|---:|---:|---:|"
    )
    X, Y = predictions(134_835, 131_073, 100, rng)
    weights = xc_metrics.compute_inv_propesity(Y, 0.55, 1.5)
    compare(
        "`Metrics.eval`, K 5, with propensities",
        lambda: xc_metrics.Metrics(Y, weights).eval(X, 5),
        lambda: plain_metrics(X, Y, weights, 5),
        close,
    )
    compare(
        "`retain_topk`, k 20",
        lambda: sparse.retain_topk(X, k=20),
        lambda: plain_retain(X, 20),
        equal,
    )
    compare(
        "`sparse.topk`, k 20",
        lambda: sparse.topk(X, 20, X.shape[1], 0),
        lambda: plain_topk(X, 20),
        lambda a, b: (a == b).all(),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.txt"
        data_utils.write_sparse_file(sparse.retain_topk(X, k=10), path)
        compare(
            "`read_sparse_file`, 1.3 million pairs",
            lambda: data_utils.read_sparse_file(path),
            lambda: plain_read(path),
            equal,
        )
    x = mixture(16_384, 64, rng)
    compare(
        "`cluster_balance`, 16,384 x 64, 1,024 clusters",
        lambda: cluster_balance(x, [np.arange(len(x))], 1024, b_kmeans_dense)[0],
        lambda: plain_clusters(x, 1024, np.random.default_rng(0)),
        lambda a, b: tight(x, a) > tight(x, b),
    )


if __name__ == "__main__":
    main()
