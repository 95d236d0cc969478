"""Batches of one group, or of several groups with equally many rows of each."""

import numpy as np
import numpy.typing as npt

from ngame import _core
from ngame.arrays import (
    Csr,
    as_count,
    as_ids,
)
from ngame.batches.base import BatchSampler, Order, draw_seed


class GroupBatchSampler(BatchSampler):
    """Plan batches of one group, or of several groups with equally many rows of each.

    Every batch holds ``batch_size / per_group`` different groups (P) and `per_group` rows (K) of
    each. Without `per_group` batches are pure: one task a batch (GISTEmbed), one language a batch
    (CoCoSoDa). With it they are the P x K batches of triplet losses. Only full batches are made.
    Every epoch draws anew which rows and which groups meet.

    Without `alpha` an epoch visits no row twice, and as many rows as possible. It leaves out the
    rows that do not fill their group's last K (so it never visits groups smaller than `per_group`)
    and, if few groups have most of the rows, those that find no other group for their batch.

    With `alpha` an epoch has as many batches, but groups take part in proportion to
    ``size ** alpha``: 1 means by size, 0 all equally; CoCoSoDa uses 0.7. Small groups then repeat
    their rows in another order, and large ones are visited in part. A batch has a group at most
    once, even if its share is larger.

    Keys, several processes, purity, length, state, and pickling are as in ClusterBatchSampler; a
    pickled copy cannot plan.

    Parameters
    ----------
    groups : integer array [n_rows]
        The group of every row, any integers.
    batch_size : int
        Rows a batch, on each rank.
    per_group : int, optional
        Rows of each group in a batch; divides `batch_size`, which is the default.
    alpha : float, optional
        0 or more.
    keys, seed, world_size, rank
        As in ClusterBatchSampler.

    Attributes
    ----------
    n_rows, batch_size, drop_last, epoch, sampler
        As in ClusterBatchSampler; `drop_last` is true.
    rows_left_out : int
        n_rows less the rows of all batches, which with `alpha` may repeat.

    Raises
    ------
    TypeError
        An argument is not of the type above.
    ValueError
        An argument is out of its range, or the groups do not make one full batch a rank.

    Examples
    --------
    >>> sampler = GroupBatchSampler([0, 0, 1, 1, 2, 2, 2], 4, per_group=2)
    >>> [rows] = sampler
    >>> len(rows), sampler.rows_left_out
    (4, 3)
    """

    _arrays = ("_keys", "_groups")

    def __init__(
        self,
        groups: npt.ArrayLike,
        batch_size: int,
        *,
        per_group: int | None = None,
        alpha: float | None = None,
        keys: Csr | npt.ArrayLike | None = None,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        ids = as_ids(groups, "groups")
        super().__init__(
            len(ids),
            batch_size,
            keys=keys,
            drop_last=True,
            seed=seed,
            world_size=world_size,
            rank=rank,
        )
        self._per_group = self.batch_size
        if per_group is not None:
            self._per_group = as_count(per_group, "per_group")
        if self.batch_size % self._per_group:
            raise ValueError(f"per_group is {per_group}, expected a divisor of {batch_size}")
        _, group_of, sizes = np.unique(ids, return_inverse=True, return_counts=True)
        by_group = np.argsort(group_of, kind="stable").astype(np.int32)
        self._groups = by_group, np.concatenate([[0], np.cumsum(sizes)])
        self._weights: npt.NDArray[np.float64] | None = None
        large, wanted = int((sizes >= self._per_group).sum()), self.batch_size // self._per_group
        if large < wanted:
            raise ValueError(
                f"groups has {len(sizes)} groups, {large} of them with {self._per_group} rows or "
                f"more; a batch of {self.batch_size} rows takes {wanted} of those"
            )
        self._settle()
        if alpha is None:
            return
        if not isinstance(alpha, (int, float, np.floating)):
            raise TypeError(f"alpha is a {type(alpha).__name__}, expected a float")
        if not 0 <= alpha < np.inf:
            raise ValueError(f"alpha is {alpha}, expected 0 or more")
        chunks, reached = self._chunks(self._per_group, None, np.random.default_rng(0))
        has_chunk = np.zeros(len(sizes), np.bool_)
        has_chunk[group_of[chunks[:reached]]] = True
        self._weights = np.where(has_chunk, (sizes / sizes.max()) ** float(alpha), 0.0)
        self._n_batches = self._visited // self.batch_size
        self._settle()

    def _order(self, epoch: int, rng: np.random.Generator) -> Order:
        self._require("_groups")
        return self._group_order(rng)

    def _reference(self, trial: int) -> Order:
        return self._group_order(np.random.default_rng(trial))

    def _group_order(self, rng: np.random.Generator) -> Order:
        quotas = None
        if self._weights is not None:
            per_batch = self.batch_size // self._per_group
            quotas = _quotas(self._weights, self._n_batches * per_batch, self._n_batches, rng)
        return self._chunks(self.batch_size, quotas, rng)

    def _chunks(
        self, batch_size: int, quotas: npt.NDArray[np.int64] | None, rng: np.random.Generator
    ) -> Order:
        """Chunks of `per_group` rows of one group, in batches that have no group twice."""
        order: Order = _core.group_order(
            *self._groups, quotas, self._per_group, batch_size, self._keys, draw_seed(rng)
        )
        return order


def _quotas(
    weights: npt.NDArray[np.float64], total: int, most: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Divide `total` chunks among groups in proportion to the weights, at most `most` each.

    Systematic sampling: each group gets its expected number, rounded down or up at random, and the
    sum is exact.
    """
    quotas = np.zeros(len(weights), np.int64)
    expected = np.zeros(len(weights))
    left, open_ = total, weights > 0
    while open_.any():
        expected = np.where(open_, weights, 0.0) * (left / weights[open_].sum())
        over = open_ & (expected > most * (1 - 1e-9))
        if not over.any():
            break
        quotas[over] = most
        left -= most * int(over.sum())
        open_ &= ~over
    ids = rng.permutation(np.flatnonzero(open_))
    if len(ids):
        ends = np.cumsum(expected[ids])
        ends[-1] = left
        quotas[ids] = np.diff(np.floor(ends + rng.random()), prepend=0.0)
    return quotas
