"""Ranking metrics at every cut-off up to k, by `ngame.metrics.evaluate`, which defines them.

Predictions come, as X or `pred_labels`, in one of four forms:

- a sparse matrix of scores, of the shape of the true labels;
- a float array of that shape, the score of every label;
- an int array of shape [n, m], label ids from the best to the worst, with ``sorted=True``;
- a dictionary of ``"indices"`` and ``"scores"``, arrays of shape [n, m]; with ``sorted=True`` they
  are ordered from best to worst, and scores are not read.

An id that is -1 or the number of labels is padding. If a row has fewer than k predictions, the rest
are misses. True labels are a sparse matrix or an array, whose nonzero entries are positives.
`use_cython` has no effect.

All but `format` raise TypeError if an argument has another type, ValueError if shapes do not agree,
there are no rows, k is less than 1, ids come without ``sorted=True`` or a score is NaN, and
IndexError for an id out of range. Results are float64 arrays of shape [k], as fractions; those of
`recall_at_gt` and `micro_recall_at_gt` are single floats.

Notes
-----
In pyxclib the order of ties is undefined; the caller's matrix is sorted in place; dense true labels
fail; a true label of value v counts as v positives; predictions in arrays must have k columns; an
id given twice in a row counts twice; propensity-scored metrics are NaN if there is no positive,
here 0.
"""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame.arrays import as_count, as_csr, canonical, with_dtype
from ngame.compat.xclib.utils.dense import csr_of_all
from ngame.compat.xclib.utils.sparse import topk
from ngame.metrics import evaluate, propensity_weights

Curve = npt.NDArray[np.float64]


def precision(
    X: Any, true_labels: Any, k: int = 5, sorted: bool = False, use_cython: bool = False
) -> Curve:
    """Give P@1 .. P@k."""
    return _curves(X, true_labels, None, k, sorted, "P")[0]


def ndcg(
    X: Any, true_labels: Any, k: int = 5, sorted: bool = False, use_cython: bool = False
) -> Curve:
    """Give N@1 .. N@k."""
    return _curves(X, true_labels, None, k, sorted, "N")[0]


def psprecision(
    X: Any,
    true_labels: Any,
    inv_psp: Any,
    k: int = 5,
    sorted: bool = False,
    use_cython: bool = False,
) -> Curve:
    """Give PSP@1 .. PSP@k, with the inverse propensity of every label."""
    return _curves(X, true_labels, inv_psp, k, sorted, "PSP")[0]


def psndcg(
    X: Any,
    true_labels: Any,
    inv_psp: Any,
    k: int = 5,
    sorted: bool = False,
    use_cython: bool = False,
) -> Curve:
    """Give PSN@1 .. PSN@k, with the inverse propensity of every label."""
    return _curves(X, true_labels, inv_psp, k, sorted, "PSN")[0]


def recall(
    X: Any, true_labels: Any, k: int = 5, sorted: bool = False, use_cython: bool = False
) -> Curve:
    """Give R@1 .. R@k; a row without positives counts as 0."""
    return _curves(X, true_labels, None, k, sorted, "R")[0]


def hits(
    X: Any, true_labels: Any, k: int = 5, sorted: bool = False, use_cython: bool = False
) -> Curve:
    """Give the share of rows with a positive among their best 1 .. k."""
    return _curves(X, true_labels, None, k, sorted, "HR")[0]


def recall_at_gt(
    X: Any, true_labels: Any, pad_val: int, sorted: bool = False, use_cython: bool = False
) -> float:
    """Give the mean of each row's recall among as many of its best as it has positives.

    A row without positives counts as 0. `pad_val` has no effect.
    """
    found, positives = _found_at_gt(X, true_labels, sorted)
    return float((found / np.maximum(positives, 1)).mean())


def micro_recall_at_gt(
    X: Any, true_labels: Any, pad_val: int, sorted: bool = False, use_cython: bool = False
) -> float:
    """Give the share of all positives found among as many of each row's best as it has positives.

    It is 0 if there is no positive. `pad_val` has no effect.

    Notes
    -----
    In pyxclib it is then NaN.
    """
    found, positives = _found_at_gt(X, true_labels, sorted)
    return float(found.sum() / max(positives.sum(), 1))


