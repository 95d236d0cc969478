"""An approximate index, for searches where an exact one takes too long."""

import importlib.util
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame.arrays import as_threads
from ngame.files import atomic_write
from ngame.progress import Progress
from ngame.topk import topk_arrays

# hnswlib's M, ef_construction and ef. As measured in bench/results/topk.md, searches then miss 1 in
# 250 of the 100 nearest.
_LINKS, _EF_CONSTRUCTION, _EF = 32, 200, 300
# Vectors converted to float32 per chunk.
_ROWS_PER_CHUNK = 16_384


def require_hnswlib() -> None:
    """Check that hnswlib is installed, so that a long run fails at its start and not at its end.

    Raises
    ------
    ModuleNotFoundError
        hnswlib is not installed; the message says how to install it.
    """
    if importlib.util.find_spec("hnswlib") is None:
        raise ModuleNotFoundError('an HNSW index needs hnswlib: pip install "ngame[ann]"')


class HnswIndex:
    """Approximate nearest neighbours by dot product.

    A hierarchical navigable small world graph (Malkov and Yashunin, 2016), built by hnswlib. With
    more than one thread the graph, and so the neighbours it misses, differ slightly between builds.

    Parameters
    ----------
    vectors : float32 or float16 [m, dim], unit length or zero
    threads : threads of the build; 0 means the CPUs this process may use
    """

    def __init__(self, vectors: npt.NDArray[np.floating[Any]], *, threads: int = 0) -> None:
        graph = self._new_graph(vectors)
        graph.set_num_threads(as_threads(threads))
        graph.init_index(len(vectors), M=_LINKS, ef_construction=_EF_CONSTRUCTION, random_seed=0)
        starts = range(0, len(vectors), _ROWS_PER_CHUNK)
        for start in Progress("indexing", len(starts), "chunk").over(starts):
            part = vectors[start : start + _ROWS_PER_CHUNK].astype(np.float32)
            graph.add_items(part, np.arange(start, start + len(part)))

    def _new_graph(self, vectors: npt.NDArray[np.floating[Any]]) -> Any:
        require_hnswlib()
        import hnswlib

        self.vectors = vectors
        self._graph = hnswlib.Index("ip", vectors.shape[1])
        return self._graph

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph in hnswlib's format."""
        with atomic_write(path) as aside:
            self._graph.save_index(str(aside))

    @classmethod
    def load(cls, path: str | os.PathLike[str], vectors: npt.NDArray[np.floating[Any]]) -> Self:
        """Read a graph that `save` wrote for the same vectors.

        Raises
        ------
        ValueError
            The file is not a graph, or has another number of vectors.
        """
        index = cls.__new__(cls)
        graph = index._new_graph(vectors)
        try:
            graph.load_index(str(Path(path)))
        except RuntimeError as error:
            raise ValueError(f"{path} is not an index: {error}") from None
        if graph.element_count != len(vectors):
            raise ValueError(f"{path} has {graph.element_count} vectors, the model {len(vectors)}")
        return index

    def search(
        self,
        queries: npt.NDArray[np.float32],
        k: int,
        *,
        drop: sp.csr_matrix | None = None,
        threads: int = 0,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Find nearly all of what ``ngame.topk_arrays(..., metric="dot")`` finds.

        Parameters
        ----------
        queries : float32 [n, dim]
        k : vectors per query
        drop : csr_matrix of shape [n, m], optional
            (query, vector) pairs to leave out.
        threads : 0 means the CPUs this process may use

        Returns
        -------
        scores : float32 [n, k], best first; -infinity where a query has fewer than k
        ids : int32 [n, k]; -1 where a query has fewer than k
        """
        k = min(k, len(self.vectors))
        # The graph cannot leave pairs out: ask for as many more.
        most = 0 if drop is None or drop.nnz == 0 else int(np.diff(drop.indptr).max())
        asked = min(k + most, len(self.vectors))
        self._graph.set_ef(max(_EF, 2 * asked))
        try:
            ids, distances = self._graph.knn_query(queries, asked, num_threads=as_threads(threads))
        except RuntimeError:
            # The graph reached fewer than that many, as can happen among duplicates.
            return topk_arrays(queries, self.vectors, k, metric="dot", drop=drop, threads=threads)
        ids, scores = ids.astype(np.int32), np.float32(1) - distances
        if most and drop is not None:
            rows = np.repeat(np.arange(len(ids)), asked)
            dropped = np.asarray(drop[rows, ids.ravel()]).reshape(ids.shape) != 0
            ids[dropped], scores[dropped] = -1, -np.inf
        best = np.lexsort((ids, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)
