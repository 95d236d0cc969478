"""Sparse shortlists: labels of cluster mates; keep, merge and drop entries of score matrices."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from ngame import _core
from ngame.arrays import (
    Csr,
    Pairs,
    as_count,
    as_csr,
    as_list,
    as_pairs,
    as_threads,
    canonical,
    new_csr,
    pattern,
)
from ngame.cluster import Clusters


def cluster_shortlist(
    labels: Csr, clusters: Clusters, *, limit: int | None = None, threads: int = 0
) -> sp.csr_matrix:
    """List the labels of every row's cluster mates that are not its own.

    Parameters
    ----------
    labels : CSR matrix of shape [n, l]
        Stored entries are the labels, whatever their values. Unsorted indices are sorted in a
        copy.
    clusters : Clusters
        Of the same n rows.
    limit : int, optional
        Most labels a row. The most frequent ones are kept, ties by lower id.
    threads : int
        0 means the CPUs this process may use.

    Returns
    -------
    float32 CSR matrix of shape [n, l]
        Values are the numbers of mates that have the label.

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


def keep_topk(matrix: Csr, k: int, *, threads: int = 0) -> sp.csr_matrix:
    """Keep the k largest entries of every row.

    Parameters
    ----------
    matrix : float32 or float64 CSR matrix
        Stored zeros count as entries. Duplicates are summed in a copy.
    k : int
        0 or more. Rows with fewer entries keep all of them.
    threads : int
        0 means the CPUs this process may use.

    Returns
    -------
    CSR matrix of the same shape and dtype, indices sorted
        Ties go to the lower column.

    Raises
    ------
    TypeError
        `matrix` is not a CSR matrix of float32 or float64.
    ValueError
        k is negative, or a row has NaN (the message names the first).
    """
    scores = _scores(matrix, "matrix")
    kept = _core.keep_topk(pattern(scores), scores.data, as_count(k, "k", 0), as_threads(threads))
    return new_csr(*kept, scores.shape)


def merge(
    shortlists: Sequence[Csr], how: Literal["max", "sum"] = "max", *, threads: int = 0
) -> sp.csr_matrix:
    """Unite score matrices: the result has every pair that any of them has.

    Parameters
    ----------
    shortlists : sequence of float32 or float64 CSR matrices of one shape
    how : "max" or "sum"
        How the scores of a pair are combined. Only stored scores count: the maximum of -1 and no
        entry is -1. NaN stays NaN.
    threads : int
        0 means the CPUs this process may use.

    Returns
    -------
    CSR matrix, indices sorted
        float64 if any of the shortlists is, else float32. Scores are added in the given order.

    Raises
    ------
    TypeError
        `shortlists` is no sequence of such matrices.
    ValueError
        There is no shortlist, shapes differ, or `how` is unknown.
    """
    if not isinstance(how, str):
        raise TypeError(f'how is a {type(how).__name__}, expected "max" or "sum"')
    if how not in ("max", "sum"):
        raise ValueError(f'how is {how!r}, expected "max" or "sum"')
    matrices = [
        _scores(one, f"shortlists[{i}]") for i, one in enumerate(as_list(shortlists, "shortlists"))
    ]
    if not matrices:
        raise ValueError("shortlists is empty")
    for i, one in enumerate(matrices):
        if one.shape != matrices[0].shape:
            raise ValueError(
                f"shortlists[{i}] has shape {one.shape}, shortlists[0] has {matrices[0].shape}"
            )
    if len(matrices) == 1:
        return sp.csr_matrix(matrices[0], copy=True)
    index = np.result_type(*(one.indices.dtype for one in matrices))
    score = np.result_type(*(one.dtype for one in matrices))
    united, scores = pattern(matrices[0], index), matrices[0].data.astype(score, copy=False)
    for one in matrices[1:]:
        scores, columns, offsets = _core.merge(
            united,
            scores,
            pattern(one, index),
            one.data.astype(score, copy=False),
            how == "sum",
            as_threads(threads),
        )
        united = offsets.astype(index, copy=False), columns.astype(index, copy=False), united[2]
    return new_csr(scores, united[1], united[0], matrices[0].shape)


def drop_pairs(matrix: Csr, pairs: Pairs, *, threads: int = 0) -> sp.csr_matrix:
    """Remove the entries at given (row, column) pairs.

    Parameters
    ----------
    matrix : float32 or float64 CSR matrix of shape [n, m]
        Stored zeros count as entries. Duplicates are summed in a copy.
    pairs : integer array of shape [p, 2], or CSR matrix of shape [n, m]
        The pairs of a matrix are its stored entries, whatever their values. Pairs without an
        entry in `matrix` are ignored.
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
