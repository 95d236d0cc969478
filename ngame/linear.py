"""Linear classifiers of sparse rows, one a label, told from a shortlist of negatives."""

from typing import Any

import numpy as np
import scipy.sparse as sp

from ngame import _core
from ngame.arrays import (
    Csr,
    Pairs,
    as_csr,
    as_number,
    as_pairs,
    as_threads,
    as_weighted_rows,
    check_columns,
    check_rows,
    new_csr,
    pattern,
)
from ngame.cluster import as_seed

_PASSES = 100


def linear_classifiers(
    points: Csr,
    labels: Csr,
    *,
    negatives: Pairs | None = None,
    cost: float = 0.5,
    tolerance: float = 0.1,
    least: float = 0.05,
    seed: int = 0,
    threads: int = 0,
) -> sp.csr_matrix:
    """Train a linear classifier for each label: what the columns of a point say of it.

    Each is a support vector machine with squared loss and without a constant. Its own points are to
    score 1 or more, those that it is told from 0 or less: the weights w minimise ``w @ w / 2 + cost
    * (sum of max(0, 1 - x @ w)**2 over its points x + sum of max(0, x @ w)**2 over the others)``.
    By the 0 a classifier need not know a column that none of its own points has, so the weights are
    few. `sparse_topk` finds a point's best labels: ``sparse_topk(points, weights, k)``.

    Parameters
    ----------
    points : float32 CSR matrix of shape [n, d]
        Rows such as TF-IDF of unit length.
    labels : CSR matrix of shape [n, L]
        Every stored entry says that a point has a label.
    negatives : CSR matrix of shape [n, L] or integer array of shape [p, 2], optional
        (point, label) pairs: the points that each label is told from. Those that have the label
        do not count. By default all points, which takes n * L visits. A hundred labels a point,
        those of its nearest points by `sparse_topk`, gave the same P@1 within .3 %
        (bench/results/linear.md).
    cost : float
        Above 0. Larger values fit the points more closely.
    tolerance : float
        Above 0. Training ends when no point has a larger slope, or after as many visits as a
        hundred passes make, which a large cost can need.
    least : float
        Weights below this share of the label's largest one are left out; 0 keeps all.
    seed : int
        Any integer: of the order in which points are visited.
    threads : int
        0 means the CPUs this process may use. Weights do not depend on it.

    Returns
    -------
    float32 CSR matrix of shape [L, d]
        Indices sorted. A label without a point has no weights.

    Raises
    ------
    TypeError
        `points` is not a CSR matrix of float32, or another argument has another type.
    ValueError
        Shapes differ, a number is out of its range, or a row has NaN or infinity (the message names
        the first).
    IndexError
        A column of `labels` or a pair of `negatives` is out of range.

    Notes
    -----
    Dual coordinate descent (Hsieh et al., "A dual coordinate descent method for large-scale linear
    SVM", ICML 2008). One classifier a label, small weights left out: DiSMEC (Babbar and Schölkopf,
    WSDM 2017). Negatives from a shortlist: Slice (Jain et al., WSDM 2019) and its kind.

    Memory beyond input and output: for each thread 4 bytes a column, and 8 an entry and 60 a point
    of those that one label is trained on.

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sp
    >>> points = sp.csr_matrix(np.array([[1, 0], [0, 1]], np.float32))
    >>> linear_classifiers(points, sp.csr_matrix([[1, 0], [0, 1]]), cost=2.0).toarray().round(2)
    array([[0.8, 0. ],
           [0. , 0.8]], dtype=float32)
    """
    rows = as_weighted_rows(points, "points")
    has = as_csr(labels, "labels")
    if has.shape[0] != rows.shape[0]:
        raise ValueError(f"labels has {has.shape[0]} rows, points has {rows.shape[0]}")
    if rows.shape[0] > np.iinfo(np.int32).max:
        raise ValueError(f"points has {rows.shape[0]} rows, at most 2**31 - 1 are possible")
    lacks = None if negatives is None else as_pairs(negatives, "negatives", has.shape)
    for name, value in (("cost", cost), ("tolerance", tolerance), ("least", least)):
        if as_number(value, name) < 0 or (value == 0 and name != "least"):
            bound = "0 or more" if name == "least" else "more than 0"
            raise ValueError(f"{name} is {value}, expected {bound}")
    check_rows(has, "labels")
    check_columns(has, "labels")
    by_label = [None if one is None else _transposed(one) for one in (has, lacks)]
    index = np.result_type(*(m.indices.dtype for m in (rows, *by_label) if m is not None))
    found = _core.train_linear(
        pattern(rows, index),
        rows.data,
        pattern(by_label[0], index),
        None if by_label[1] is None else pattern(by_label[1], index),
        float(cost),
        float(tolerance),
        float(least),
        _PASSES,
        as_seed(seed),
        as_threads(threads),
    )
    return new_csr(*found, (has.shape[1], rows.shape[1]))


def _transposed(matrix: Any) -> sp.csr_matrix:
    """The stored entries, by column."""
    ones = np.ones(len(matrix.indices), np.int8)
    found = sp.csr_matrix(sp.csr_matrix((ones, matrix.indices, matrix.indptr), matrix.shape).T)
    found.sum_duplicates()
    return found
