"""Losses over the score matrix of a batch, with known positives masked.

Both losses take the full [S, U] score matrix of S points and the U labels of the batch's pool, and
two sets of its entries. `known` are all entries that are positives in the label matrix: they never
count as negatives. `targets` are the positives to rank up, a subset of `known`.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from ngame.transfer import sent

MASKED = -1e30
"""Score of a masked entry: far below any cosine divided by a temperature, but finite, so that a row
without negatives has a zero gradient instead of NaN."""


class CooIndex(NamedTuple):
    """Positions of entries in a matrix: `rows` and `columns`, int64 tensors of the same length.

    `shape` is that of the matrix, where it is known: the losses check that the scores have it.
    `CooIndex.of` makes one of a CSR matrix, such as `ngame.label_pool` gives, or of a mask. The
    losses send those on the host to a GPU themselves, and do not wait for it.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    shape: tuple[int, int] | None = None

    @classmethod
    def of(
        cls, matrix: sp.csr_matrix | torch.Tensor, device: torch.device | str | None = None
    ) -> "CooIndex":
        """Positions of the stored entries of a CSR matrix, or of a mask's True, row by row.

        Parameters
        ----------
        matrix : CSR matrix, or dense bool tensor, of shape [n, c]
            A GPU that has the tensor is waited for.
        device : torch.device or str, optional
            Where the result goes; if not given, it stays where `matrix` is.

        Raises
        ------
        TypeError
            `matrix` is something else.
        ValueError
            It is a tensor of other than two dimensions.
        """
        if isinstance(matrix, torch.Tensor):
            if matrix.dtype != torch.bool or matrix.layout != torch.strided:
                kind = f"{matrix.layout} tensor of {matrix.dtype}"
                raise TypeError(f"matrix is a {kind}, expected a CSR matrix or a dense bool tensor")
            if matrix.ndim != 2:
                raise ValueError(f"matrix has shape {list(matrix.shape)}, expected two dimensions")
            there = matrix.device if device is None else device
            rows, columns = torch.nonzero(matrix.to(there), as_tuple=True)
            return cls(rows, columns, (matrix.shape[0], matrix.shape[1]))
        if not sp.issparse(matrix) or matrix.format != "csr":
            kind = type(matrix).__name__
            raise TypeError(
                f"matrix is a {kind}, expected a scipy.sparse CSR matrix or array, or a bool tensor"
            )
        row_of = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
        columns = matrix.indices[: len(row_of)].astype(np.int64)  # behind them is room to spare
        places = torch.from_numpy(row_of), torch.from_numpy(columns)
        index = cls(*places, (matrix.shape[0], matrix.shape[1]))
        return index if device is None else index.to(device)

    def to(self, device: torch.device | str) -> "CooIndex":
        """The same positions on a device; a GPU is not waited for."""
        return CooIndex(sent(self.rows, device), sent(self.columns, device), self.shape)

    def part(self, rows: slice) -> "CooIndex":
        """The entries of the rows from `rows.start` to `rows.stop`, which count from 0."""
        within = (self.rows >= rows.start) & (self.rows < rows.stop)
        shape = None if self.shape is None else (rows.stop - rows.start, self.shape[1])
        return CooIndex(self.rows[within] - rows.start, self.columns[within], shape)


