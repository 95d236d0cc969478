"""Ranking metrics of sparse predictions, defined as in the extreme classification repository."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame import _core
from ngame.arrays import (
    Csr,
    Pairs,
    Pattern,
    as_array,
    as_csr,
    as_cutoffs,
    as_ids,
    as_number,
    as_pairs,
    as_threads,
    canonical,
    check_columns,
    check_rows,
    contiguous,
    is_sparse,
    pattern,
    widened,
    with_dtype,
)
from ngame.dispatch import dispatched

FEWEST_ROWS = 3
"""Training points of which propensities can be told: ln n must be more than 1."""


@dispatched
def evaluate(
    predictions: Csr | npt.ArrayLike | tuple[npt.ArrayLike, npt.ArrayLike],
    truth: Csr | npt.ArrayLike,
    *,
    ks: Sequence[int] = (1, 3, 5),
    inverse_propensity: npt.ArrayLike | None = None,
    drop: Pairs | None = None,
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
    - MRR@k: mean of 1 / r for the first positive, if its rank r is at most k;
    - MAP@k: mean of :math:`\sum_{r \le k} h_r P_r / \min(k, |P|)` with the row's own
      :math:`P_r = \frac1r \sum_{s \le r} h_s`;
    - HR@k, the hit rate: share of the rows with a positive among the first k;
    - PSP@k: mean of :math:`\frac1k \sum_{r \le k} w_r h_r`, divided by the same mean for the
      best possible ranking: a ratio of means;
    - PSN@k: the same ratio for :math:`\sum_{r \le k} w_r h_r / \log_2(r + 1) \, / I_k`.

    A row without positives counts as zero.

    Parameters
    ----------
    predictions : CSR matrix of shape [n, l], or one of the forms below
        Scores, higher is better. Stored zeros count as predictions. Indices need not be sorted, and
        the matrix is not changed. A label stored twice in a row takes two ranks and counts once, at
        the better one. A sparse CSR tensor on a CUDA device is scored there: see `ngame.cuda`. Or:

        - (scores, ids), two arrays or tensors of shape [n, k], as `topk_arrays` and ``torch.topk``
          give them; an id of -1 is none;
        - floats of shape [n, l]: the score of every label;
        - integers of shape [n, k]: label ids, best first, -1 for none;
        - a list of label ids for every row, best first, of any lengths.
    truth : CSR matrix of shape [n, l], or one of the forms below
        Nonzero entries are positives, none is negative. Or an array or tensor of that shape with 0
        and 1; or a list of label ids for every row.
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
        An argument has none of these forms.
    ValueError
        Shapes differ, there are no rows, a k is less than 1, a row has a NaN score (the message
        names the first), or a weight is not positive; integers in the shape of the truth repeat in
        a row, so that they are no label ids; the truth has negative values or NaN; an array of it
        has others than 0 and 1; predictions and truth are swapped, as far as values can tell.
    IndexError
        A label id or a pair of `drop` is out of range.

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sp
    >>> predictions = sp.csr_matrix(np.array([[0.9, 0.1, 0.0], [0.0, 0.2, 0.7]]))
    >>> truth = sp.csr_matrix(np.array([[1, 0, 0], [0, 1, 0]]))
    >>> found = evaluate(predictions, truth, ks=[2])
    >>> {name: round(value, 3) for name, value in found.items()}
    {'P@2': 0.5, 'N@2': 0.815, 'R@2': 1.0, 'MRR@2': 0.75, 'MAP@2': 0.75, 'HR@2': 1.0}
    """
    found = _evaluate(predictions, truth, ks, inverse_propensity, drop, threads, False)
    return {name: float(values[0]) for name, values in found.items()}


@dispatched
def evaluate_rows(
    predictions: Csr | npt.ArrayLike | tuple[npt.ArrayLike, npt.ArrayLike],
    truth: Csr | npt.ArrayLike,
    *,
    ks: Sequence[int] = (1, 3, 5),
    inverse_propensity: npt.ArrayLike | None = None,
    drop: Pairs | None = None,
    threads: int = 0,
) -> dict[str, npt.NDArray[np.float64]]:
    """Score every row: what `evaluate` takes the mean of, for tests of significance.

    Parameters and errors are those of `evaluate`.

    Returns
    -------
    dict of float64 arrays of shape [n]
        The means of the arrays are the values of `evaluate`, to the rounding. So PSP and PSN of a
        row are its gain divided by the mean over all rows of the best possible gain, and can be
        more than 1. On a CUDA device tensors.

    Examples
    --------
    >>> evaluate_rows([[2, 0], [1, 2]], [[0], [0, 1]], ks=[2])["P@2"]
    array([0.5, 0.5])
    """
    return _evaluate(predictions, truth, ks, inverse_propensity, drop, threads, True)


