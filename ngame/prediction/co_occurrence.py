"""What the probable labels of a text say of others, by how training points have them together."""

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame.shortlist import keep_topk

# Of each label: most labels that are kept of those it occurs with, fewer where all would be more
# than so many. Of each text: its most probable labels, which speak for others.
_KEPT, _KEPT_IN_ALL, _SPEAKERS = 200, 100_000_000, 20
# A label speaks as if it had so many more points, which have no other label: rare ones say little.
_MORE_POINTS = 2
# What is added to a spread before its logarithm is taken, and the most that counts: beyond it, a
# label that is often found with others must not pass one that the text itself speaks of.
_LEAST, _MOST = 1e-3, 0.1
_LABELS_PER_CHUNK = 4096


def label_shares(labels: sp.csr_matrix, *, threads: int = 0) -> sp.csr_matrix:
    """Shares of a label's points that have another label.

    Parameters
    ----------
    labels : csr_matrix [N, L], of training points; its values mean nothing
    threads : 0 means the CPUs this process may use

    Returns
    -------
    float32 csr_matrix [L, L]
        The entry (i, j) is the number of points that have both i and j over two more than the
        number that have i. Of a row the 200 highest, the one of i itself among them; with more than
        500,000 labels fewer, so that all take at most 0.8 GB.
    """
    ones = np.ones(labels.nnz, np.float32)
    points = sp.csr_matrix((ones, labels.indices, labels.indptr), shape=labels.shape)
    of_label = points.T.tocsr()
    weights = (1 / (np.diff(of_label.indptr) + _MORE_POINTS)).astype(np.float32)
    kept = max(1, min(_KEPT, _KEPT_IN_ALL // max(1, len(weights))))
    parts = []
    for start in range(0, len(weights), _LABELS_PER_CHUNK):
        chunk = slice(start, start + _LABELS_PER_CHUNK)
        together = sp.diags(weights[chunk]) @ (of_label[chunk] @ points)
        parts.append(keep_topk(together, kept, threads=threads))
    return sp.vstack(parts, format="csr")


def spread(
    probabilities: sp.csr_matrix, shares: sp.csr_matrix, *, threads: int = 0
) -> sp.csr_matrix:
    """Let the probable labels of texts speak for those they occur with, and for themselves.

    Parameters
    ----------
    probabilities : float32 csr_matrix [n, L]; the 20 highest of a row count
    shares : as `label_shares` gives them

    Returns
    -------
    float32 csr_matrix [n, L], indices ascending
        For a label j the sum, over labels i, of i's probability times the share of (i, j).
    """
    found = sp.csr_matrix(keep_topk(probabilities, _SPEAKERS, threads=threads) @ shares)
    found.sort_indices()
    return found


def log_spread(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The feature that is fused: the logarithm of a spread, of at most a tenth."""
    return np.log(np.minimum(values, np.float32(_MOST)) + np.float32(_LEAST))
