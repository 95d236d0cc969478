"""Balanced clusters of embeddings."""

import glob
import math
import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame import _core
from ngame.arrays import ProcessGroup, as_count, as_matrix, as_threads, on_gpu
from ngame.dispatch import dispatched, on_host
from ngame.files import atomic_write
from ngame.parts import Parts
from ngame.topk import pair_scores, topk_arrays

if TYPE_CHECKING:
    from ngame.ranks import Ranks

# Processes divide the rows among them along directions that are learnt on a sample of so many, as
# the core does (csrc/cluster.cpp); they send each other so many bytes at a time; and a process
# clusters its part of the rows in up to so many portions, of which it holds one beside its share.
_SAMPLED_ROWS, _SAMPLED_ROWS_PER_DIMENSION = 6144, 12
_SENT_BYTES = 1 << 21
_MOST_PORTIONS, _LEAST_PORTION = 8, 1 << 22  # the latter in bytes
_CLUSTERS_AT_ONCE = 64

# What the core takes beside the rows, in bytes a row; and what is kept of a row while the parts of
# a matrix larger than memory are clustered one by one. Parts differ in size by some percent, as
# they are cut where a sample says.
_WORKING_BYTES, _KEPT_BYTES = 84, 8
_UNEVEN = 1.25
_MOST_PARTS = 256
_READ_BYTES = 1 << 24  # at a time
# Equal rows are parted too: products with a cut differ by up to this, as the ids say.
_JITTER = 1e-5

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

    def save(self, path: str | os.PathLike[str], part: int = 0, parts: int = 1) -> None:
        """Write an ``.npz`` file, aside and then in place of `path`.

        With `parts`, such as one for each of several processes, only that part of the clusters:
        FILE.npz is then FILE-00000-of-00002.npz and so on, and `load` reads all of them.
        """
        first, end = part * len(self) // parts, (part + 1) * len(self) // parts
        offsets = self.offsets[first : end + 1]
        order = self.order[offsets[0] : offsets[-1]]
        if parts > 1:
            path = Path(path)
            path = path.with_name(f"{path.stem}-{part:05}-of-{parts:05}{path.suffix}")
        with atomic_write(path) as aside, open(aside, "wb") as file:
            np.savez(file, order=order, offsets=offsets)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Clusters":
        """Read what `save` wrote, in one file or in parts.

        Raises
        ------
        ValueError
            The file is no such file; or there are parts of several divisions.
        FileNotFoundError
            There is no such file, and no part of it; or a part is missing.
        """
        path = Path(path)
        paths = [path]
        if not path.exists():
            found = path.parent.glob(f"{glob.escape(path.stem)}-*-of-*{path.suffix}")
            counts = {file.stem.rpartition("-of-")[2] for file in found}
            if len(counts) > 1:
                raise ValueError(f"there are parts of {path} of {sorted(counts)} files")
            for count in counts:
                names = [f"{path.stem}-{part:05}-of-{count}" for part in range(int(count))]
                paths = [path.with_name(name + path.suffix) for name in names]
        orders, offsets = [], [np.zeros(1, np.int64)]
        try:
            for path in paths:
                with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                    orders.append(arrays["order"])
                    offsets.append(arrays["offsets"][1:])
            return cls(np.concatenate(orders), np.concatenate(offsets))
        # One array saved by itself comes back as an array, which is no context: a TypeError.
        except (KeyError, IndexError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
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
    memory: int | None = None,
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
    memory : int, optional
        Bytes that the call may take, counting all rows, mapped or not, and some tens of megabytes
        less than the process has. If the rows and what is said above do not fit, they are clustered
        in parts, and the clusters are others than those of one piece: each row goes to a part
        by cuts learnt on a sample; the parts are written to temporary files, then clustered and
        refined one by one. The clusters are dealt to parts once more, along other cuts, and refined
        again. That reads `x` twice, from end to end, and writes and reads the temporary files
        twice. They are as large as `x`, in the folder that the environment variable TMPDIR names,
        which must be on a disk. 8 bytes a row stay in memory throughout.
    group : torch.distributed.ProcessGroup, optional
        Every rank calls with a share of the rows, whose ids go on where those of the rank before
        end. The upper cuts, into eight parts a rank, are made together: along directions learnt
        on a sample of all rows, with sides of exact size. Each rank gets the rows of its parts of
        the clusters, one part at a time, and divides and refines them by itself. Then the clusters
        are dealt to the parts once more, along other directions, and refined again, so that rows
        near a cut meet their neighbours beyond it. All ranks get the clusters of all rows, which
        differ from those of one process. A rank holds the vectors of its share of the rows, and
        an eighth as many more. `size` and `n_clusters` are of all rows. Arrays on the host only.

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
        `n_clusters` is not in 1 .. n, or not exactly one of them is given; `memory` does
        not suffice, or is given with a `group`; the ranks differ in what they ask for.
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
    if memory is not None:
        memory = as_count(memory, "memory")
        if group is not None:
            raise ValueError("memory is given with a group: each rank holds its share in memory")
        if on_gpu(x):
            raise TypeError("x is on a CUDA device, expected an array on the host with memory")
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
    if memory is not None:
        parts = _parts_within(memory, x, len(offsets) - 1)
        if parts > 1:
            order = _parted_order(x, offsets, parts, as_seed(seed), max_iter, rounds, threads)
            return Clusters(order, offsets)
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
    """The order of `balanced_clusters` over ranks; the rows of x have the ids from `first` on.

    A rank clusters its part of the rows in portions, so that it holds few more rows than its x.
    """
    sizes = np.diff(offsets)
    share_bytes = int(offsets[-1]) * x.shape[1] * x.itemsize // ranks.size
    portions = min(max(share_bytes // _LEAST_PORTION, 1), _MOST_PORTIONS)
    parts = np.arange(ranks.size * portions).reshape(ranks.size, portions)  # of each rank
    bounds = np.arange(parts.size + 1) * len(sizes) // parts.size  # of each part's clusters
    room = np.empty((np.diff(bounds).max() * sizes.max(), x.shape[1]), x.dtype)
    homes, cuts = _homes(x, offsets[bounds], ranks, [], seed, max_iter, threads)
    found, means = [], []
    for of_rank in parts.T:
        part = int(of_rank[ranks.rank])
        ids, vectors = _exchanged(x, first, homes, of_rank, ranks, room)
        if len(ids):
            own = offsets[bounds[part] : bounds[part + 1] + 1] - offsets[bounds[part]]
            most = -(-rounds // 2)  # more follow
            of_part = as_seed(seed + part)
            local = balanced_order(vectors, own, of_part, max_iter, refine=most, threads=threads)
            means.append(_means(vectors, local, own))
            ids = ids[local]
        found.append(ids)
    order = np.concatenate(ranks.all_arrays(np.concatenate(found)))
    if rounds == 0:
        return order
    # Rows that the cuts parted from their neighbours could not reach them. So the clusters are
    # dealt once more, along other directions, and refined again.
    sums = np.concatenate([*means, np.zeros((0, x.shape[1]), np.float32)])
    dealt, _ = _homes(sums, bounds, ranks, cuts, seed, max_iter, threads)
    del means, sums
    dealt = np.concatenate(ranks.all_arrays(dealt))
    assignment = np.empty(len(order), np.int32)
    assignment[order] = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    homes = dealt[assignment[first : first + len(x)]]
    found = []
    for of_rank in parts.T:
        part = int(of_rank[ranks.rank])
        ids, vectors = _exchanged(x, first, homes, of_rank, ranks, room)
        if len(ids):
            own = np.append(0, np.cumsum(sizes[dealt == part]))
            local = np.argsort(assignment[ids], kind="stable").astype(np.int32)
            ids = ids[_core.refine_clusters(vectors, local, own, rounds, as_threads(threads))]
        found.append(ids)
    places = np.argsort(np.repeat(dealt, sizes), kind="stable")
    order[places] = np.concatenate(ranks.all_arrays(np.concatenate(found)))
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
) -> tuple[npt.NDArray[np.int32], list[npt.NDArray[np.float32]]]:
    """The part that each row of x goes to: bounds[p + 1] - bounds[p] rows of all to part p.

    Also gives the directions of the cuts, which are at right angles to those to avoid.
    """
    homes = np.zeros(len(x), np.int32)
    cuts = []
    # Parts begin .. end - 1 have rows to divide among them, whose homes are `begin` so far.
    nodes = [(0, len(bounds) - 1)]
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
            # Of one cut only: the core's lowest cuts have an eighth of a sample each.
            wanted = max(_SAMPLED_ROWS, _SAMPLED_ROWS_PER_DIMENSION * x.shape[1]) // 4
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
        counts = ranks.sum_counts(np.bincount(digits, minlength=1 << width))
        ends = below + np.cumsum(counts)
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
    x: npt.NDArray[Any],
    first: int,
    homes: npt.NDArray[np.int32],
    of_rank: npt.NDArray[np.integer],
    ranks: "Ranks",
    room: npt.NDArray[Any],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    """Ids and vectors of the rows, of all ranks, that this one gets, ids ascending.

    The rows of x have the ids from `first` on; those whose home is of_rank[r] go to rank r.
    The vectors are in `room`.
    """
    parts = [np.flatnonzero(homes == part).astype(np.int32) for part in of_rank]
    received = ranks.exchange([part + np.int32(first) for part in parts])
    ids = np.concatenate(received)
    vectors = room[: len(ids)]
    starts = np.cumsum([0, *map(len, received)])
    row_bytes = x.dtype.itemsize * x.shape[1]
    at_once = max(1, _SENT_BYTES // max(1, row_bytes * ranks.size))
    rounds = ranks.most(max(-(-len(part) // at_once) for part in parts))
    for start in range(0, rounds * at_once, at_once):
        found = ranks.exchange([x[part[start : start + at_once]] for part in parts])
        for begin, rows in zip(starts + start, found, strict=False):
            vectors[begin : begin + len(rows)] = rows
    return ids, vectors


def _parts_within(memory: int, x: npt.NDArray[Any], clusters: int) -> int:
    """The number of parts that x is to be clustered in; 1 where all of it fits."""
    rows, dim = x.shape
    needed: int = rows * (dim * x.itemsize + _WORKING_BYTES) + 4 * dim * clusters
    if needed <= memory:
        return 1
    least = math.ceil(_KEPT_BYTES * rows + _UNEVEN * needed / _MOST_PARTS)
    if memory < least:
        raise ValueError(f"memory is {memory} bytes, x of shape {x.shape} takes {least} or more")
    parts: int = math.ceil(_UNEVEN * needed / (memory - _KEPT_BYTES * rows))
    return min(parts, clusters)


def _parted_order(
    x: npt.NDArray[Any],
    offsets: npt.NDArray[np.int64],
    parts: int,
    seed: int,
    max_iter: int,
    rounds: int,
    threads: int,
) -> npt.NDArray[np.int32]:
    """The order of `balanced_clusters` by parts, of which one at a time is in memory."""
    sizes = np.diff(offsets)
    order = np.empty(len(x), np.int32)
    with tempfile.TemporaryDirectory(prefix="ngame-") as folder:
        files = Parts(folder, x.shape[1], x.dtype)
        cuts = _Cuts(x, parts, None, seed, max_iter, threads)
        for ids, rows in _pieces(x):
            bad = ~np.isfinite(rows).all(axis=1)
            if bad.any():
                raise ValueError(f"x has NaN or infinity in row {ids[int(np.argmax(bad))]}")
            files.append(cuts.homes(rows, ids, threads), ids, rows)
        means = Path(folder) / "means"
        first = 0  # cluster of the part
        for part in range(parts):
            ids, vectors = files.take(part)
            # Whole clusters. The rows that are left over go to the next part, which is near.
            end = int(np.searchsorted(offsets, offsets[first] + len(ids), "right"))
            own = offsets[first:end] - offsets[first]
            first, whole = end - 1, int(own[-1])
            local = np.arange(len(ids), dtype=np.int32)
            if whole:
                bounds = own if whole == len(ids) else np.append(own, len(ids))
                of_part = as_seed(seed + part)
                local = balanced_order(
                    vectors, bounds, of_part, max_iter, refine=rounds // 2, threads=threads
                )
                with open(means, "ab") as file:
                    _means(vectors, local[:whole], own).tofile(file)
            rest = local[whole:]
            files.append(np.full(len(rest), part + 1), ids[rest], vectors[rest])
            del vectors
            members = ids[local[:whole]]
            if (np.diff(ids) < 0).any():  # those left over came last
                cluster = np.repeat(np.arange(len(own) - 1), np.diff(own))
                members = members[np.lexsort((members, cluster))]
            order[offsets[first] - whole : offsets[first]] = members
        if rounds == 0:
            return order
        # As between ranks: rows near a cut meet their neighbours beyond it.
        assignment = np.empty(len(x), np.int32)
        assignment[order] = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        sums = np.memmap(means, np.float32, "r", shape=(len(sizes), x.shape[1]))
        again = _Cuts(sums, parts, cuts.directions, seed, max_iter, threads)
        dealt = np.concatenate([again.homes(rows, ids, threads) for ids, rows in _pieces(sums)])
        for ids, rows in _pieces(x):
            files.append(dealt[assignment[ids]], ids, rows)
        for part in range(parts):
            ids, vectors = files.take(part)
            if len(ids) == 0:
                continue
            clusters = np.flatnonzero(dealt == part)
            own = np.append(0, np.cumsum(sizes[clusters]))
            local = np.argsort(assignment[ids], kind="stable").astype(np.int32)
            places = np.arange(len(ids)) + np.repeat(offsets[clusters] - own[:-1], sizes[clusters])
            left = rounds - rounds // 2
            refined = _core.refine_clusters(vectors, local, own, left, as_threads(threads))
            order[places] = ids[refined]
            del vectors
    return order


def _pieces(x: npt.NDArray[Any]) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[Any]]]:
    """All rows, with their ids, as many at a time as take `_READ_BYTES`."""
    at_once = max(1, _READ_BYTES // max(1, x.itemsize * x.shape[1]))
    for begin in range(0, len(x), at_once):
        rows = np.asarray(x[begin : begin + at_once])
        yield np.arange(begin, begin + len(rows), dtype=np.int32), rows


class _Cuts:
    """How rows are dealt to parts: a tree of cuts, learnt on a sample, into about equal parts.

    The directions of the cuts are at right angles to those to avoid.
    """

    def __init__(
        self,
        x: npt.NDArray[Any],
        parts: int,
        avoided: npt.NDArray[np.float32] | None,
        seed: int,
        max_iter: int,
        threads: int,
    ) -> None:
        wanted = max(_SAMPLED_ROWS, _SAMPLED_ROWS_PER_DIMENSION * x.shape[1])
        drawn = min(len(x), wanted * -(-parts // 8))
        random = np.random.default_rng([seed, parts])
        ids = np.sort(random.choice(len(x), drawn, replace=False)).astype(np.int32)
        rows = x[ids]
        sample = _unit(rows.astype(np.float32))
        if avoided is not None:
            basis = np.linalg.qr(avoided[: x.shape[1] // 2].T)[0]
            sample -= (sample @ basis) @ basis.T
        ends = np.arange(parts + 1) * drawn // parts
        order = balanced_order(sample, ends, seed, max_iter, refine=0, threads=threads)
        sums = _means(sample, order, ends)
        nodes = [(0, parts)]
        for begin, end in nodes:  # grows: level after level
            middle = (begin + end) // 2
            if end - begin > 2:
                nodes += [
                    node for node in ((begin, middle), (middle, end)) if node[1] - node[0] > 1
                ]
        self._nodes = [(begin, (begin + end) // 2) for begin, end in nodes]
        self.directions = np.stack(
            [
                np.subtract(*_unit(np.stack([sums[middle:end].sum(0), sums[begin:middle].sum(0)])))
                for (begin, end), (_, middle) in zip(nodes, self._nodes, strict=True)
            ]
        )
        # Each leaves to the left what its share of the parts is.
        self._thresholds: list[float] = []
        homes = np.zeros(drawn, np.int16)
        scores = self._scores(rows, ids, threads)
        for cut, ((begin, end), (_, middle)) in enumerate(zip(nodes, self._nodes, strict=True)):
            part = scores[homes == begin, cut]
            left = len(part) * (middle - begin) // (end - begin)
            self._thresholds.append(np.partition(part, left)[left] if len(part) else 0)
            homes[(homes == begin) & (scores[:, cut] >= self._thresholds[cut])] = middle

    def homes(
        self, rows: npt.NDArray[Any], ids: npt.NDArray[np.int32], threads: int
    ) -> npt.NDArray[np.int16]:
        """The part that each row goes to."""
        homes = np.zeros(len(rows), np.int16)
        scores = self._scores(rows, ids, threads)
        for cut, (begin, middle) in enumerate(self._nodes):
            beyond = scores[:, cut] >= self._thresholds[cut]
            homes[(homes == begin) & beyond] = middle
        return homes

    def _scores(
        self, rows: npt.NDArray[Any], ids: npt.NDArray[np.int32], threads: int
    ) -> npt.NDArray[np.float32]:
        """Cosine of each row with the direction of each cut, float32 [rows, cuts]."""
        shape = len(rows), len(self.directions)
        every = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).ravel()
        ends = np.arange(len(rows) + 1, dtype=np.int32) * shape[1]
        pairs = sp.csr_matrix((np.ones(len(every), np.int8), every, ends), shape=shape)
        scores = pair_scores(rows, self.directions, pairs, threads=threads).reshape(shape)
        scattered = ids.astype(np.uint32) * np.uint32(2654435769)  # of a golden section
        jitter = (scattered.astype(np.float64) * (_JITTER / 2**32)).astype(np.float32)
        return scores + jitter[:, None]


@dispatched
def balanced_order(
    x: Any, offsets: npt.NDArray[np.int64], seed: int, max_iter: int, *, refine: int, threads: int
) -> npt.NDArray[np.int32]:
    """The order of `balanced_clusters`, whose arguments are checked, with its offsets."""
    return _core.balanced_clusters(x, offsets, seed, max_iter, refine, as_threads(threads))


def as_seed(seed: Any) -> int:
    """Any integer as the 64 bits that the core takes."""
    return as_count(seed, "seed", -math.inf, math.inf) % 2**64
