"""Sparse scores: exact search, labels of cluster mates, and what is done to their rows."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame import _core
from ngame.arrays import (
    Pattern,
    as_count,
    as_csr,
    as_matrix,
    as_pairs,
    as_threads,
    canonical,
    new_csr,
    on_gpu,
    pattern,
)
from ngame.cluster import Clusters

Metric = Literal["cosine", "dot"]


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
    if on_gpu(queries) or on_gpu(items):
        from ngame import cuda

        return cuda.topk_arrays(queries, items, k, metric=metric, drop=drop)
    queries, items, cosine = _searched(queries, items, metric)
    k = as_count(k, "k")
    if k > len(items):
        raise ValueError(f"k is {k}, items has only {len(items)} rows")
    dropped: Pattern | None = None
    if drop is not None:
        dropped = pattern(as_pairs(drop, "drop", (len(queries), len(items))))
    return _core.topk(queries, items, k, cosine, dropped, as_threads(threads))


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
    if on_gpu(queries) or on_gpu(items):
        from ngame import cuda

        return cuda.topk(queries, items, k, metric=metric, drop=drop)
    scores, ids = topk_arrays(queries, items, k, metric=metric, drop=drop, threads=threads)
    order = np.argsort(ids, axis=1, kind="stable")
    scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    found = ids >= 0
    offsets = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(found.sum(1), out=offsets[1:])
    return new_csr(scores[found], ids[found], offsets, (len(ids), len(items)))


def cluster_shortlist(
    labels: Any, clusters: Clusters, *, limit: int | None = None, threads: int = 0
) -> sp.csr_matrix:
    """List for every row the labels of its cluster mates, less its own.

    Parameters
    ----------
    labels : CSR matrix of shape [n, l]
        Stored entries are the labels, whatever their values; sorted in a copy if unsorted.
    clusters : Clusters
        Of the same n rows.
    limit : int, optional
        At most so many labels a row: the most frequent ones, ties by lower id.
    threads : int
        0 means the CPUs this process may use.

    Returns
    -------
    float32 CSR matrix of shape [n, l]
        The value is the number of mates that have the label.

    Raises
    ------
    ValueError
        `labels` and `clusters` differ in their number of rows, or `limit` is negative.
    """
    matrix = canonical(as_csr(labels, "labels"))
    if not isinstance(clusters, Clusters):
        raise TypeError(f"clusters is a {type(clusters).__name__}, expected ngame.Clusters")
    if matrix.shape[0] != len(clusters.order):
        raise ValueError(f"labels has {matrix.shape[0]} rows, clusters has {len(clusters.order)}")
    most = None if limit is None else as_count(limit, "limit", 0)
    found = _core.cluster_shortlist(
        pattern(matrix), clusters.order, clusters.offsets, most, as_threads(threads)
    )
    return new_csr(*found, matrix.shape)


def keep_topk(matrix: Any, k: int, *, threads: int = 0) -> sp.csr_matrix:
    """Keep the k largest entries of every row.

    Parameters
    ----------
    matrix : float32 or float64 CSR matrix
        Stored zeros are entries like others, and may stay. Duplicates are summed in a copy.
    k : int
        0 or more; rows with fewer entries keep them all.
    threads : int
        0 means the CPUs this process may use.

    Returns
    -------
    CSR matrix of the same shape and dtype, indices sorted
        Of equal entries the lower columns stay.

    Raises
    ------
    TypeError
        `matrix` is no CSR matrix of float32 or float64.
    ValueError
        k is negative, or a row (the first is named) has NaN.
    """
    scores = _scores(matrix, "matrix")
    kept = _core.keep_topk(pattern(scores), scores.data, as_count(k, "k", 0), as_threads(threads))
    return new_csr(*kept, scores.shape)


def merge(
    shortlists: Sequence[Any], how: Literal["max", "sum"] = "max", *, threads: int = 0
) -> sp.csr_matrix:
    """Unite sparse scores: every pair that any of them has.

    Parameters
    ----------
    shortlists : sequence of float32 or float64 CSR matrices of one shape
    how : "max" or "sum"
        What is kept of the scores of a pair that several have. Where one has no entry, it has no
        say: the maximum of -1 and nothing is -1. NaN stays NaN.
    threads : int
        0 means the CPUs this process may use.

    Returns
    -------
    CSR matrix, indices sorted
        float64 if any of the shortlists is, float32 otherwise. Sums are taken in the given order.

    Raises
    ------
    ValueError
        There is no shortlist, shapes differ, or `how` is unknown.
    """
    if how not in ("max", "sum"):
        raise ValueError(f'how is {how!r}, expected "max" or "sum"')
    matrices = [_scores(one, f"shortlists[{at}]") for at, one in enumerate(shortlists)]
    if not matrices:
        raise ValueError("shortlists is empty")
    for at, one in enumerate(matrices):
        if one.shape != matrices[0].shape:
            raise ValueError(
                f"shortlists[{at}] has shape {one.shape}, shortlists[0] has {matrices[0].shape}"
            )
    if len(matrices) == 1:
        return sp.csr_matrix(matrices[0], copy=True)
    index = np.result_type(*(one.indices.dtype for one in matrices))
    score = np.result_type(*(one.dtype for one in matrices))
    united = matrices[0]
    for one in matrices[1:]:
        found = _core.merge(
            pattern(united, index),
            united.data.astype(score, copy=False),
            pattern(one, index),
            one.data.astype(score, copy=False),
            how == "sum",
            as_threads(threads),
        )
        united = new_csr(*found, united.shape)
    return united


def drop_pairs(matrix: Any, pairs: Any, *, threads: int = 0) -> sp.csr_matrix:
    """Leave out the entries at given (row, column) pairs.

    Parameters
    ----------
    matrix : float32 or float64 CSR matrix of shape [n, m]
        Stored zeros are entries like others. Duplicates are summed in a copy.
    pairs : integer array of shape [p, 2], or CSR matrix of shape [n, m]
        Of a matrix the stored entries count, whatever their values. Pairs that `matrix` has not
        do nothing.
    threads : int
        0 means the CPUs this process may use.

    Returns
    -------
    CSR matrix of the same shape and dtype, indices sorted

    Raises
    ------
    ValueError
        `pairs` has the wrong shape.
    IndexError
        A pair is out of range.
    """
    scores = _scores(matrix, "matrix")
    dropped = as_pairs(pairs, "pairs", scores.shape)
    kept = _core.drop_pairs(
        pattern(scores),
        scores.data,
        pattern(dropped, scores.indices.dtype),
        as_threads(threads),
    )
    return new_csr(*kept, scores.shape)


def _scores(value: Any, name: str) -> Any:
    """A CSR matrix of float32 or float64 without duplicates."""
    matrix = as_csr(value, name)
    if matrix.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} has dtype {matrix.dtype}, expected float32 or float64")
    return canonical(matrix)
