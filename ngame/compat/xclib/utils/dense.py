"""Dense arrays: their best entries, and the centroids of labels."""

from typing import Any

import numpy as np
import scipy.sparse as sp

from ngame.compat.xclib.utils import sparse


def topk(values: Any, indices: Any = None, k: int = 10, sorted: bool = False) -> Any:
    """Give the k largest values of every row, best first.

    Parameters
    ----------
    values : float array of shape [n, m]
    indices : int array of shape [n, m], optional
        The id of each value; its column otherwise.
    k : int
        1 .. m, or -1 for m.
    sorted : no effect

    Returns
    -------
    ids : array of shape [n, k]
    values : array of shape [n, k]
        Ties by lower column.

    Raises
    ------
    ValueError
        k is not in 1 .. m, the shapes differ, or a row has NaN.

    Notes
    -----
    In pyxclib the order is arbitrary unless `sorted`, and as given where k is m.
    """
    values = np.asarray(values)
    if values.ndim != 2:
        raise ValueError(f"values has shape {values.shape}, expected two dimensions")
    if indices is not None and np.shape(indices) != values.shape:
        raise ValueError(f"indices has shape {np.shape(indices)}, values has {values.shape}")
    columns = values.shape[1]
    k = columns if k == -1 else k
    if not 1 <= k <= columns:
        raise ValueError(f"k is {k}, values has {columns} columns")
    ids = sparse.topk(csr_of_all(values), k, pad_ind=-1, pad_val=0)
    best = np.take_along_axis(values, ids, 1)
    return (ids if indices is None else np.take_along_axis(np.asarray(indices), ids, 1)), best


def compute_centroid(
    X: Any, Y: Any, reduction: str = "sum", binarize: bool = True, copy: bool = True
) -> Any:
    """Add up, or average, the rows of each label, whose weights are 1 unless `binarize` is false.

    Parameters, result and errors are those of `sparse.compute_centroid`.
    """
    return sparse.compute_centroid(X, Y, reduction, binarize, copy)


def csr_of_all(values: Any) -> sp.csr_matrix:
    """A CSR matrix that stores every element of an array [n, m], zeros too."""
    rows, columns = values.shape
    ids = np.broadcast_to(np.arange(columns, dtype=np.int32), values.shape)
    offsets = np.arange(rows + 1, dtype=np.int64) * columns
    return sp.csr_matrix((values.ravel(), ids.ravel(), offsets), shape=values.shape)
