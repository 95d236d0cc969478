"""What is left out of a comparison because it may be no negative.

A filter looks at a `Comparison` and says which of its entries to leave out. Several compose by OR
in `ContrastiveLoss`, which also leaves out by itself what can never be a negative: a row's own
labelled positives, its own query, and empty places. The score of a labelled positive is no entry of
a comparison, so that no filter can take it away.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from ngame.arrays import as_csr, canonical
from ngame.loss import CooIndex
from ngame.negatives.schedule import Number, Schedule, value_at
from ngame.negatives.sources import Ids
from ngame.positives import in_batch_positives
from ngame.transfer import sent

Side = Literal["query", "item"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Anchors against candidates, as a filter sees them.

    Attributes
    ----------
    anchor, candidate : "query" or "item"
        What the two are. Anchors that are items are the labelled positives of `queries`.
    queries : int64 array [n]
        The query that each row of the comparison belongs to.
    positives : int64 array [t]
        All labelled positives of the rows; `owners`, int64 array [t], has the row of each.
    ids : int64 array [c] or [n, c]
        Of the candidates; negative where there is no id.
    scores : float tensor [n, c]
        The model's, without gradient.
    positive_scores : float tensor [t]
        Of the labelled positives, without gradient.
    step : int
        The step of the training, for what follows a schedule.
    """

    anchor: Side
    candidate: Side
    queries: Ids
    positives: Ids
    owners: Ids
    ids: Ids
    scores: torch.Tensor
    positive_scores: torch.Tensor
    step: int = 0

    @property
    def anchors(self) -> Ids:
        """Ids of the anchors, int64 [n]."""
        return self.queries if self.anchor == "query" else self.positives

    def mask(self, rows: npt.NDArray[Any], columns: npt.NDArray[Any]) -> torch.Tensor:
        """A bool tensor [n, c] that is true at these entries; a GPU is not waited for."""
        mask = self.scores.new_zeros(self.scores.shape, dtype=torch.bool)
        places = self._sent(rows), self._sent(columns)
        return mask.index_put_(places, mask.new_ones(()))

    def with_id(self) -> torch.Tensor:
        """Which candidates have an id, bool tensor [c] or [n, c]."""
        return self._sent(self.ids >= 0)

    def lowest(self, scores: torch.Tensor) -> torch.Tensor:
        """Each row's lowest of [t] scores of the labelled positives, [n, 1]; infinite without."""
        lowest = scores.new_full((len(self.queries),), torch.inf)
        return lowest.scatter_reduce(0, self._sent(self.owners), scores, "amin")[:, None]

    def _sent(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return sent(torch.from_numpy(values), self.scores.device)


class Filter(Protocol):
    """Whatever says which entries of a comparison to leave out."""

    def __call__(self, comparison: Comparison) -> torch.Tensor:
        """Bool tensor [n, c], true where an entry is to be left out."""
        ...


class KnownPositives:
    """Leave out known positives: NGAME's mask, and that of SimKGC (ACL 2022).

    An item is left out where it is a known positive of the row's query, a query where one of the
    row's labelled positives is a known positive of it.

    Parameters
    ----------
    labels : CSR matrix of shape [queries, items]
        Stored entries are the known positives.

    Raises
    ------
    IndexError
        When called with an id out of range.
    """

    def __init__(self, labels: sp.csr_matrix) -> None:
        labels = canonical(as_csr(labels, "labels"))
        ones = np.ones(len(labels.indices), np.int8)
        self._labels = sp.csr_matrix((ones, labels.indices, labels.indptr), labels.shape)

    def __call__(self, comparison: Comparison) -> torch.Tensor:
        """Bool tensor [n, c], true where an entry is to be left out."""
        ids = np.maximum(comparison.ids, 0)  # what has no id is taken out again below
        items = comparison.candidate == "item"
        for name, given, most in (
            ("query", comparison.queries, self._labels.shape[0]),
            ("item", comparison.positives, self._labels.shape[1]),
            ("item" if items else "query", ids, self._labels.shape[1 if items else 0]),
        ):
            if given.size and given.max() >= most:
                raise IndexError(
                    f"{name} id {given.max()} is out of range for {most} of the known positives"
                )
        if ids.ndim == 2:
            found = self._listed(comparison, ids)
        elif items:
            known = CooIndex.of(in_batch_positives(self._labels, comparison.queries, ids))
            found = comparison.mask(known.rows.numpy(), known.columns.numpy())
        else:
            known = CooIndex.of(in_batch_positives(self._labels, ids, comparison.positives))
            found = comparison.mask(comparison.owners[known.columns.numpy()], known.rows.numpy())
        return found & comparison.with_id()

    def _listed(self, comparison: Comparison, ids: Ids) -> torch.Tensor:
        """The same where every row has its own candidates, pair by pair."""
        if comparison.candidate == "item":
            hits = stored(self._labels, comparison.queries[:, None], ids)
            owners = np.arange(len(ids))
        else:
            owners = comparison.owners
            hits = stored(self._labels, ids[owners], comparison.positives[:, None])
        pairs, places = np.nonzero(hits)
        return comparison.mask(owners[pairs], places)


class Guide:
    """Leave out what a guide finds nearer than the labelled positive (GISTEmbed, 2024).

    The guide is a model whose vectors were computed beforehand, such as a larger one; nothing of it
    runs in training. An entry is left out where the guide's score of anchor and candidate is higher
    than its score of the row's query and labelled positive (of several, the lowest score) less the
    margin. Ties stay.

    Parameters
    ----------
    queries : float array or tensor of shape [queries, d]
    items : float array or tensor of shape [items, d]
        Scores are dot products: give vectors of unit length for cosines. Only the rows of a batch
        are read, so both can be memory-mapped files, in float16 as well.
    margin : float or Schedule
        "absolute": subtracted from the positive's score. "relative": the share of the positive's
        score (its magnitude) that is subtracted; 0.05 is the 95 % of NV-Retriever (2024).
        Larger margins leave out more, minus infinity leaves out nothing.
    mode : "absolute" or "relative"

    Raises
    ------
    TypeError
        `queries` or `items` is no array or tensor.
    ValueError
        Another mode; the widths differ. When called, a vector has NaN or infinity.
    IndexError
        When called with an id out of range.
    """

    def __init__(
        self,
        queries: Any,
        items: Any,
        *,
        margin: Number = 0.0,
        mode: Literal["absolute", "relative"] = "absolute",
    ) -> None:
        if mode not in ("absolute", "relative"):
            raise ValueError(f"mode is {mode!r}, expected 'absolute' or 'relative'")
        shapes = _shape(queries, "queries"), _shape(items, "items")
        if shapes[0][1] != shapes[1][1]:
            raise ValueError(f"queries has shape {shapes[0]}, items {shapes[1]}: widths differ")
        self._vectors = {"query": queries, "item": items}
        self.margin, self.mode = margin, mode

    def __call__(self, comparison: Comparison) -> torch.Tensor:
        """Bool tensor [n, c], true where an entry is to be left out."""
        device = comparison.scores.device
        queries = _rows(self._vectors["query"], comparison.queries, device)
        positives = _rows(self._vectors["item"], comparison.positives, device)
        anchors = queries if comparison.anchor == "query" else positives
        candidates = _rows(self._vectors[comparison.candidate], comparison.ids, device)
        owners = sent(torch.from_numpy(comparison.owners), device)
        bound = comparison.lowest((queries[owners] * positives).sum(1))
        margin = value_at(self.margin, comparison.step)
        bound = bound - (margin if self.mode == "absolute" else margin * bound.abs())
        return (_products(anchors, candidates) > bound) & comparison.with_id()


class SelfGuide:
    """Leave out what the model in training itself finds much nearer than the labelled positive.

    Such a candidate is more often an unknown positive than a hard negative, once the model has
    learned something: let the margin be infinite for the first steps.

    Parameters
    ----------
    margin : float or Schedule
        By how much a score must be higher than that of the row's labelled positive (of several,
        the lowest).
    """

    def __init__(self, margin: Number = 0.1) -> None:
        self.margin = margin

    def __call__(self, comparison: Comparison) -> torch.Tensor:
        """Bool tensor [n, c], true where an entry is to be left out."""
        bound = comparison.lowest(comparison.positive_scores)
        return comparison.scores > bound + value_at(self.margin, comparison.step)


class NearCopies:
    """Leave out items that are nearly the labelled positive: another edition, a plural, a typo.

    Parameters
    ----------
    items : float array or tensor of shape [items, d]
        Vectors of unit length in which near copies are near. Only rows of a batch are read.
    threshold : float or Schedule
        A cosine with a labelled positive of the row that is higher leaves an item out. It depends
        on the model: with MiniLM 0.8 found 87 to 96 % of injected copies at a precision of 94 to
        100 %, and the default half of them (bench/results/false_negatives.md). The default suits
        models whose cosines are all high, too, such as E5. `masked_shares` of the loss tells how
        much it leaves out.

    Raises
    ------
    TypeError
        `items` is no array or tensor.
    ValueError
        The threshold is not above 0, or a plain number above 1. When called, a vector has NaN or
        infinity, or a length other than 1 (or 0, of an empty text).
    IndexError
        When called with an id out of range.
    """

    def __init__(self, items: Any, threshold: Number = 0.95) -> None:
        _shape(items, "items")
        highest = math.inf if isinstance(threshold, Schedule) else 1
        if not 0 < value_at(threshold, 0) <= highest:
            raise ValueError(f"threshold is {threshold}, expected a cosine above 0, at most 1")
        self._items = items
        self.threshold = threshold

    def __call__(self, comparison: Comparison) -> torch.Tensor:
        """Bool tensor [n, c], true where an entry is to be left out."""
        if comparison.candidate == "query":
            return torch.zeros_like(comparison.scores, dtype=torch.bool)
        device = comparison.scores.device
        positives = _rows(self._items, comparison.positives, device, unit=True)
        ids = comparison.ids if comparison.ids.ndim == 1 else comparison.ids[comparison.owners]
        candidates = _rows(self._items, ids, device, unit=True)
        near = _products(positives, candidates) > value_at(self.threshold, comparison.step)
        owners, shape = comparison.owners, comparison.scores.shape
        if not np.array_equal(owners, np.arange(shape[0])):
            # A candidate is near a row if it is near one of its positives. They are counted, so
            # that a GPU need not be waited for.
            counts = comparison.scores.new_zeros(shape, dtype=torch.int32)
            near = counts.index_add_(0, comparison._sent(owners), near.int()) > 0
        return near & comparison.with_id()


def stored(matrix: sp.csr_matrix, rows: Ids, columns: Ids) -> npt.NDArray[np.bool_]:
    """Whether entries of a matrix of ones are there, one by one; `rows` and `columns` broadcast."""
    shape = np.broadcast_shapes(rows.shape, columns.shape)
    flat = (np.ascontiguousarray(np.broadcast_to(ids, shape)).ravel() for ids in (rows, columns))
    if 0 in shape:  # which SciPy warns of
        return np.zeros(shape, np.bool_)
    return np.asarray(matrix[tuple(flat)]).reshape(shape) > 0


def _rows(vectors: Any, ids: Ids, device: torch.device, *, unit: bool = False) -> torch.Tensor:
    """Rows of an array or tensor, float32; the first one where there is no id.

    They are checked where they are: those on the host, without a wait for a GPU.
    """
    ids = np.maximum(ids, 0)
    if ids.size and ids.max() >= len(vectors):
        raise IndexError(f"id {ids.max()} is out of range for {len(vectors)} vectors")
    if isinstance(vectors, torch.Tensor):
        taken = vectors[torch.from_numpy(ids).to(vectors.device)]
    else:
        taken = torch.from_numpy(np.asarray(vectors[ids]))
    taken = taken.float()
    if not bool(taken.isfinite().all()):
        wrong = (~taken.isfinite()).any(-1).cpu().numpy()
        raise ValueError(f"the vector of id {ids[wrong][0]} has NaN or infinity")
    if unit:
        _check_length(taken, ids)
    return sent(taken, device)


def _check_length(vectors: torch.Tensor, ids: Ids) -> None:
    """ValueError unless vectors have unit length, or none; those of half precision nearly so."""
    lengths = vectors.norm(dim=-1)
    wrong = ((lengths - 1).abs() > 0.01) & (lengths > 0)
    if bool(wrong.any()):
        place = wrong.cpu().numpy()
        raise ValueError(
            f"items[{ids[place][0]}] has length {float(lengths[wrong][0]):.3g}, expected vectors "
            "of unit length: divide each by its norm"
        )


def _shape(vectors: Any, name: str) -> tuple[int, ...]:
    shape = getattr(vectors, "shape", None)
    if shape is None:
        raise TypeError(f"{name} is a {type(vectors).__name__}, expected an array or tensor")
    if len(shape) != 2:
        raise ValueError(f"{name} has shape {tuple(shape)}, expected two dimensions")
    return tuple(shape)


def _products(anchors: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Dot products of [n, d] and [c, d] or [n, c, d], float [n, c]."""
    if candidates.ndim == 2:
        return anchors @ candidates.T
    return torch.einsum("nk,nck->nc", anchors, candidates)
