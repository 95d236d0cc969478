"""Balanced clusters of embeddings."""

import math
import os
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame import _core
from ngame.arrays import ProcessGroup, as_count, as_matrix, as_threads, on_gpu
from ngame.dispatch import dispatched, on_host
from ngame.files import atomic_write
from ngame.topk import pair_scores, topk_arrays

if TYPE_CHECKING:
    from ngame.ranks import Ranks

# Processes divide the rows among them along directions that are learnt on a sample of so many, as
# the core does (csrc/cluster.cpp); and send each other so many bytes at a time.
_SAMPLED_ROWS, _SAMPLED_ROWS_PER_DIMENSION = 6144, 12
_SENT_BYTES = 1 << 24
_CLUSTERS_AT_ONCE = 256

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
        rows: npt.NDArray[Any] = self._as_many(as_matrix(x, "x"))
        return _core.coherence(rows, self.order, self.offsets, as_threads(threads))

    def neighbor_share(
        self,
        x: npt.ArrayLike,
        k: int = 10,
        *,
        seed: int = 0,
        threads: int = 0,
        group: ProcessGroup | None = None,
    ) -> float:
        """NN10 where k is 10: how many of a row's k nearest rows lie in its own cluster.

        What batches of whole clusters are made for: near rows that share a batch are each other's
        hard negatives. A row in a cluster of c rows has c - 1 others, so the share is at most
        (c - 1) / k there.

        Parameters
        ----------
        x : float32 or float16 array of shape [n, d]
            What was clustered, n of 2 or more; or a CUDA tensor, searched there. Nearest is by the
            cosine, found by exact search.
        k : int
            Neighbours a row; all others where there are fewer.
        seed : int
            Draws the 2,000 rows that are looked at; all of them where there are no more.
        threads : int
            0 means the CPUs this process may use.
        group : torch.distributed.ProcessGroup, optional
            Every rank calls with a share of x, as in `balanced_clusters`.

        Returns
        -------
        float
            The mean over these rows, from 0 to 1. Drawn rows leave it within about 0.02.

        Raises
        ------
        ValueError
            `x` has another number of rows than the clusters, or one row only.
        """
        rows, first = len(self.order), 0
        own_rows: Any  # an array, or a tensor on a GPU
        if group is None:
            own_rows = self._as_many(dispatched(as_matrix)(x, "x"))
        else:
            from ngame.ranks import Ranks

            ranks, own_rows = Ranks(group), as_matrix(x, "x")
            counts = np.concatenate(ranks.all_arrays(np.array([len(own_rows)])))
            if counts.sum() != rows:
                raise ValueError(f"x has {counts.sum()} rows, the clusters have {rows}")
            first = int(counts[: ranks.rank].sum())
        if rows < 2:
            raise ValueError(f"x has {rows} rows, expected 2 or more")
        k = min(as_count(k, "k"), rows - 1)
        asked = np.arange(rows)
        if rows > _ASKED_ROWS:
            random = np.random.default_rng(as_seed(seed))
            asked = np.sort(random.choice(rows, _ASKED_ROWS, replace=False))
        own = asked[(asked >= first) & (asked < first + len(own_rows))]
        itself = np.stack([np.arange(len(own)), own], axis=1)
        _, found = topk_arrays(
            own_rows[own - first], own_rows, k, drop=itself, threads=threads, group=group
        )
        near = np.asarray(on_host(found))
        assignment = self.assignment
        shared = assignment[near] == assignment[own, None]
        if group is not None:
            shared = np.concatenate(ranks.all_arrays(shared))
        return float(shared.mean())

    def _as_many(self, x: Any) -> Any:
        if len(x) != len(self.order):
            raise ValueError(f"x has {len(x)} rows, the clusters have {len(self.order)}")
        return x

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
    group: ProcessGroup | None = None,
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
    group : torch.distributed.ProcessGroup, optional
        Every rank calls with a share of the rows, whose ids go on where those of the rank before
        end. The upper cuts, as many levels as there are halvings of the ranks, are made together:
        along directions learnt on a sample of all rows, with sides of exact size. Each rank gets
        the rows of its part of the clusters, and divides and refines them by itself. Then the
        clusters are dealt to the ranks once more, along other directions, and refined again, so
        that rows near a cut meet their neighbours beyond it. All ranks get the clusters of all
        rows, which differ from those of one process. A rank holds the vectors of its share of the
        rows twice. `size` and `n_clusters` are of all rows. Arrays on the host only.

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
        `n_clusters` is not in 1 .. n, or not exactly one of them is given; the ranks differ in
        what they ask for.
    ConnectionError
        Another rank of `group` has ended, because of an error of its own, say.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1, 0], [0, 1], [1, 0.1], [0.1, 1]], np.float32)
    >>> sorted(ids.tolist() for ids in balanced_clusters(x, size=2))
    [[0, 2], [1, 3]]
    """
    x = dispatched(as_matrix)(x, "x")
    rounds, max_iter = as_count(refine, "refine", 0), as_count(max_iter, "max_iter")
    rows, ranks = len(x), None
    if group is not None:
        from ngame.ranks import Ranks

        if on_gpu(x):
            raise TypeError("x is on a CUDA device, expected an array on the host with a group")
        ranks = Ranks(group)
        asked = [x.shape[1], size or 0, n_clusters or 0, as_seed(seed) >> 1, max_iter, rounds]
        about = np.stack(ranks.all_arrays(np.array([[rows, *asked]])))[:, 0]
        names = ("columns", "size", "n_clusters", "seed", "max_iter", "refine")
        for name, values in zip(names, about.T[1:], strict=True):
            if (values != values[0]).any():
                raise ValueError(f"the ranks differ in {name}: {values.tolist()}")
        rows = int(about[:, 0].sum())
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
    if ranks is None:
        order = balanced_order(x, offsets, as_seed(seed), max_iter, refine=rounds, threads=threads)
        return Clusters(order, offsets)
    first = int(about[: ranks.rank, 0].sum())
    order = _shared_order(x, first, offsets, ranks, as_seed(seed), max_iter, rounds, threads)
    return Clusters(order, offsets)


def _shared_order(
    x: npt.NDArray[Any],
    first: int,
    offsets: npt.NDArray[np.int64],
    ranks: "Ranks",
    seed: int,
    max_iter: int,
    rounds: int,
    threads: int,
) -> npt.NDArray[np.int32]:
    """The order of `balanced_clusters` over ranks; the rows of x have the ids from `first` on."""
    sizes = np.diff(offsets)
    bounds = np.arange(ranks.size + 1) * len(sizes) // ranks.size  # of each rank's clusters
    homes, cuts = _homes(x, offsets[bounds], ranks, [], seed, max_iter, threads)
    ids, vectors = _exchanged(x, first, homes, ranks)
    means = np.zeros((0, x.shape[1]), np.float32)
    if len(ids):
        own = offsets[bounds[ranks.rank] : bounds[ranks.rank + 1] + 1]
        own, of_rank = own - own[0], as_seed(seed + ranks.rank)
        most = -(-rounds // 2)  # more follow
        local = balanced_order(vectors, own, of_rank, max_iter, refine=most, threads=threads)
        means = _means(vectors, local, own)
        ids = ids[local]
    del vectors
    order = np.concatenate(ranks.all_arrays(ids))
    if rounds == 0:
        return order
    # Rows that the cuts parted from their neighbours could not reach them. So the clusters are
    # dealt once more, along other directions, and refined again.
    dealt, _ = _homes(means, bounds, ranks, cuts, seed, max_iter, threads)
    dealt = np.concatenate(ranks.all_arrays(dealt))
    assignment = np.empty(len(order), np.int32)
    assignment[order] = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    ids, vectors = _exchanged(x, first, dealt[assignment[first : first + len(x)]], ranks)
    if len(ids):
        own = np.append(0, np.cumsum(sizes[dealt == ranks.rank]))
        local = np.argsort(assignment[ids], kind="stable").astype(np.int32)
        ids = ids[_core.refine_clusters(vectors, local, own, rounds, as_threads(threads))]
    homes = np.repeat(dealt, sizes)
    for rank, theirs in enumerate(ranks.all_arrays(ids)):
        order[homes == rank] = theirs
    return order


def _means(
    x: npt.NDArray[Any], order: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Sums of the unit vectors of clusters, none of them empty."""
    sums = np.empty((len(offsets) - 1, x.shape[1]), np.float32)
    for begin in range(0, len(sums), _CLUSTERS_AT_ONCE):
        part = offsets[begin : begin + _CLUSTERS_AT_ONCE + 1]
        rows = _unit(x[order[part[0] : part[-1]]].astype(np.float32))
        sums[begin : begin + len(part) - 1] = np.add.reduceat(rows, part[:-1] - part[0])
    return sums


