"""What the batches of an epoch are: whole clusters (NGAME), neighbourhoods, or groups."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame import _core
from ngame.arrays import as_count, as_csr, as_ids
from ngame.cluster import Clusters, as_seed, balanced_clusters
from ngame.neighbours import embedding_neighbours, graph_neighbours

# First word of the spawn key: keeps the random streams of the two purposes apart.
_PLAN, _CLUSTER = 0, 1

# Orders that are tried to find out how many rows keys allow, where they do not allow all.
_TRIALS = 3

Keys = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], int]
"""The keys of the rows as the core takes them: offsets, keys, number of different keys."""

Order = tuple[npt.NDArray[np.int32], int]
"""Rows such that cutting at multiples of the batch size gives the batches, and how many of them
can be used: behind these stand the rows that conflicts of keys leave over."""


class _BatchSampler(ABC):
    """What all the samplers of this module share; see ClusterBatchSampler for what it promises.

    A subclass gives the order of an epoch, and calls `_settle` when it is ready to.
    """

    _arrays: ClassVar[tuple[str, ...]] = ("_keys",)
    """Attributes that pickling drops; those with an underscore came with the constructor."""

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        *,
        keys: Any,
        drop_last: bool,
        seed: int,
        world_size: int,
        rank: int,
    ) -> None:
        self.n_rows = as_count(n_rows, "n_rows")
        if self.n_rows > np.iinfo(np.int32).max:
            raise ValueError(f"n_rows is {n_rows}, at most 2**31 - 1 are possible")
        self.batch_size = as_count(batch_size, "batch_size")
        self.drop_last = bool(drop_last)
        self.epoch = 0
        self._keys = None if keys is None else _as_keys(keys, self.n_rows)
        self._dropped: frozenset[str] = frozenset()
        self._seed = as_seed(seed)
        self._world_size = as_count(world_size, "world_size")
        self._rank = as_count(rank, "rank", 0)
        if self._rank >= self._world_size:
            raise ValueError(f"rank is {rank}, expected less than world_size, {world_size}")
        self._visited = self.n_rows

    def _settle(self) -> None:
        """Find the number of rows that every epoch can visit.

        It depends on neither the seed nor the epoch. Where keys leave rows over, and some orders
        leave more of them than others, it stays below the lowest number met; an epoch that does
        not reach it all the same takes one of the orders tried here, which do.
        """
        reached = [self._reference(0)[1]]
        if reached[0] < self.n_rows:
            reached += [self._reference(trial)[1] for trial in range(1, _TRIALS)]
        visited = min(reached)
        if visited < max(reached):
            margin = self.batch_size + min(self.n_rows - visited, visited) // 10
            visited = max(visited - margin, 1)
        round_rows = self.batch_size * self._world_size
        only_full = self.drop_last or self._world_size > 1
        self._visited = visited // round_rows * round_rows if only_full else visited
        if self._visited == 0:
            what = f"n_rows is {self.n_rows}"
            if visited < self.n_rows:
                what += f", of which {visited} can be planned"
            raise ValueError(
                f"{what}, expected at least batch_size * world_size = {round_rows} "
                "where only full batches count"
            )

    @abstractmethod
    def _order(self, epoch: int, rng: np.random.Generator) -> Order:
        """Plan an epoch, flat."""

    def _reference(self, trial: int) -> Order:
        """An order that depends on nothing that changes."""
        return self._random_order(np.random.default_rng(trial))

    def _random_order(self, rng: np.random.Generator) -> Order:
        return self._separated(rng.permutation(self.n_rows).astype(np.int32))

    def _separated(self, rows: npt.NDArray[np.int32]) -> Order:
        """Rows rearranged so that no two of a batch share a key."""
        if self._keys is None:
            return rows, len(rows)
        order: Order = _core.separate(rows, self._keys, self.batch_size)
        return order

    def _hard_first(self, epoch: int) -> bool:
        """Whether the batches of an epoch stand in an order that is to be kept."""
        return False

    def __len__(self) -> int:
        """Number of batches this rank gets: exact, and the same every epoch."""
        return -(-self._visited // self.batch_size) // self._world_size

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of the current epoch as lists of row ids."""
        return map(np.ndarray.tolist, self.plan())

    @property
    def rows_left_out(self) -> int:
        """Rows that an epoch leaves out, over all ranks: the same number every epoch."""
        return self.n_rows - self._visited

    def plan(self, epoch: int | None = None) -> list[npt.NDArray[np.int64]]:
        """Batches of an epoch as arrays, for this rank.

        Parameters
        ----------
        epoch : int, optional
            The current one if not given. Other epochs are planned with what is now in use.

        Returns
        -------
        list of int64 arrays of shape [batch_size]
            The last one may be shorter, with `drop_last` false and one process only.

        Raises
        ------
        ValueError
            The epoch needs what pickling dropped.
        """
        epoch = self.epoch if epoch is None else as_count(epoch, "epoch", 0)
        self._require("_keys")
        rng = np.random.default_rng(self._seeds(_PLAN, epoch))
        rows, reached = self._order(epoch, rng)
        if reached < self._visited:
            rows, _ = max((self._reference(trial) for trial in range(_TRIALS)), key=itemgetter(1))
        order = rows[: self._visited].astype(np.int64)
        # A short last batch stays last. The others change places, since the smaller cluster and
        # the uneven deal of whole clusters would else come at the same time in every epoch.
        n_full = self._visited // self.batch_size
        starts = np.arange(0, self._visited, self.batch_size)
        if not self._hard_first(epoch):
            starts[:n_full] = rng.permutation(starts[:n_full])
        starts = starts[self._rank :: self._world_size]
        return [order[start : start + self.batch_size] for start in starts.tolist()]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration plans; cheap, and safe to repeat."""
        self.epoch = as_count(epoch, "epoch", 0)

    def state_dict(self) -> dict[str, Any]:
        """Everything a restart needs, as ints and NumPy arrays, but for the arguments.

        What `refresh` took is part of it, since the embeddings it came from cannot be had again
        after a restart; before the first refresh these arrays are empty.

        Raises
        ------
        ValueError
            This is a pickled copy without what there is to save.
        """
        return {**self._identity(), "seed": self._seed, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave: the same epoch, clusters, and batches.

        Raises
        ------
        ValueError
            A key is missing; the state belongs to another number of rows, batch size, number of
            processes, `drop_last`, or keys; or what it holds does not fit the rows.
        """
        expected = self._identity()
        missing = self._state_names() - state.keys()
        if missing:
            raise ValueError(f"state lacks {', '.join(sorted(missing))}")
        for name, here in expected.items():
            if int(state[name]) != here:
                raise ValueError(f"state has {name} {int(state[name])}, this sampler has {here}")
        self._load(state)

    def _load(self, state: Mapping[str, Any]) -> None:
        self._seed = int(state["seed"])
        self.epoch = int(state["epoch"])

    def _state_names(self) -> set[str]:
        return {*self._identity(), "seed", "epoch"}

    @property
    def sampler(self) -> "_EpochProxy":
        """Proxy whose `set_epoch` forwards to this object."""
        return _EpochProxy(self)

    def __getstate__(self) -> dict[str, Any]:
        here = {name for name in self._arrays if getattr(self, name) is not None}
        return {**self.__dict__, **dict.fromkeys(here), "_dropped": self._dropped | here}

    def _require(self, name: str) -> None:
        """Reject what cannot be done without an array that pickling dropped."""
        if name in self._dropped:
            kind = type(self).__name__
            raise ValueError(
                f"this {kind} is a pickled copy without {name.lstrip('_')}: "
                + (
                    f"make a new {kind} instead"
                    if name.startswith("_")
                    else "call refresh or load_state_dict first"
                )
            )

    def _identity(self) -> dict[str, int]:
        """What the length of an epoch depends on; a state only fits where it is the same."""
        return {
            "n_rows": self.n_rows,
            "batch_size": self.batch_size,
            "drop_last": int(self.drop_last),
            "world_size": self._world_size,
            "rows_left_out": self.rows_left_out,
        }

    def _seeds(self, *place: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self._seed, spawn_key=place)


