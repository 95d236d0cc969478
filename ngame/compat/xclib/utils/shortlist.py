"""The nearest items of queries."""

import os
import zipfile
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ngame.arrays import as_count, as_matrix, as_threads
from ngame.compat.xclib.utils.sparse import normalize
from ngame.files import atomic_write
from ngame.topk import topk_arrays

_EXACT, _APPROXIMATE = ("brute", "brute_gpu"), ("hnswlib", "hnsw")


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
        try:
            with open(fname, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                items = arrays["items"]
                self.space, self.num_neighbours = str(arrays["space"]), int(arrays["neighbours"])
        except (KeyError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{os.fspath(fname)} does not hold an index: {error}") from error
        if self.approximate:
            from ngame.prediction.hnsw import HnswIndex

            graph = f"{os.fspath(fname)}.graph"
            self._graph = HnswIndex.load(graph, items)
        self.items = items


class Shortlist:
    """The nearest items of queries, found exactly or approximately.

    Parameters
    ----------
    method : "brute", "brute_gpu", "hnswlib" or "hnsw"
        The first two search exactly, with `ngame.topk_arrays`; the others search a graph of
        hnswlib, which must be installed.
    num_neighbours : int
    M, efC, efS
        No effect: the graph is that of `ngame.prediction.hnsw.HnswIndex`.
    num_threads : int
        At most this many, and never more than the CPUs this process may use, which 0 or less means.
    space : "cosine" or "ip"
        Inner product.

    Attributes
    ----------
    index : Index

    Raises
    ------
    ValueError
        `method` or `space` is unknown.

    Notes
    -----
    pyxclib only prints a line if `method` is unknown. Its "brute" has no "ip". Its "brute_gpu" uses
    the inner product even if `space` is "cosine", and gives 1 minus the similarity unless raw
    scores are asked for, so the nearest come last; it has no result on a CPU, needs memory for all
    scores at once, and is not moved to its device when loaded. `num_neighbours` of one query stays
    for the next ones, and hnswlib and nmslib must be installed for every method.
    """

    def __init__(
        self,
        method: str,
        num_neighbours: int,
        M: int = 50,
        efC: int = 100,
        efS: int = 100,
        num_threads: int = 24,
        space: str = "cosine",
    ) -> None:
        if method not in _EXACT + _APPROXIMATE:
            names = ", ".join(_EXACT + _APPROXIMATE)
            raise ValueError(f"method is {method!r}, expected one of {names}")
        if space not in ("cosine", "ip"):
            raise ValueError(f'space is {space!r}, expected "cosine" or "ip"')
        self.method, self.space = method, space
        self.num_neighbours = as_count(num_neighbours, "num_neighbours")
        self.M, self.efC, self.efS = M, efC, efS
        self.num_threads = num_threads
        self.reset()

    def reset(self) -> None:
        """Forget the items."""
        threads = as_threads(0)
        threads = threads if self.num_threads <= 0 else min(self.num_threads, threads)
        approximate = self.method in _APPROXIMATE
        self.index = Index(self.num_neighbours, self.space, approximate, threads)

    def fit(self, data: Any) -> None:
        """Take the items, a float array of shape [m, d]; float64 is narrowed to float32.

        Raises
        ------
        TypeError
            `data` has no floats.
        ValueError
            It has another number of dimensions, NaN or infinity.
        ModuleNotFoundError
            The method needs hnswlib, which is not installed.
        """
        self.index.fit(data)

    def query(
        self, data: Any, return_raw_score: bool = False, *, num_neighbours: int | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Find the nearest items of every query.

        Parameters
        ----------
        data : float array of shape [n, d]
        return_raw_score : bool
            Give distances, 1 minus the similarity, instead; no effect with "brute_gpu", whose raw
            score is the similarity.
        num_neighbours : int, optional
            Replaces that of the object for this query.

        Returns
        -------
        ids : int64 array of shape [n, num_neighbours]
        similarities : float32 array of shape [n, num_neighbours]
            Nearest first, ties by lower id.

        Raises
        ------
        ValueError
            Nothing is fitted, there are fewer items, shapes do not agree, or a row has NaN or
            infinity.
        """
        ids, scores = self.index.search(data, num_neighbours)
        raw = return_raw_score and self.method != "brute_gpu"
        return ids, 1 - scores if raw else scores

    def save(self, fname: str | os.PathLike[str]) -> None:
        """Write the items to `fname`, in NumPy's npz format, and a graph to ``fname.graph``."""
        self.index.save(fname)

    def load(self, fname: str | os.PathLike[str]) -> None:
        """Read what `save` wrote; the method must be the same."""
        self.index.load(fname)

    @property
    def model_size(self) -> float:
        """Size of the items in MiB."""
        return 0.0 if self.index.items is None else self.index.items.nbytes / 2**20


def _float32(data: Any) -> Any:
    array = np.asarray(data)
    return array.astype(np.float32) if array.dtype == np.float64 else array
