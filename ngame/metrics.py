"""Ranking metrics of sparse predictions, defined as in the extreme classification repository."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ngame import _core
from ngame.arrays import (
    Pattern,
    as_csr,
    as_cutoffs,
    as_pairs,
    as_threads,
    canonical,
    check_rows,
    pattern,
)
from ngame.dispatch import dispatched


@dispatched
def evaluate(
    predictions: Any,
    truth: Any,
    *,
    ks: Sequence[int] = (1, 3, 5),
    inverse_propensity: Any = None,
    drop: Any = None,
    threads: int = 0,
) -> dict[str, float]:
    r"""Score ranked predictions against the truth.

    The entries of a row are ranked by score, ties by lower column. :math:`h_r` is 1 where the
    entry at rank r is a positive and else 0, :math:`P` are the positives of the row, :math:`w_r` is
    the inverse propensity of the label at rank r, and
    :math:`I_k = \sum_{r \le \min(k, |P|)} 1 / \log_2(r + 1)`. Means are over all rows:

    - P@k: mean of :math:`\frac1k \sum_{r \le k} h_r`, also where fewer than k are predicted;
    - N@k: mean of :math:`\sum_{r \le k} h_r / \log_2(r + 1) \, / I_k`;
    - R@k: mean of :math:`\sum_{r \le k} h_r / |P|`;
    - PSP@k: mean of :math:`\frac1k \sum_{r \le k} w_r h_r`, divided by the same mean for the
      best possible ranking: a ratio of means;
    - PSN@k: the same ratio for :math:`\sum_{r \le k} w_r h_r / \log_2(r + 1) \, / I_k`.

    A row without positives counts as zero.

    Parameters
    ----------
    predictions : float32 or float64 CSR matrix of shape [n, l]
        Higher is better. Stored zeros count as predictions. Indices need not be sorted, and the
        matrix is not changed. A label stored twice in a row takes two ranks and counts once, at
        the better one. A sparse CSR tensor on a CUDA device is scored there: see `ngame.cuda`.
    truth : CSR matrix of shape [n, l]
        Nonzero entries are positives.
    ks : sequence of int
        Cut-offs, each 1 or more.
    inverse_propensity : float array of shape [l], optional
        Positive weights, see `inverse_propensity`. They add PSP and PSN to the result.
    drop : CSR matrix of shape [n, l] or integer array of shape [p, 2], optional
        (row, label) pairs that are left out of both predictions and truth.
    threads : int
        0 means the CPUs this process may use. Results do not depend on it.

    Returns
    -------
    dict of float
        ``"P@1"``, ``"N@1"``, ``"R@1"`` and so on, as fractions. Sums are taken in float64.

    Raises
    ------
    TypeError
        An argument is not a CSR matrix, or scores are neither float32 nor float64.
    ValueError
        Shapes differ, there are no rows, a k is less than 1, a row has a NaN score (the message
        names the first), or a weight is not positive.
    IndexError
        A pair of `drop` is out of range.

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sp
    >>> predictions = sp.csr_matrix(np.array([[0.9, 0.1, 0.0], [0.0, 0.2, 0.7]]))
    >>> truth = sp.csr_matrix(np.array([[1, 0, 0], [0, 1, 0]]))
    >>> evaluate(predictions, truth, ks=[1])
    {'P@1': 0.5, 'N@1': 0.5, 'R@1': 0.5}
    """
    scored = as_csr(predictions, "predictions", any_order=True)
    if scored.dtype not in (np.float32, np.float64):
        raise TypeError(f"predictions has dtype {scored.dtype}, expected float32 or float64")
    positives = canonical(as_csr(truth, "truth"))
    if positives.shape != scored.shape:
        raise ValueError(f"truth has shape {positives.shape}, predictions has {scored.shape}")
    rows, labels = scored.shape
    if rows == 0:
        raise ValueError("predictions has no rows")
    if not positives.data.all():
        check_rows(positives, "truth")
        positives = positives.copy()
        positives.eliminate_zeros()
    cuts = as_cutoffs(ks)
    weights = None
    if inverse_propensity is not None:
        weights = np.ascontiguousarray(inverse_propensity, np.float32)
        if weights.shape != (labels,):
            raise ValueError(f"inverse_propensity has shape {weights.shape}, expected ({labels},)")
        if not (np.isfinite(weights) & (weights > 0)).all():
            raise ValueError("inverse_propensity has values that are not positive and finite")
    index = scored.indices.dtype
    dropped: Pattern | None = None
    if drop is not None:
        dropped = pattern(as_pairs(drop, "drop", scored.shape), index)
    families = _core.evaluate(
        pattern(scored),
        np.ascontiguousarray(scored.data),
        pattern(positives, index),
        dropped,
        weights,
        np.array(cuts, np.int64),
        as_threads(threads),
    )
    return {
        f"{family}@{k}": value
        for family, values in families.items()
        for k, value in zip(cuts, values, strict=False)
    }


def inverse_propensity(
    train_labels: Any, a: float = 0.55, b: float = 1.5
) -> npt.NDArray[np.float32]:
    r"""Weight labels by how likely their positives are missing: rare labels weigh more.

    With n training points, :math:`n_l` of which have label l,
    :math:`w_l = 1 + C \, (n_l + b)^{-a}` with :math:`C = (\ln n - 1) \, (b + 1)^a`
    (Jain, Prabhu and Varma, KDD 2016).

    Parameters
    ----------
    train_labels : CSR matrix of shape [n, l]
        Nonzero entries are positives.
    a, b : float
        Usual are 0.5 and 0.4 for Wikipedia articles, 0.6 and 2.6 for Amazon products, and 0.55
        and 1.5 for everything else.

    Returns
    -------
    float32 array of shape [l]

    Raises
    ------
    ValueError
        There are no rows, or a or b is not positive.
    IndexError
        A column is out of range.
    """
    labels = canonical(as_csr(train_labels, "train_labels"))
    if labels.shape[0] == 0:
        raise ValueError("train_labels has no rows")
    if not a > 0 or not b > 0:
        raise ValueError(f"a and b are {a} and {b}, expected positive numbers")
    check_rows(labels, "train_labels")
    outside = (labels.indices < 0) | (labels.indices >= labels.shape[1])
    if outside.any():
        raise IndexError(
            f"train_labels has column {labels.indices[np.argmax(outside)]}, "
            f"out of range for {labels.shape[1]} columns"
        )
    counts = np.bincount(labels.indices[labels.data != 0], minlength=labels.shape[1])
    scale = (np.log(labels.shape[0]) - 1) * (b + 1) ** a
    weights: npt.NDArray[np.float32] = (1 + scale * (counts + b) ** -a).astype(np.float32)
    return weights