class _RefreshedBatchSampler(_BatchSampler):
    """Batches made of something that `refresh` renews, from an epoch on."""

    def __init__(self, schedule: Mapping[int, int], refresh_every: int, **common: Any) -> None:
        super().__init__(**common)
        self.refreshes = 0
        self._refreshed_epoch = -1
        self._schedule = schedule  # a size from each epoch on, in the order of the epochs
        self._refresh_every = as_count(refresh_every, "refresh_every")

    @property
    @abstractmethod
    def _source(self) -> object | None:
        """What the last refresh took, or None."""

    def _size_at(self, epoch: int) -> int:
        """The size that the schedule gives for an epoch; 1 where batches are random."""
        size = 1
        for start, scheduled in self._schedule.items():
            if start <= epoch:
                size = scheduled
        return size

    def due(self, epoch: int) -> bool:
        """Whether `refresh` is wanted before an epoch is planned.

        It is where the epoch is not random and there was no refresh yet, where `refresh_every` or
        a change of size says so, and not if a refresh was made for this very epoch.
        """
        if self._size_at(epoch) == 1 or epoch == self._refreshed_epoch:
            return False
        waited = epoch - next(iter(self._schedule))
        periodic = waited % self._refresh_every == 0
        return self._source is None or periodic or epoch in self._schedule

    def _refreshed(self, name: str, source: object) -> None:
        setattr(self, name, source)
        self._dropped -= {name}
        self.refreshes += 1
        self._refreshed_epoch = self.epoch

    def _seeds(self, *place: int) -> np.random.SeedSequence:
        return super()._seeds(*place, self.refreshes)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "refreshes": self.refreshes,
            "refreshed_epoch": self._refreshed_epoch,
        }

    def _state_names(self) -> set[str]:
        return super()._state_names() | {"refreshes", "refreshed_epoch"}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self.refreshes = int(state["refreshes"])
        self._refreshed_epoch = int(state["refreshed_epoch"])


