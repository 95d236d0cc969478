"""One contrastive loss for all sources, filters and forms."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ngame.arrays import as_list, refuse_class
from ngame.loss import MASKED, CooIndex, check_index, mean_over_rows
from ngame.negatives.filters import Comparison, Filter, Side, stored
from ngame.negatives.mixing import HardMixer, MixingDraws
from ngame.negatives.schedule import Number, value_at
from ngame.negatives.sources import EMPTY, Candidates, Ids
from ngame.positives import in_batch_positives
from ngame.transfer import sent

Direction = Literal["query_to_item", "item_to_query", "query_to_query", "item_to_item"]

Similarity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Scores of queries [n, d] with items [c, d], float [n, c]."""


class ContrastiveLoss(torch.nn.Module):
    """Softmax loss of each labelled positive against negatives from any sources, filtered.

    A query with a labelled positive of logit p pays ``log(1 + sum_n exp(n - p))`` over the logits n
    of its negatives. Logits are dot products over the temperature. So the positives of a query do
    not compete (decoupled softmax, as `ngame.loss.decoupled_softmax`); with one positive a query
    this is InfoNCE. The loss is the mean over the queries that have a labelled positive, of the
    mean over theirs.

    What is left out of the negatives: a query's own labelled positives, by their ids, from
    whichever source; a query itself; empty places; and whatever a filter says.

    ==================  ==============================================================
    form                options
    ==================  ==============================================================
    InfoNCE             the defaults
    Sample4Geo (2023)   ``directions=("query_to_item", "item_to_query")``,
                        ``label_smoothing=0.1, temperature=0.07, learned=True``
    GISTEmbed (2024)    ``directions=("query_to_item", "query_to_query", "item_to_item")``,
                        ``joint=True, temperature=0.01, filters=[Guide(...)]``
    GTE (2023)          all four directions, ``joint=True, temperature=0.01``
    SimKGC (2022)       ``margin=0.02, temperature=0.05, learned=True``,
                        ``filters=[KnownPositives(...)]``
    ==================  ==============================================================

    Numbers that may be a `Schedule` follow the argument `step` of a call.

    Parameters
    ----------
    temperature : float or Schedule
    learned : bool
        Learn the temperature from that value on, as the logarithm of its inverse: the parameter
        `log_scale`. It must reach the optimizer.
    margin : float or Schedule
        Subtracted from the positives' scores, before the temperature.
    label_smoothing : float or Schedule
        Share of the target that is spread evenly over the positive and all negatives compared.
    hardness : float or Schedule
        This times the score, without gradient, is added to a negative's logit in "query_to_item":
        9 (LLaVE, 2025).
    mined_hardness : float or Schedule, optional
        The same for the negatives that were mined for the row itself, which are [b, c] sources and
        those with `rows`: 5 (EmbeddingGemma, 2025). By default as for all others.
    directions : names of anchors and candidates, "query_to_item" first of all
        "item_to_query": the labelled positives against the batch's queries, and so on. Sources
        other than the batch are items, met in "query_to_item" only. In "item_to_item" a positive
        is not compared with what was mined for its row.
    joint : bool
        One sum of negatives over all directions, instead of the mean of a loss for each. As in
        GTE, the positive then counts once in "query_to_item" and once in "item_to_query".
    filters : sequence of callables
        See `ngame.negatives.filters`. After a call, `masked_shares` has for each the share of the
        comparisons that it left out.
    mixer : HardMixer, optional
        Adds synthetic negatives to "query_to_item".
    progressive : Progressive, optional
        Weighs the positives by how hard they are.
    similarity : callable, optional
        Scores of queries [n, d] and items [c, d], float [n, c], such as a negative distance; dot
        products if not given. Goes without a mixer, whose closed forms are those of cosines.
    rows_at_once : int, optional
        Anchors whose scores are in memory at once. The backward pass computes them a second time;
        the gradients are the same to the rounding.

    Raises
    ------
    TypeError
        `directions` or `filters` is no sequence.
    ValueError
        A number is out of range, or there is no such direction.
    """

    def __init__(
        self,
        *,
        temperature: Number = 0.05,
        learned: bool = False,
        margin: Number = 0.0,
        label_smoothing: Number = 0.0,
        hardness: Number = 0.0,
        mined_hardness: Number | None = None,
        directions: Sequence[Direction] = ("query_to_item",),
        joint: bool = False,
        filters: Sequence[Filter] = (),
        mixer: HardMixer | None = None,
        progressive: "Progressive | None" = None,
        similarity: Similarity | None = None,
        rows_at_once: int | None = None,
    ) -> None:
        super().__init__()
        if not value_at(temperature, 0) > 0:
            raise ValueError(f"temperature is {temperature}, expected more than 0")
        if not 0 <= value_at(label_smoothing, 0) < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}, expected from 0 to below 1")
        directions, filters = as_list(directions, "directions"), as_list(filters, "filters")
        if unknown := set(directions) - set(get_args(Direction)):
            raise ValueError(f"directions has {', '.join(map(repr, sorted(unknown)))}")
        if not directions or len(set(directions)) < len(directions):
            raise ValueError(f"directions is {tuple(directions)}, expected some, each once")
        if rows_at_once is not None and rows_at_once < 1:
            raise ValueError(f"rows_at_once is {rows_at_once}, expected at least 1")
        parts = {f"filters[{place}]": one for place, one in enumerate(filters)}
        for name, part in {**parts, "mixer": mixer, "progressive": progressive}.items():
            refuse_class(part, name)
        if mixer is not None and similarity is not None:
            raise ValueError(
                "mixer is given with a similarity, expected dot products of unit length"
            )
        self.temperature = temperature
        self.log_scale: torch.nn.Parameter | None = None
        if learned:
            start = -math.log(value_at(temperature, 0))
            self.log_scale = torch.nn.Parameter(torch.tensor(start))
        self.margin, self.label_smoothing = margin, label_smoothing
        self.hardness = hardness
        self.mined_hardness = hardness if mined_hardness is None else mined_hardness
        self.directions, self.joint = tuple(directions), joint
        self.filters, self.mixer, self.progressive = tuple(filters), mixer, progressive
        self.similarity, self.rows_at_once = similarity, rows_at_once
        self._masked: list[torch.Tensor] = []
        self._compared = torch.zeros(())

    @property
    def masked_shares(self) -> list[float]:
        """For each filter, the share it left out of the last call's comparisons.

        What the loss leaves out by itself does not count, neither as left out nor as compared.
        Asking waits for the device.
        """
        return [float(count) / max(1.0, float(self._compared)) for count in self._masked]

    def forward(
        self,
        queries: Candidates,
        items: Candidates,
        targets: CooIndex | None = None,
        sources: Sequence[Candidates] = (),
        *,
        step: int = 0,
    ) -> torch.Tensor:
        """Loss of a batch, a float32 scalar.

        Parameters
        ----------
        queries : the batch's b queries, with their ids
        items : the batch's own c items, with their ids: the positives, and what else there is
        targets : CooIndex of [b, c]
            The labelled positives. If not given, that of query i is item i. Best give them on the
            host, which reads them and sends them to the GPU. It must wait for a GPU that has them.
        sources : what else the queries are compared with
        step : int
            The step of the training.

        Raises
        ------
        TypeError
            `queries`, `items` or a source is something other than `Candidates`, or `targets`
            something other than a `CooIndex`.
        ValueError
            Shapes do not agree, widths of the vectors included, unless a `similarity` is given.
        """
        sources = as_list(sources, "sources")
        offered = {f"sources[{place}]": source for place, source in enumerate(sources)}
        named = {"queries": queries, "items": items, **offered}
        for name, given in named.items():
            if not isinstance(given, Candidates):
                refuse_class(given, name)
                kind = type(given).__name__
                raise TypeError(f"{name} is a {kind}, expected Candidates(ids, vectors)")
        rows = len(queries)
        if not queries.shared or not items.shared:
            raise ValueError("queries and items must be vectors of shape [b, d] and [c, d]")
        if targets is None:
            if len(items) < rows:
                raise ValueError(f"items has {len(items)} rows, queries {rows}: give targets")
            own = torch.arange(rows)
            targets = CooIndex(own, own)
        check_index(targets, "targets", rows, len(items))
        pairs = _Pairs(targets.rows.cpu().numpy(), targets.columns.cpu().numpy())
        targets = targets.to(queries.vectors.device)
        if (queries.ids < 0).any() or (items.ids[pairs.columns] < 0).any():
            raise ValueError("queries and labelled positives need ids from 0 up")
        for source in sources:
            if not source.shared and len(source.ids) != rows:
                raise ValueError(f"a source has {len(source.ids)} rows, queries {rows}")
        if self.similarity is None:  # another than dot products may take two widths
            widths = {name: int(given.vectors.shape[-1]) for name, given in named.items()}
            if len(set(widths.values())) > 1:
                found = ", ".join(f"{name} {width}" for name, width in widths.items())
                raise ValueError(f"vectors differ in width: {found}")
        batch = _Batch(self, queries, items, targets, pairs, sources, step)
        device = queries.vectors.device
        self._masked = [torch.zeros((), device=device) for _ in self.filters]
        self._compared = torch.zeros((), device=device)
        parts = [batch.negatives(direction) for direction in self.directions]
        if self.joint:
            together = torch.stack(parts)
            parts = [torch.cat([torch.logsumexp(together[:, :1], 0), together[:, 1:].sum(0)])]
            if {"query_to_item", "item_to_query"} <= set(self.directions):
                parts = [_with_another_positive(parts[0], batch.positive)]
        losses = [self._losses(batch, part) for part in parts]
        return torch.stack([mean_over_rows(loss, targets, rows) for loss in losses]).mean()

    def _losses(self, batch: "_Batch", negatives: torch.Tensor) -> torch.Tensor:
        """Loss of each target, [t], from what `_Batch.negatives` gave."""
        positive = batch.positive
        losses = plain = F.softplus(negatives[0] - positive)
        smoothing = value_at(self.label_smoothing, batch.step)
        if smoothing:
            _, total, count = negatives
            losses = losses + smoothing * (positive - (total + positive) / (count + 1))
        if self.progressive is not None:
            losses = self.progressive(losses, torch.exp(-plain.detach()), step=batch.step)
        return losses


