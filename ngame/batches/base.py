"""What all samplers share: the length of an epoch, seeds, processes, state, pickling."""

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame import _core
from ngame.arrays import as_array, as_count, as_csr, contiguous, refuse_names
from ngame.cluster import as_seed

# First word of the spawn key, which separates the random streams of plans and of clusterings.
PLAN, CLUSTER = 0, 1

# Orders tried to find out how many rows the keys allow, where they do not allow all.
_TRIALS = 3

Keys = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], int]
"""The keys of the rows as the core takes them: offsets, keys, number of different keys."""

Order = tuple[npt.NDArray[np.int32], int]
"""Rows in the order of the batches, to be cut at multiples of the batch size, and how many of them
can be used; the rows that keys leave over follow."""


class BatchSampler(ABC):
    """Base of all samplers; see ClusterBatchSampler for what it promises.

    A subclass gives the order of an epoch, and calls `_settle` at the end of its constructor.
    """

    _arrays: ClassVar[tuple[str, ...]] = ("_keys",)
    """Attributes that pickling drops; those with an underscore are made by the constructor."""

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Say what to do to trainers that would rebuild the sampler around one of their own."""
        refuse_rebuild(arguments)
        return super().__new__(cls)

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
        # Memory must grow with the rows, whatever batch size is asked for.
        self._most_in_batch = min(self.batch_size, self.n_rows)
        self._count_visited(self.n_rows)

    def _settle(self) -> None:
        """Find the number of rows that every epoch can visit.

        It depends on neither the seed nor the epoch. If the keys leave rows over, and in some
        orders more than in others, it stays below the lowest number found. An epoch that still does
        not reach it uses one of the orders tried here, which do.
        """
        reached = [self._reference(0)[1]]
        if reached[0] < self.n_rows:
            reached += [self._reference(trial)[1] for trial in range(1, _TRIALS)]
        visited = min(reached)
        if visited < max(reached):
            margin = self.batch_size + min(self.n_rows - visited, visited) // 10
            visited = max(visited - margin, 1)
        self._count_visited(visited)
        if self._keys is not None and 2 * reached[0] < self.n_rows:
            self._warn_of_keys(reached[0], self._keys[1])

    def _warn_of_keys(self, reached: int, keys: npt.NDArray[np.int32]) -> None:
        most = np.bincount(keys).max() if len(keys) else 0
        warnings.warn(
            f"keys let an epoch visit {reached} of {self.n_rows} rows: one key is that of {most} "
            f"rows, and no batch of {self.batch_size} may hold two of them. Leave such keys out, "
            "and mask known positives in the loss",
            stacklevel=4,
        )

    def _count_visited(self, visited: int) -> None:
        """Set the number of rows an epoch visits, where so many can be planned."""
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
        """An order that depends neither on the seed, nor on the epoch, nor on refreshes."""
        return self._random_order(np.random.default_rng(trial))

    def _random_order(self, rng: np.random.Generator) -> Order:
        return self._separated(rng.permutation(self.n_rows).astype(np.int32))

    def _separated(self, rows: npt.NDArray[np.int32]) -> Order:
        """Rows rearranged so that no two of a batch share a key."""
        if self._keys is None:
            return rows, len(rows)
        order: Order = _core.separate(rows, self._keys, self._most_in_batch)
        return order

    def _hard_first(self, epoch: int) -> bool:
        """Whether the order of an epoch's batches is to be kept."""
        return False

    def __len__(self) -> int:
        """Number of batches this rank gets: exact, and the same every epoch."""
        return -(-self._visited // self.batch_size) // self._world_size

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of the current epoch as lists of row ids.

        Raises
        ------
        ValueError
            The epoch needs what pickling dropped; or the sampler was made with `world_size`, and
            accelerate, which deals batches to the processes itself, iterates.
        """
        if self._world_size > 1 and _dealt_by_accelerate():
            raise ValueError(
                f"the batches are dealt out twice, by this {type(self).__name__}, made with "
                f"world_size={self._world_size}, and by accelerate's prepare: leave out world_size "
                "and rank, or do not prepare the loader"
            )
        self._check_refreshed()
        return map(np.ndarray.tolist, self.plan())

    def _check_refreshed(self) -> None:
        """Warn if the epoch should not be random, but is."""
        return

    @property
    def rows_left_out(self) -> int:
        """Rows that an epoch leaves out, over all ranks: the same number every epoch."""
        return self.n_rows - self._visited

    def plan(self, epoch: int | None = None) -> list[npt.NDArray[np.int64]]:
        """Batches of an epoch as arrays, for this rank.

        Parameters
        ----------
        epoch : int, optional
            The current epoch by default. Other epochs are planned with the clusters or neighbours
            in use now.

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
        rng = np.random.default_rng(self._seeds(PLAN, epoch))
        rows, reached = self._order(epoch, rng)
        if reached < self._visited:
            rows, _ = max((self._reference(trial) for trial in range(_TRIALS)), key=itemgetter(1))
        order = rows[: self._visited].astype(np.int64)
        # A short last batch stays last. The others are shuffled: otherwise the smaller cluster, and
        # batches with more whole clusters, would come at the same time in every epoch.
        n_full = self._visited // self.batch_size
        starts = np.arange(0, self._visited, self._most_in_batch)
        if not self._hard_first(epoch):
            starts[:n_full] = rng.permutation(starts[:n_full])
        starts = starts[self._rank :: self._world_size]
        return [order[start : start + self.batch_size] for start in starts.tolist()]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration plans; cheap, and safe to repeat."""
        self.epoch = as_count(epoch, "epoch", 0)

    def state_dict(self) -> dict[str, Any]:
        """All that a restart needs besides the arguments, as ints and arrays.

        Where torch is loaded the arrays are its tensors, so that plain ``torch.load`` reads them;
        else they are NumPy's. `load_state_dict` takes either.

        It includes the clusters or neighbours in use, since their embeddings are gone after a
        restart; before the first refresh these arrays are empty. They are not copied: a refresh
        makes new ones, and nothing writes into the old.

        Raises
        ------
        ValueError
            This is a pickled copy, which lacks what is to be saved.
        """
        return {**self._identity(), "seed": self._seed, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state_dict`: the same epoch, clusters, and batches.

        Raises
        ------
        ValueError
            A name is missing; the state is of another number of rows, batch size, number of
            processes, `drop_last`, keys, or sizes of clusters or neighbourhoods; or its arrays do
            not fit the rows.
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
        """Raise ValueError if pickling dropped an array."""
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
        """What the length of an epoch depends on; a state fits only if all of it is equal."""
        return {
            "n_rows": self.n_rows,
            "batch_size": self.batch_size,
            "drop_last": int(self.drop_last),
            "world_size": self._world_size,
            "rows_left_out": self.rows_left_out,
        }

    def _seeds(self, *place: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self._seed, spawn_key=place)


class RefreshedBatchSampler(BatchSampler):
    """Base of samplers whose batches come, from some epoch on, from what `refresh` takes."""

    def __init__(self, schedule: Mapping[int, int], refresh_every: int, **common: Any) -> None:
        super().__init__(**common)
        self.refreshes = 0
        self._refreshed_epoch = -1
        self._started_over = False
        self._schedule = schedule  # the size that holds from each epoch on, sorted by epoch
        self._refresh_every = as_count(refresh_every, "refresh_every")
        self._warned = False

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

    @property
    def start_epoch(self) -> int | None:
        """The first epoch that is not random; None if all are."""
        return next((epoch for epoch, size in self._schedule.items() if size != 1), None)

    def _check_refreshed(self) -> None:
        if self._source is None and self._size_at(self.epoch) != 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"epoch {self.epoch} of this {type(self).__name__} is random, since refresh was "
                "not called yet: call it before each epoch that is due, or leave that to "
                "ClusterDataLoader or to a RefreshCallback",
                stacklevel=3,
            )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration plans; cheap, and safe to repeat.

        Going back to `start_epoch` or before it begins a new training: the next refresh is due at
        `start_epoch` and counts as the first. Until then the clusters or neighbours stay. To go on
        after a look at an earlier epoch, load the state from before it.
        """
        before = self.epoch
        super().set_epoch(epoch)
        back = self._started_over or self.epoch < before
        self._started_over = back and self.epoch <= (self.start_epoch or 0)

    def due(self, epoch: int) -> bool:
        """Whether to call `refresh` before an epoch is planned.

        True if the epoch is not random and there was no refresh yet, `refresh_every` says so, or
        the size changes; False if there was a refresh for this epoch already, in this training.
        """
        refreshed = epoch == self._refreshed_epoch and not self._started_over
        if self._size_at(epoch) == 1 or refreshed:
            return False
        return self._source is None or self._scheduled(epoch)

    def last_refresh(self, epochs: int) -> int:
        """The last of the epochs 0 .. epochs - 1 before which a refresh is due; -1 if none is.

        From then on nothing reads an embedding bank.
        """
        scheduled = (epoch for epoch in reversed(range(epochs)) if self._scheduled(epoch))
        return next(scheduled, -1)

    def _scheduled(self, epoch: int) -> bool:
        """Whether `refresh_every` or a change of size asks for a refresh."""
        since_start = epoch - next(iter(self._schedule))
        return self._size_at(epoch) != 1 and (
            since_start % self._refresh_every == 0 or epoch in self._schedule
        )

    def _refreshed(self, name: str, source: object) -> None:
        setattr(self, name, source)
        self._dropped -= {name}
        self.refreshes = 1 if self._started_over else self.refreshes + 1
        self._refreshed_epoch = self.epoch
        self._started_over = False

    def _seeds(self, *place: int) -> np.random.SeedSequence:
        refreshes = 0 if self._started_over else self.refreshes
        if place[0] == PLAN:  # random epochs are the same whatever clusters there are from before
            refreshes = 0 if self._size_at(place[1]) == 1 else self.refreshes
        return super()._seeds(*place, refreshes)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "refreshes": self.refreshes,
            "refreshed_epoch": self._refreshed_epoch,
            "started_over": int(self._started_over),
            "schedule": stored(np.array([*self._schedule.items()], np.int64)),
        }

    def _state_names(self) -> set[str]:
        return super()._state_names() | {"refreshes", "refreshed_epoch", "schedule"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "schedule" in state:  # else what is missing is told below
            there = dict(np.asarray(state["schedule"]).tolist())
            if there != self._schedule:
                raise ValueError(
                    f"state has the sizes {there} (by epoch), this sampler has {self._schedule}"
                )
        super().load_state_dict(state)

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self.refreshes = int(state["refreshes"])
        self._refreshed_epoch = int(state["refreshed_epoch"])
        self._started_over = bool(state.get("started_over", False))  # older states lack it


class _EpochProxy:
    """The `batch_sampler.sampler` on which trainers call `set_epoch`."""

    def __init__(self, batches: BatchSampler) -> None:
        self._batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Forward to the batch sampler."""
        self._batches.set_epoch(epoch)


def _dealt_by_accelerate() -> bool:
    """Whether accelerate's dealing to one of several processes is among the callers.

    It knows nothing of `world_size`, and passes nothing on by which a sampler could know it.
    """
    frame = sys._getframe(1)
    for _ in range(12):  # torch's loader, and a batch sampler of a loader's own, lie in between
        caller = frame.f_back
        if caller is None:
            return False
        frame = caller
        dealer = frame.f_locals.get("self")
        if type(dealer).__name__ == "BatchSamplerShard":
            return getattr(dealer, "num_processes", 1) > 1
        if type(dealer).__name__ == "DataLoaderDispatcher":  # dispatch_batches=True
            return getattr(getattr(dealer, "state", None), "num_processes", 1) > 1
    return False


def refuse_rebuild(arguments: tuple[Any, ...]) -> None:
    """Raise ValueError for the arguments by which Lightning rebuilds a batch sampler.

    With several processes it makes a new one of the same class around torch's DistributedSampler,
    which chooses the rows, so that nothing of the plan would be left.
    """
    kinds = type(arguments[0]).__mro__ if arguments else ()
    if any(kind.__module__.startswith("torch.utils.data") for kind in kinds):
        raise ValueError(
            f"the batches would be rebuilt around a {type(arguments[0]).__name__}, as Lightning "
            "does with several processes: make the sampler with world_size and rank, and the "
            "trainer with use_distributed_sampler=False"
        )


def stored(array: npt.NDArray[Any]) -> Any:
    """An array of a state: a tensor where torch is loaded, whose files hold no NumPy arrays."""
    torch = sys.modules.get("torch")
    if torch is None:
        return array
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def check_rows(name: str, rows: int, n_rows: int) -> None:
    if rows != n_rows:
        raise ValueError(f"{name} has {rows} rows, the sampler has {n_rows}")


def check_columns(source: Any) -> None:
    """ValueError for embeddings without a column, of which no row is nearer than another."""
    shape = tuple(np.shape(source))
    if shape[1:] == (0,):
        raise ValueError(
            f"source has shape {shape}, expected embeddings [n_rows, D] with D above 0"
        )


def as_share(value: Any, name: str) -> float:
    """Check a share of the rows."""
    if not isinstance(value, (int, float, np.floating)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a float")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}, expected a share from 0 to 1")
    return float(value)


def draw_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**64, dtype=np.uint64))


def _as_keys(keys: Any, n_rows: int) -> Keys:
    """The keys that several rows share; others cannot conflict."""
    if sp.issparse(keys):
        matrix = as_csr(keys, "keys", any_order=True)
        check_rows("keys", matrix.shape[0], n_rows)
        offsets, values = matrix.indptr, matrix.indices
    else:
        values = as_array(keys, "keys")
        refuse_names(values, "keys")
        if values.dtype.kind not in "iu":
            raise TypeError(f"keys has dtype {values.dtype}, expected integers")
        if values.ndim not in (1, 2):
            raise ValueError(f"keys has shape {values.shape}, expected [n_rows] or [n_rows, c]")
        check_rows("keys", len(values), n_rows)
        offsets = np.arange(n_rows + 1) * (values.size // n_rows)
    numbered: Keys = _core.number_keys(
        offsets.astype(np.int64, copy=False),
        contiguous(values.ravel()[: offsets[-1]], np.int64),
    )
    return numbered