class ClusterBatchSampler(_RefreshedBatchSampler):
    """Plan the batches of every epoch so that rows of one cluster meet in one batch: NGAME.

    A drop-in `batch_sampler` for a `torch.utils.data.DataLoader` and the trainers around it; it
    needs no torch itself. Every row is visited once an epoch. Until clusters are due (see
    `cluster_size`), and while there are none, batches are plain random ones. Afterwards the
    clusters are shuffled, their rows concatenated, and the result cut into batches.

    **Guarantee.** Where `batch_size` is a multiple of the cluster size, no cluster is split over
    two batches; with `random_share` above zero this holds for every cluster size up to
    `batch_size`, for the clusters that are not dissolved. It needs clusters of one size but for a
    single smaller one, which is what ``balanced_clusters(size=...)`` makes. Otherwise a batch is
    filled up from the next cluster, and clusters larger than a batch are dealt to several.

    **Keys.** No two rows of a batch share a key, be it for duplicates, for several views of one
    item, or for positives in common. Of rows that do, the first stays; the others move to the next
    batches with room for them, and rows of the last batches fill the room they leave. The rest
    stays where it is, so the guarantee holds for clusters without conflict, but for the few that
    these two uses take a row from. Where one key has more rows than there are batches some are
    left over: `rows_left_out` says how many. With one key a row these are as few as can be; with
    several as few as every epoch is sure to come down to.

    **Purity.** The plan is a function of the seed, the epoch, the number of refreshes, and the
    clusters. Iterating changes nothing: an epoch can be abandoned and begun again, and the epoch
    only advances by `set_epoch`. A plan is fixed when `iter` is called.

    **Several processes.** Batch b of the epoch goes to rank ``b % world_size``, and all ranks get
    the same number of full batches: the ``n_rows % (batch_size * world_size)`` rows that do not
    fill a round are left out (of those that keys allow), other rows every epoch. Every rank must
    hold the same clusters; do not rely on embeddings that agree to the last bit, but cluster on
    one rank and send the result to the `refresh` of the others.

    **Pickling** (and copying) drops clusters and keys, so that worker processes and saved training
    arguments carry no array of n_rows. A copy cannot plan clustered epochs before `refresh` or
    `load_state_dict` gives it clusters, and none at all if there were keys.

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
    keys : integer array [n_rows] or [n_rows, c], or CSR matrix [n_rows, m], optional
        Keys that no two rows of a batch may share. Of an array every value is a key, the same in
        all columns; of a matrix the columns of a row's stored entries are its keys, none at all
        being possible. They are no part of the state: give the same after a restart.
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
    rows_left_out : int
        Rows that an epoch leaves out, over all ranks: the same number every epoch.
    sampler : object
        A proxy whose `set_epoch` forwards here: accelerate (with several processes) and Lightning
        tell the epoch to `batch_sampler.sampler` only.

    Raises
    ------
    TypeError
        An argument is not of the type above.
    ValueError
        An argument is out of its range, `keys` has another number of rows than n_rows, or no rank
        would get a single full batch.

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
        keys: Any = None,
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
        self.clusters: Clusters | None = None
        if not isinstance(random_share, (int, float, np.floating)):
            raise TypeError(f"random_share is a {type(random_share).__name__}, expected a float")
        self._random_share = float(random_share)
        if not 0.0 <= self._random_share <= 1.0:
            raise ValueError(f"random_share is {random_share}, expected a share from 0 to 1")
        self._threads = as_count(threads, "threads", 0)
        self._settle()

    @property
    def _source(self) -> Clusters | None:
        return self.clusters

    def cluster_size_at(self, epoch: int) -> int:
        """Cluster size that the schedule gives for an epoch; 1 where batches are random."""
        return self._size_at(epoch)

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
                seed=int(self._seeds(_CLUSTER).generate_state(1)[0]),
                threads=self._threads,
            )
        self._refreshed("clusters", clusters)

    def state_dict(self) -> dict[str, Any]:
        self._require("clusters")
        return {
            **super().state_dict(),
            "order": np.empty(0, np.int32) if self.clusters is None else self.clusters.order,
            "offsets": np.empty(0, np.int64) if self.clusters is None else self.clusters.offsets,
        }

    def _state_names(self) -> set[str]:
        return super()._state_names() | {"order", "offsets"}

    def _load(self, state: Mapping[str, Any]) -> None:
        clusters = None
        if len(state["order"]):
            _check_rows("order of the state", len(state["order"]), self.n_rows)
            clusters = Clusters(state["order"], state["offsets"])
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
        """Rows cluster by cluster, some of them at random places if so wanted."""
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
        sequence = np.empty(len(sizes), np.int32)
        sequence[place] = np.arange(len(sizes), dtype=np.int32)
        order: npt.NDArray[np.int32] = _core.cluster_order(
            clusters.order, clusters.offsets, sequence, _draw_seed(rng)
        )

        n_full = self._visited // self.batch_size
        if not self._random_share or not n_full:
            return order
        # Deal whole clusters, or single rows of them where clusters cannot stay whole.
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


class NeighbourBatchSampler(_RefreshedBatchSampler):
    """Plan the batches of every epoch so that a row meets its neighbours: Sample4Geo.

    A batch is filled in the way of Sample4Geo (ICCV 2023, arXiv 2303.11851): a random row that was
    not used yet in the epoch, its `nearest` nearest neighbours, `drawn` more drawn at random from
    those behind them, except what was used already; then the next such row, until the batch is
    full. So the first batches of an epoch are whole neighbourhoods, and the last ones made of what
    these left. Unlike the published code this neither gives up after a number of rows in vain, nor
    leaves out the last batch unless told to, nor treats row 0 in another way.

    Keys, several processes, purity, length, state, and pickling are as in ClusterBatchSampler.
    Rows that share a key with a batch are passed over while it is filled, and go to another one.

    Parameters
    ----------
    n_rows : int
        Number of training rows; batches hold ids from 0 to n_rows - 1.
    batch_size : int
        Rows a batch, on each rank.
    nearest : int
        So many of the nearest neighbours follow a seed.
    drawn : int
        And so many of those behind them, drawn anew every epoch.
    neighbour_range : int
        Neighbours of a row that are considered at all.
    start_epoch : int
        First epoch with neighbourhoods; those before it are random.
    refresh_every : int
        Epochs from one refresh to the next, counted from `start_epoch`.
    shuffle_batches : bool
        Let the batches change places, instead of going from neighbourhoods to leftovers in every
        epoch.
    keys, drop_last, seed, world_size, rank
        As in ClusterBatchSampler.
    threads : int
        Threads that search for neighbours; 0 means the CPUs this process may use.

    Attributes
    ----------
    n_rows, batch_size, drop_last, epoch, refreshes, rows_left_out, sampler
        As in ClusterBatchSampler.
    neighbours : int32 array [n_rows, k] or None
        The neighbours in use, nearest first, -1 for none.

    Raises
    ------
    TypeError
        An argument is not of the type above.
    ValueError
        An argument is out of its range, or no rank would get a single full batch.

    Examples
    --------
    >>> sampler = NeighbourBatchSampler(6, 2, nearest=1, drawn=0)
    >>> sampler.refresh([[1], [0], [3], [2], [5], [4]])
    >>> sorted(sorted(batch) for batch in sampler)
    [[0, 1], [2, 3], [4, 5]]
    """

    _arrays = ("_keys", "neighbours")

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        *,
        nearest: int = 32,
        drawn: int = 32,
        neighbour_range: int = 128,
        start_epoch: int = 0,
        refresh_every: int = 1,
        shuffle_batches: bool = False,
        keys: Any = None,
        drop_last: bool = False,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
        threads: int = 0,
    ) -> None:
        self._nearest = as_count(nearest, "nearest", 0)
        self._drawn = as_count(drawn, "drawn", 0)
        self._range = as_count(neighbour_range, "neighbour_range")
        if self._nearest + self._drawn > self._range:
            raise ValueError(
                f"nearest and drawn are {nearest} and {drawn}, "
                f"neighbour_range is only {neighbour_range}"
            )
        super().__init__(
            {as_count(start_epoch, "start_epoch", 0): 1 + self._nearest + self._drawn},
            refresh_every,
            n_rows=n_rows,
            batch_size=batch_size,
            keys=keys,
            drop_last=drop_last,
            seed=seed,
            world_size=world_size,
            rank=rank,
        )
        self.neighbours: npt.NDArray[np.int32] | None = None
        self._shuffle_batches = bool(shuffle_batches)
        self._threads = as_count(threads, "threads", 0)
        self._settle()

    @property
    def _source(self) -> npt.NDArray[np.int32] | None:
        return self.neighbours

    def refresh(self, source: Any) -> None:
        """Take new neighbours; they act from the next iteration on.

        Parameters
        ----------
        source : array [n_rows, k] of integers, CSR matrix [n_rows, n_rows], or embeddings
            Ids, the nearest first, -1 for none, such as `topk_arrays` or `haversine_neighbours`
            gives; only the first `neighbour_range` columns are kept. Or a graph, whose stored
            entries are edges, the larger the nearer. Or a float32 or float16 array [n_rows, D],
            in which the neighbours of every row are found by the cosine, exactly.

        Raises
        ------
        TypeError
            `source` is none of these.
        ValueError
            It has another number of rows than n_rows, another shape, NaN or infinity.
        IndexError
            A neighbour is not in -1 .. n_rows - 1.
        """
        if sp.issparse(source):
            _check_rows("graph", source.shape[0], self.n_rows)
            neighbours = graph_neighbours(source, self._range, threads=self._threads)
        else:
            array = np.asarray(source)
            is_ids = array.dtype.kind in "iu"
            what = "neighbours" if is_ids else "embeddings"
            if array.ndim != 2:
                raise ValueError(f"{what} has shape {array.shape}, expected two dimensions")
            _check_rows(what, len(array), self.n_rows)
            if is_ids:
                neighbours = self._checked(array)
            else:
                neighbours = embedding_neighbours(array, self._range, threads=self._threads)
        self._refreshed("neighbours", neighbours)

    def _checked(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        ids = ids[:, : self._range]
        bad = (ids < -1) | (ids >= self.n_rows)
        if bad.any():
            row, rank = np.argwhere(bad)[0].tolist()
            raise IndexError(
                f"neighbours[{row}, {rank}] is {ids[row, rank]}, out of range for {self.n_rows}"
            )
        return np.ascontiguousarray(ids, np.int32)

    def state_dict(self) -> dict[str, Any]:
        self._require("neighbours")
        here = self.neighbours
        return {
            **super().state_dict(),
            "neighbours": np.empty((0, 0), np.int32) if here is None else here,
        }

    def _state_names(self) -> set[str]:
        return super()._state_names() | {"neighbours"}

    def _load(self, state: Mapping[str, Any]) -> None:
        neighbours = None
        if len(state["neighbours"]):
            _check_rows("neighbours of the state", len(state["neighbours"]), self.n_rows)
            neighbours = self._checked(state["neighbours"])
        super()._load(state)
        self.neighbours = neighbours
        self._dropped -= {"neighbours"}

    def _neighbours_at(self, epoch: int) -> npt.NDArray[np.int32] | None:
        """The neighbours that an epoch goes by; None where its batches are random."""
        if self._size_at(epoch) == 1:
            return None
        self._require("neighbours")
        return self.neighbours

    def _hard_first(self, epoch: int) -> bool:
        return not self._shuffle_batches and self._neighbours_at(epoch) is not None

    def _order(self, epoch: int, rng: np.random.Generator) -> Order:
        neighbours = self._neighbours_at(epoch)
        if neighbours is None:
            return self._random_order(rng)
        seed = _draw_seed(rng)
        return self._separated(
            _core.neighbour_order(
                neighbours, self._nearest, self._drawn, self.batch_size, self._keys, seed
            )
        )


class GroupBatchSampler(_BatchSampler):
    """Plan batches of one group, or of several groups with as many rows of each.

    Every batch holds ``batch_size / per_group`` different groups (P) and `per_group` rows (K) of
    each. Without `per_group` batches are pure: one task a batch (GISTEmbed), one language a batch
    (CoCoSoDa). With it they are the P x K batches of triplet losses. Only full batches are made.
    Which rows stand together, and which groups, is drawn anew every epoch.

    Without `alpha` no row comes twice in an epoch, and as many come as can: left out are the rows
    that do not fill up their group's last K (so groups smaller than `per_group` never come), and
    where few groups hold most rows those that find no further group beside them.

    With `alpha` an epoch has as many batches, but groups take part in proportion to
    ``size ** alpha``: 1 as they are, 0 all alike; CoCoSoDa uses 0.7. Small groups then begin again
    with their rows, in another order, and large ones are visited in part. A group stands at most
    once in a batch, even if its share is larger.

    Keys, several processes, purity, length, state, and pickling are as in ClusterBatchSampler; a
    pickled copy cannot plan.

    Parameters
    ----------
    groups : integer array [n_rows]
        The group of every row, any integers.
    batch_size : int
        Rows a batch, on each rank.
    per_group : int, optional
        Rows of each group in a batch; divides `batch_size`, which it is if not given.
    alpha : float, optional
        0 or more.
    keys, seed, world_size, rank
        As in ClusterBatchSampler.

    Attributes
    ----------
    n_rows, batch_size, drop_last, epoch, sampler
        As in ClusterBatchSampler; `drop_last` is true.
    rows_left_out : int
        n_rows less the rows of all batches, which with `alpha` may repeat.

    Raises
    ------
    TypeError
        An argument is not of the type above.
    ValueError
        An argument is out of its range, or the groups do not make a single full batch a rank.

    Examples
    --------
    >>> sampler = GroupBatchSampler([0, 0, 1, 1, 2, 2, 2], 4, per_group=2)
    >>> [rows] = sampler
    >>> len(rows), sampler.rows_left_out
    (4, 3)
    """

    _arrays = ("_keys", "_groups")

    def __init__(
        self,
        groups: Any,
        batch_size: int,
        *,
        per_group: int | None = None,
        alpha: float | None = None,
        keys: Any = None,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        ids = as_ids(groups, "groups")
        super().__init__(
            len(ids),
            batch_size,
            keys=keys,
            drop_last=True,
            seed=seed,
            world_size=world_size,
            rank=rank,
        )
        self._per_group = self.batch_size
        if per_group is not None:
            self._per_group = as_count(per_group, "per_group")
        if self.batch_size % self._per_group:
            raise ValueError(f"per_group is {per_group}, expected a divisor of {batch_size}")
        _, group_of, sizes = np.unique(ids, return_inverse=True, return_counts=True)
        by_group = np.argsort(group_of, kind="stable").astype(np.int32)
        self._groups = by_group, np.concatenate([[0], np.cumsum(sizes)])
        self._weights: npt.NDArray[np.float64] | None = None
        self._settle()
        if alpha is None:
            return
        if not isinstance(alpha, (int, float, np.floating)):
            raise TypeError(f"alpha is a {type(alpha).__name__}, expected a float")
        if not 0 <= alpha < np.inf:
            raise ValueError(f"alpha is {alpha}, expected 0 or more")
        chunks, reached = self._chunks(self._per_group, None, np.random.default_rng(0))
        able = np.zeros(len(sizes), np.bool_)  # to fill at least one chunk
        able[group_of[chunks[:reached]]] = True
        self._weights = np.where(able, (sizes / sizes.max()) ** float(alpha), 0.0)
        self._n_batches = self._visited // self.batch_size
        self._settle()

    def _order(self, epoch: int, rng: np.random.Generator) -> Order:
        self._require("_groups")
        return self._group_order(rng)

    def _reference(self, trial: int) -> Order:
        return self._group_order(np.random.default_rng(trial))

    def _group_order(self, rng: np.random.Generator) -> Order:
        quotas = None
        if self._weights is not None:
            per_batch = self.batch_size // self._per_group
            quotas = _quotas(self._weights, self._n_batches * per_batch, self._n_batches, rng)
        return self._chunks(self.batch_size, quotas, rng)

    def _chunks(
        self, batch_size: int, quotas: npt.NDArray[np.int64] | None, rng: np.random.Generator
    ) -> Order:
        """Rows of a group `per_group` at a time, `batch_size` of them without a group twice."""
        order: Order = _core.group_order(
            *self._groups, quotas, self._per_group, batch_size, self._keys, _draw_seed(rng)
        )
        return order


class _EpochProxy:
    """What trainers find at `batch_sampler.sampler`: only `set_epoch`."""

    def __init__(self, batches: _BatchSampler) -> None:
        self._batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Forward to the batch sampler."""
        self._batches.set_epoch(epoch)


