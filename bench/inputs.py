"""What the benchmarks run on: embeddings and sparse matrices, the same on every run.

The defaults are the sizes in bench/results. Arrays are read-only, because those of the last
call are kept for the next benchmark with the same arguments.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

# Rows made at a time, so that float16 input never exists as a whole in float32.
BLOCK = 1 << 16


@lru_cache(maxsize=1)
def mixture(
    n: int = 294_805, dim: int = 384, dtype: npt.DTypeLike = np.float32, seed: int = 0
) -> npt.NDArray[Any]:
    """Make points on the unit sphere that gather around topics, and topics around parents.

    There is a topic for every 50 points, and as many parents as the square root of that. The
    standard deviation is 0.7 a dimension for topics around their parent and 1 for points around
    their topic. So clusters overlap, as those of text embeddings do.

    Returns
    -------
    array of shape [n, dim]
    """
    x = np.empty((n, dim), dtype)
    fill_mixture(x, seed)
    return _frozen(x)


def fill_mixture(x: npt.NDArray[Any], seed: int = 0) -> None:
    """Fill an array with what `mixture` gives for its shape. It may be a mapped file."""
    n, dim = x.shape
    rng = np.random.default_rng(seed)
    topics = max(16, n // 50)
    parents = rng.standard_normal((round(topics**0.5), dim), dtype=np.float32)
    centres = parents[rng.integers(len(parents), size=topics)]
    centres += 0.7 * rng.standard_normal(centres.shape, dtype=np.float32)
    for start in range(0, n, BLOCK):
        rows = centres[rng.integers(topics, size=min(BLOCK, n - start))]
        rows += rng.standard_normal(rows.shape, dtype=np.float32)
        x[start : start + BLOCK] = rows / np.linalg.norm(rows, axis=1, keepdims=True)


@lru_cache(maxsize=1)
def labels(
    n: int = 294_805, n_labels: int = 131_073, mean: float = 2.3, seed: int = 0
) -> sp.csr_matrix:
    """Draw the labels of points: at least one each, `mean` on average, with a long tail.

    The label of rank r is drawn in proportion to ``(r + 100) ** -0.7``, which at the default sizes
    gives the most frequent label some 270 of the points and half of the labels three or fewer.
    Ranks are dealt to label ids at random.

    Returns
    -------
    float32 CSR matrix of ones, of shape [n, n_labels], indices sorted
        A label that was drawn twice for a point counts once.
    """
    rng = np.random.default_rng(seed)
    counts = 1 + rng.poisson(mean - 1, size=n)
    steps = np.cumsum((np.arange(n_labels) + 100.0) ** -0.7)
    ranks = np.searchsorted(steps, rng.random(counts.sum()) * steps[-1], side="right")
    return _ones(np.repeat(np.arange(n), counts), rng.permutation(n_labels)[ranks], (n, n_labels))


@lru_cache(maxsize=1)
def predictions(
    n: int = 134_835, n_labels: int = 131_073, k: int = 100, seed: int = 0
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Make random predictions, and a truth: half of it is among the predictions.

    Returns
    -------
    predictions : float32 CSR matrix of shape [n, n_labels], indices sorted
        About k a row. The scores of a label that is drawn twice are added.
    truth : float32 CSR matrix of ones, of the same shape, indices sorted
        2.3 labels a row on average, at least one.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(n_labels, size=(n, k), dtype=np.int32)
    ids.sort(axis=1)
    offsets = np.arange(0, n * k + 1, k, dtype=np.int32)
    scores = rng.random(n * k, dtype=np.float32)
    predicted = sp.csr_matrix((scores, ids.reshape(-1), offsets), shape=(n, n_labels))
    rows = np.repeat(np.arange(n), 1 + rng.poisson(1.3, size=n))
    hits = ids[rows, rng.integers(k, size=len(rows))]
    others = rng.integers(n_labels, size=len(rows))
    columns = np.where(rng.random(len(rows)) < 0.5, hits, others)
    predicted.sum_duplicates()
    return _frozen(predicted), _ones(rows, columns, (n, n_labels))


def _ones(rows: Any, columns: Any, shape: tuple[int, int]) -> sp.csr_matrix:
    matrix = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return _frozen(matrix)


def _frozen(value: Any) -> Any:
    """The same array or matrix, read-only."""
    arrays = (value.data, value.indices, value.indptr) if sp.issparse(value) else (value,)
    for array in arrays:
        array.setflags(write=False)
    return value