def compute_inv_propesity(labels: Any, A: float, B: float) -> Curve:
    """Give the inverse propensity of every label, as `ngame.metrics.inverse_propensity` does.

    Parameters
    ----------
    labels : sparse matrix or array of shape [n, l]
        True labels of the training points.
    A, B : float
        0.5 and 0.4 are usual for Wikipedia articles and titles, 0.6 and 2.6 for Amazon products,
        0.55 and 1.5 for all else, WikiSeeAlso among it. Renée's training code takes 0.5 and 0.4 for
        every name with "Wiki" in it, so that published scores of WikiSeeAlso may differ by that.

    Returns
    -------
    float64 array of shape [l]

    Notes
    -----
    pyxclib adds up the values of a label; here its positives are counted. As there, there may be
    fewer than three rows, though rare labels then weigh less.
    """
    return propensity_weights(_truth(labels), A, B).astype(np.float64)


def format(*args: Any, decimal_points: str = "%0.2f") -> str:
    """Write each sequence of fractions as a line of percentages with commas between them."""
    return "\n".join(",".join(decimal_points % (value * 100) for value in row) for row in args)


class Metrics:
    """Score predictions against the same true labels.

    Parameters
    ----------
    true_labels : sparse matrix or array of shape [n, l]
    inv_psp : array of shape [l], optional
        The inverse propensity of every label.
    remove_invalid : bool
        Leave out rows without positives.

    Notes
    -----
    With `remove_invalid` pyxclib shortens the arrays in the caller's dictionary.
    """

    def __init__(self, true_labels: Any, inv_psp: Any = None, remove_invalid: bool = False) -> None:
        self.true_labels = _truth(true_labels)
        self.inv_psp = None if inv_psp is None else np.ravel(inv_psp)
        self.remove_invalid = remove_invalid
        self.valid_idx: npt.NDArray[np.int64] | None = None
        if remove_invalid:
            self.valid_idx = np.flatnonzero((self.true_labels != 0).getnnz(axis=1))
            self.true_labels = self.true_labels[self.valid_idx]
        self.num_instances, self.num_labels = self.true_labels.shape

    def eval(
        self, pred_labels: Any, K: int = 5, sorted: bool = False, use_cython: bool = False
    ) -> list[Curve]:
        """Give P, N, and where there are inverse propensities PSP and PSN, at 1 .. K each.

        Parameters
        ----------
        pred_labels : predictions of all n rows
        K : int
        sorted : bool

        Returns
        -------
        list of two or four arrays of shape [K]
        """
        rows = self.valid_idx
        if rows is not None:
            if isinstance(pred_labels, dict):
                pred_labels = {
                    name: np.asarray(pred_labels[name])[rows] for name in ("indices", "scores")
                }
            else:
                pred_labels = (pred_labels.tocsr() if sp.issparse(pred_labels) else pred_labels)[
                    rows
                ]
        families = ("P", "N") if self.inv_psp is None else ("P", "N", "PSP", "PSN")
        return _curves(pred_labels, self.true_labels, self.inv_psp, K, sorted, *families)


class Metrices(Metrics):
    """`Metrics` by its old name, with a FutureWarning."""

    def __init__(
        self, true_labels: Any, inv_propensity_scores: Any = None, remove_invalid: bool = False
    ) -> None:
        warnings.warn("Metrices is now Metrics", FutureWarning, stacklevel=2)
        super().__init__(true_labels, inv_propensity_scores, remove_invalid)


# The steps of a metric, which some codes call themselves: ids, then flags, then means.


