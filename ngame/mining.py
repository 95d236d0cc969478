"""Hard negatives as lists of ids, for training on explicit negatives."""

import math
from collections.abc import Sized
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ngame.arrays import (
    Csr,
    as_count,
    as_matrix,
    as_number,
    as_pairs,
)
from ngame.cluster import as_seed
from ngame.topk import Metric, pair_scores, topk_arrays

# Pairs that are ranked at once. Bounds the memory beside the result and changes nothing else.
_PAIRS_AT_ONCE = 2**22

# Ranks in the window for each negative wanted, where `ranks` has no end.
_WINDOW = 10


def mine_hard_negatives(
    queries: npt.ArrayLike,
    items: npt.ArrayLike,
    positives: Csr,
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
    """Find items that score high for a query and are not among its positives, exactly.

    The items that are not positives of the query are ranked by score. The window `ranks` is cut
    out of this ranking, items whose score is out of bounds are left out, and n of the rest are
    taken.

    Both margins are measured from the lowest-scoring positive: a negative scores below every
    positive of its query. A query without positives has no such bound. A copy of a positive never
    passes a margin, not even a margin of 0. Without a margin it can be a negative, unless
    `positives` lists it too.

    Parameters
    ----------
    queries : float32 or float16 array of shape [q, d]
    items : float32 or float16 array of shape [m, d]
    positives : CSR matrix of shape [q, m], or integer array of shape [p, 2]
        Known positives, which are never taken as negatives: stored entries, whatever their
        values, or (query, item) pairs, which may be a list of tuples. A list of ids for each query
        is an error, as far as it cannot be such pairs. If the queries are the items, add the pairs
        (i, i).
    n : int
        Negatives wanted for each query.
    ranks : (int, int or None)
        The window: from the first rank, inclusive, to the second, exclusive; rank 0 has the
        highest score. Ranks are counted before the bounds on the score apply. None means 10 * n
        ranks. Skip the first ranks where unlabelled positives are likely: they rank highest.
        Coming from the function of this name in sentence-transformers: its `range_min` skips ranks
        of what the bounds leave, and its margins count from the highest positive's score.
    min_score, max_score : float, optional
        Lowest and highest score of a negative.
    margin : float, optional
        A negative scores less than s - margin, where s is the lowest positive's score.
    relative_margin : float, optional
        A negative scores less than s - relative_margin * abs(s). The 0.05 of NV-Retriever
        (arXiv 2407.15831) keeps negatives below 95 % of a positive score.
    sampling : "top" or "random"
        Take the n highest, or draw n uniformly without replacement.
    seed : int
        Of the draw.
    metric : "cosine" or "dot"
    threads : int
        0 means the CPUs this process may use. Results do not depend on it.

    Returns
    -------
    scores : float32 array of shape [q, n]
    ids : int32 array of shape [q, n]
        Best first, ties by lower id. Where fewer than n are left, the tail of a row is -inf and
        -1. Queries are ranked in chunks, so memory beside the result is bounded.

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

    With a progress bar, where there are millions of queries: slices of them, with their rows of a
    CSR matrix. They have the same negatives, unless these are drawn at random.

    >>> import scipy.sparse as sp
    >>> from tqdm import tqdm
    >>> known = sp.eye(4, format="csr")
    >>> starts = tqdm(range(0, 4, 2), disable=None)  # slices of a hundred thousand or so
    >>> parts = [mine_hard_negatives(x[at : at + 2], x, known[at : at + 2], 2) for at in starts]
    >>> scores, ids = map(np.concatenate, zip(*parts))
    >>> ids.tolist()
    [[1, 2], [0, 2], [1, 0], [2, 1]]
    """
    queries, items = as_matrix(queries, "queries"), as_matrix(items, "items")
    _refuse_lists_of_ids(positives, len(queries))
    known = as_pairs(positives, "positives", (len(queries), len(items)))
    n = as_count(n, "n")
    first, stop = _window(ranks, n)
    if sampling not in ("top", "random"):
        raise ValueError(f'sampling is {sampling!r}, expected "top" or "random"')
    floor = np.float64(-np.inf if min_score is None else as_number(min_score, "min_score"))
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
        # Scores fall along a row, so the bounds leave one range of ranks: begin .. end.
        end = ((ranked_ids >= 0) & (ranked >= floor)).sum(1)
        begin = np.full(len(end), first)
        if ceiling is not None:
            begin = np.maximum(begin, (ranked > ceiling[rows, np.newaxis]).sum(1))
        left = np.maximum(end - begin, 0)
        taken = np.broadcast_to(np.arange(n), (len(left), n))
        if sampling == "random":
            taken = np.where(left[:, np.newaxis] > n, _draw(left, rng.random(taken.shape)), taken)
        found = taken < left[:, np.newaxis]
        rank = np.where(found, begin[:, np.newaxis] + taken, 0)
        scores[rows] = np.where(found, np.take_along_axis(ranked, rank, 1), -np.inf)
        ids[rows] = np.where(found, np.take_along_axis(ranked_ids, rank, 1), -1)
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
    """Highest score that a negative of each query may have, float64 [q]; None if unbounded."""
    margins = {"margin": margin, "relative_margin": relative_margin}
    for name, value in margins.items():
        if value is not None and as_number(value, name) < 0:
            raise ValueError(f"{name} is {value}, expected 0 or more")
    given = None if max_score is None else as_number(max_score, "max_score")
    if margin is None and relative_margin is None:
        return None if given is None else np.full(len(queries), given)
    # Scored like the search scores them, so that a copy of a positive has exactly its score.
    scores = pair_scores(queries, items, known, metric=metric, threads=threads)
    lowest = np.zeros(len(queries))
    rows_with = np.flatnonzero(np.diff(known.indptr))
    if len(rows_with):
        lowest[rows_with] = np.minimum.reduceat(scores, known.indptr[rows_with])
    below = np.minimum(lowest - (margin or 0), lowest - (relative_margin or 0) * np.abs(lowest))
    # The next lower number: "at most" it is "less than" `below`.
    below = np.where(np.diff(known.indptr) > 0, np.nextafter(below, -np.inf), np.inf)
    return np.minimum(below, np.inf if given is None else given)


def _refuse_lists_of_ids(positives: Any, queries: int) -> None:
    """ValueError for a list of the ids of each query, which would be taken for pairs."""
    if not isinstance(positives, list | tuple) or len(positives) != queries:
        return
    lengths = {len(row) if isinstance(row, Sized) else -1 for row in positives}
    first = [row[0] for row in positives] if lengths == {2} else []
    if lengths - {2} or any(later < earlier for earlier, later in pairwise(first)):
        raise ValueError(
            "positives is a list with an entry for each query, expected (query, item) pairs in the "
            "order of the queries, or a CSR matrix [queries, items]"
        )


def _draw(left: npt.NDArray[np.int64], uniform: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Draw n of the numbers 0 .. left - 1 for every row, uniformly, ascending: int64 [q, n].

    Floyd's sampling without replacement, a column at a time (Bentley and Floyd, CACM 30(9), 1987).
    Rows with `left` < n are undefined.
    """
    n = uniform.shape[1]
    drawn = np.empty(uniform.shape, np.int64)
    for column in range(n):
        last = left - n + column
        new = (uniform[:, column] * (last + 1)).astype(np.int64)
        taken = (drawn[:, :column] == new[:, np.newaxis]).any(1)
        drawn[:, column] = np.where(taken, last, new)
    drawn.sort(axis=1)
    return drawn


def _window(ranks: Any, n: int) -> tuple[int, int]:
    """First rank and the one after the last."""
    try:
        first, stop = ranks
    except (TypeError, ValueError):
        raise TypeError(f"ranks is {ranks!r}, expected a pair (first, stop)") from None
    first = as_count(first, "first of ranks", 0, math.inf)
    stop = first + _WINDOW * n if stop is None else as_count(stop, "stop of ranks", 1, math.inf)
    if stop - first < n:
        raise ValueError(f"ranks is {ranks!r}, a window of {max(0, stop - first)} ranks, n is {n}")
    return first, stop