def check_index(index: CooIndex, name: str, rows: int, columns: int) -> None:
    """Check positions in a score matrix of shape [rows, columns], an argument of this name.

    Raises
    ------
    TypeError
        It is no `CooIndex`.
    ValueError
        It has positions in a matrix of another shape.
    """
    if not isinstance(index, CooIndex):
        raise TypeError(
            f"{name} is a {type(index).__name__}, expected a CooIndex: CooIndex.of({name}) of a "
            "CSR matrix or a bool tensor, or what ngame.negatives.batch_labels gives"
        )
    if index.shape is not None and index.shape != (rows, columns):
        raise ValueError(
            f"{name} has positions in a matrix of shape {list(index.shape)}, the scores have "
            f"shape {[rows, columns]}: expected a score for each point and each label of the "
            "batch's pool, in the pool's order"
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

    The loss of a target with score p is ``sum_n w_n * max(0, n - p + margin)`` over the
    `negatives` highest scores n in its row that are not known positives. The weights are a softmax
    of ``n / temperature`` over the negatives that violate the margin; all others have weight 0. A
    row with fewer negatives uses those it has. Losses are averaged over the targets of each row,
    then over the rows that have a target.

    A loss that stays at the margin means that all vectors have become the same: start with
    `decoupled_softmax` or a lower learning rate.

    Parameters
    ----------
    scores : float tensor of shape [S, U], cosines
    known, targets : CooIndex of `scores`
    margin : a negative scored below the positive by more than this costs nothing
    negatives : number of hardest negatives per row
    temperature : temperature of the softmax that weights them

    Returns
    -------
    float32 scalar

    Raises
    ------
    TypeError
        `known` or `targets` is no `CooIndex`, such as a CSR matrix or a mask.
    ValueError
        The temperature is not positive, `negatives` is below 1, or `known` or `targets` are
        positions in a matrix of another shape.
    """
    _check_temperature(temperature)
    if negatives < 1:
        raise ValueError(f"negatives is {negatives}, expected 1 or more")
    known, targets = _beside(scores, known, targets)
    scores = scores.float()
    hardest = _negatives(scores, known).topk(min(negatives, scores.shape[1]), dim=1).values
    hardest = hardest[targets.rows]
    positive = scores[targets.rows, targets.columns][:, None]
    hinge = (hardest - positive + margin).clamp_min(0)
    violates = hinge > 0
    weights = torch.softmax((hardest / temperature).masked_fill(~violates, MASKED), dim=1)
    return mean_over_rows((hinge * weights * violates).sum(dim=1), targets, len(scores))


def decoupled_softmax(
    scores: torch.Tensor, known: CooIndex, targets: CooIndex, *, temperature: float = 0.05
) -> torch.Tensor:
    """Softmax loss of each positive against the negatives only (DEXML, ICLR 2024).

    The loss of a target with score p is ``log(1 + sum_n exp((n - p) / temperature))`` over the
    scores n in its row that are not known positives, so the positives of a point do not compete.
    Losses are averaged over the targets of each row, then over the rows that have a target.

    Parameters
    ----------
    scores : float tensor of shape [S, U], cosines
    known, targets : CooIndex of `scores`
    temperature : the scores are divided by it

    Returns
    -------
    float32 scalar

    Raises
    ------
    TypeError
        `known` or `targets` is no `CooIndex`, such as a CSR matrix or a mask.
    ValueError
        The temperature is not positive, or `known` or `targets` are positions in a matrix of
        another shape.
    """
    _check_temperature(temperature)
    known, targets = _beside(scores, known, targets)
    scores = scores.float() / temperature
    negative = torch.logsumexp(_negatives(scores, known), dim=1)
    positive = scores[targets.rows, targets.columns]
    return mean_over_rows(F.softplus(negative[targets.rows] - positive), targets, len(scores))


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0")


def _beside(scores: torch.Tensor, known: CooIndex, targets: CooIndex) -> tuple[CooIndex, CooIndex]:
    """Both, after a check of their shapes, on the device of the scores."""
    if scores.ndim != 2:
        raise ValueError(f"scores has shape {list(scores.shape)}, expected two dimensions")
    check_index(known, "known", *scores.shape)
    check_index(targets, "targets", *scores.shape)
    there = known.to(scores.device)
    return there, there if targets is known else targets.to(scores.device)


def _negatives(scores: torch.Tensor, known: CooIndex) -> torch.Tensor:
    return scores.index_put((known.rows, known.columns), scores.new_full((), MASKED))


def mean_over_rows(losses: torch.Tensor, targets: CooIndex, rows: int) -> torch.Tensor:
    """Average `losses` over the targets of each of the rows, then over those that have any.

    0 if there are no targets.
    """
    if len(losses) == 0:
        return losses.sum()
    # Not `bincount`, which waits for the GPU to learn how long its result is.
    count = torch.zeros(rows, dtype=torch.int64, device=losses.device)
    count.index_add_(0, targets.rows, torch.ones_like(targets.rows))
    return (losses / count[targets.rows]).sum() / torch.count_nonzero(count)
