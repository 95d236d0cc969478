"""The tree and its refinement, of rows that are in memory, and what the cuts above them need."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame import _core
from ngame.arrays import as_count, as_threads
from ngame.dispatch import dispatched
from ngame.topk import pair_scores

# Cuts above the trees are learnt on a sample of so many rows, as the core's are (csrc/cluster.cpp).
SAMPLED_ROWS, SAMPLED_ROWS_PER_DIMENSION = 6144, 12
_READ_BYTES = 1 << 24  # at a time

# Rows that the cuts part from their neighbours cannot reach them, so rows are dealt to parts again,
# whole clusters together, along other directions: so many times in all at most, and no more after a
# time that did not make the clusters tighter by this. It takes as long as three rounds of
# refinement, which end where one adds half a percent.
MOST_DEALS, _LEAST_PROGRESS = 6, 1.015


@dispatched
def balanced_order(
    x: Any, offsets: npt.NDArray[np.int64], seed: int, max_iter: int, *, refine: int, threads: int
) -> npt.NDArray[np.int32]:
    """The order of `balanced_clusters`, whose arguments are checked, with its offsets."""
    return _core.balanced_clusters(x, offsets, seed, max_iter, refine, as_threads(threads))


def as_seed(seed: Any) -> int:
    """Any integer as the 64 bits that the core takes."""
    return as_count(seed, "seed", -math.inf, math.inf) % 2**64


def unit(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows scaled to length 1, in place; zero rows stay zero."""
    squares = np.einsum("ij,ij->i", x, x)
    # Squares of extreme values are no floats.
    extreme = ~((squares > 1e-30) & (squares < 1e30))
    if extreme.any():
        rows = x[extreme]
        largest = np.abs(rows).max(axis=1, initial=0, keepdims=True)
        rows /= np.where(largest > 0, largest, 1)
        x[extreme] = rows
        squares[extreme] = np.einsum("ij,ij->i", rows, rows)
    x /= np.sqrt(np.where(squares > 0, squares, 1))[:, None]
    return x


def pieces(x: npt.NDArray[Any]) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[Any]]]:
    """All rows, with their ids, as many at a time as take `_READ_BYTES`."""
    at_once = max(1, _READ_BYTES // max(1, x.itemsize * x.shape[1]))
    for begin in range(0, len(x), at_once):
        rows = np.asarray(x[begin : begin + at_once])
        yield np.arange(begin, begin + len(rows), dtype=np.int32), rows


def first_not_finite(x: npt.NDArray[Any]) -> int | None:
    """The first row with NaN or infinity; None if all values are finite."""
    for ids, rows in pieces(x):
        finite = np.isfinite(rows)
        if not finite.all():
            return int(ids[np.argmin(finite.all(axis=1))])
    return None


def learnt_cuts(
    sample: npt.NDArray[np.float32],
    ends: npt.NDArray[np.int64],
    seed: int,
    max_iter: int,
    threads: int,
    avoided: Sequence[npt.NDArray[np.float32]] = (),
) -> tuple[list[list[tuple[int, int, int]]], npt.NDArray[np.float32]]:
    """A tree of cuts that deal rows to parts.

    Parameters
    ----------
    sample : unit vectors of some of the rows, which are changed
    ends : where each part's share of the sample begins, and where that of the last ends
    avoided : of each earlier tree its directions
        The cuts are at right angles to the first of each, to half as many as there are dimensions.

    Returns
    -------
    levels : of each level of the tree its cuts, (begin, middle, end) each
        It deals the rows of parts begin .. end - 1: those of lower scores to parts before middle.
    directions : float32 [cuts, dim], level after level
        From the mean of the rows on the left to that of the others.
    """
    if avoided:
        of_each = sample.shape[1] // 2 // len(avoided)
        basis = np.linalg.qr(np.concatenate([cuts[:of_each] for cuts in avoided]).T)[0]
        sample -= (sample @ basis) @ basis.T
    order = balanced_order(sample, ends, seed, max_iter, refine=0, threads=threads)
    sums = _core.cluster_sums(sample, order, ends, as_threads(threads))
    levels, nodes = [], [(0, len(ends) - 1)]
    while level := [(begin, (begin + end) // 2, end) for begin, end in nodes if end - begin > 1]:
        levels.append(level)
        nodes = [half for begin, middle, end in level for half in ((begin, middle), (middle, end))]
    every = [cut for level in levels for cut in level]
    left = unit(np.stack([sums[begin:middle].sum(axis=0) for begin, middle, _ in every]))
    right = unit(np.stack([sums[middle:end].sum(axis=0) for _, middle, end in every]))
    return levels, right - left


def squared_means(sums: npt.NDArray[np.float32], sizes: npt.NDArray[np.int64]) -> float:
    """Sum over clusters of the squared norms of their means, of the sums and sizes of each."""
    return float((np.einsum("ij,ij->i", sums, sums) / sizes.astype(np.float64) ** 2).sum())


def is_progress(tightness: list[float]) -> bool:
    """Whether rows are to be dealt again, by how tight the clusters were after each time so far."""
    return len(tightness) == 1 or tightness[-1] >= _LEAST_PROGRESS * tightness[-2]


def cut_scores(
    x: npt.NDArray[Any], directions: npt.NDArray[np.float32], threads: int
) -> npt.NDArray[np.float32]:
    """Cosine of each row with the direction of each cut, float32 [rows, cuts].

    By the core: the same bits for any number of threads, float16 read as such.
    """
    shape = len(x), len(directions)
    every = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).ravel()
    ends = np.arange(shape[0] + 1, dtype=np.int32) * shape[1]
    pairs = sp.csr_matrix((np.ones(len(every), np.int8), every, ends), shape=shape)
    return pair_scores(x, directions, pairs, threads=threads).reshape(shape)
