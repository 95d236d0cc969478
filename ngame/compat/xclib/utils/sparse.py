"""Sparse matrices: best entries, norms, construction."""

import warnings
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.special import expit

from ngame.arrays import as_count, as_csr, as_ids, with_dtype
from ngame.shortlist import keep_topk

ZeroBased = bool | Literal["auto"]

# Values of an array that `normalize` widens to float64 at once.
_VALUES_AT_ONCE = 1 << 16


def binarize(X: Any, copy: bool = False) -> Any:
    """Set every stored value to 1, stored zeros included; in place unless `copy`."""
    X = _stored(X, "X", copy)
    X.data.fill(1)
    return X


def frequency(X: Any, axis: int = 0, copy: bool = False) -> npt.NDArray[np.int64]:
    """Count the stored entries of every column (`axis` 0) or row (1).

    Returns
    -------
    int64 array

    Notes
    -----
    pyxclib binarises the caller's matrix unless `copy`, and counts in its dtype, which in float32
    ends at 2**24. Here X is not changed, so `copy` has no effect.
    """
    return _counts(_stored(X, "X"), axis)


def rank(X: Any) -> sp.csr_matrix:
    """Rank the stored entries of every row by value: 1 is the largest, ties in stored order.

    Parameters
    ----------
    X : CSR matrix

    Returns
    -------
    int64 csr_matrix with the pattern of X
    """
    X = as_csr(X, "X", any_order=True)
    counts = np.diff(X.indptr)
    rows = np.repeat(np.arange(X.shape[0]), counts)
    ranks = np.empty(len(X.data), np.int64)
    ranks[np.lexsort((-X.data.astype(np.float64), rows))] = (
        np.arange(len(ranks)) - np.repeat(X.indptr[:-1], counts) + 1
    )
    return sp.csr_matrix((ranks, X.indices.copy(), X.indptr.copy()), shape=X.shape)


def topk(
    X: Any,
    k: int,
    pad_ind: int,
    pad_val: float,
    return_values: bool = False,
    dtype: npt.DTypeLike = "float32",
    use_cython: bool = False,
) -> Any:
    """Give the columns of the k largest stored entries of every row, best first.

    Parameters
    ----------
    X : CSR matrix of shape [n, m]
        Stored zeros and negative values are entries like others.
    k : int
        0 or more.
    pad_ind, pad_val
        Fill the ids and values of rows with fewer entries.
    return_values : bool
        Whether to give the values too.
    dtype : of the values
    use_cython : no effect

    Returns
    -------
    ids : int array of shape [n, k], ties by lower column
    values : array of shape [n, k], if `return_values`

    Raises
    ------
    ValueError
        k is negative, or a row has NaN.

    Notes
    -----
    In pyxclib the order of ties is undefined, and differs with `use_cython`, which also truncates
    values to integers.
    """
    X = as_csr(X, "X")
    best = keep_topk(_floats(X), k)
    counts = np.diff(best.indptr)
    taken = np.arange(k) < counts[:, None]
    # -inf past the end of a row; the sort is stable, so this comes after entries of -inf.
    keys = np.full(taken.shape, -np.inf)
    keys[taken] = best.data
    order = np.argsort(-keys, axis=1, kind="stable")
    ids = np.full(taken.shape, pad_ind, np.int64)
    ids[taken] = best.indices
    ids = np.take_along_axis(ids, order, 1)
    if not return_values:
        return ids
    values = np.full(taken.shape, pad_val, dtype)
    values[taken] = best.data
    return ids, np.take_along_axis(values, order, 1)


def retain_topk(X: Any, copy: bool = True, k: int = 5) -> Any:
    """Keep the k largest stored entries of every row; in place unless `copy`.

    Returns
    -------
    CSR matrix of the shape and dtype of X, indices sorted
        Of equal entries the lower columns stay.

    Notes
    -----
    pyxclib sorts the caller's indices even when it copies, and drops a 0 among the k largest, which
    is kept here.
    """
    best = keep_topk(_floats(as_csr(X, "X", any_order=True)), k)
    if not copy:
        X.data, X.indices, X.indptr = best.data.astype(X.dtype), best.indices, best.indptr
        X.has_sorted_indices = X.has_canonical_format = True
        return X
    return best.astype(X.dtype, copy=False)