def _unit(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows scaled to length 1, in place; zero rows stay zero."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x /= np.where(norms > 0, norms, 1)
    return x


def _homes(
    x: npt.NDArray[Any],
    bounds: npt.NDArray[np.int64],
    ranks: "Ranks",
    avoided: list[npt.NDArray[np.float32]],
    seed: int,
    max_iter: int,
    threads: int,
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.float32]]]:
    """The rank that each row of x goes to: bounds[r + 1] - bounds[r] rows of all to rank r.

    Also gives the directions of the cuts, which are at right angles to those to avoid.
    """
    homes = np.zeros(len(x), np.int64)
    cuts = []
    # Ranks begin .. end - 1 have rows to divide among them, whose homes are `begin` so far.
    nodes = [(0, ranks.size)]
    while nodes:
        begin, end = nodes.pop(0)
        middle = (begin + end) // 2
        if middle == begin:
            continue
        rows = np.flatnonzero(homes == begin)
        left, count = (int(bounds[stop] - bounds[begin]) for stop in (middle, end))
        if left == 0:
            homes[rows] = middle
        elif left < count:
            wanted = max(_SAMPLED_ROWS, _SAMPLED_ROWS_PER_DIMENSION * x.shape[1])
            drawn = min(len(rows), -(-wanted * len(rows) // count))
            random = np.random.default_rng([seed, begin, end, ranks.rank])
            own = x[np.sort(random.choice(rows, drawn, replace=False))].astype(np.float32)
            sample = _unit(np.concatenate(ranks.all_arrays(own)))
            cut = _direction(sample, left / count, avoided, max_iter, threads)
            pairs = sp.csr_matrix(
                (np.ones(len(rows), np.int8), rows, [0, len(rows)]), shape=(1, len(x))
            )
            scores = pair_scores(cut[None], x, pairs, threads=threads)
            homes[rows[~_smallest(scores, left, ranks)]] = middle
            cuts.append(cut)
        nodes += [(begin, middle), (middle, end)]
    return homes, cuts


def _direction(
    sample: npt.NDArray[np.float32],
    share: float,
    avoided: list[npt.NDArray[np.float32]],
    max_iter: int,
    threads: int,
) -> npt.NDArray[np.float32]:
    """From the left centre to the right one, with that share of the rows on the left."""
    if avoided:
        basis = np.linalg.qr(np.stack(avoided[: sample.shape[1] // 2]).T)[0]
        sample -= (sample @ basis) @ basis.T
    left = min(max(round(share * len(sample)), 1), len(sample) - 1)
    sizes = np.array([0, left, len(sample)])
    order = balanced_order(sample, sizes, 0, max_iter, refine=0, threads=threads)
    centres = _unit(_means(sample, order, sizes))
    direction: npt.NDArray[np.float32] = centres[1] - centres[0]
    return direction


def _smallest(scores: npt.NDArray[np.float32], count: int, ranks: "Ranks") -> npt.NDArray[np.bool_]:
    """Whether each score is among the `count` smallest of all ranks' scores.

    Ties go to the lower rank, and there to the lower place. The threshold is found digit by digit,
    from counts of each digit's values.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # one zero
    keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    below, threshold = 0, np.uint32(0)
    alive = keys
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        digits = (alive >> np.uint32(shift)) & np.uint32((1 << width) - 1)
        counts = np.bincount(digits, minlength=1 << width)
        ends = below + np.cumsum(np.sum(ranks.all_arrays(counts[None]), axis=(0, 1)))
        digit = int(np.searchsorted(ends, count))
        below = int(ends[digit - 1]) if digit else below
        alive = alive[digits == digit]
        threshold |= np.uint32(digit << shift)
    ties = np.flatnonzero(keys == threshold)
    before = np.concatenate(ranks.all_arrays(np.array([len(ties)])))[: ranks.rank].sum()
    chosen: npt.NDArray[np.bool_] = keys < threshold
    chosen[ties[: max(0, count - below - int(before))]] = True
    return chosen


def _exchanged(
    x: npt.NDArray[Any], first: int, homes: npt.NDArray[np.int64], ranks: "Ranks"
) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    """Ids and vectors of the rows, of all ranks, that go to this one, ids ascending.

    The rows of x have the ids from `first` on.
    """
    parts = [np.flatnonzero(homes == rank).astype(np.int32) for rank in range(ranks.size)]
    received = ranks.exchange([part + np.int32(first) for part in parts])
    ids = np.concatenate(received)
    vectors = np.empty((len(ids), x.shape[1]), x.dtype)
    starts = np.cumsum([0, *map(len, received)])
    row_bytes = x.dtype.itemsize * x.shape[1]
    at_once = max(1, _SENT_BYTES // max(1, row_bytes * ranks.size))
    most = max(len(part) for part in parts)
    rounds = int(np.max(ranks.all_arrays(np.array([-(-most // at_once)]))))
    for start in range(0, rounds * at_once, at_once):
        found = ranks.exchange([x[part[start : start + at_once]] for part in parts])
        for begin, rows in zip(starts + start, found, strict=False):
            vectors[begin : begin + len(rows)] = rows
    return ids, vectors


@dispatched
def balanced_order(
    x: Any, offsets: npt.NDArray[np.int64], seed: int, max_iter: int, *, refine: int, threads: int
) -> npt.NDArray[np.int32]:
    """The order of `balanced_clusters`, whose arguments are checked, with its offsets."""
    return _core.balanced_clusters(x, offsets, seed, max_iter, refine, as_threads(threads))


def as_seed(seed: Any) -> int:
    """Any integer as the 64 bits that the core takes."""
    return as_count(seed, "seed", -math.inf, math.inf) % 2**64
