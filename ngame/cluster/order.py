"""The tree and its refinement, of rows that are in memory, and what the cuts above them need."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ngame import _core
from ngame.arrays import as_count, as_threads
from ngame.dispatch import dispatched

# Cuts above the trees are learnt on a sample of so many rows, as the core's are (csrc/cluster.cpp).
SAMPLED_ROWS, SAMPLED_ROWS_PER_DIMENSION = 6144, 12
_CLUSTERS_AT_ONCE = 64
_READ_BYTES = 1 << 24  # at a time


@dispatched
def balanced_order(
    x: Any, offsets: npt.NDArray[np.int64], seed: int, max_iter: int, *, refine: int, threads: int
) -> npt.NDArray[np.int32]:
    """The order of `balanced_clusters`, whose arguments are checked, with its offsets."""
    return _core.balanced_clusters(x, offsets, seed, max_iter, refine, as_threads(threads))


def as_seed(seed: Any) -> int:
    """Any integer as the 64 bits that the core takes."""
    return as_count(seed, "seed", -math.inf, math.inf) % 2**64


def sums_of(
    x: npt.NDArray[Any], order: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Sums of the unit vectors of clusters, none of them empty."""
    sums = np.empty((len(offsets) - 1, x.shape[1]), np.float32)
    for begin in range(0, len(sums), _CLUSTERS_AT_ONCE):
        part = offsets[begin : begin + _CLUSTERS_AT_ONCE + 1]
        rows = unit(x[order[part[0] : part[-1]]].astype(np.float32))
        sums[begin : begin + len(part) - 1] = np.add.reduceat(rows, part[:-1] - part[0])
    return sums


def unit(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows scaled to length 1, in place; zero rows stay zero."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x /= np.where(norms > 0, norms, 1)
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


def away_from(
    x: npt.NDArray[np.float32], directions: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """What is left of the rows at right angles to directions, or to the first of too many."""
    basis = np.linalg.qr(directions[: x.shape[1] // 2].T)[0]
    left: npt.NDArray[np.float32] = x - (x @ basis) @ basis.T
    return left