def _evaluate(
    predictions: Csr | npt.ArrayLike | tuple[npt.ArrayLike, npt.ArrayLike],
    truth: Csr | npt.ArrayLike,
    ks: Sequence[int],
    inverse_propensity: npt.ArrayLike | None,
    drop: Pairs | None,
    threads: int,
    by_row: bool,
) -> dict[str, npt.NDArray[np.float64]]:
    """The values of each metric: one for each row, or their mean alone."""
    cuts = as_cutoffs(ks)
    weights = None
    if inverse_propensity is not None:
        given = as_array(inverse_propensity, "inverse_propensity")
        if given.dtype.kind not in "biuf":
            raise TypeError(f"inverse_propensity has dtype {given.dtype}, expected floats")
        with np.errstate(over="ignore"):  # refused below
            weights = contiguous(given, np.float32)
    scored, positives = _as_matrices(predictions, truth, None if weights is None else weights.size)
    rows, labels = scored.shape
    if rows == 0:
        raise ValueError("predictions has no rows")
    _refuse_swapped(scored, positives)
    if not positives.data.all():
        check_rows(positives, "truth")
        positives = positives.copy()
        positives.eliminate_zeros()
    if weights is not None:
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
        contiguous(scored.data),
        pattern(positives, index),
        dropped,
        weights,
        np.array(cuts, np.int64),
        by_row,
        as_threads(threads),
    )
    return {
        f"{family}@{k}": values[place]
        for family, of_family in families.items()
        for values in [of_family.reshape(len(cuts), -1)]
        for place, k in enumerate(cuts)
    }


def evaluate_each(
    predictions: Mapping[Any, Any],
    truth: sp.csr_matrix,
    labelled: sp.csr_matrix,
    *,
    ks: Sequence[int],
    propensity: Sequence[float] = (0.55, 1.5),
    drop: Pairs | None = None,
    threads: int = 0,
) -> dict[Any, dict[str, float]]:
    """All metrics of predictions by name, with propensities of the labelled training points.

    The truth may have more labels than these, which count as labels without a training point. One
    warning counts the rows without a label; another says if there are too few points for
    propensities, and PSP and PSN are left out.
    """
    _warn_of_unlabelled(truth, drop)
    width, weights = truth.shape[1], None
    if labelled.shape[0] < FEWEST_ROWS:
        warnings.warn(
            f"{labelled.shape[0]} training points have a label: PSP and PSN, which need at least "
            f"{FEWEST_ROWS}, are left out",
            stacklevel=3,
        )
    else:
        known = max(width, labelled.shape[1])  # a truth that is narrower is refused below
        weights = inverse_propensity(widened(labelled, known), *propensity)
    return {
        name: evaluate(
            matrix,
            truth,
            ks=ks,
            inverse_propensity=weights,
            drop=drop,
            threads=threads,
        )
        for name, matrix in predictions.items()
    }


def _warn_of_unlabelled(truth: Csr, drop: Pairs | None) -> None:
    """Warn of rows without a positive, which every metric counts as wrong."""
    given = as_csr(truth, "truth")
    check_rows(given, "truth")  # before SciPy compares it with other pairs
    check_columns(given, "truth")
    left = canonical(given) != 0
    if drop is not None:
        left = left > as_pairs(drop, "drop", left.shape)
    missing = int((np.diff(left.tocsr().indptr) == 0).sum())
    if missing:
        warnings.warn(
            f"{missing} of {left.shape[0]} test points have no label and count as wrong",
            stacklevel=4,
        )


# The forms of predictions and truth


def _as_matrices(predictions: Any, truth: Any, labels: int | None) -> tuple[Any, Any]:
    """Both as CSR matrices of one shape; `labels` is their width where neither form tells."""
    scored = _as_scores(predictions)
    positives: Any = None
    if is_sparse(truth):
        positives = _as_positives(truth, "truth")
    elif isinstance(truth, (list, tuple)):
        positives = _rows_of_ids(truth, "truth")
    else:
        positives = _as_dense_truth(truth)
    widths = [part.shape[1] for part in (scored, positives) if not isinstance(part, _Ids)]
    if widths:
        labels = widths[0]
    elif labels is None:
        labels = 1 + max(part.ids.max(initial=-1) for part in (scored, positives))
    if isinstance(scored, _Ids):
        if positives.shape[0] == scored.shape[0] and not scored.listed:
            scored.refuse_scores(labels)
        scored = scored.matrix(labels, "predictions")
    if isinstance(positives, _Ids):
        positives.refuse_flags(labels)
        positives.scores = np.ones(len(positives.ids), np.bool_)
        positives = canonical(as_csr(positives.matrix(labels, "truth"), "truth"))
    if positives.shape != scored.shape:
        raise ValueError(f"truth has shape {positives.shape}, predictions has {scored.shape}")
    return scored, positives


