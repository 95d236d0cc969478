"""Losses over the scores of a batch's points against its label pool, known positives masked.

Both take the whole [S, U] score matrix (S points, U labels of the pool) and two lists of its
entries: `known`, every entry that is a positive (from the whole of Y), which no row may take as a
negative; and `targets`, the positives that are to be ranked up, a part of `known`.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F

# Score of an entry that is no negative. Finite, so that a row without a single negative has a
# defined (zero) gradient; far below any cosine divided by a temperature.
_MASKED = -1e30


class CooIndex(NamedTuple):
    """Entries of a matrix: `rows` and `columns` are int64 tensors of one length."""

    rows: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, matrix: sp.csr_matrix, device: torch.device | str = "cpu") -> "CooIndex":
        """The stored entries of a CSR matrix, row by row."""
        rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
        return cls(
            torch.from_numpy(rows).to(device),
            torch.from_numpy(matrix.indices.astype(np.int64)).to(device),
        )


def triplet(
    scores: torch.Tensor,
    known: CooIndex,
    targets: CooIndex,
    *,
    margin: float = 0.3,
    negatives: int = 10,
    temperature: float = 0.1,
) -> torch.Tensor:
    """Triplet margin loss over each point's hardest negatives (NGAME, first stage).

    A target with score p pays ``sum_n w_n * max(0, n - p + margin)`` over the `negatives` highest
    scores n of its row that are not known positives. The weights are a softmax of n over
    `temperature` among the negatives that violate the margin: the others get none, and so do the
    missing ones of a row that has fewer. The loss is the mean over the rows that have a target,
    of the mean over the row's targets.

    Parameters
    ----------
    scores : float tensor of shape [S, U], cosines
    known, targets : CooIndex of `scores`
    margin : by how much a positive must beat a negative to pay nothing
    negatives : how many of the hardest a row meets
    temperature : of the softmax that weighs them

    Returns
    -------
    float32 scalar
    """
    scores = scores.float()
    hardest = _negatives(scores, known).topk(min(negatives, scores.shape[1]), dim=1).values
    hardest = hardest[targets.rows]
    positive = scores[targets.rows, targets.columns][:, None]
    hinge = (hardest - positive + margin).clamp_min(0)
    violates = hinge > 0
    weights = torch.softmax((hardest / temperature).masked_fill(~violates, _MASKED), dim=1)
    return _mean_over_rows((hinge * weights * violates).sum(dim=1), targets)


def decoupled_softmax(
    scores: torch.Tensor, known: CooIndex, targets: CooIndex, *, temperature: float = 0.05
) -> torch.Tensor:
    """Softmax loss of each positive against the negatives only (DEXML, ICLR 2024).

    A target with score p pays ``log(1 + sum_n exp((n - p) / temperature))`` over the scores n of
    its row that are not known positives, so that the positives of a point do not compete. The
    loss is the mean over the rows that have a target, of the mean over the row's targets.

    Parameters
    ----------
    scores : float tensor of shape [S, U], cosines
    known, targets : CooIndex of `scores`
    temperature : divides the scores

    Returns
    -------
    float32 scalar
    """
    scores = scores.float() / temperature
    negative = torch.logsumexp(_negatives(scores, known), dim=1)
    positive = scores[targets.rows, targets.columns]
    return _mean_over_rows(F.softplus(negative[targets.rows] - positive), targets)


def _negatives(scores: torch.Tensor, known: CooIndex) -> torch.Tensor:
    return scores.index_put(tuple(known), scores.new_tensor(_MASKED))


def _mean_over_rows(losses: torch.Tensor, targets: CooIndex) -> torch.Tensor:
    """Mean over the rows of `targets` of the mean over a row's `losses`; 0 without a target."""
    if len(losses) == 0:
        return losses.sum()
    count = torch.bincount(targets.rows)
    return (losses / count[targets.rows]).sum() / torch.count_nonzero(count)