def _check_rows(name: str, rows: int, n_rows: int) -> None:
    if rows != n_rows:
        raise ValueError(f"{name} has {rows} rows, the sampler has {n_rows}")


def _draw_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**64, dtype=np.uint64))


def _as_keys(keys: Any, n_rows: int) -> Keys:
    """Keys of the rows, but for those that only one row has: they cannot conflict."""
    if sp.issparse(keys):
        matrix = as_csr(keys, "keys", any_order=True)
        _check_rows("keys", matrix.shape[0], n_rows)
        offsets, values = matrix.indptr, matrix.indices
    else:
        values = np.asarray(keys)
        if values.dtype.kind not in "iu":
            raise TypeError(f"keys has dtype {values.dtype}, expected integers")
        if values.ndim not in (1, 2):
            raise ValueError(f"keys has shape {values.shape}, expected [n_rows] or [n_rows, c]")
        _check_rows("keys", len(values), n_rows)
        offsets = np.arange(n_rows + 1) * (values.size // n_rows)
    numbered: Keys = _core.number_keys(
        offsets.astype(np.int64, copy=False),
        np.ascontiguousarray(values.ravel()[: offsets[-1]], np.int64),
    )
    return numbered


def _quotas(
    weights: npt.NDArray[np.float64], total: int, most: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Share `total` places in proportion to the weights, none getting more than `most`.

    Systematic sampling: each gets its expected number rounded down or up at random, and the sum
    is exact.
    """
    quotas = np.zeros(len(weights), np.int64)
    expected = np.zeros(len(weights))
    left, open_ = total, weights > 0
    while open_.any():
        expected = np.where(open_, weights, 0.0) * (left / weights[open_].sum())
        over = open_ & (expected > most * (1 - 1e-9))
        if not over.any():
            break
        quotas[over] = most
        left -= most * int(over.sum())
        open_ &= ~over
    ids = rng.permutation(np.flatnonzero(open_))
    if len(ids):
        ends = np.cumsum(expected[ids])
        ends[-1] = left
        quotas[ids] = np.diff(np.floor(ends + rng.random()), prepend=0.0)
    return quotas


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
