"""An approximate index of vectors, for searches that exact ones make too long."""

import importlib.util
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from tqdm import tqdm

from ngame.files import atomic_write
from ngame.topk import topk_arrays

Vectors = npt.NDArray[np.float32] | npt.NDArray[np.float16]

# Links a vector and breadth of the searches, when building and when asking: at these, 1 in 250 of
# the 100 nearest is missed where they were measured (bench/results/topk.md).
_LINKS, _BUILD_BREADTH, _BREADTH = 32, 200, 300
# Vectors that are widened to float32 at once.
_ROWS_AT_ONCE = 16_384


def require_hnswlib() -> None:
    """Say how to get the library where it is missing: before a long run, not after it.

    Raises
    ------
    ModuleNotFoundError
        hnswlib is not installed.
    """
    if importlib.util.find_spec("hnswlib") is None:
        raise ModuleNotFoundError('an HNSW index needs hnswlib: pip install "ngame[ann]"')


class HnswIndex:
    """The nearest of a set of vectors by dot product, nearly always: a graph that is walked.

    Hierarchical navigable small worlds (Malkov and Yashunin, 2016) by the library hnswlib. With
    more than one thread the graph, and so what it misses, differs a little from one building to
    the next.

    Parameters
    ----------
    vectors : float32 or float16 [m, dim], unit length or zero
    threads : 0 means the CPUs this process may use
    """

    def __init__(self, vectors: Vectors, *, threads: int = 0) -> None:
        graph = self._start(vectors, threads)
        graph.init_index(len(vectors), M=_LINKS, ef_construction=_BUILD_BREADTH, random_seed=0)
        starts = range(0, len(vectors), _ROWS_AT_ONCE)
        for start in tqdm(starts, "indexing", disable=None, delay=2, leave=False):
            part = vectors[start : start + _ROWS_AT_ONCE].astype(np.float32)
            graph.add_items(part, np.arange(start, start + len(part)))

    def _start(self, vectors: Vectors, threads: int) -> Any:
        require_hnswlib()
        import hnswlib

        self.vectors, self.threads = vectors, threads
        self._graph = hnswlib.Index("ip", vectors.shape[1])
        self._graph.set_num_threads(threads or len(os.sched_getaffinity(0)))
        return self._graph

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph, in hnswlib's own format, in one step."""
        with atomic_write(path) as aside:
            self._graph.save_index(str(aside))

    @classmethod
    def load(cls, path: str | os.PathLike[str], vectors: Vectors, *, threads: int = 0) -> Self:
        """Read a graph that `save` wrote, of the same vectors.

        Raises
        ------
        ValueError
            The file holds another number of vectors, or is no graph.
        """
        index = cls.__new__(cls)
        graph = index._start(vectors, threads)
        try:
            graph.load_index(str(Path(path)))
        except RuntimeError as error:
            raise ValueError(f"{path} holds no index: {error}") from None
        if graph.element_count != len(vectors):
            raise ValueError(f"{path} has {graph.element_count} vectors, the model {len(vectors)}")
        return index

    def search(
        self, queries: npt.NDArray[np.float32], k: int, *, drop: sp.csr_matrix | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Find the k nearest, as `ngame.topk_arrays` with ``metric="dot"`` does, but for misses.

        Parameters
        ----------
        queries : float32 [n, dim]
        k : vectors a query
        drop : csr_matrix of shape [n, m], optional
            (query, vector) pairs to leave out.

        Returns
        -------
        scores : float32 [n, k], best first; -infinity where there are fewer than k
        ids : int32 [n, k]; -1 where there are fewer than k
        """
        k = min(k, len(self.vectors))
        # The graph knows nothing of the pairs: as many more are asked for.
        most = 0 if drop is None or drop.nnz == 0 else int(np.diff(drop.indptr).max())
        asked = min(k + most, len(self.vectors))
        self._graph.set_ef(max(_BREADTH, 2 * asked))
        try:
            ids, distances = self._graph.knn_query(queries, asked)
        except RuntimeError:
            # A walk that ends before it met that many, as among copies of one vector.
            return topk_arrays(
                queries, self.vectors, k, metric="dot", drop=drop, threads=self.threads
            )
        ids, scores = ids.astype(np.int32), np.float32(1) - distances
        if most and drop is not None:
            rows = np.repeat(np.arange(len(ids)), asked)
            left_out = np.asarray(drop[rows, ids.ravel()]).reshape(ids.shape) != 0
            ids[left_out], scores[left_out] = -1, -np.inf
        best = np.lexsort((ids, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)
