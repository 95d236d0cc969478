"""Indexes of vectors: exact, or a graph of hnswlib."""

import os
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ngame.arrays import as_count, as_matrix, as_threads
from ngame.compat.xclib.utils.sparse import normalize
from ngame.files import atomic_write, reading
from ngame.topk import topk_arrays


class Index:
    """Items and their search, as `Shortlist.index`.

    Parameters
    ----------
    num_neighbours : int
    space : "cosine" or "ip"
    approximate : bool
        Whether to search a graph of hnswlib instead of exactly.
    threads : int
    """

    def __init__(self, num_neighbours: int, space: str, approximate: bool, threads: int) -> None:
        self.num_neighbours, self.space = num_neighbours, space
        self.approximate, self.threads = approximate, threads
        self.items: npt.NDArray[Any] | None = None
        self._graph: Any = None

    def fit(self, data: Any) -> None:
        """Take the items, an array of shape [m, d]; float64 is narrowed to float32."""
        items = as_matrix(_float32(data), "data")
        if not np.isfinite(items).all():
            raise ValueError("data has NaN or infinity")
        if self.approximate:
            from ngame.prediction.hnsw import HnswIndex

            if self.space == "cosine":
                items = normalize(items, copy=True)
            self._graph = HnswIndex(items, threads=self.threads)
        self.items = items

    def predict(
        self, data: Any, num_neighbours: int | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Give ids and distances of the nearest items, as `Shortlist.query` does."""
        ids, scores = self.search(data, num_neighbours)
        return ids, 1 - scores

    def search(
        self, data: Any, num_neighbours: int | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Give ids and similarities of the nearest items, nearest first."""
        if self.items is None:
            raise ValueError("nothing is fitted yet")
        k = self.num_neighbours if num_neighbours is None else num_neighbours
        k = as_count(k, "num_neighbours")
        queries = as_matrix(_float32(data), "data")
        if self._graph is None:
            metric: Literal["cosine", "dot"] = "cosine" if self.space == "cosine" else "dot"
            scores, ids = topk_arrays(queries, self.items, k, metric=metric, threads=self.threads)
            return ids.astype(np.int64), scores
        if queries.shape[1] != self.items.shape[1]:
            raise ValueError(f"data has {queries.shape[1]} columns, not {self.items.shape[1]}")
        if k > len(self.items):
            raise ValueError(f"num_neighbours is {k}, there are {len(self.items)} items")
        if not np.isfinite(queries).all():
            raise ValueError("data has NaN or infinity")
        queries = queries.astype(np.float32)
        scores, ids = self._graph.search(
            normalize(queries) if self.space == "cosine" else queries, k, threads=self.threads
        )
        return ids.astype(np.int64), scores

    def save(self, fname: str | os.PathLike[str]) -> None:
        """Write the items to `fname`, in NumPy's npz format, and a graph to ``fname.graph``."""
        if self.items is None:
            raise ValueError("nothing is fitted yet")
        if self._graph is not None:
            self._graph.save(f"{os.fspath(fname)}.graph")
        with atomic_write(fname) as aside, open(aside, "wb") as file:
            np.savez(file, items=self.items, space=self.space, neighbours=self.num_neighbours)

    def load(self, fname: str | os.PathLike[str]) -> None:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            The file does not hold an index.
        """
        with (
            reading(fname, "does not hold an index"),
            open(fname, "rb") as file,
            np.load(file, allow_pickle=False) as arrays,
        ):
            items = arrays["items"]
            self.space, self.num_neighbours = str(arrays["space"]), int(arrays["neighbours"])
        if self.approximate:
            from ngame.prediction.hnsw import HnswIndex

            graph = f"{os.fspath(fname)}.graph"
            self._graph = HnswIndex.load(graph, items)
        self.items = items


class HNSW(Index):
    """Approximate nearest neighbours.

    Parameters
    ----------
    M, efC, efS
        No effect: the graph is that of `ngame.prediction.hnsw.HnswIndex`.
    num_neighbours : int
    num_threads : int
        At most this many, and never more than the CPUs this process may use, which 0 or less means.
    space : "cosine" or "ip"

    Notes
    -----
    pyxclib needs nmslib, which has no builds for today's Python, where this one needs hnswlib; it
    gives `efS` columns, of which those from `num_neighbours` on are zeros.
    """

    def __init__(
        self,
        M: int,
        efC: int,
        efS: int,
        num_neighbours: int,
        num_threads: int,
        space: str = "cosine",
    ) -> None:
        super().__init__(num_neighbours, space, True, at_most(num_threads))
        self.M, self.efC, self.efS, self.num_threads = M, efC, efS, num_threads

    def fit(self, data: Any, print_progress: bool = True) -> None:
        """Take the items, an array of shape [m, d]; `print_progress` has no effect."""
        super().fit(data)

    def predict(  # type: ignore[override]
        self, data: Any, efS: int | None = None, num_neighbours: int | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Give ids and distances of the nearest items; `efS` has no effect."""
        return super().predict(data, num_neighbours)


def at_most(num_threads: int) -> int:
    """The number of threads: no more than there are CPUs, which 0 or less means."""
    threads = as_threads(0)
    return threads if num_threads <= 0 else min(num_threads, threads)


def _float32(data: Any) -> Any:
    array = np.asarray(data)
    return array.astype(np.float32) if array.dtype == np.float64 else array
