"""Exact search: the items with the highest cosine or dot product."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ngame import _core
from ngame.arrays import (
    Pattern,
    as_count,
    as_matrix,
    as_pairs,
    as_threads,
    new_csr,
    pattern,
)
from ngame.dispatch import dispatched

Metric = Literal["cosine", "dot"]


@dispatched
def topk_arrays(
    queries: Any,
    items: Any,
    k: int,
    *,
    metric: Metric = "cosine",
    drop: Any = None,
    threads: int = 0,
) -> tuple[Any, Any]:
    """Find the k items with the highest score for every query, exactly.

    Where one of the two lies on a CUDA device, so do the results: see `ngame.cuda`.

    Parameters
    ----------
    queries : float32 or float16 array of shape [n, d]
    items : float32 or float16 array of shape [m, d]
        Copied is, of either, only an array whose rows are not contiguous.
    k : int
        1 .. m.
    metric : "cosine" or "dot"
        The cosine of a zero row with anything is 0.
    drop : CSR matrix of shape [n, m] or integer array of shape [p, 2], optional
        (query, item) pairs that are left out.
    threads : int
        0 means the CPUs this process may use. Scores do not depend on it.

    Returns
    -------
    scores : float32 array of shape [n, k]
    ids : int32 array of shape [n, k]
        Best first, ties by lower id. Where `drop` leaves fewer than k items, the tail of a row is
        -inf and -1. A score is summed in float64 and rounded once, to float32: it is as such that
        scores are compared.

    Raises
    ------
    TypeError
        Another dtype than float32 and float16.
    ValueError
        Shapes do not agree, k is not in 1 .. m, `metric` is unknown, or a row (the first is named)
        has NaN, infinity, or, for "dot", values whose products overflow float32.
    IndexError
        A pair of `drop` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> scores, ids = topk_arrays(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), 1)
    >>> ids.tolist()
    [[0], [1]]
    """
    queries, items, cosine = _searched(queries, items, metric)
    k = as_count(k, "k")
    if k > len(items):
        raise ValueError(f"k is {k}, items has only {len(items)} rows")
    dropped: Pattern | None = None
    if drop is not None:
        dropped = pattern(as_pairs(drop, "drop", (len(queries), len(items))))
    return _core.topk(queries, items, None, k, cosine, dropped, as_threads(threads))


def pair_scores(
    queries: Any, items: Any, pairs: Any, *, metric: Metric = "cosine", threads: int = 0
) -> npt.NDArray[np.float32]:
    """Score given pairs of queries and items, each to the bit as `topk_arrays` does.

    Parameters
    ----------
    queries, items, metric, threads
        As for `topk_arrays`.
    pairs : CSR matrix of shape [n, m]
        Of which every stored entry is a pair.

    Returns
    -------
    float32 array of shape [pairs.nnz]
        In the order of the entries, columns ascending within a row.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `topk_arrays`.
    """
    queries, items, cosine = _searched(queries, items, metric)
    asked = as_pairs(pairs, "pairs", (len(queries), len(items)))
    return _core.pair_scores(queries, items, pattern(asked), cosine, as_threads(threads))


def _searched(
    queries: Any, items: Any, metric: str
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], bool]:
    """Both matrices after a check, and whether the metric is the cosine."""
    queries, items = as_matrix(queries, "queries"), as_matrix(items, "items")
    if queries.shape[1] != items.shape[1]:
        raise ValueError(f"queries has {queries.shape[1]} columns, items has {items.shape[1]}")
    if len(items) > np.iinfo(np.int32).max:
        raise ValueError(f"items has {len(items)} rows, at most 2**31 - 1 are possible")
    if metric not in ("cosine", "dot"):
        raise ValueError(f'metric is {metric!r}, expected "cosine" or "dot"')
    return queries, items, metric == "cosine"


def topk(
    queries: Any,
    items: Any,
    k: int,
    *,
    metric: Metric = "cosine",
    drop: Any = None,
    threads: int = 0,
) -> Any:
    """Find the k items with the highest score for every query, as a sparse matrix.

    Parameters, errors and choice of the items are those of `topk_arrays`.

    Returns
    -------
    float32 CSR matrix of shape [n, m]
        k stored entries a row, fewer where `drop` leaves fewer items; indices sorted. A score of
        exactly 0 is stored too. On a CUDA device a sparse CSR tensor.
    """
    scores, ids = topk_arrays(queries, items, k, metric=metric, drop=drop, threads=threads)
    return ranked_csr(scores, ids, len(items))


@dispatched
def ranked_csr(scores: Any, ids: Any, columns: int) -> Any:
    """Scores and ids [n, k], as `topk_arrays` gives them, as a CSR matrix of shape [n, columns].

    Indices are sorted. An id of -1 is no entry.
    """
    order = np.argsort(ids, axis=1)
    scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    found = ids >= 0
    offsets = np.append(0, np.cumsum(found.sum(axis=1)))
    return new_csr(scores[found], ids[found], offsets, (len(ids), columns))