def _refuse_swapped(scored: Any, positives: Any) -> None:
    """Reject predictions that are all 1 where the truth has fractions: truth and scores."""
    values = positives.data
    if values.dtype.kind == "f" and len(scored.data) and (scored.data == 1).all():
        fractions = values != np.rint(values)
        if fractions.any():
            raise ValueError(
                f"truth holds {values[np.argmax(fractions)]:.4g} and predictions nothing but 1: "
                "they look swapped, expected evaluate(predictions, truth)"
            )


def _as_positives(value: Any, name: str) -> Any:
    """A CSR matrix without duplicates and whose values are no scores."""
    matrix = canonical(as_csr(value, name))
    values = matrix.data
    if values.dtype.kind in "if":
        wrong = ~(values >= 0)  # NaN too
        if wrong.any():
            raise ValueError(
                f"{name} holds {values[np.argmax(wrong)]:.4g}, expected nonzero entries for "
                "positives and no negative ones"
            )
    return matrix


class _Ids:
    """Label ids of every row, whose number of labels is known later; -1 is none."""

    def __init__(self, ids: Any, counts: Any, scores: Any, *, listed: bool = False) -> None:
        self.ids, self.counts, self.listed = ids, counts, listed
        self.scores = scores
        self.shape = (len(counts),)

    def matrix(self, labels: int, name: str) -> Any:
        rows = np.repeat(np.arange(len(self.counts)), self.counts)
        wrong = (self.ids < -1) | (self.ids >= labels)
        if wrong.any():
            place = int(np.argmax(wrong))
            raise IndexError(
                f"{name} has label id {self.ids[place]} in row {rows[place]}, out of range for "
                f"{labels} labels"
            )
        kept = self.ids >= 0
        offsets = np.append(0, np.cumsum(np.bincount(rows[kept], minlength=len(self.counts))))
        content = self.scores[kept], self.ids[kept], offsets
        return sp.csr_matrix(content, shape=(len(self.counts), labels))

    def refuse_scores(self, labels: int) -> None:
        """Reject integers for every label that can be no ids; they would be ranked wrongly."""
        if not len(self.counts) or (self.counts != labels).any():
            return
        ordered = np.sort(self.ids.reshape(-1, labels), axis=1)
        repeats = ((np.diff(ordered, axis=1) == 0) & (ordered[:, 1:] >= 0)).any(axis=1)
        if repeats.any():
            raise ValueError(
                f"predictions holds integers, one for every label, with repeats in row "
                f"{int(np.argmax(repeats))}: integers are label ids; give scores as floats"
            )

    def refuse_flags(self, labels: int) -> None:
        """Reject lists of 0 and 1 for every label, which would be taken for ids."""
        if (
            labels > 1
            and len(self.counts)
            and (self.counts == labels).all()
            and self.ids.max() <= 1
        ):
            raise ValueError(
                "truth is a list of 0 and 1 for every label; lists hold label ids: give an array"
            )


def _as_scores(predictions: Any) -> Any:
    """Predictions as a CSR matrix of floats, or as ids."""
    name = "predictions"
    if is_sparse(predictions):
        scored = as_csr(predictions, name, any_order=True)
        if scored.dtype in (np.float32, np.float64):
            return scored
        if scored.dtype.kind not in "biuf":
            raise TypeError(f"{name} has dtype {scored.dtype}, expected numbers")
        return with_dtype(scored, np.float64)
    if isinstance(predictions, tuple) and len(predictions) == 2 and np.ndim(predictions[1]) == 2:
        return _as_pair(*predictions)
    if isinstance(predictions, (list, tuple)):
        rows = [as_array(row, f"{name}[{number}]") for number, row in enumerate(predictions)]
        if not any(row.dtype.kind == "f" and row.size for row in rows):
            return _rows_of_ids(rows, name)
        if len({row.shape for row in rows}) > 1:
            raise ValueError(f"{name} is a ragged list of floats; rows of label ids may be ragged")
        predictions = np.stack(rows)
    array = as_array(predictions, name)
    if array.dtype == object:
        raise TypeError(
            f"{name} is a {type(predictions).__name__}, expected scores or label ids of every row"
        )
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}, expected two dimensions")
    if array.dtype.kind in "iu":
        return _ranked(array)
    if array.dtype.kind != "f":
        raise TypeError(f"{name} has dtype {array.dtype}, expected scores or label ids")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32 if array.dtype == np.float16 else np.float64)
    rows, labels = array.shape
    ids = np.broadcast_to(np.arange(labels, dtype=np.int32), array.shape)
    offsets = np.arange(rows + 1, dtype=np.int64) * labels
    return sp.csr_matrix((array.ravel(), ids.ravel(), offsets), shape=array.shape)


