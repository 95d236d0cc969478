"""Batches of neighbourhoods: Sample4Geo."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame import _core
from ngame.arrays import MAX_THREADS, Csr, as_array, as_count, contiguous, on_gpu, renamed
from ngame.batches.base import (
    Order,
    RefreshedBatchSampler,
    as_share,
    check_columns,
    check_rows,
    draw_seed,
    stored,
)
from ngame.dispatch import in_reach, on_host
from ngame.neighbours import embedding_neighbours, graph_neighbours


class NeighbourBatchSampler(RefreshedBatchSampler):
    """Plan the batches of every epoch so that a row meets its neighbours: Sample4Geo.

    A batch is filled as in Sample4Geo (ICCV 2023, arXiv 2303.11851): with a random row that the
    epoch has not used yet, its `nearest` nearest neighbours, and `drawn` of its other neighbours at
    random, leaving out used rows; then with the next such row, until the batch is full. So the
    first batches of an epoch are whole neighbourhoods, and the last ones consist of leftovers.
    Unlike the published code this does not give up after some number of failures, keeps the last
    batch unless told otherwise, and treats row 0 like any other.

    Keys, several processes, purity, length, state, and pickling are as in ClusterBatchSampler.
    A row that shares a key with a batch is passed over and goes to another batch.

    Parameters
    ----------
    n_rows : int
        Number of training rows; batches hold ids from 0 to n_rows - 1.
    batch_size : int
        Rows a batch, on each rank.
    nearest : int
        How many of its nearest neighbours follow a seed row.
    drawn : int
        How many of its other neighbours follow, drawn anew every epoch.
    neighbour_range : int
        How many neighbours of a row are considered.
    start_epoch : int
        First epoch with neighbourhoods; batches before it are random.
    refresh_every : int
        Epochs from one refresh to the next, counted from `start_epoch`.
    random_share : float
        Share of the rows, from 0 to 1 and rounded to whole rows a batch, that come without their
        neighbours.
    shuffle_batches : bool
        Shuffle the batches. Otherwise every epoch goes from neighbourhoods to leftovers.
    keys, drop_last, seed, world_size, rank
        As in ClusterBatchSampler.
    threads : int
        Threads for the search of neighbours; 0 means the CPUs this process may use.

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
        An argument is out of its range, or no rank would get a full batch.

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
        random_share: float = 0.0,
        shuffle_batches: bool = False,
        keys: Csr | npt.ArrayLike | None = None,
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
        self._random_rows = round(as_share(random_share, "random_share") * self._most_in_batch)
        self._range = min(self._range, self.n_rows)
        self._shuffle_batches = bool(shuffle_batches)
        self._threads = as_count(threads, "threads", 0, MAX_THREADS)
        self._settle()

    @property
    def _source(self) -> npt.NDArray[np.int32] | None:
        return self.neighbours

    def refresh(self, source: Csr | npt.ArrayLike) -> None:
        """Take new neighbours, which the next iteration uses.

        Parameters
        ----------
        source : array [n_rows, k] of integers, CSR matrix [n_rows, n_rows], or embeddings
            Ids, nearest first, -1 for none, as `haversine_neighbours` gives them; only the first
            `neighbour_range` columns are kept; int32 ids of just these are not copied, a mapped
            file stays one. Or the pair of scores and ids that `topk_arrays`
            and ``torch.topk`` give, the scores of which are not used. Or a graph, whose stored
            entries are edges, larger for nearer rows. Or a float32 or float16 array [n_rows, D],
            whose rows' neighbours are found exactly, by cosine. Or a torch tensor instead of an
            array, on any device, in bfloat16 too: embeddings on a GPU are searched there.

        Raises
        ------
        TypeError
            `source` is none of these.
        ValueError
            It does not have n_rows rows, has another shape, NaN or infinity, or no column.
        IndexError
            A neighbour is not in -1 .. n_rows - 1.
        """
        if isinstance(source, tuple) and len(source) == 2:
            source = _without_itself(as_array(on_host(source[1]), "source[1]"))
        if sp.issparse(source):
            graph: Any = source
            check_rows("source", graph.shape[0], self.n_rows)
            with renamed(graph="source"):
                neighbours = graph_neighbours(graph, self._range, threads=self._threads)
        else:
            array: Any = in_reach(source)
            stays = on_gpu(array) and hasattr(array, "detach") and array.is_floating_point()
            if not stays:
                array = as_array(on_host(array), "source")
            if not array.ndim:
                raise TypeError(
                    f"source is a {type(source).__name__}, expected neighbours or embeddings"
                )
            if array.ndim != 2:
                raise ValueError(f"source has shape {tuple(array.shape)}, expected two dimensions")
            check_rows("source", len(array), self.n_rows)
            if not stays and array.dtype.kind in "iu":
                neighbours = self._checked(array)
            else:
                check_columns(array)
                with renamed(queries="source", items="source"):
                    neighbours = embedding_neighbours(array, self._range, threads=self._threads)
        self._refreshed("neighbours", neighbours)

    def _checked(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        ids = ids[:, : self._range]
        bad = (ids < -1) | (ids >= self.n_rows)
        if bad.any():
            row, rank = np.argwhere(bad)[0].tolist()
            raise IndexError(
                f"source[{row}, {rank}] is {ids[row, rank]}, out of range for {self.n_rows}"
            )
        return contiguous(ids, np.int32)

    def state_dict(self) -> dict[str, Any]:
        self._require("neighbours")
        here = self.neighbours
        return {
            **super().state_dict(),
            "neighbours": stored(np.empty((0, 0), np.int32) if here is None else here),
        }

    def _state_names(self) -> set[str]:
        return super()._state_names() | {"neighbours"}

    def _load(self, state: Mapping[str, Any]) -> None:
        neighbours = None
        if len(state["neighbours"]):
            check_rows("neighbours of the state", len(state["neighbours"]), self.n_rows)
            neighbours = self._checked(np.asarray(state["neighbours"]))
        super()._load(state)
        self.neighbours = neighbours
        self._dropped -= {"neighbours"}

    def _neighbours_at(self, epoch: int) -> npt.NDArray[np.int32] | None:
        """The neighbours that an epoch uses; None where its batches are random."""
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
        seed = draw_seed(rng)
        return self._separated(
            _core.neighbour_order(
                neighbours,
                min(self._nearest, self.n_rows),
                min(self._drawn, self.n_rows),
                self._most_in_batch,
                self._random_rows,
                self._keys,
                seed,
            )
        )


def _without_itself(ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Ids by a search of all rows among themselves, which finds each row first."""
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise TypeError(
            f"source is a pair of which the second is of {ids.dtype} {ids.shape}, expected ids"
        )
    own = ids == np.arange(len(ids))[:, np.newaxis]
    last = np.argsort(own, axis=1, kind="stable")
    return np.take_along_axis(np.where(own, -1, ids), last, axis=1)
