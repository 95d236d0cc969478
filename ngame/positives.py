"""The known positives of a batch.

If `labels` is a sparse CSR tensor on a CUDA device, results are CUDA tensors: see `ngame.cuda`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from ngame import _core
from ngame.arrays import (
    Csr,
    as_csr,
    as_ids,
    canonical,
    new_csr,
    pattern,
)
from ngame.dispatch import dispatched


@dispatched
def in_batch_positives(labels: Csr, rows: npt.ArrayLike, columns: npt.ArrayLike) -> Any:
    """Mark every known positive among the rows and labels of a batch.

    This is the in-batch mask of NGAME (Dahiya et al., WSDM 2023). A marked entry is a positive
    in `labels`, so it must not be used as a negative.

    Parameters
    ----------
    labels : CSR matrix of shape [n, l]
        Stored entries are the positives, whatever their values. Unsorted indices are sorted in a
        copy at every call: better sort them once.
    rows : integer array of shape [b]
        Row ids; may repeat.
    columns : integer array of shape [c]
        Label ids, in any order; may repeat.

    Returns
    -------
    bool CSR matrix of shape [b, c], indices sorted
        Entry (i, j) is True where ``labels[rows[i], columns[j]]`` is stored. Time and memory grow
        with the stored entries of these rows and with c, not with n or l.

    Raises
    ------
    IndexError
        An id is out of range.

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sp
    >>> labels = sp.csr_matrix(np.array([[1, 0, 1], [0, 1, 0]]))
    >>> in_batch_positives(labels, [0, 1], [2, 1, 2]).toarray().astype(int)
    array([[1, 0, 1],
           [0, 1, 0]])
    """
    matrix = canonical(as_csr(labels, "labels"))
    rows, columns = as_ids(rows, "rows"), as_ids(columns, "columns")
    found, offsets = _core.in_batch_positives(pattern(matrix), rows, columns)
    return new_csr(np.ones(len(found), np.bool_), found, offsets, (len(rows), len(columns)))


@dispatched
def label_pool(labels: Csr, rows: npt.ArrayLike) -> tuple[Any, Any]:
    """Collect the labels of a batch of rows.

    Parameters
    ----------
    labels : CSR matrix of shape [n, l]
        As in `in_batch_positives`.
    rows : integer array of shape [b]
        Row ids; may repeat.

    Returns
    -------
    pool : int32 array of shape [u]
        The distinct labels of these rows, ascending.
    positives : bool CSR matrix of shape [b, u], indices sorted
        Entry (i, j) is True where row ``rows[i]`` has label ``pool[j]``.

    Raises
    ------
    IndexError
        A row is out of range.
    """
    matrix = canonical(as_csr(labels, "labels"))
    rows = as_ids(rows, "rows")
    pool, found, offsets = _core.label_pool(pattern(matrix), rows)
    return pool, new_csr(np.ones(len(found), np.bool_), found, offsets, (len(rows), len(pool)))
