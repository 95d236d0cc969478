"""Synthetic negatives, mixed from hard ones."""

import math
from typing import NamedTuple

import numpy as np
import torch

from ngame.arrays import as_count
from ngame.negatives.schedule import Number, value_at
from ngame.transfer import sent

# Floats that the vectors of the pairs mixed at once may have, of each of the two.
_FLOATS_AT_ONCE = 1 << 22


class MixingDraws(NamedTuple):
    """Random choices of a step for b queries, each uniform from 0 to 1."""

    pairs: torch.Tensor
    """[3, b, s]: the first and the second negative, and the share of the first."""
    queries: torch.Tensor
    """[2, b, t]: the negative, and the share of the query before it is scaled to its maximum."""

    def take(self, rows: slice) -> "MixingDraws":
        """The choices for these queries."""
        return MixingDraws(self.pairs[:, rows], self.queries[:, rows])


class HardMixer:
    """Negatives mixed from each query's hardest ones (MoCHi, NeurIPS 2020).

    Of the `hardest` negatives with the highest scores, whatever the filters leave, `pairs` are
    mixed by twos, ``normalise(a * n1 + (1 - a) * n2)`` with a uniform from 0 to 1, and `queries`
    with the query itself, ``normalise(b * q + (1 - b) * n)`` with b uniform from 0 to `max_share`,
    so that the negative outweighs it. Synthetic negatives have no gradient: neither the negatives
    nor the query inside a mixture are moved by it. Only their scores are computed, by closed forms:
    memory grows with queries times synthetics, not with their width.

    All vectors must have unit length. A query with fewer than two negatives has none mixed by twos,
    one without a negative none at all.

    Parameters
    ----------
    hardest : int
    pairs, queries : int
        Synthetic negatives of each kind a query.
    max_share : float, from 0 to 0.5
    start : (int, int)
        First step of each kind: while the encoder has learned little, mixing does harm.
    seed : int
        Choices are a function of it and of the step.
    """

    def __init__(
        self,
        hardest: int,
        pairs: int,
        queries: int,
        *,
        max_share: Number = 0.5,
        start: tuple[int, int] = (0, 0),
        seed: int = 0,
    ) -> None:
        self._hardest = as_count(hardest, "hardest")
        self._pairs, self._queries = as_count(pairs, "pairs", 0), as_count(queries, "queries", 0)
        if not 0 <= value_at(max_share, 0) <= 0.5:
            raise ValueError(f"max_share is {max_share}, expected from 0 to 0.5")
        self._max_share, self._start = max_share, start
        self._seed = as_count(seed, "seed", 0, math.inf)

    def draw(self, rows: int, step: int) -> MixingDraws:
        """The random choices of a step for that many queries."""
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(step,)))
        pairs = self._pairs if step >= self._start[0] else 0
        queries = self._queries if step >= self._start[1] else 0
        of_pairs = rng.random((3, rows, pairs), np.float32)
        of_queries = rng.random((2, rows, queries), np.float32)
        of_queries[1] *= value_at(self._max_share, step)
        return MixingDraws(torch.from_numpy(of_pairs), torch.from_numpy(of_queries))

    def mix(
        self,
        queries: torch.Tensor,
        negatives: torch.Tensor,
        left_out: torch.Tensor,
        draws: MixingDraws,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the synthetic negatives.

        Parameters
        ----------
        queries : float tensor [b, d]
        negatives : float tensor [c, d], without gradient
        left_out : bool tensor [b, c]
            What is no negative of a query.
        draws : the choices, from `draw`

        Returns
        -------
        scores : float tensor [b, s + t], differentiable by `queries` alone
        missing : bool tensor [b, s + t]
            True where a query has too few negatives for a synthetic one.
        """
        negatives = negatives.detach()
        draws = MixingDraws(*(sent(drawn, queries.device) for drawn in draws))
        made = draws.pairs.shape[2] + draws.queries.shape[2]
        if not (made and len(negatives)):
            shape = len(queries), made
            return queries.new_zeros(shape), queries.new_ones(shape, dtype=torch.bool)
        scores = queries @ negatives.T
        hard = scores.detach().masked_fill(left_out, -torch.inf)
        hardest = hard.topk(min(self._hardest, hard.shape[1]), dim=1).indices
        there = (~left_out).sum(1, keepdim=True).clamp_max(hardest.shape[1])

        first = _chosen(draws.pairs[0], there)
        second = _chosen(draws.pairs[1], there - 1)
        second = torch.where(second >= first, second + 1, second).clamp_max(there - 1).clamp_min(0)
        mixed = self._of_two(
            scores, negatives, hardest.gather(1, first), hardest.gather(1, second), draws.pairs[2]
        )
        one = hardest.gather(1, _chosen(draws.queries[0], there))
        with_query = _with_query(queries, scores.gather(1, one), draws.queries[1])
        missing = torch.cat(
            [(there < 2).expand(mixed.shape), (there < 1).expand(with_query.shape)], dim=1
        )
        return torch.cat([mixed, with_query], dim=1), missing

    @staticmethod
    def _of_two(
        scores: torch.Tensor,
        negatives: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        share: torch.Tensor,
    ) -> torch.Tensor:
        """q . normalise(a n1 + (1 - a) n2), [b, s]."""
        at_once = max(1, _FLOATS_AT_ONCE // max(1, negatives.shape[1]))
        pairs = zip(
            torch.split(first.ravel(), at_once), torch.split(second.ravel(), at_once), strict=True
        )
        cosine = torch.cat([(negatives[i] * negatives[j]).sum(1) for i, j in pairs])
        cosine = cosine.reshape(first.shape)
        other = 1 - share
        norm = (share**2 + other**2 + 2 * share * other * cosine).clamp_min(1e-12).sqrt()
        return (share * scores.gather(1, first) + other * scores.gather(1, second)) / norm


def _with_query(queries: torch.Tensor, scores: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """q . normalise(b q + (1 - b) n), [b, t], the q within the mixture without gradient."""
    other = 1 - share
    length = (queries * queries.detach()).sum(1, keepdim=True)
    cosine = scores.detach()
    norm = (share**2 + other**2 + 2 * share * other * cosine).clamp_min(1e-12).sqrt()
    return (share * length + other * scores) / norm


def _chosen(uniform: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Whole numbers from 0 to count - 1; 0 where there is nothing to choose from."""
    chosen = (uniform * count).long()
    return torch.minimum(chosen, count - 1).clamp_min(0)
