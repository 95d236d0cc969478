"""Hard negatives as explicit lists, for those who train on them rather than on batches."""

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ngame.arrays import as_count, as_matrix, as_pairs
from ngame.cluster import as_seed
from ngame.topk import Metric, pair_scores, topk_arrays

# Pairs that are ranked at once: the memory beside the result is bounded by it, and nothing else
# depends on it.
_PAIRS_AT_ONCE = 2**22

# Ranks to choose from for every negative wanted, where no last rank is given.
_WINDOW = 10


def mine_hard_negatives(
    queries: Any,
    items: Any,
    positives: Any,
    n: int,
    *,
    ranks: tuple[int, int | None] = (0, None),
    min_score: float | None = None,
    max_score: float | None = None,
    margin: float | None = None,
    relative_margin: float | None = None,
    sampling: Literal["top", "random"] = "top",
    seed: int = 0,
    metric: Metric = "cosine",
    threads: int = 0,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Find for every query items that score high and are not among its positives, exactly.

    The items that are not positives of the query are ranked by their score. Of those in the window
    `ranks`, the ones beyond a bound on the score are left out, and n of the rest are taken.

    Both margins are measured from the positive that scores lowest, so that a negative lies below
    every positive of its query. A query without positives has no such bound. An item with the very
    vector of a positive lies below it by no margin, not even by 0; without a margin it is a
    negative like others unless `positives` has it too.

    Parameters
    ----------
    queries : float32 or float16 array of shape [q, d]
    items : float32 or float16 array of shape [m, d]
    positives : CSR matrix of shape [q, m], or integer array of shape [p, 2]
        Known positives, none of which is ever a negative: stored entries, whatever their values,
        or (query, item) pairs. Where the queries are items themselves, put the pairs (i, i) here.
    n : int
        Negatives wanted for each query.
    ranks : (int, int or None)
        The window: ranks from the first number, inclusive, to the second, exclusive; 0 is the
        highest score. Ranks are counted before any bound acts. None stands for 10 * n ranks. To
        skip the first ranks is to skip those that are likeliest to be positives nobody labelled.
    min_score, max_score : float, optional
        Least and greatest score of a negative.
    margin : float, optional
        A negative scores less than the lowest positive's score s less `margin`.
    relative_margin : float, optional
        A negative scores less than s - relative_margin * abs(s). The 0.05 of NV-Retriever
        (arXiv 2407.15831) keeps negatives below 95 % of a positive score.
    sampling : "top" or "random"
        Take the n highest, or any n alike, drawn without replacement.
    seed : int
        Governs the drawing.
    metric : "cosine" or "dot"
    threads : int
        0 means the CPUs this process may use. Nothing depends on it.

    Returns
    -------
    scores : float32 array of shape [q, n]
    ids : int32 array of shape [q, n]
        Best first, ties by lower id. Where fewer than n are left, the tail of a row is -inf and
        -1. Only so many queries are ranked at once that memory beside the result is bounded.

    Raises
    ------
    TypeError
        An argument is not of the type above.
    ValueError
        Shapes do not agree, the window holds fewer than n ranks, a margin is negative, a bound is
        not finite, `sampling` or `metric` is unknown, or a row has NaN or infinity.
    IndexError
        A pair of `positives` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1, 0], [0.9, 0.1], [0.6, 0.4], [0, 1]], np.float32)
    >>> positives = [(0, 0), (1, 1)]
    >>> mine_hard_negatives(x[:2], x, positives, 2)[1].tolist()
    [[1, 2], [0, 2]]
    >>> mine_hard_negatives(x[:2], x, positives, 2, margin=0.1)[1].tolist()
    [[2, 3], [2, 3]]
    """
    queries, items = as_matrix(queries, "queries"), as_matrix(items, "items")
    known = as_pairs(positives, "positives", (len(queries), len(items)))
    n = as_count(n, "n")
    first, stop = _window(ranks, n)
    if sampling not in ("top", "random"):
        raise ValueError(f'sampling is {sampling!r}, expected "top" or "random"')
    floor = np.float64(-np.inf if min_score is None else _as_float(min_score, "min_score"))
    ceiling = _ceiling(queries, items, known, margin, relative_margin, max_score, metric, threads)
    rng = np.random.default_rng(as_seed(seed))

    scores = np.full((len(queries), n), -np.inf, np.float32)
    ids = np.full((len(queries), n), -1, np.int32)
    if not len(queries) or first >= len(items):
        return scores, ids
    # Without a ceiling the n highest are the first n of the window.
    depth = stop if sampling == "random" or ceiling is not None else first + n
    depth = min(depth, len(items))
    at_once = max(1, _PAIRS_AT_ONCE // depth)
    for start in range(0, len(queries), at_once):
        rows = slice(start, start + at_once)
        ranked, ranked_ids = topk_arrays(
            queries[rows], items, depth, metric=metric, drop=known[rows], threads=threads
        )
        # Scores fall along a row: what the bounds leave of it is one stretch, begin .. end.
        end = ((ranked_ids >= 0) & (ranked >= floor)).sum(1)
        begin = np.full(len(end), first)
        if ceiling is not None:
            begin = np.maximum(begin, (ranked > ceiling[rows, np.newaxis]).sum(1))
        left = np.maximum(end - begin, 0)
        taken = np.broadcast_to(np.arange(n), (len(left), n))
        if sampling == "random":
            taken = np.where(left[:, np.newaxis] > n, _draw(left, rng.random(taken.shape)), taken)
        there = taken < left[:, np.newaxis]
        at = np.where(there, begin[:, np.newaxis] + taken, 0)
        scores[rows] = np.where(there, np.take_along_axis(ranked, at, 1), -np.inf)
        ids[rows] = np.where(there, np.take_along_axis(ranked_ids, at, 1), -1)
    return scores, ids


def _ceiling(
    queries: npt.NDArray[Any],
    items: npt.NDArray[Any],
    known: Any,
    margin: float | None,
    relative_margin: float | None,
    max_score: float | None,
    metric: Metric,
    threads: int,
) -> npt.NDArray[np.float64] | None:
    """Greatest score of a negative of each query, float64 [q]; None if nothing bounds it."""
    margins = {"margin": margin, "relative_margin": relative_margin}
    for name, value in margins.items():
        if value is not None and _as_float(value, name) < 0:
            raise ValueError(f"{name} is {value}, expected 0 or more")
    given = None if max_score is None else _as_float(max_score, "max_score")
    if margin is None and relative_margin is None:
        return None if given is None else np.full(len(queries), given)
    # Scored as the search scores them: so an item that is a copy of a positive has its score to the
    # last bit, and no margin takes it for lower.
    scores = pair_scores(queries, items, known, metric=metric, threads=threads)
    lowest = np.zeros(len(queries))
    rows_with = np.flatnonzero(np.diff(known.indptr))
    if len(rows_with):
        lowest[rows_with] = np.minimum.reduceat(scores, known.indptr[rows_with])
    below = np.minimum(lowest - (margin or 0), lowest - (relative_margin or 0) * np.abs(lowest))
    # "Less than" as "at most".
    below = np.where(np.diff(known.indptr) > 0, np.nextafter(below, -np.inf), np.inf)
    return np.minimum(below, np.inf if given is None else given)


def _draw(left: npt.NDArray[np.int64], uniform: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Draw n of the numbers 0 .. left - 1 for every row, all alike, ascending: int64 [q, n].

    Floyd's sampling without replacement, a column at a time (Bentley and Floyd, CACM 30(9), 1987).
    Rows with less than n to draw from come out as nonsense.
    """
    drawn = np.empty(uniform.shape, np.int64)
    for at in range(uniform.shape[1]):
        last = left - uniform.shape[1] + at
        new = (uniform[:, at] * (last + 1)).astype(np.int64)
        taken = (drawn[:, :at] == new[:, np.newaxis]).any(1)
        drawn[:, at] = np.where(taken, last, new)
    drawn.sort(axis=1)
    return drawn


def _window(ranks: Any, n: int) -> tuple[int, int]:
    """First rank and the one after the last."""
    try:
        first, stop = ranks
    except (TypeError, ValueError):
        raise TypeError(f"ranks is {ranks!r}, expected a pair (first, stop)") from None
    first = as_count(first, "first of ranks", 0)
    stop = first + _WINDOW * n if stop is None else as_count(stop, "stop of ranks")
    if stop - first < n:
        raise ValueError(f"ranks is {ranks!r}, which holds {max(0, stop - first)} ranks, n is {n}")
    return first, stop


def _as_float(value: Any, name: str) -> float:
    if not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a float")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}, expected a finite number")
    return float(value)