def csr_from_arrays(
    indices: Any,
    values: Any,
    shape: tuple[int, int] | None = None,
    dtype: npt.DTypeLike = "float32",
) -> sp.csr_matrix:
    """Make a sparse matrix from arrays: row i has ``values[i, j]`` in column ``indices[i, j]``.

    Parameters
    ----------
    indices : int array of shape [n, m]
    values : array of shape [n, m]
    shape : (n, columns), optional
        By default there is one column more than the largest id.
    dtype : of the result

    Returns
    -------
    csr_matrix, indices sorted
        Duplicates are summed.

    Raises
    ------
    TypeError
        `indices` are no integers.
    ValueError
        Shapes do not agree.
    IndexError
        An id is out of range.

    Notes
    -----
    pyxclib ignores `dtype`, leaves indices unsorted, and keeps duplicates.
    """
    indices, values = np.asarray(indices), np.asarray(values)
    if indices.ndim != 2 or indices.shape != values.shape:
        raise ValueError(
            f"indices and values have shapes {indices.shape} and {values.shape}, expected one "
            "shape of two dimensions"
        )
    ids = as_ids(indices.ravel(), "indices")
    rows, width = indices.shape
    if shape is not None and shape[0] != rows:
        raise ValueError(f"shape is {tuple(shape)}, indices has {rows} rows")
    columns = _columns(ids, None if shape is None else shape[1], "indices")
    # Copies, since the matrix sorts its arrays in place.
    data = np.array(values.ravel(), dtype)
    matrix = sp.csr_matrix(
        (data, ids.copy(), np.arange(rows + 1, dtype=np.int64) * width), shape=(rows, columns)
    )
    matrix.sum_duplicates()
    return matrix


def ll_to_sparse(
    X: Iterable[Sequence[int]],
    shape: tuple[int, int] | None = None,
    dtype: npt.DTypeLike = "float32",
    zero_based: ZeroBased = True,
) -> sp.csr_matrix:
    """Make a sparse matrix of ones from a list of columns per row.

    Parameters
    ----------
    X : iterable of sequences of int
    shape : (rows, columns), optional
        May have more rows than X, which are empty, and more columns than X uses.
    dtype : of the result
    zero_based : bool or "auto"
        Whether ids count from 0; "auto": from 1 where there is no id 0.

    Returns
    -------
    csr_matrix, indices sorted
        A column given twice in a row becomes 2.

    Raises
    ------
    ValueError
        X has more rows than `shape`.
    IndexError
        An id is out of range.

    Notes
    -----
    An id that is one too large for `shape`, as from callers who take the largest id for the number
    of labels, adds a column, with a warning; pyxclib accepts it too, in a matrix that has no such
    column. It does not subtract 1 if ids count from 1, and fails if there are no ids.
    """
    return _from_lists(X, None, shape, dtype, zero_based)


def tuples_to_sparse(
    X: Iterable[Sequence[tuple[int, float]]],
    shape: tuple[int, int] | None = None,
    dtype: npt.DTypeLike = "float32",
    zero_based: ZeroBased = True,
) -> sp.csr_matrix:
    """Make a sparse matrix from a list of (column, value) per row; otherwise as `ll_to_sparse`."""
    rows = [list(row) for row in X]
    ids = [[column for column, _ in row] for row in rows]
    values = [value for row in rows for _, value in row]
    return _from_lists(ids, values, shape, dtype, zero_based)


