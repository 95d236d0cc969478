"""Graphs of labels: random walks over shared points, and their normalization."""

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame.arrays import as_count, as_csr, as_ids
from ngame.compat.xclib.utils.sparse import _map, retain_topk

Ids = npt.NDArray[np.int32]


def normalize_graph(X: Any) -> sp.csr_matrix:
    """Divide every value by the square roots of the sums of its row and of its column.

    Parameters
    ----------
    X : sparse matrix of values from 0 up

    Returns
    -------
    csr_matrix without stored zeros
        A row or column of zeros stays empty.

    Raises
    ------
    TypeError
        X is no sparse matrix.
    ValueError
        A sum is negative.

    Notes
    -----
    pyxclib divides by zero where a row or column is empty, with a warning.
    """
    if not sp.issparse(X):
        raise TypeError(f"X is a {type(X).__name__}, expected a scipy.sparse matrix")
    scales = []
    for axis in (1, 0):
        sums = np.asarray(X.sum(axis=axis), np.float64).ravel()
        if (sums < 0).any():
            what = "row" if axis else "column"
            raise ValueError(f"X has a negative sum in {what} {int(np.argmax(sums < 0))}")
        scales.append(
            sp.diags(np.divide(1, np.sqrt(sums), out=np.zeros_like(sums), where=sums > 0))
        )
    rows, columns = scales
    kind = X.dtype if X.dtype.kind == "f" else np.float64
    normalized = sp.csr_matrix(rows @ X @ columns).astype(kind)
    normalized.eliminate_zeros()
    return normalized


def _random_walk(
    q_rng: Any,
    q_lbl: Any,
    l_rng: Any,
    l_qry: Any,
    walk_to: int,
    p_reset: float,
    start: int,
    end: int,
) -> tuple[Ids, npt.NDArray[np.float32]]:
    """Walk from each of the labels start .. end - 1, and give the labels that it comes to.

    A step goes from a label to one of its points, and from there to one of the point's labels, both
    drawn uniformly from NumPy's global generator. The first step leaves from the label itself, and
    so, with probability `p_reset`, does every later one; otherwise it goes on.

    Parameters
    ----------
    q_rng, q_lbl : int arrays
        `indptr` and `indices` of the CSR matrix of points and labels.
    l_rng, l_qry : int arrays
        The same of its transpose.
    walk_to : int
        Steps of each walk.
    p_reset : float
    start, end : int

    Returns
    -------
    labels : int32 array of shape [(end - start) * walk_to], walk after walk
    ones : float32 array of that shape

    Raises
    ------
    ValueError
        A label has no point, so that no step leaves it; `p_reset` is not from 0 to 1.
    """
    if not 0 <= p_reset <= 1:
        raise ValueError(f"p_reset is {p_reset}, expected from 0 to 1")
    firsts = np.arange(start, end)
    walk_to = as_count(walk_to, "walk_to")
    alone = np.diff(l_rng)[firsts] == 0
    if alone.any():
        raise ValueError(f"label {firsts[np.argmax(alone)]} has no point to walk to")
    walks = np.empty((len(firsts), walk_to), np.int32)
    here = firsts
    for step in range(walk_to):
        if step:
            back = np.random.random(len(firsts)) < p_reset  # noqa: NPY002
            here = np.where(back, firsts, here)
        here = _neighbour(q_rng, q_lbl, _neighbour(l_rng, l_qry, here))
        walks[:, step] = here
    return walks.ravel(), np.ones(walks.size, np.float32)


def _neighbour(offsets: Any, ids: Any, rows: Any) -> Any:
    """One of the entries of each row, drawn uniformly; no row is empty."""
    counts = offsets[rows + 1] - offsets[rows]
    drawn = (np.random.random(len(rows)) * counts).astype(np.int64)  # noqa: NPY002
    return ids[offsets[rows] + drawn]


class RandomWalk:
    """Random walks from label to label, over the points that they share.

    Parameters
    ----------
    Y : sparse matrix of shape [points, labels]
        Nonzero values are labels of points.
    valid_labels : int array, optional
        Labels that walks start from and come to; by default all that have a point.

    Attributes
    ----------
    Y : csr_matrix of the valid labels and the points that have one
    """

    def __init__(self, Y: Any, valid_labels: Any = None) -> None:
        if not sp.issparse(Y):
            raise TypeError(f"Y is a {type(Y).__name__}, expected a scipy.sparse matrix")
        self.num_inst, self.num_lbls = Y.shape
        labels = sp.csr_matrix(Y, copy=True)
        labels.eliminate_zeros()
        if valid_labels is None:
            valid_labels = np.flatnonzero(labels.getnnz(axis=0))
        self.valid_labels = as_ids(valid_labels, "valid_labels")
        labels = labels[:, self.valid_labels]
        self.Y = as_csr(labels[labels.getnnz(axis=1) > 0], "Y")

    def simulate(
        self, walk_to: int = 100, p_reset: float = 0.2, k: int | None = None, b_size: int = 1000
    ) -> sp.csr_matrix:
        """Count how often a walk from each label comes to every other.

        Parameters
        ----------
        walk_to : int
            Steps of each walk.
        p_reset : float
            Probability that a step starts at the walk's first label again.
        k : int, optional
            Keep the k labels that a walk comes to most often; the first label itself always stays.
        b_size : int
            Labels that walk at once, which bounds the memory.

        Returns
        -------
        float32 csr_matrix of shape [labels, labels]
            1 on the diagonal where a walk does not come back; rows of other than valid labels are
            empty. The draws are those of NumPy's global generator.

        Raises
        ------
        ValueError
            As `_random_walk`, or a number is less than 1.

        Notes
        -----
        In pyxclib the draws cannot be seeded, and without resets a walk begins anywhere.
        """
        b_size = as_count(b_size, "b_size")
        points = self.Y.T.tocsr()
        count = self.Y.shape[1]
        parts = []
        for start in range(0, count, b_size):
            end = min(start + b_size, count)
            found, ones = _random_walk(
                self.Y.indptr, self.Y.indices, points.indptr, points.indices,
                walk_to, p_reset, start=start, end=end,
            )  # fmt: skip
            rows = np.repeat(np.arange(end - start), walk_to)
            visits = sp.csr_matrix((ones, (rows, found)), shape=(end - start, count))
            own = visits.diagonal(k=start)
            if k is not None:
                visits = retain_topk(visits, copy=False, k=k)
            visits = visits.tolil()
            visits.setdiag(np.maximum(own, 1), k=start)
            parts.append(visits.tocsr())
        walked = (
            sp.vstack(parts, format="csr") if parts else sp.csr_matrix((0, 0), dtype=np.float32)
        )
        shape = self.num_lbls, self.num_lbls
        rows_mapped = _map(walked, self.valid_labels, (self.num_lbls, count), axis=0)
        return _map(rows_mapped, self.valid_labels, shape, axis=1)
