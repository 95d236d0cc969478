"""Lists of neighbours, nearest first: from coordinates, from embeddings, from a graph."""

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame.arrays import as_array, as_count, as_csr, as_threads, canonical
from ngame.dispatch import on_host
from ngame.shortlist import drop_pairs, keep_topk
from ngame.topk import topk_arrays


def haversine_neighbours(
    latitude: npt.ArrayLike, longitude: npt.ArrayLike, k: int, *, threads: int = 0
) -> npt.NDArray[np.int32]:
    """Find the k nearest places of every place, by the great-circle (haversine) distance.

    A longer chord between two points of a sphere means a longer arc, so a k-d tree over points of
    the unit sphere is exact. It works in float64: cosines of float32 vectors cannot tell apart
    places that are a few kilometres from each other.

    Parameters
    ----------
    latitude, longitude : array of shape [n]
        Degrees.
    k : int
        1 or more.
    threads : int
        0 means the CPUs this process may use.

    Returns
    -------
    int32 array of shape [n, k]
        Ids, nearest first, without the place itself; ties in no defined order. Where there are
        fewer than k others, the tail of a row is -1.

    Raises
    ------
    ValueError
        Shapes differ, there are no places, k is not positive, or a value is NaN, infinite, or a
        latitude beyond 90 degrees.

    Examples
    --------
    >>> haversine_neighbours([0, 0, 0, 80], [179, -178, 100, 100], 2).tolist()
    [[1, 2], [0, 2], [0, 3], [2, 0]]
    """
    from scipy.spatial import cKDTree  # only here: its import takes a tenth of a second

    places = {}
    for name, value in (("latitude", latitude), ("longitude", longitude)):
        angles = np.asarray(value)
        if angles.dtype.kind not in "iuf":
            raise TypeError(f"{name} has dtype {angles.dtype}, expected degrees")
        if angles.ndim != 1 or not len(angles):
            raise ValueError(f"{name} has shape {angles.shape}, expected [n]")
        bad = ~np.isfinite(angles) | ((name == "latitude") & (np.abs(angles) > 90))
        if bad.any():
            place = int(np.argmax(bad))
            raise ValueError(f"{name}[{place}] is {angles[place]}, expected degrees")
        places[name] = np.radians(angles.astype(np.float64))
    latitude, longitude = places["latitude"], places["longitude"]
    if len(latitude) != len(longitude):
        raise ValueError(f"latitude has {len(latitude)} places, longitude has {len(longitude)}")
    k = as_count(k, "k")
    parallel = np.cos(latitude)  # radius of the circle of latitude
    points = np.stack(
        [parallel * np.cos(longitude), parallel * np.sin(longitude), np.sin(latitude)], axis=1
    )
    _, ids = cKDTree(points).query(points, k + 1, workers=as_threads(threads))
    # A place is its own first neighbour, unless more than k others are at the same point.
    own = ids == np.arange(len(points))[:, np.newaxis]
    own[~own.any(axis=1), -1] = True
    found = ids[~own].reshape(-1, k)
    return np.where(found < len(points), found, -1).astype(np.int32)


def embedding_neighbours(x: npt.ArrayLike, k: int, *, threads: int = 0) -> npt.NDArray[np.int32]:
    """Find the k rows with the highest cosine for every row, without the row itself.

    Parameters
    ----------
    x : float32 or float16 array of shape [n, d]; or a tensor on a CUDA device, searched there
    k : int
        Where there are fewer than k other rows, the result has fewer columns.
    threads : int
        0 means the CPUs this process may use.

    Returns
    -------
    int32 array of shape [n, min(k, n - 1)]
        Best first, ties by lower id.

    Raises
    ------
    TypeError, ValueError
        As `topk_arrays`.
    """
    rows = np.shape(x)[0]
    width = min(as_count(k, "k"), rows - 1)
    if width < 1:
        return np.empty((rows, 0), np.int32)
    itself = sp.identity(rows, np.bool_, "csr")
    _, ids = topk_arrays(x, x, width, drop=itself, threads=threads)
    return as_array(on_host(ids), "ids")


def graph_neighbours(graph: Any, k: int, *, threads: int = 0) -> npt.NDArray[np.int32]:
    """List the k heaviest edges of every row of a weighted graph, without loops.

    Parameters
    ----------
    graph : CSR matrix of shape [n, n]
        Every stored entry is an edge. The higher its value, the nearer the neighbour.
    k : int
        1 or more.
    threads : int
        0 means the CPUs this process may use.

    Returns
    -------
    int32 array of shape [n, k]
        Nearest first, ties by lower id. Where a row has fewer neighbours, its tail is -1.

    Raises
    ------
    TypeError
        `graph` is no CSR matrix.
    ValueError
        It is not square, or has NaN.
    """
    matrix = canonical(as_csr(graph, "graph"))
    rows, columns = matrix.shape
    if rows != columns:
        raise ValueError(f"graph has shape {matrix.shape}, expected as many rows as columns")
    if matrix.dtype not in (np.float32, np.float64):
        matrix = matrix.astype(np.float64)
    others = drop_pairs(matrix, sp.identity(rows, np.bool_, "csr"), threads=threads)
    kept = keep_topk(others, as_count(k, "k"), threads=threads)
    counts = np.diff(kept.indptr)
    row_of = np.repeat(np.arange(rows), counts)
    # The sort is stable and columns ascend: ties go to the lower id.
    nearest_first = np.lexsort((-kept.data, row_of))
    ids = np.full((rows, k), -1, np.int32)
    ids[np.arange(k) < counts[:, np.newaxis]] = kept.indices[nearest_first]
    return ids
