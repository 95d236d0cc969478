"""The nearest items of queries, and the labels of the nearest points or centroids."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame.arrays import as_count, as_csr
from ngame.cluster import balanced_clusters
from ngame.compat.xclib.utils import dense
from ngame.compat.xclib.utils.ann import Index, at_most
from ngame.compat.xclib.utils.clustering import drawn_seed
from ngame.compat.xclib.utils.sparse import normalize, topk
from ngame.files import atomic_write, reading

_EXACT, _APPROXIMATE = ("brute", "brute_gpu"), ("hnswlib", "hnsw")


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
        approximate = self.method in _APPROXIMATE
        self.index = Index(self.num_neighbours, self.space, approximate, at_most(self.num_threads))

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


class ShortlistCentroids(Shortlist):
    """The labels whose centroids are nearest to a query.

    A label's centroid is the mean of its points' vectors. A label of many points may have several
    centroids beside it: those of balanced clusters of its points.

    Parameters
    ----------
    method, num_neighbours, M, efC, efS, num_threads, space
        As for `Shortlist`.
    verbose : no effect
    num_clusters : int
        More centroids for each label of more than `threshold` points; 1 means none.
    threshold : int
    pad_val : float
        Similarity where a row has fewer labels, as where several centroids are one label's; the id
        there is the number of labels.

    Attributes
    ----------
    pad_ind : int
        The number of labels, -1 before `fit`.
    mapping : int64 array or None
        The label of every centroid, where a label has several.

    Notes
    -----
    The k-means of pyxclib is not balanced, and its `mapping` has labels of exactly `threshold`
    points too. Clusters are drawn from NumPy's global generator.
    """

    def __init__(
        self,
        method: str = "hnsw",
        num_neighbours: int = 300,
        M: int = 100,
        efC: int = 300,
        efS: int = 300,
        num_threads: int = 24,
        space: str = "cosine",
        verbose: bool = True,
        num_clusters: int = 1,
        threshold: int = 7500,
        pad_val: float = -10000,
    ) -> None:
        super().__init__(method, num_neighbours, M, efC, efS, num_threads, space)
        self.num_clusters = as_count(num_clusters, "num_clusters")
        self.threshold, self.pad_val = threshold, pad_val
        self.pad_ind = -1
        self.mapping: npt.NDArray[np.int64] | None = None

    def fit(self, features: Any, labels: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Take the points.

        Parameters
        ----------
        features : float array of shape [n, d]
        labels : sparse matrix of shape [n, l]
            Nonzero values are the points' labels; a label without points has a centroid of zeros.
        """
        labels = _positives(labels)
        features = np.asarray(features, np.float32)
        centroids = [dense.compute_centroid(features, labels, reduction="mean")]
        self.pad_ind, self.mapping = labels.shape[1], None
        if self.num_clusters > 1:
            points = labels.T.tocsr()
            many = np.flatnonzero(np.diff(points.indptr) > self.threshold)
            for label in many:
                own = features[points.indices[points.indptr[label] : points.indptr[label + 1]]]
                found = balanced_clusters(
                    own,
                    n_clusters=min(self.num_clusters, len(own)),
                    seed=drawn_seed(),
                    threads=at_most(self.num_threads),
                )
                sums = np.add.reduceat(own[found.order], found.offsets[:-1], axis=0)
                centroids.append(sums / np.diff(found.offsets)[:, np.newaxis])
            if len(many):
                owners = [np.arange(labels.shape[1])]
                owners += [
                    np.full(len(part), label)
                    for label, part in zip(many, centroids[1:], strict=True)
                ]
                self.mapping = np.concatenate(owners)
        super().fit(np.concatenate(centroids).astype(np.float32))

    def query(
        self, data: Any, return_raw_score: bool = False, *, num_neighbours: int | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Find the nearest labels of every query; otherwise as `Shortlist.query`.

        A label with several centroids has the similarity of the nearest one.
        """
        if self.mapping is None:
            return super().query(data, return_raw_score, num_neighbours=num_neighbours)
        ids, scores = super().query(data, num_neighbours=num_neighbours)
        found = self.mapping[ids]
        # Nearest first, so the first of several is the one to keep.
        by_label = np.argsort(found, axis=1, kind="stable")
        labels = np.take_along_axis(found, by_label, 1)
        again = np.zeros(found.shape, np.bool_)
        np.put_along_axis(again, by_label[:, 1:], labels[:, 1:] == labels[:, :-1], 1)
        found[again], scores[again] = self.pad_ind, self.pad_val
        order = np.argsort(again, axis=1, kind="stable")
        found, scores = np.take_along_axis(found, order, 1), np.take_along_axis(scores, order, 1)
        raw = return_raw_score and self.method != "brute_gpu"
        return found, 1 - scores if raw else scores

    def save(self, fname: str | os.PathLike[str]) -> None:
        """Write the centroids to ``fname.index`` and the rest to ``fname.metadata``, as npz."""
        mapping = np.zeros(0, np.int64) if self.mapping is None else self.mapping
        _write(fname, {"mapping": mapping, "pad_ind": self.pad_ind, "pad_val": self.pad_val})
        super().save(f"{os.fspath(fname)}.index")

    def load(self, fname: str | os.PathLike[str]) -> None:
        """Read what `save` wrote; the method must be the same."""
        found = _read(fname, "mapping", "pad_ind", "pad_val")
        self.mapping = found["mapping"] if len(found["mapping"]) else None
        self.pad_ind, self.pad_val = int(found["pad_ind"]), float(found["pad_val"])
        super().load(f"{os.fspath(fname)}.index")

    def purge(self, fname: str | os.PathLike[str]) -> None:
        """Remove the files of `save`."""
        _remove(fname)


class ShortlistInstances(Shortlist):
    """The labels of the points nearest to a query.

    A label's score is the sum of the similarities of those points that have it, divided by the
    largest such sum of the row.

    Parameters
    ----------
    method, M, efC, num_threads, space
        As for `Shortlist`.
    num_neighbours : int
        Labels to give for each query.
    efS : int
        Points to look at.
    verbose : no effect
    pad_val : float
        Score where there are fewer labels; the id there is the number of labels.

    Attributes
    ----------
    pad_ind : int or None
        The number of labels.

    Notes
    -----
    In pyxclib labels are in no order if there are no more than `num_neighbours`, best first here.
    """

    def __init__(
        self,
        method: str = "hnsw",
        num_neighbours: int = 300,
        M: int = 100,
        efC: int = 300,
        efS: int = 300,
        num_threads: int = 24,
        space: str = "cosine",
        verbose: bool = False,
        pad_val: float = -10000,
    ) -> None:
        super().__init__(method, efS, M, efC, efS, num_threads, space)
        self._labels_wanted = as_count(num_neighbours, "num_neighbours")
        self.labels: sp.csr_matrix | None = None
        self.pad_ind: int | None = None
        self.pad_val = pad_val

    def fit(self, features: Any, labels: Any) -> None:  # type: ignore[override]
        """Take the points: those with a label, and with a vector that is not zero.

        Parameters
        ----------
        features : float array of shape [n, d]
        labels : sparse matrix of shape [n, l]
        """
        labels, features = _positives(labels), np.asarray(features)
        if features.shape[0] != labels.shape[0]:
            raise ValueError(f"features has {len(features)} rows, labels has {labels.shape[0]}")
        valid = (features != 0).any(axis=1) & (np.diff(labels.indptr) > 0)
        super().fit(features[valid])
        self.labels, self.pad_ind = labels[valid], labels.shape[1]

    def query(
        self, data: Any, return_raw_score: bool = False, *, num_neighbours: int | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Find the labels of the nearest points.

        Parameters
        ----------
        data : float array of shape [n, d]
        return_raw_score : no effect
        num_neighbours : int, optional
            Replaces the number of labels of the object for this query.

        Returns
        -------
        ids : int64 array of shape [n, num_neighbours], best first, ties by lower id
        scores : float32 array of shape [n, num_neighbours], 1 for the best
        """
        if self.labels is None or self.pad_ind is None or self.index.items is None:
            raise ValueError("nothing is fitted yet")
        wanted = self._labels_wanted if num_neighbours is None else num_neighbours
        points = min(self.index.num_neighbours, len(self.index.items))
        ids, scores = self.index.search(data, points)
        offsets = np.arange(len(ids) + 1) * points
        shape = len(ids), len(self.index.items)
        near = sp.csr_matrix((scores.ravel(), ids.ravel(), offsets), shape=shape)
        found = as_csr(sp.csr_matrix(near @ self.labels), "labels")
        ids, values = topk(
            normalize(found, norm="max"),
            as_count(wanted, "num_neighbours"),
            pad_ind=self.pad_ind,
            pad_val=self.pad_val,
            return_values=True,
        )
        return ids, values

    def save(self, fname: str | os.PathLike[str]) -> None:
        """Write the points to ``fname.index`` and the rest to ``fname.metadata``, as npz."""
        if self.labels is None:
            raise ValueError("nothing is fitted yet")
        matrix = self.labels
        _write(
            fname,
            {
                "indptr": matrix.indptr,
                "indices": matrix.indices,
                "pad_ind": matrix.shape[1],
                "pad_val": self.pad_val,
                "wanted": self._labels_wanted,
            },
        )
        super().save(f"{os.fspath(fname)}.index")

    def load(self, fname: str | os.PathLike[str]) -> None:
        """Read what `save` wrote; the method must be the same."""
        found = _read(fname, "indptr", "indices", "pad_ind", "pad_val", "wanted")
        self.pad_ind, self.pad_val = int(found["pad_ind"]), float(found["pad_val"])
        self._labels_wanted = int(found["wanted"])
        ones = np.ones(len(found["indices"]), np.float32)
        shape = len(found["indptr"]) - 1, self.pad_ind
        self.labels = sp.csr_matrix((ones, found["indices"], found["indptr"]), shape=shape)
        super().load(f"{os.fspath(fname)}.index")

    def purge(self, fname: str | os.PathLike[str]) -> None:
        """Remove the files of `save`."""
        _remove(fname)


def _positives(labels: Any) -> sp.csr_matrix:
    """The nonzero values of a sparse matrix as float32 ones."""
    if not sp.issparse(labels):
        raise TypeError(f"labels is a {type(labels).__name__}, expected a scipy.sparse matrix")
    # A copy, since SciPy's comparison sums duplicates in place.
    return sp.csr_matrix(labels.copy() != 0, dtype=np.float32)


def _write(fname: str | os.PathLike[str], content: dict[str, Any]) -> None:
    with atomic_write(f"{os.fspath(fname)}.metadata") as aside, open(aside, "wb") as file:
        np.savez(file, **content)


def _read(fname: str | os.PathLike[str], *names: str) -> dict[str, npt.NDArray[Any]]:
    path = f"{os.fspath(fname)}.metadata"
    with (
        reading(path, "does not hold a shortlist"),
        open(path, "rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        return {name: arrays[name] for name in names}


def _remove(fname: str | os.PathLike[str]) -> None:
    for suffix in (".index", ".index.graph", ".metadata"):
        Path(f"{os.fspath(fname)}{suffix}").unlink(missing_ok=True)
