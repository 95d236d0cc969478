"""The labels that a batch is compared with: those of its points, and those shared by all."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from ngame.loss import CooIndex
from ngame.positives import in_batch_positives, label_pool


class BatchLabels(NamedTuple):
    """Labels of a batch, and the entries of its [rows, labels] score matrix that matter."""

    pool: npt.NDArray[np.int32]
    """Label ids, ascending, each once: encode these."""
    known: CooIndex
    """Every known positive, which no row may take as a negative."""
    targets: CooIndex
    """The positives to rank up, a part of `known`."""

    def part(self, rows: slice) -> "BatchLabels":
        """The entries of some rows of the batch, with the same pool."""
        targets = self.targets.part(rows)
        known = targets if self.known is self.targets else self.known.part(rows)
        return BatchLabels(self.pool, known, targets)


def batch_labels(
    labels: sp.csr_matrix,
    rows: npt.NDArray[Any],
    *,
    known: sp.csr_matrix | None = None,
    shared: npt.NDArray[Any] | None = None,
    rng: np.random.Generator | None = None,
    device: torch.device | str = "cpu",
) -> BatchLabels:
    """Collect the labels of a batch, its known positives and its targets.

    Every label stands in the pool once, however many rows brought it along, and whether or not it
    was drawn as well: so it is encoded once, and the mask of known positives acts on all.

    Parameters
    ----------
    labels : CSR matrix of shape [n, l], indices sorted
        Stored entries are the positives to train on.
    rows : integer array of shape [b]
        The points of the batch.
    known : CSR matrix of shape [n, l], optional
        All that is no negative, `labels` included; `labels` itself if not given.
    shared : integer array, optional
        Labels for all rows beside their own, such as ``SharedRandom(l, 512).draw(step).ids``.
    rng : numpy.random.Generator, optional
        Draws one positive a row, uniformly, as NGAME does. All of them are targets if not given.
        A row without a label has no target.
    device : where the results' tensors go

    Raises
    ------
    IndexError
        A row or label is out of range.

    Examples
    --------
    >>> labels = sp.csr_matrix(np.array([[1, 0, 1, 0], [0, 0, 1, 0]]))
    >>> pool, known, targets = batch_labels(labels, np.array([1]), shared=np.array([0, 2]))
    >>> pool.tolist(), known.columns.tolist(), targets.columns.tolist()
    ([0, 2], [1], [1])
    """
    known = labels if known is None else known
    if rng is None:
        pool, positives = label_pool(labels, rows)
        targets = CooIndex.of(positives)
        if shared is None and known is labels:
            targets = targets.to(device)
            return BatchLabels(pool, targets, targets)
    else:
        begin = labels.indptr[rows]
        count = labels.indptr[np.asarray(rows) + 1] - begin
        places = begin + (rng.random(len(rows)) * count).astype(np.int64)
        labelled = np.flatnonzero(count)
        pool, columns = np.unique(labels.indices[places[labelled]], return_inverse=True)
        shape = len(rows), len(pool)
        targets = CooIndex(torch.from_numpy(labelled), torch.from_numpy(columns), shape)
    if shared is not None:
        own, pool = pool, np.union1d(pool, shared).astype(pool.dtype)
        moved = torch.from_numpy(np.searchsorted(pool, own))
        targets = CooIndex(targets.rows, moved[targets.columns], (len(rows), len(pool)))
    masked = CooIndex.of(in_batch_positives(known, rows, pool), device)
    return BatchLabels(pool, masked, targets.to(device))