def _as_pair(scores: Any, ids: Any) -> _Ids:
    scores, ids = as_array(scores, "predictions[0]"), as_array(ids, "predictions[1]")
    if ids.dtype.kind not in "iu" or scores.dtype.kind not in "iuf":
        raise TypeError(
            f"predictions has two parts of dtypes {scores.dtype} and {ids.dtype}, expected scores "
            "and label ids"
        )
    if scores.shape != ids.shape:
        raise ValueError(
            f"predictions has scores of shape {scores.shape} and ids of shape {ids.shape}"
        )
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float32 if scores.dtype == np.float16 else np.float64)
    counts = np.full(len(ids), ids.shape[1])
    return _Ids(ids.ravel().astype(np.int64), counts, scores.ravel(), listed=True)


def _ranked(ids: npt.NDArray[Any]) -> _Ids:
    """Ids [n, k], best first, with scores that fall."""
    scores = np.broadcast_to(-np.arange(ids.shape[1], dtype=np.float32), ids.shape)
    counts = np.full(len(ids), ids.shape[1])
    return _Ids(ids.ravel().astype(np.int64), counts, scores.ravel())


def _rows_of_ids(rows: Sequence[Any], name: str) -> _Ids:
    parts = [as_ids(row, f"{name}[{number}]") for number, row in enumerate(rows)]
    counts = np.array([len(part) for part in parts], np.int64)
    ids = np.concatenate([np.empty(0, np.int64), *parts])
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    return _Ids(ids, counts, (firsts - np.arange(len(ids))).astype(np.float32), listed=True)


def _as_dense_truth(truth: Any) -> Any:
    array = as_array(truth, "truth")
    if array.dtype.kind not in "biuf":
        raise TypeError(f"truth is a {type(truth).__name__}, expected a scipy.sparse CSR matrix")
    if array.ndim != 2:
        raise ValueError(f"truth has shape {array.shape}, expected [n, labels]")
    wrong = (array != 0) & (array != 1)
    if wrong.any():
        cure = "give label ids as lists, one a row"
        if array.dtype.kind == "f":
            cure = "scores are predictions, the first argument"
        raise ValueError(
            f"truth holds {array.flat[np.argmax(wrong)]:.4g}: an array has 0 and 1 for every "
            f"label; {cure}"
        )
    return sp.csr_matrix(array != 0)  # SciPy has no float16


def inverse_propensity(
    train_labels: Csr, a: float = 0.55, b: float = 1.5
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
    TypeError
        `train_labels` is no CSR matrix, or a or b is no number.
    ValueError
        There are fewer than three rows, of which C is negative: rare labels would weigh less. Or
        a or b is not positive and finite, or makes weights beyond float32.
    IndexError
        A column is out of range.
    """
    labels = _as_positives(train_labels, "train_labels")
    if labels.shape[0] < FEWEST_ROWS:
        raise ValueError(f"train_labels has {labels.shape[0]} rows, expected {FEWEST_ROWS} or more")
    return propensity_weights(labels, a, b)


def propensity_weights(train_labels: Csr, a: float, b: float) -> npt.NDArray[np.float32]:
    """`inverse_propensity`, however few rows there are: the formula alone."""
    labels = _as_positives(train_labels, "train_labels")
    a, b = as_number(a, "a"), as_number(b, "b")
    if not a > 0 or not b > 0:
        raise ValueError(f"a and b are {a} and {b}, expected positive numbers")
    check_rows(labels, "train_labels")
    check_columns(labels, "train_labels")
    counts = np.bincount(labels.indices[labels.data != 0], minlength=labels.shape[1])
    with np.errstate(all="ignore"):
        scale = (np.log(labels.shape[0]) - 1) * np.float64(b + 1) ** a
        weights: npt.NDArray[np.float32] = (1 + scale * (counts + b) ** -a).astype(np.float32)
    if not np.isfinite(weights).all():
        raise ValueError(f"a and b are {a} and {b}, of which the weights are beyond float32")
    return weights