def _with_another_positive(negatives: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """What `_Batch.negatives` gives, where the positive is in the sum of the negatives, too."""
    first = torch.logaddexp(negatives[0], positive)
    if len(negatives) == 1:
        return first[None]
    return torch.stack([first, negatives[1] + positive, negatives[2] + 1])


class Progressive:
    """Weights of positives by how hard they are: progressive weighting, in the spirit of PEG.

    PEG (2023) says that it pays growing attention to hard samples; its formula is not public, and
    this is not it. A positive of probability p has the difficulty d = 1 - p, without gradient, and
    the weight ``(1 - ramp) + ramp * d ** gamma / mean(d ** gamma)``: the weights' mean is 1.

    Parameters
    ----------
    ramp : float or Schedule, from 0 (all alike) to 1
    gamma : float
        Above 0 the hard ones weigh more, below 0 the easy ones.
    """

    def __init__(self, ramp: Number, gamma: float = 1.0) -> None:
        self.ramp, self.gamma = ramp, gamma

    def __call__(
        self, losses: torch.Tensor, probabilities: torch.Tensor, *, step: int = 0
    ) -> torch.Tensor:
        """Weighted losses, float [t]; `probabilities` are those of the positives."""
        ramp = value_at(self.ramp, step)
        if ramp == 0 or len(losses) == 0:
            return losses
        difficulty = (1 - probabilities.detach()).clamp_min(1e-6) ** self.gamma
        return losses * ((1 - ramp) + ramp * difficulty / difficulty.mean())


@dataclass(frozen=True, eq=False)
class _Anchors:
    """The anchors of a direction, and the labelled positives of each."""

    vectors: torch.Tensor
    rows: Ids
    """Row of the batch that each belongs to."""
    queries: Ids
    owners: Ids
    """Anchor of each labelled positive, ascending."""
    positives: Ids
    positive_scores: torch.Tensor

    def take(self, rows: slice) -> "_Anchors":
        begin, end = np.searchsorted(self.owners, [rows.start, rows.stop])
        return _Anchors(
            self.vectors[rows],
            self.rows[rows],
            self.queries[rows],
            self.owners[begin:end] - rows.start,
            self.positives[begin:end],
            self.positive_scores[begin:end],
        )


class _Pairs(NamedTuple):
    """The labelled positives on the host."""

    rows: Ids
    columns: Ids


class _Batch:
    """One call of the loss."""

    def __init__(
        self,
        loss: ContrastiveLoss,
        queries: Candidates,
        items: Candidates,
        targets: CooIndex,
        on_host: _Pairs,
        sources: Sequence[Candidates],
        step: int,
    ) -> None:
        self.loss, self.queries, self.items, self.targets = loss, queries, items, targets
        self.sources, self.step = sources, step
        temperature = value_at(loss.temperature, step)
        if not temperature > 0:  # of a schedule
            raise ValueError(f"temperature is {temperature} at step {step}, expected more than 0")
        self.scale: Any = 1 / temperature
        if loss.log_scale is not None:
            self.scale = loss.log_scale.exp()
        pairs = self._pair_scores(queries.vectors[targets.rows], items.vectors[targets.columns])
        self.positive = (pairs - value_at(loss.margin, step)) * self.scale
        self._pairs = pairs.detach()
        self._rows, self._columns = on_host
        # Which items are labelled positives of which query here, by their ids: a query may be there
        # several times. The last column, which is empty, stands for all other items.
        self._queries, rows = np.unique(queries.ids[self._rows], return_inverse=True)
        self._items, columns = np.unique(items.ids[self._columns], return_inverse=True)
        shape = len(self._queries) + 1, len(self._items) + 1
        self._own = sp.csr_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape)
        self._own.data[:] = 1

    def _pair_scores(self, queries: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Scores of queries with one item each, [t]."""
        if self.loss.similarity is None or not len(queries):
            return (queries * items).sum(1).float()
        by_pair = torch.vmap(self.loss.similarity)
        return by_pair(queries[:, None], items[:, None])[:, 0, 0].float()

    def _scores(self, side: Side, anchors: torch.Tensor, source: Candidates) -> torch.Tensor:
        """Scores of anchors with what a source offers, [n, c]."""
        similarity = self.loss.similarity
        if similarity is None:
            return source.scores(anchors).float()
        if not source.shared:
            return torch.vmap(similarity)(anchors[:, None], source.vectors)[:, 0].float()
        if side == "item":
            return similarity(source.vectors, anchors).T.float()
        return similarity(anchors, source.vectors).float()

    def negatives(self, direction: Direction) -> torch.Tensor:
        """Of the negatives of each target the log-sum-exp, float [1, t]; or, where labels are
        smoothed, that, their sum and their number, [3, t].
        """
        anchor, _, candidate = direction.partition("_to_")
        positives = self.items.ids[self._columns]
        if anchor == "query":
            order = np.argsort(self._rows, kind="stable")
            scores = self._pairs[sent(torch.from_numpy(order), self._pairs.device)]
            anchors = _Anchors(
                self.queries.vectors,
                np.arange(len(self.queries)),
                self.queries.ids,
                self._rows[order],
                positives[order],
                scores,
            )
        else:
            anchors = _Anchors(
                self.items.vectors[self.targets.columns],
                self._rows,
                self.queries.ids[self._rows],
                np.arange(len(positives)),
                positives,
                self._pairs,
            )
        offered = [self.items if candidate == "item" else self.queries]
        draws = None
        if direction == "query_to_item":
            offered += self.sources
            if self.loss.mixer is not None:
                draws = self.loss.mixer.draw(len(self.queries), self.step)
        # Queries outside of the first and the last labelled one, such as those of other processes,
        # are only candidates.
        first, last = 0, len(anchors.vectors)
        if anchor == "query" and len(self._rows):
            first, last = int(self._rows.min()), int(self._rows.max()) + 1
        sides = anchor, candidate
        found = self._in_chunks(
            lambda rows, count: self._some(
                sides,  # type: ignore[arg-type]
                anchors.take(rows),
                [each.take(rows) for each in offered],
                None if draws is None else draws.take(rows),
                count,
            ),
            first,
            last,
        )
        return found[:, self.targets.rows - first] if anchor == "query" else found

    def _in_chunks(self, some: Callable[..., torch.Tensor], first: int, last: int) -> torch.Tensor:
        """`some` of these anchors, [1 or 3, n]; chunk by chunk where the loss is told to."""
        at_once = self.loss.rows_at_once
        if at_once is None or at_once >= last - first:
            return some(slice(first, last), True)
        found = []
        for begin in range(first, last, at_once):
            fresh = iter([True])  # the second time, in the backward pass, nothing is counted
            found.append(
                checkpoint(
                    lambda rows, fresh: some(rows, next(fresh, False)),
                    slice(begin, min(begin + at_once, last)),
                    fresh,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            )
        return torch.cat(found, dim=1)

    def _some(
        self,
        sides: tuple[Side, Side],
        anchors: _Anchors,
        offered: list[Candidates],
        draws: MixingDraws | None,
        count: bool,
    ) -> torch.Tensor:
        """What `negatives` says, of some anchors."""
        logits, masks = [], []
        for source in offered:
            scores = self._scores(sides[0], anchors.vectors, source)
            comparison = Comparison(
                *sides,
                queries=anchors.queries,
                positives=anchors.positives,
                owners=anchors.owners,
                ids=source.ids,
                scores=scores.detach(),
                positive_scores=anchors.positive_scores,
                step=self.step,
            )
            never = self._never(comparison)
            if sides == ("item", "item") and source.rows is not None:
                mined = torch.from_numpy(source.mined_for(anchors.rows))
                never = never | sent(mined, never.device)
            mask = self._left_out(comparison, never, count)
            values = scores * (self.scale * source.weight)
            if source.shift is not None:
                values = values + source.shift
            if sides == ("query", "item"):
                values = values + self._penalty(scores.detach(), source, anchors.rows)
            logits.append(values)
            masks.append(mask)
        if draws is not None:
            shared = [number for number, each in enumerate(offered) if each.shared]
            vectors = torch.cat([offered[number].vectors.detach() for number in shared])
            mask = torch.cat([masks[number] for number in shared], dim=1)
            mixer = self.loss.mixer
            assert mixer is not None
            scores, missing = mixer.mix(anchors.vectors, vectors, mask, draws)
            logits.append(scores.float() * self.scale)
            masks.append(missing)
        whole, left_out = (
            parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in (logits, masks)
        )
        negative = torch.logsumexp(whole.masked_fill(left_out, MASKED), dim=1)
        if not value_at(self.loss.label_smoothing, self.step):
            return negative[None]
        compared = ~left_out
        return torch.stack([negative, (whole * compared).sum(1), compared.sum(1).float()])

    def _penalty(self, scores: torch.Tensor, source: Candidates, rows: Ids) -> torch.Tensor | float:
        """What hardness adds to the logits: of negatives mined for the row, and of all others."""
        mined, others = (
            value_at(number, self.step) for number in (self.loss.mined_hardness, self.loss.hardness)
        )
        if mined == others:
            return others * scores if others else 0.0
        strength = np.where(source.mined_for(rows), mined, others).astype(np.float32)
        return sent(torch.from_numpy(strength), scores.device) * scores

    def _left_out(
        self, comparison: Comparison, left_out: torch.Tensor, count: bool
    ) -> torch.Tensor:
        """What is no negative, bool [n, c]: what can never be one, and what filters leave out."""
        compared = ~left_out
        loss = self.loss
        if count:
            loss._compared += compared.sum()
        for number, each in enumerate(loss.filters):
            mask = each(comparison)
            if count:
                loss._masked[number] += (mask & compared).sum()
            left_out = left_out | mask
        return left_out

    def _never(self, comparison: Comparison) -> torch.Tensor:
        """One's own labelled positives, oneself, queries with one of them, empty places."""
        ids = comparison.ids
        queries = _places(self._queries, comparison.queries)
        if comparison.candidate == "query":
            positives = _places(self._items, comparison.positives)
            columns, pairs = _stored(self._own, _places(self._queries, ids), positives)
            same, oneself = np.nonzero(comparison.queries[:, None] == ids)
            rows = np.concatenate([comparison.owners[pairs], same])
            return comparison.mask(rows, np.concatenate([columns, oneself]))
        items = _places(self._items, ids)
        if ids.ndim == 1:
            rows, columns = _stored(self._own, queries, items)
        else:
            rows, columns = np.nonzero(stored(self._own, queries[:, None], items))
        empty = sent(torch.from_numpy(ids == EMPTY), comparison.scores.device)
        return comparison.mask(rows, columns) | empty


def _places(distinct: Ids, ids: Ids) -> Ids:
    """Place of each id among the distinct ones; their number where it is not among them."""
    places = np.searchsorted(distinct, ids)
    return np.where(np.append(distinct, EMPTY)[places] == ids, places, len(distinct))


def _stored(matrix: sp.csr_matrix, rows: Ids, columns: Ids) -> tuple[Ids, Ids]:
    """Where ``matrix[rows][:, columns]`` has a stored entry."""
    found = CooIndex.of(in_batch_positives(matrix, rows, columns))
    return found.rows.numpy(), found.columns.numpy()
