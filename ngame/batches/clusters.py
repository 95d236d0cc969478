"""Batches of whole clusters: NGAME."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ngame import _core
from ngame.arrays import MAX_THREADS, Csr, ProcessGroup, as_array, as_count, is_sparse, renamed
from ngame.batches.base import (
    CLUSTER,
    Order,
    RefreshedBatchSampler,
    as_share,
    check_columns,
    check_rows,
    draw_seed,
    stored,
)
from ngame.cluster import Clusters, balanced_clusters
from ngame.dispatch import in_reach


class ClusterBatchSampler(RefreshedBatchSampler):
    """Plan the batches of every epoch so that rows of one cluster meet in one batch: NGAME.

    A drop-in `batch_sampler` for `torch.utils.data.DataLoader` and the trainers built on it; it
    needs no torch itself. Every row is visited once an epoch. Batches are random until clusters are
    due (see `cluster_size`) and given. Then the clusters are shuffled, their rows concatenated, and
    the result cut into batches.

    **Guarantee.** If `batch_size` is a multiple of the cluster size, no cluster is split over two
    batches. With `random_share` above zero this holds for every cluster size up to `batch_size`,
    except for the clusters dissolved for that share. All clusters but one smaller one must have the
    same size, as ``balanced_clusters(size=...)`` makes them. Otherwise a batch is filled from the
    next cluster, and clusters larger than a batch are dealt to several batches.

    **Keys.** No two rows of a batch share a key: use keys for duplicates, for several views of one
    item, or for common positives. Of rows that share one the first stays; the others move to later
    batches with room, and rows of the last batches fill the gaps. All other rows stay, so the
    guarantee still holds for clusters without conflicts, except the few that give rows away. If a
    key has more rows than there are batches, some are left out: `rows_left_out` counts them. Their
    number is minimal with one key a row; otherwise it is a safe constant.

    **Purity.** The plan of a random epoch is a function of the seed and the epoch; of any other,
    also of the clusters and the number of refreshes. Iterating changes nothing: an epoch can be
    abandoned and started again, and only `set_epoch` changes the epoch. A plan is fixed when `iter`
    is called. A second training with the same sampler, begun by ``set_epoch(0)``, has the batches
    of a new sampler. After a training of one epoch nothing goes back: load a state from before it.

    **Several processes.** Batch b of the epoch goes to rank ``b % world_size``, and all ranks get
    the same number of full batches. The ``n_rows % (batch_size * world_size)`` rows that do not
    fill a round are left out (of those that keys allow), other rows every epoch. Every rank must
    hold the same clusters. Embeddings may differ in the last bit between ranks, so cluster on one
    rank and send the result to the `refresh` of the others.

    **Pickling** (and copying) drops clusters and keys, so that worker processes and saved training
    arguments carry no array of n_rows. A copy cannot plan clustered epochs until `refresh` or
    `load_state_dict` gives it clusters; if there were keys, it cannot plan at all.

    Parameters
    ----------
    n_rows : int
        Number of training rows; batches hold ids from 0 to n_rows - 1.
    batch_size : int
        Rows a batch, on each rank.
    cluster_size : int, optional
        Size of the clusters from `start_epoch` on; 1 means random batches. Exactly one of
        `cluster_size` and `schedule` is given.
    schedule : mapping of int to int, optional
        ``{epoch: cluster size}``: each size holds from its epoch until the next one's. Batches
        before the first epoch named are random.
    start_epoch : int, optional
        First epoch with clusters, 1 if not given; only goes with `cluster_size`.
    refresh_every : int
        Epochs from one refresh to the next, counted from the first epoch with clusters.
    random_share : float
        Share of the rows, from 0 to 1, that fills the batches at random instead of by cluster.
        Every epoch draws anew which clusters are dissolved for it. The whole clusters are dealt to
        the batches as evenly as possible, so the share holds over the epoch even if a batch has
        room for one cluster only. Room that is too small for a whole cluster counts towards the
        share, and a short last batch is all random rows.
    keys : integer array [n_rows] or [n_rows, c], or CSR matrix [n_rows, m], optional
        Keys that no two rows of a batch may share. Every value of an array is a key; columns share
        one set of keys. Of a matrix, the columns of a row's stored entries are its keys; there may
        be none. Keys are not part of the state: give the same ones after a restart.
    drop_last : bool
        Leave out the rows that do not fill a batch, other rows every epoch.
    seed : int
        Seed of all random choices, including the clustering.
    world_size, rank : int
        Number of processes that share an epoch, and the number of this one.
    threads : int
        Threads for clustering; 0 means the CPUs this process may use.

    Attributes
    ----------
    n_rows, batch_size, drop_last, epoch : as given; the epoch begins at 0
    clusters : Clusters or None
        The clusters in use.
    refreshes : int
        Number of refreshes so far.
    rows_left_out : int
        Rows that an epoch leaves out, over all ranks: the same number every epoch.
    sampler : object
        A proxy whose `set_epoch` forwards here: accelerate (with several processes) and Lightning
        set the epoch only on `batch_sampler.sampler`.

    Raises
    ------
    TypeError
        An argument is not of the type above.
    ValueError
        An argument is out of its range, `keys` does not have n_rows rows, or no rank would get a
        full batch.

    Examples
    --------
    >>> sampler = ClusterBatchSampler(1000, 64, cluster_size=8, start_epoch=0)
    >>> rng = np.random.default_rng(0)
    >>> for epoch in range(2):
    ...     sampler.set_epoch(epoch)
    ...     if sampler.due(epoch):
    ...         sampler.refresh(rng.standard_normal((1000, 16), dtype=np.float32))
    ...     print(len(list(sampler)))
    16
    16
    """

    _arrays = ("_keys", "clusters")

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        *,
        cluster_size: int | None = None,
        schedule: Mapping[int, int] | None = None,
        start_epoch: int | None = None,
        refresh_every: int = 1,
        random_share: float = 0.0,
        keys: Csr | npt.ArrayLike | None = None,
        drop_last: bool = False,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
        threads: int = 0,
    ) -> None:
        super().__init__(
            _schedule(cluster_size, schedule, start_epoch, as_count(n_rows, "n_rows")),
            refresh_every,
            n_rows=n_rows,
            batch_size=batch_size,
            keys=keys,
            drop_last=drop_last,
            seed=seed,
            world_size=world_size,
            rank=rank,
        )
        largest = max(self._schedule.values())
        if largest > self.batch_size:
            warnings.warn(
                f"clusters of {largest} rows are larger than batches of {self.batch_size}: they "
                "are cut, and points of a cluster do not meet",
                stacklevel=2,
            )
        self.clusters: Clusters | None = None
        self._random_share = as_share(random_share, "random_share")
        self._threads = as_count(threads, "threads", 0, MAX_THREADS)
        self._settle()

    @property
    def _source(self) -> Clusters | None:
        return self.clusters

    def cluster_size_at(self, epoch: int) -> int:
        """Cluster size that the schedule gives for an epoch; 1 where batches are random."""
        return self._size_at(epoch)

    def refresh(
        self, source: npt.ArrayLike | Clusters, *, group: ProcessGroup | None = None
    ) -> None:
        """Take new clusters, which the next iteration uses.

        Parameters
        ----------
        source : float32 or float16 array [n_rows, D], a torch tensor, or Clusters
            Embeddings, which `balanced_clusters` groups into clusters of the size scheduled for the
            current epoch (or for the first epoch with clusters, if that is later); or clusters of
            n_rows rows. A tensor may be on any device, and in bfloat16.
        group : torch.distributed.ProcessGroup, optional
            Every rank calls with the embeddings of a share of the rows, as in `balanced_clusters`,
            and takes the same clusters.

        Raises
        ------
        TypeError, ValueError
            As `balanced_clusters`; or the number of rows is not n_rows, or there is no column.
        """
        if isinstance(source, Clusters):
            check_rows("source", len(source.order), self.n_rows)
            clusters = source
        else:
            x = in_reach(source)
            if is_sparse(x):
                raise TypeError("source is a sparse matrix, expected embeddings or Clusters")
            x = as_array(x, "source") if isinstance(x, list | tuple) else x
            if not np.ndim(x):
                raise TypeError(
                    f"source is a {type(source).__name__}, expected embeddings or Clusters"
                )
            if group is None:
                check_rows("source", len(x), self.n_rows)
            check_columns(x)
            with renamed(x="source"):
                clusters = balanced_clusters(
                    x,
                    size=self.cluster_size_at(max(self.epoch, next(iter(self._schedule)))),
                    seed=int(self._seeds(CLUSTER).generate_state(1)[0]),
                    threads=self._threads,
                    group=group,
                )
            check_rows("source of all ranks", len(clusters.order), self.n_rows)
        self._refreshed("clusters", clusters)

    def state_dict(self) -> dict[str, Any]:
        self._require("clusters")
        return {
            **super().state_dict(),
            "order": stored(
                np.empty(0, np.int32) if self.clusters is None else self.clusters.order
            ),
            "offsets": stored(
                np.empty(0, np.int64) if self.clusters is None else self.clusters.offsets
            ),
        }

    def _state_names(self) -> set[str]:
        return super()._state_names() | {"order", "offsets"}

    def _load(self, state: Mapping[str, Any]) -> None:
        clusters = None
        if len(state["order"]):
            check_rows("order of the state", len(state["order"]), self.n_rows)
            clusters = Clusters(np.asarray(state["order"]), np.asarray(state["offsets"]))
        super()._load(state)
        self.clusters = clusters
        self._dropped -= {"clusters"}

    def _order(self, epoch: int, rng: np.random.Generator) -> Order:
        if self._size_at(epoch) == 1:
            return self._random_order(rng)
        self._require("clusters")
        if self.clusters is None:
            return self._random_order(rng)
        return self._separated(self._clustered(self.clusters, rng))

    def _clustered(self, clusters: Clusters, rng: np.random.Generator) -> npt.NDArray[np.int32]:
        """Rows cluster by cluster, with `random_share` of them at random positions."""
        sizes = np.diff(clusters.offsets)
        size = int(sizes.max())
        others = np.flatnonzero(sizes != size)
        one_size = len(others) <= 1
        position = rng.permutation(len(sizes))  # of each cluster in the epoch
        if one_size and len(others):
            # The smaller cluster would shift all later ones against the batches, so it comes last:
            # of all rows, or, so that not every epoch leaves it out, of the rows that are visited.
            # (The cluster after it is then cut off, not split.)
            last = len(sizes) - 1
            if self._visited < self.n_rows and not self._random_share:
                last = max(self._visited // size - 1, 0)
            position[position == last] = position[others]
            position[others] = last
        sequence = np.empty(len(sizes), np.int32)
        sequence[position] = np.arange(len(sizes), dtype=np.int32)
        order: npt.NDArray[np.int32] = _core.cluster_order(
            clusters.order, clusters.offsets, sequence, draw_seed(rng)
        )

        n_full = self._visited // self.batch_size
        if not self._random_share or not n_full:
            return order
        # Deal whole clusters, or single rows where clusters cannot stay whole.
        unit = size if one_size and size <= self.batch_size else 1
        units_per_batch = min(
            (1.0 - self._random_share) * self.batch_size / unit, self.batch_size // unit
        )
        n_units = round(units_per_batch * n_full)
        dealt = np.diff(np.arange(n_full + 1) * n_units // n_full) * unit
        by_cluster = np.zeros(self.n_rows, bool)
        by_cluster[: n_full * self.batch_size] = (
            np.arange(self.batch_size) < dealt[:, np.newaxis]
        ).ravel()
        n_clustered = n_units * unit
        woven = np.empty_like(order)
        woven[by_cluster] = order[:n_clustered]
        woven[~by_cluster] = rng.permutation(order[n_clustered:])
        return woven


def _schedule(
    cluster_size: int | None,
    schedule: Mapping[int, int] | None,
    start_epoch: int | None,
    n_rows: int,
) -> dict[int, int]:
    """The cluster size that holds from each epoch on, sorted by epoch."""
    if (cluster_size is None) == (schedule is None):
        raise ValueError("exactly one of cluster_size and schedule is expected")
    if cluster_size is not None:
        schedule = {1 if start_epoch is None else start_epoch: cluster_size}
    elif start_epoch is not None:
        raise ValueError("start_epoch is given with schedule, whose first epoch is the start")
    if not isinstance(schedule, Mapping):
        raise TypeError(f"schedule is a {type(schedule).__name__}, expected a mapping")
    if not schedule:
        raise ValueError("schedule is empty, expected at least one epoch")
    sizes = {
        as_count(epoch, "start epoch", 0): as_count(size, "cluster size")
        for epoch, size in schedule.items()
    }
    if max(sizes.values()) > n_rows:
        raise ValueError(f"cluster size is {max(sizes.values())}, n_rows is only {n_rows}")
    return dict(sorted(sizes.items()))
