"""Batches made of whole clusters: the mini-batches of NGAME (Dahiya et al., WSDM 2023)."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ngame.arrays import as_count
from ngame.cluster import Clusters, as_seed, balanced_clusters

# First word of the spawn key: keeps the random streams of the two purposes apart.
_PLAN, _CLUSTER = 0, 1


class ClusterBatchSampler:
    """Plan the batches of every epoch so that rows of one cluster meet in one batch.

    A drop-in `batch_sampler` for a `torch.utils.data.DataLoader` and the trainers around it; it
    needs no torch itself. Every row is visited once an epoch. Until clusters are due (see
    `cluster_size`), and while there are none, batches are plain random ones. Afterwards the
    clusters are shuffled, their rows concatenated, and the result cut into batches.

    **Guarantee.** Where `batch_size` is a multiple of the cluster size, no cluster is split over
    two batches; with `random_share` above zero this holds for every cluster size up to
    `batch_size`, for the clusters that are not dissolved. It needs clusters of one size but for a
    single smaller one, which is what ``balanced_clusters(size=...)`` makes. Otherwise a batch is
    filled up from the next cluster, and clusters larger than a batch are dealt to several.

    **Purity.** The plan is a function of the seed, the epoch, the number of refreshes, and the
    clusters. Iterating changes nothing: an epoch can be abandoned and begun again, and the epoch
    only advances by `set_epoch`. A plan is fixed when `iter` is called.

    **Several processes.** Batch b of the epoch goes to rank ``b % world_size``, and all ranks get
    the same number of full batches: the ``n_rows % (batch_size * world_size)`` rows that do not
    fill a round are left out, other rows every epoch. Every rank must hold the same clusters; do
    not rely on embeddings that agree to the last bit, but cluster on one rank and send the
    result to the `refresh` of the others.

    **Pickling** (and copying) drops the clusters, so that worker processes and saved training
    arguments carry no array of n_rows. A copy cannot plan clustered epochs before `refresh` or
    `load_state_dict` gives it clusters.

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
        Which clusters are dissolved for it is drawn anew every epoch. The whole clusters are
        dealt to the batches as evenly as they go, so that the share holds over the epoch even
        where a batch has room for one cluster only. Room that no whole cluster fits into counts
        towards it, and a short last batch is all random rows.
    drop_last : bool
        Leave out the rows that do not fill a batch, other rows every epoch.
    seed : int
        Governs every random choice, the clustering's included.
    world_size, rank : int
        Number of processes that share an epoch, and which of them this is.
    threads : int
        Threads that cluster; 0 means the CPUs this process may use.

    Attributes
    ----------
    n_rows, batch_size, drop_last, epoch : as given; the epoch begins at 0
    clusters : Clusters or None
        The clusters in use.
    refreshes : int
        Number of refreshes so far.
    sampler : object
        A proxy whose `set_epoch` forwards here: accelerate (with several processes) and Lightning
        tell the epoch to `batch_sampler.sampler` only.

    Raises
    ------
    TypeError
        An argument is not of the type above.
    ValueError
        An argument is out of its range, or no rank would get a single full batch.

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
        drop_last: bool = False,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
        threads: int = 0,
    ) -> None:
        self.n_rows = as_count(n_rows, "n_rows")
        self.batch_size = as_count(batch_size, "batch_size")
        self.drop_last = bool(drop_last)
        self.epoch = 0
        self.clusters: Clusters | None = None
        self.refreshes = 0
        self._refreshed_epoch = -1
        self._clusters_dropped = False
        self._schedule = _schedule(cluster_size, schedule, start_epoch, self.n_rows)
        self._refresh_every = as_count(refresh_every, "refresh_every")
        if not isinstance(random_share, (int, float, np.floating)):
            raise TypeError(f"random_share is a {type(random_share).__name__}, expected a float")
        self._random_share = float(random_share)
        if not 0.0 <= self._random_share <= 1.0:
            raise ValueError(f"random_share is {random_share}, expected a share from 0 to 1")
        self._seed = as_seed(seed)
        self._world_size = as_count(world_size, "world_size")
        self._rank = as_count(rank, "rank", 0)
        if self._rank >= self._world_size:
            raise ValueError(f"rank is {rank}, expected less than world_size, {world_size}")
        self._threads = as_count(threads, "threads", 0)

        only_full = self.drop_last or self._world_size > 1
        round_rows = self.batch_size * self._world_size
        self._visited = self.n_rows // round_rows * round_rows if only_full else self.n_rows
        if self._visited == 0:
            raise ValueError(
                f"n_rows is {n_rows}, expected at least batch_size * world_size = {round_rows} "
                "where only full batches count"
            )

    def __len__(self) -> int:
        """Number of batches this rank gets: exact, and the same every epoch."""
        return -(-self._visited // self.batch_size) // self._world_size

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of the current epoch as lists of row ids."""
        return map(np.ndarray.tolist, self.plan())

    def plan(self, epoch: int | None = None) -> list[npt.NDArray[np.int64]]:
        """Batches of an epoch as arrays, for this rank.

        Parameters
        ----------
        epoch : int, optional
            The current one if not given. Other epochs are planned with the clusters now in use.

        Returns
        -------
        list of int64 arrays of shape [batch_size]
            The last one may be shorter, with `drop_last` false and one process only.

        Raises
        ------
        ValueError
            The epoch needs clusters that pickling dropped.
        """
        epoch = self.epoch if epoch is None else as_count(epoch, "epoch", 0)
        rng = np.random.default_rng(self._seeds(_PLAN, epoch, self.refreshes))
        if self.cluster_size_at(epoch) == 1:
            order = rng.permutation(self.n_rows)[: self._visited]
        elif self._clusters_dropped:
            raise ValueError(
                "this ClusterBatchSampler is a pickled copy without clusters: "
                "call refresh or load_state_dict before it plans a clustered epoch"
            )
        elif self.clusters is None:
            order = rng.permutation(self.n_rows)[: self._visited]
        else:
            order = self._clustered_order(self.clusters, rng)
        # A short last batch stays last. The others change places, since the smaller cluster and
        # the uneven deal of whole clusters would else come at the same time in every epoch.
        n_full = self._visited // self.batch_size
        starts = np.arange(0, self._visited, self.batch_size)
        starts[:n_full] = rng.permutation(starts[:n_full])
        starts = starts[self._rank :: self._world_size]
        return [order[start : start + self.batch_size] for start in starts.tolist()]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration plans; cheap, and safe to repeat."""
        self.epoch = as_count(epoch, "epoch", 0)

    def cluster_size_at(self, epoch: int) -> int:
        """Cluster size that the schedule gives for an epoch; 1 where batches are random."""
        size = 1
        for start, scheduled in self._schedule.items():
            if start <= epoch:
                size = scheduled
        return size

    def due(self, epoch: int) -> bool:
        """Whether `refresh` is wanted before an epoch is planned.

        It is where the epoch has clusters and there are none yet, where `refresh_every` or a
        change of cluster size says so, and not if a refresh was made for this very epoch.
        """
        if self.cluster_size_at(epoch) == 1 or epoch == self._refreshed_epoch:
            return False
        waited = epoch - next(iter(self._schedule))
        periodic = waited % self._refresh_every == 0
        return self.clusters is None or periodic or epoch in self._schedule

    def refresh(self, source: Any) -> None:
        """Take new clusters; they act from the next iteration on.

        Parameters
        ----------
        source : float32 or float16 array [n_rows, D], or Clusters
            Embeddings, which `balanced_clusters` cuts into clusters of the size that the schedule
            gives for the current epoch (or for the first one with clusters, if that is still to
            come); or clusters of n_rows rows made elsewhere.

        Raises
        ------
        TypeError, ValueError
            As `balanced_clusters`; or the number of rows is not n_rows.
        """
        if isinstance(source, Clusters):
            _check_rows("clusters", len(source.order), self.n_rows)
            clusters = source
        else:
            shape = np.shape(source)
            _check_rows("embeddings", shape[0] if shape else 0, self.n_rows)
            clusters = balanced_clusters(
                source,
                size=self.cluster_size_at(max(self.epoch, next(iter(self._schedule)))),
                seed=int(self._seeds(_CLUSTER, self.refreshes).generate_state(1)[0]),
                threads=self._threads,
            )
        self.clusters = clusters
        self._clusters_dropped = False
        self.refreshes += 1
        self._refreshed_epoch = self.epoch

    def state_dict(self) -> dict[str, Any]:
        """Everything a restart needs, as ints and NumPy arrays.

        The clusters themselves are part of it, since the embeddings they came from cannot be had
        again after a restart; without clusters the two arrays are empty.
        """
        if self._clusters_dropped:
            raise ValueError("this ClusterBatchSampler is a pickled copy without clusters to save")
        return {
            **self._identity(),
            "seed": self._seed,
            "epoch": self.epoch,
            "refreshes": self.refreshes,
            "refreshed_epoch": self._refreshed_epoch,
            "order": np.empty(0, np.int32) if self.clusters is None else self.clusters.order,
            "offsets": np.empty(0, np.int64) if self.clusters is None else self.clusters.offsets,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave: the same epoch, clusters, and batches.

        Raises
        ------
        ValueError
            A key is missing; the state belongs to another number of rows, batch size, number of
            processes, or `drop_last`; or its clusters do not hold every row once.
        """
        expected = self._identity()
        missing = {*expected, "seed", "epoch", "refreshes", "refreshed_epoch", "order", "offsets"}
        missing -= state.keys()
        if missing:
            raise ValueError(f"state lacks {', '.join(sorted(missing))}")
        for name, here in expected.items():
            if int(state[name]) != here:
                raise ValueError(f"state has {name} {int(state[name])}, this sampler has {here}")
        clusters = None
        if len(state["order"]):
            _check_rows("order of the state", len(state["order"]), self.n_rows)
            clusters = Clusters(state["order"], state["offsets"])
        self.clusters = clusters
        self._clusters_dropped = False
        self._seed = int(state["seed"])
        self.epoch = int(state["epoch"])
        self.refreshes = int(state["refreshes"])
        self._refreshed_epoch = int(state["refreshed_epoch"])

    @property
    def sampler(self) -> "_EpochProxy":
        """Proxy whose `set_epoch` forwards to this object."""
        return _EpochProxy(self)

    def __getstate__(self) -> dict[str, Any]:
        dropped = self._clusters_dropped or self.clusters is not None
        return {**self.__dict__, "clusters": None, "_clusters_dropped": dropped}

    def _identity(self) -> dict[str, int]:
        """What the length of an epoch depends on; a state only fits where it is the same."""
        return {
            "n_rows": self.n_rows,
            "batch_size": self.batch_size,
            "drop_last": int(self.drop_last),
            "world_size": self._world_size,
        }

    def _seeds(self, purpose: int, *counts: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self._seed, spawn_key=(purpose, *counts))

    def _clustered_order(
        self, clusters: Clusters, rng: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """Rows to visit, such that cutting at multiples of the batch size gives the batches."""
        sizes = np.diff(clusters.offsets)
        size = int(sizes.max())
        others = np.flatnonzero(sizes != size)
        one_size = len(others) <= 1
        place = rng.permutation(len(sizes))  # of each cluster in the epoch
        if one_size and len(others):
            # The smaller cluster would push all that follow it out of line with the batches, so
            # it comes last: of all rows, or else of the rows that are visited (the cluster behind
            # it is then cut off, not split), since it must not be left out in every epoch.
            last = len(sizes) - 1
            if self._visited < self.n_rows and not self._random_share:
                last = max(self._visited // size - 1, 0)
            place[place == last] = place[others]
            place[others] = last
        # Sorting shuffled rows by the place of their cluster also shuffles within each cluster.
        rows = rng.permutation(self.n_rows)
        order = rows[np.argsort(place[clusters.assignment[rows]], kind="stable")]

        n_full = self._visited // self.batch_size
        if not self._random_share or not n_full:
            return order[: self._visited]
        # Deal whole clusters, or single rows of them where clusters cannot stay whole.
        unit = size if one_size and size <= self.batch_size else 1
        units_per_batch = min(
            (1.0 - self._random_share) * self.batch_size / unit, self.batch_size // unit
        )
        n_units = round(units_per_batch * n_full)
        dealt = np.diff(np.arange(n_full + 1) * n_units // n_full) * unit
        by_cluster = np.zeros(self._visited, bool)
        by_cluster[: n_full * self.batch_size] = (
            np.arange(self.batch_size) < dealt[:, np.newaxis]
        ).ravel()
        n_clustered = n_units * unit
        at_random = rng.permutation(order[n_clustered:])
        woven = np.empty(self._visited, np.int64)
        woven[by_cluster] = order[:n_clustered]
        woven[~by_cluster] = at_random[: self._visited - n_clustered]
        return woven


class _EpochProxy:
    """What trainers find at `batch_sampler.sampler`: only `set_epoch`."""

    def __init__(self, batches: ClusterBatchSampler) -> None:
        self._batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Forward to the batch sampler."""
        self._batches.set_epoch(epoch)


def _check_rows(name: str, rows: int, n_rows: int) -> None:
    if rows != n_rows:
        raise ValueError(f"{name} has {rows} rows, the sampler has {n_rows}")


def _schedule(
    cluster_size: int | None,
    schedule: Mapping[int, int] | None,
    start_epoch: int | None,
    n_rows: int,
) -> dict[int, int]:
    """Cluster size from each epoch on, in the order of the epochs."""
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