def _setup_metric(
    X: Any,
    true_labels: Any,
    inv_psp: Any = None,
    k: int = 5,
    sorted: bool = False,
    use_cython: bool = False,
) -> tuple[npt.NDArray[np.int64], sp.csr_matrix, npt.NDArray[np.int64] | None, Any]:
    """Rank predictions and best labels.

    Parameters
    ----------
    X : predictions in one of the four forms
    true_labels : sparse matrix or array of shape [n, l]
    inv_psp : array of shape [l], optional
    k : int
    sorted : bool

    Returns
    -------
    ids : int64 array of shape [n, k]
        The k best of every row, best first; l where there are fewer.
    true_labels : csr_matrix of shape [n, l + 1]
        The last column is empty, for the padding.
    ids of the best attainable : int64 array of shape [n, k], or None without `inv_psp`
    inv_psp : float64 array of shape [l + 1], the last is 0; or None
    """
    truth = _truth(true_labels)
    rows, labels = truth.shape
    k = as_count(k, "k")
    if rows == 0:
        raise ValueError("true_labels has no rows")
    ids = topk(_scores(X, truth.shape, k, sorted), k, pad_ind=labels, pad_val=0)
    wider = sp.csr_matrix((truth.data, truth.indices, truth.indptr), shape=(rows, labels + 1))
    if inv_psp is None:
        return ids, wider, None, None
    weights = np.ravel(np.asarray(inv_psp, np.float64))
    if weights.shape != (labels,):
        raise ValueError(f"inv_psp has shape {np.shape(inv_psp)}, expected ({labels},)")
    weighted = truth.astype(np.float64)
    weighted.data *= weights[weighted.indices]
    best = topk(weighted, k, pad_ind=labels, pad_val=0)
    return ids, wider, best, np.append(weights, 0.0)


def _eval_flags(indices: Any, true_labels: Any, inv_psp: Any = None) -> npt.NDArray[Any]:
    """Give the true value of every predicted label, times its weight if there are weights.

    Parameters
    ----------
    indices : int array of shape [n, k]
    true_labels : sparse matrix or array of shape [n, l]
        Ids are below l: `_setup_metric` adds the column of the padding.
    inv_psp : array of shape [l], optional

    Returns
    -------
    array of shape [n, k]
    """
    ids = np.asarray(indices)
    if sp.issparse(true_labels):
        # SciPy has no indexing of no elements.
        rows = np.repeat(np.arange(len(ids)), ids.shape[1])
        found = true_labels.tocsr()[rows, ids.ravel()] if ids.size else np.zeros(0)
        flags = np.asarray(found).reshape(ids.shape)
    else:
        flags = np.take_along_axis(np.asarray(true_labels), ids, axis=1)
    return flags if inv_psp is None else np.asarray(inv_psp)[ids] * flags


def _precision(eval_flags: Any, k: int = 5) -> Curve:
    """P@1 .. P@k of flags of shape [n, k]."""
    flags = np.asarray(eval_flags, np.float64)
    return np.ravel(np.cumsum(flags, axis=1).mean(axis=0) / np.arange(1, k + 1))


def _recall(eval_flags: Any, deno: Any, k: int = 5) -> Curve:
    """R@1 .. R@k of flags of shape [n, k]; `deno` [n, 1] is 1 / positives of each row."""
    flags = np.asarray(eval_flags, np.float64)
    return np.ravel((np.cumsum(flags, axis=1) * np.asarray(deno).reshape(-1, 1)).mean(axis=0))


def _hits(eval_flags: Any) -> Curve:
    """Share of rows with a positive among their best 1 .. k, of flags of shape [n, k]."""
    found = np.cumsum(np.asarray(eval_flags, np.float64), axis=1)
    return np.ravel(np.minimum(found, 1).mean(axis=0))


def _ndcg(eval_flags: Any, n: Any, k: int = 5) -> Curve:
    """N@1 .. N@k of flags of shape [n, k]; `n` [n, 1] is the best gain with all of a row's labels.

    The best gain at rank j is the smaller of `n` and the gain of j labels.
    """
    flags = np.asarray(eval_flags, np.float64)
    discounts = 1 / np.log2(np.arange(2, k + 2))
    best = np.minimum(np.asarray(n, np.float64).reshape(-1, 1), np.cumsum(discounts))
    return np.ravel((np.cumsum(flags * discounts, axis=1) / best).mean(axis=0))


