"""Balanced clusters of embeddings."""

import math
import os
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ngame import _core
from ngame.arrays import as_count, as_matrix, as_threads
from ngame.dispatch import dispatched
from ngame.files import atomic_write
from ngame.topk import topk_arrays

# Rows whose neighbours `Clusters.neighbor_share` looks at.
_ASKED_ROWS = 2000


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """A division of n rows into k clusters.

    Attributes
    ----------
    order : int32 array of shape [n]
        The row ids, cluster after cluster.
    offsets : int64 array of shape [k + 1]
        Cluster c is ``order[offsets[c]:offsets[c + 1]]``.

    Raises
    ------
    ValueError
        `order` is not a permutation of 0 .. n - 1, or `offsets` does not ascend from 0 to n.
    """

    order: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        order = np.ascontiguousarray(self.order, np.int32)
        offsets = np.ascontiguousarray(self.offsets, np.int64)
        if order.ndim != 1 or offsets.ndim != 1:
            raise ValueError(
                f"order and offsets have shapes {order.shape} and {offsets.shape}, "
                "expected one dimension each"
            )
        ends = offsets[:1].tolist() + offsets[-1:].tolist()
        if ends != [0, len(order)] or (np.diff(offsets) < 0).any():
            raise ValueError(f"offsets does not ascend from 0 to the {len(order)} rows of order")
        seen = np.zeros(len(order), np.bool_)
        inside = order[(order >= 0) & (order < len(order))]
        seen[inside] = True
        if not seen.all():
            raise ValueError(f"order has not every row once: row {int(np.argmin(seen))} is missing")
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "offsets", offsets)

    def __len__(self) -> int:
        """Number of clusters."""
        return len(self.offsets) - 1

    def __getitem__(self, cluster: int) -> npt.NDArray[np.int32]:
        """The row ids of one cluster."""
        if not -len(self) <= cluster < len(self):
            raise IndexError(f"cluster {cluster} is out of range for {len(self)} clusters")
        cluster %= len(self)
        return self.order[self.offsets[cluster] : self.offsets[cluster + 1]]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Clusters):
            return NotImplemented
        return np.array_equal(self.order, other.order) and np.array_equal(
            self.offsets, other.offsets
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def assignment(self) -> npt.NDArray[np.int32]:
        """The cluster of every row, int32 [n]."""
        assignment = np.empty(len(self.order), np.int32)
        assignment[self.order] = np.repeat(
            np.arange(len(self), dtype=np.int32), np.diff(self.offsets)
        )
        return assignment

    def coherence(self, x: npt.ArrayLike, *, threads: int = 0) -> float:
        """How tight the clusters are: the mean squared norm of the means of their unit vectors.

        Parameters
        ----------
        x : float32 or float16 array of shape [n, d]
            What was clustered. Rows are scaled to unit length here; zero rows stay zero.
        threads : int
            0 means the CPUs this process may use.

        Returns
        -------
        float
            1 where all the rows of each cluster point one way, near 0 where they point anywhere.
        """
        x = self._rows_of(x)
        return _core.coherence(x, self.order, self.offsets, as_threads(threads))

    def neighbor_share(
        self, x: npt.ArrayLike, k: int = 10, *, seed: int = 0, threads: int = 0
    ) -> float:
        """NN10 where k is 10: how many of a row's k nearest rows lie in its own cluster.

        What batches of whole clusters are made for: near rows that share a batch are each other's
        hard negatives. A row in a cluster of c rows has c - 1 others, so the share is at most
        (c - 1) / k there.

        Parameters
        ----------
        x : float32 or float16 array of shape [n, d]
            What was clustered, n of 2 or more. Nearest is by the cosine, found by exact search.
        k : int
            Neighbours a row; all others where there are fewer.
        seed : int
            Draws the 2,000 rows that are looked at; all of them where there are no more.
        threads : int
            0 means the CPUs this process may use.

        Returns
        -------
        float
            The mean over these rows, from 0 to 1. Drawn rows leave it within about 0.02.

        Raises
        ------
        ValueError
            `x` has another number of rows than the clusters, or one row only.
        """
        x = self._rows_of(x)
        rows = len(x)
        if rows < 2:
            raise ValueError(f"x has {rows} rows, expected 2 or more")
        k = min(as_count(k, "k"), rows - 1)
        asked = np.arange(rows)
        if rows > _ASKED_ROWS:
            random = np.random.default_rng(as_seed(seed))
            asked = np.sort(random.choice(rows, _ASKED_ROWS, replace=False))
        itself = np.stack([np.arange(len(asked)), asked], axis=1)
        near = topk_arrays(x[asked], x, k, drop=itself, threads=threads)[1]
        assignment = self.assignment
        return float((assignment[near] == assignment[asked, None]).mean())

    def _rows_of(self, x: npt.ArrayLike) -> npt.NDArray[Any]:
        matrix: npt.NDArray[Any] = as_matrix(x, "x")
        if len(matrix) != len(self.order):
            raise ValueError(f"x has {len(matrix)} rows, the clusters have {len(self.order)}")
        return matrix

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` file, aside and then in place of `path`."""
        with atomic_write(path) as aside, open(aside, "wb") as file:
            np.savez(file, order=self.order, offsets=self.offsets)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Clusters":
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            The file is no such file.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                return cls(arrays["order"], arrays["offsets"])
        # One array saved by itself comes back as an array, which is no context: a TypeError.
        except (KeyError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{os.fspath(path)} does not hold clusters: {error}") from error


def balanced_clusters(
    x: npt.ArrayLike,
    *,
    size: int | None = None,
    n_clusters: int | None = None,
    seed: int = 0,
    max_iter: int = 20,
    refine: int = 5,
    threads: int = 0,
) -> Clusters:
    """Divide rows into clusters of exact sizes: a tree of balanced 2-means, then refinement.

    The tree is the clustering of NGAME (Dahiya et al., WSDM 2023) with sizes that are exact: a
    node of k clusters is split into floor(k / 2) and ceil(k / 2) of them, with the rows that these
    will hold. Within a split, rows are assigned by their product with the difference of the two
    centres; each side takes as many of them as it must, ties by lower id. Large nodes are divided
    several levels in one pass over `x`, along directions learnt on a sample of their rows; small
    ones on a bfloat16 copy of theirs.

    A cut never looks back, so the tree leaves many near neighbours apart. Each round of refinement
    takes, for every row, the 64 clusters whose means are nearest to the mean of its own, and
    scores them by the cosine of the row and the mean; its own cluster's mean is taken without the
    row. Rows and clusters are then matched stably (Gale and Shapley, 1962): a row asks its 8 best
    clusters from the best down; a cluster keeps the best of the rows that ask, as many as it has
    places. A row that all 8 refuse gets a place that is left, near its old cluster in the order.

    Beside `x` the call takes some 80 bytes a row, 4 bytes a cluster and column, and 4 to
    40 megabytes a thread, as the rows are wide.

    Parameters
    ----------
    x : float32 or float16 array of shape [n, d]
        Anything `numpy.asarray` understands without a copy (np.memmap, CPU tensors). The geometry
        is the cosine; rows are scaled on the fly and `x` is not changed. Zero rows are allowed.
        A mapped file may be larger than memory: then it is read from end to end for each few
        levels and twice for each round, and its rows one by one where they are copied, with many
        requests at a time. Float16 is read as such. An array is copied only where its rows are
        not contiguous. A CUDA tensor, bfloat16 too, is clustered on its device; only the ids come
        to the host. The tree's clusters differ from those of the CPU, and so do the refined.
    size : int
        Every cluster has exactly `size` rows, but for the last, which takes the remainder.
    n_clusters : int
        Number of clusters; their sizes differ by at most one. Give either this or `size`.
    seed : int
        Any integer; the same seed gives the same clusters for any number of threads.
    max_iter : int
        Most rounds of each 2-means; it stops before when no row changes sides.
    refine : int
        Most rounds of refinement; 0 gives the tree alone. They end before when a round adds less
        than half a percent to the coherence. Five rounds take about three times as long as the
        tree and double the share of near neighbours in one cluster on trained embeddings
        (`Clusters.neighbor_share`); further rounds gain less and less.
    threads : int
        0 means the CPUs this process may use.

    Returns
    -------
    Clusters
        Ids ascend within each cluster; clusters that are near in the tree are near in the order.

    Raises
    ------
    TypeError
        `x` is neither float32 nor float16.
    ValueError
        `x` has no rows, or has NaN or infinity (the first such row is named); `size` or
        `n_clusters` is not in 1 .. n, or not exactly one of them is given.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1, 0], [0, 1], [1, 0.1], [0.1, 1]], np.float32)
    >>> sorted(ids.tolist() for ids in balanced_clusters(x, size=2))
    [[0, 2], [1, 3]]
    """
    x = dispatched(as_matrix)(x, "x")
    rows = len(x)
    if rows == 0:
        raise ValueError("x has no rows")
    if rows > np.iinfo(np.int32).max:
        raise ValueError(f"x has {rows} rows, at most 2**31 - 1 are possible")
    if (size is None) == (n_clusters is None):
        raise ValueError("exactly one of size and n_clusters must be given")
    name = "n_clusters" if size is None else "size"
    count = as_count(n_clusters if size is None else size, name)
    if count > rows:
        raise ValueError(f"{name} is {count}, x has only {rows} rows")
    if size is None:
        offsets = np.arange(count + 1, dtype=np.int64) * rows // count
    else:
        offsets = np.append(np.arange(0, rows, count, dtype=np.int64), rows)
    rounds, max_iter = as_count(refine, "refine", 0), as_count(max_iter, "max_iter")
    order = balanced_order(x, offsets, as_seed(seed), max_iter, refine=rounds, threads=threads)
    return Clusters(order, offsets)


@dispatched
def balanced_order(
    x: Any, offsets: npt.NDArray[np.int64], seed: int, max_iter: int, *, refine: int, threads: int
) -> npt.NDArray[np.int32]:
    """The order of `balanced_clusters`, whose arguments are checked, with its offsets."""
    return _core.balanced_clusters(x, offsets, seed, max_iter, refine, as_threads(threads))


def as_seed(seed: Any) -> int:
    """Any integer as the 64 bits that the core takes."""
    return as_count(seed, "seed", -math.inf, math.inf) % 2**64