def normalize(X: Any, norm: str = "l2", copy: bool = False) -> Any:
    """Scale every row to norm 1, except rows of zeros; in place unless `copy`.

    Parameters
    ----------
    X : CSR matrix or array of shape [n, d]
        Other sparse formats and integers are always copied.
    norm : "l2", "l1" or "max"
        "max" divides by the largest magnitude.
    copy : bool

    Returns
    -------
    The CSR matrix or array

    Raises
    ------
    ValueError
        `norm` is unknown.
    """
    if norm not in ("l2", "l1", "max"):
        raise ValueError(f'norm is {norm!r}, expected "l2", "l1" or "max"')
    if not sp.issparse(X):
        order = {"l2": 2, "l1": 1, "max": np.inf}[norm]
        given = np.asarray(X)
        dense = given if given.dtype.kind == "f" else given.astype(np.float64)
        if copy and dense is given:
            dense = dense.copy()
        # In the array's own type the norm of a row of float16 or of large float32 may overflow. A
        # wider copy of all rows would need two to four times the memory of the array.
        some = max(1, _VALUES_AT_ONCE // max(1, dense[:1].size))
        for first in range(0, len(dense), some):
            part = dense[first : first + some]
            wide = part.astype(np.result_type(part, np.float64))
            norms = np.linalg.norm(wide, ord=order, axis=1, keepdims=True)
            norms[~(norms > 0)] = 1  # of a row of zeros; one with NaN stays as it is too
            np.divide(wide, norms, out=part, casting="same_kind")
        return dense
    matrix = _floats(X.tocsr(copy=copy))
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    sizes = np.abs(matrix.data.astype(np.float64))
    if norm == "max":
        scale = np.zeros(matrix.shape[0])
        np.maximum.at(scale, rows, sizes)
    else:
        power = 2 if norm == "l2" else 1
        scale = np.bincount(rows, sizes**power, matrix.shape[0]) ** (1 / power)
    scale[scale == 0] = 1
    matrix.data /= scale[rows].astype(matrix.dtype)
    return matrix


def sigmoid(X: Any, copy: bool = False) -> Any:
    """Give the logistic function of every stored value; in place unless `copy`."""
    X = _stored(X, "X", copy)
    X.data = expit(X.data)
    return X


def compute_centroid(
    X: Any, Y: Any, reduction: str = "sum", _binarize: bool = False, copy: bool = True
) -> Any:
    """Add up, or average, the rows of each label: ``Y.T @ X``.

    Parameters
    ----------
    X : sparse matrix or array of shape [n, d]
    Y : sparse matrix of shape [n, l]
        Values are weights of the rows, 1 if `_binarize`.
    reduction : "sum" or "mean"
        The mean divides by the number of stored entries of a label.
    _binarize : bool
    copy : no effect

    Returns
    -------
    CSR matrix of shape [l, d] if X is sparse, else an array

    Raises
    ------
    ValueError
        `reduction` is unknown, or X and Y differ in their rows.

    Notes
    -----
    pyxclib binarises the caller's Y unless `copy`, and fails on a dense X, for which it has a
    function of the same name in `dense`.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction is {reduction!r}, expected "sum" or "mean"')
    Y = _stored(Y, "Y")
    if X.shape[0] != Y.shape[0]:
        raise ValueError(f"X has {X.shape[0]} rows, Y has {Y.shape[0]}")
    counts = np.maximum(_counts(Y, 0), 1)
    centroids = (binarize(Y, copy=True) if _binarize else Y).T @ X
    if reduction == "mean":
        scale = (1 / counts).astype(np.result_type(centroids.dtype, np.float32))
        if sp.issparse(centroids):
            centroids = sp.diags(scale) @ centroids
        else:
            centroids = centroids * scale[:, None]
    return centroids.tocsr() if sp.issparse(centroids) else centroids


def _map_rows(X: Any, mapping: Any, shape: tuple[int, int], oformat: str = "csr") -> Any:
    """Move row i of X to row ``mapping[i]`` of a matrix of `shape`; otherwise as `_map`."""
    return _map(X, mapping, shape, 0, oformat)


def _map_cols(X: Any, mapping: Any, shape: tuple[int, int], oformat: str = "csr") -> Any:
    """Move column i of X to column ``mapping[i]`` of a matrix of `shape`; otherwise as `_map`."""
    return _map(X, mapping, shape, 1, oformat)


def _map(X: Any, mapping: Any, shape: tuple[int, int], axis: int = 1, oformat: str = "csr") -> Any:
    """Move the columns (`axis` 1) or rows (0) of a sparse matrix to other places.

    Parameters
    ----------
    X : sparse matrix of shape [n, m]
    mapping : int array of shape [m], or [n] if `axis` is 0
        The new place of each.
    shape : (rows, columns) of the result
    axis : 0 or 1
    oformat : "csr", "csc", "lil" or "coo"

    Returns
    -------
    sparse matrix of that format, indices sorted
        Columns or rows that get one place are added.

    Raises
    ------
    TypeError
        X is no sparse matrix, or `mapping` holds no integers.
    ValueError
        `axis` or `oformat` is another, or `mapping` has another length.
    IndexError
        A new place is out of range.

    Notes
    -----
    pyxclib drops stored zeros, which are kept here, and fails on a matrix of one entry.
    """
    if axis not in (0, 1):
        raise ValueError(f"axis is {axis}, expected 0 or 1")
    if oformat not in ("csr", "csc", "lil", "coo"):
        raise ValueError(f"oformat is {oformat!r}, expected csr, csc, lil or coo")
    entries = _stored(X, "X").tocoo()
    places = as_ids(mapping, "mapping")
    if len(places) != X.shape[axis]:
        raise ValueError(f"mapping has {len(places)} entries, X has shape {X.shape}")
    wrong = (places < 0) | (places >= shape[axis])
    if wrong.any():
        raise IndexError(f"mapping has {places[np.argmax(wrong)]}, shape is {tuple(shape)}")
    rows, columns = entries.row, entries.col
    at = (rows, places[columns]) if axis else (places[rows], columns)
    matrix = sp.csr_matrix((entries.data, at), shape=shape)
    matrix.sort_indices()
    return matrix.asformat(oformat)


def from_zero(ids: npt.NDArray[np.int64], zero_based: ZeroBased) -> npt.NDArray[np.int64]:
    """Ids that count from 0."""
    if zero_based not in (True, False, "auto"):
        raise ValueError(f'zero_based is {zero_based!r}, expected True, False or "auto"')
    if zero_based == "auto":
        zero_based = len(ids) == 0 or bool(ids.min() == 0)
    return ids if zero_based else ids - 1


def _from_lists(
    ids: Iterable[Sequence[int]],
    values: Sequence[float] | None,
    shape: tuple[int, int] | None,
    dtype: npt.DTypeLike,
    zero_based: ZeroBased,
) -> sp.csr_matrix:
    """A sparse matrix from the ids of every row, and all their values in that order, or ones."""
    rows = [list(row) for row in ids]
    columns = from_zero(as_ids(list(chain.from_iterable(rows)), "X"), zero_based)
    if shape is None:
        shape = len(rows), _columns(columns, None, "X")
    if shape[0] < len(rows):
        raise ValueError(f"X has {len(rows)} rows, shape is {tuple(shape)}")
    if len(columns) and columns.max() == shape[1]:
        warnings.warn(
            f"X has id {shape[1]} and shape is {tuple(shape)}: the matrix gets a column more, "
            f"{shape[1] + 1}",
            stacklevel=3,
        )
        shape = shape[0], shape[1] + 1
    _columns(columns, shape[1], "X")
    offsets = np.full(shape[0] + 1, len(columns), np.int64)
    offsets[: len(rows) + 1] = np.cumsum([0, *map(len, rows)])
    data = np.ones(len(columns), dtype) if values is None else np.array(values, dtype)
    matrix = sp.csr_matrix((data, columns, offsets), shape=shape)
    matrix.sum_duplicates()
    return matrix


def _columns(ids: npt.NDArray[np.int64], columns: int | None, name: str) -> int:
    """The number of columns, `columns` or one more than the largest id; checks the ids."""
    least, most = int(ids.min(initial=0)), int(ids.max(initial=-1))
    columns = most + 1 if columns is None else as_count(columns, "shape[1]", 0)
    if least < 0 or most >= columns:
        wrong = least if least < 0 else most
        raise IndexError(f"{name} has id {wrong}, out of range for {columns} columns")
    return columns


def _stored(X: Any, name: str, copy: bool = False) -> Any:
    """Check that a sparse matrix has its values in one array."""
    if not sp.issparse(X) or X.format not in ("csr", "csc", "coo"):
        kind = f"{X.format} matrix" if sp.issparse(X) else type(X).__name__
        raise TypeError(f"{name} is a {kind}, expected a scipy.sparse CSR, CSC or COO matrix")
    return X.copy() if copy else X


def _counts(X: Any, axis: int) -> npt.NDArray[np.int64]:
    """The stored entries of every column (`axis` 0) or row (1)."""
    matrix = getattr(sp, f"{X.format}_matrix")(X)  # SciPy's sparse arrays do not count them
    return np.asarray(matrix.getnnz(axis=axis), np.int64)


def _floats(X: Any) -> Any:
    """X itself if its values are float32 or float64, else a copy in float64."""
    return X if X.dtype in (np.float32, np.float64) else with_dtype(X, np.float64)