def _found_at_gt(
    X: Any, true_labels: Any, ranked: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of each row, the positives found among as many of its best as it has, and those it has."""
    truth = _truth(true_labels) != 0
    positives = truth.getnnz(axis=1).astype(np.int64)
    ids, wider, _, _ = _setup_metric(X, truth, k=max(1, positives.max(initial=0)), sorted=ranked)
    within = np.arange(ids.shape[1]) < positives[:, np.newaxis]
    return (_eval_flags(ids, wider) * within).sum(axis=1, dtype=np.int64), positives


def _curves(
    X: Any, true_labels: Any, inv_psp: Any, k: int, ranked: bool, *families: str
) -> list[Curve]:
    """Each metric at 1 .. k."""
    ks = range(1, as_count(k, "k") + 1)
    truth = _truth(true_labels)
    if truth.shape[0] == 0:
        raise ValueError("true_labels has no rows")
    if inv_psp is None and not {"PSP", "PSN"}.isdisjoint(families):
        raise TypeError("inv_psp is None, expected the inverse propensity of every label")
    scores = _scores(X, truth.shape, k, ranked)
    if inv_psp is not None:
        inv_psp = np.ravel(inv_psp)
    values = evaluate(scores, truth, ks=ks, inverse_propensity=inv_psp)
    return [np.array([values[f"{family}@{k}"] for k in ks]) for family in families]


def _truth(true_labels: Any) -> sp.csr_matrix:
    if not (sp.issparse(true_labels) or isinstance(true_labels, np.ndarray)):
        kind = type(true_labels).__name__
        raise TypeError(f"true_labels is a {kind}, expected a sparse matrix or an array")
    if isinstance(true_labels, np.ndarray) and true_labels.dtype == np.float16:  # not in SciPy
        true_labels = true_labels.astype(np.float32)
    # Without unsorted or repeated indices, which SciPy would set right in the caller's arrays.
    return canonical(as_csr(_one_index_type(sp.csr_matrix(true_labels)), "true_labels"))


def _scores(X: Any, shape: tuple[int, int], k: int, ranked: bool) -> sp.csr_matrix:
    """Predictions in any of the four forms as scores in a CSR matrix."""
    if isinstance(X, dict):
        return _ranked_or_scored(
            np.asarray(X["indices"]), None if ranked else np.asarray(X["scores"]), shape, k
        )
    if isinstance(X, np.ndarray) and X.dtype.kind in "iu":
        if not ranked:
            raise ValueError("X has label ids, which must be sorted: say so by sorted=True")
        return _ranked_or_scored(X, None, shape, k)
    if not sp.issparse(X) and not (isinstance(X, np.ndarray) and X.dtype.kind == "f"):
        kind = f"an array of {X.dtype}" if isinstance(X, np.ndarray) else f"a {type(X).__name__}"
        raise TypeError(
            f"X is {kind}, expected a sparse matrix, an array of floats or integers, or a dict"
        )
    if X.shape != shape:
        raise ValueError(f"X has shape {X.shape}, true_labels has {shape}")
    matrix = _one_index_type(X.tocsr()) if sp.issparse(X) else csr_of_all(X)
    if matrix.dtype not in (np.float32, np.float64):
        matrix = with_dtype(matrix, np.float32 if matrix.dtype == np.float16 else np.float64)
    return matrix


def _ranked_or_scored(
    ids: npt.NDArray[Any], scores: npt.NDArray[Any] | None, shape: tuple[int, int], k: int
) -> sp.csr_matrix:
    """A CSR matrix of ids with their scores, or with scores that fall from left to right."""
    rows, labels = shape
    if ids.dtype.kind not in "iu":
        raise TypeError(f"X has ids of dtype {ids.dtype}, expected integers")
    if ids.ndim != 2 or len(ids) != rows:
        raise ValueError(f"X has ids of shape {ids.shape}, expected [{rows}, m]")
    if scores is None:
        ids = ids[:, :k]
        scores = np.broadcast_to(-np.arange(ids.shape[1], dtype=np.float32), ids.shape)
    elif scores.shape != ids.shape:
        raise ValueError(f"X has ids of shape {ids.shape} and scores of shape {scores.shape}")
    ids = ids.astype(np.int64, copy=False)
    outside = np.argwhere((ids < -1) | (ids > labels))
    if len(outside):
        row, column = outside[0]
        raise IndexError(f"X has id {ids[row, column]} in row {row}; there are {labels} labels")
    kept = (ids >= 0) & (ids < labels)
    offsets = np.append(0, np.cumsum(kept.sum(axis=1)))
    values = scores[kept]
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float64)
    return sp.csr_matrix((values, ids[kept], offsets), shape=shape)


def _one_index_type(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """The same over one type of index arrays: callers widen `indices` by hand."""
    if matrix.indices.dtype == matrix.indptr.dtype:
        return matrix
    return sp.csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=matrix.shape)
