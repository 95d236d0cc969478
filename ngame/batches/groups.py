"""Batches of one group, or of several groups with equally many rows of each."""

import warnings

import numpy as np
import numpy.typing as npt

from ngame import _core
from ngame.arrays import Csr, as_array, as_count, as_ids, as_number, refuse_names
from ngame.batches.base import BatchSampler, Order, draw_seed


class GroupBatchSampler(BatchSampler):
    """Plan batches of one group, or of several groups with equally many rows of each.

    Every batch holds ``batch_size / per_group`` different groups (P) and `per_group` rows (K) of
    each. Without `per_group` batches are pure: one task a batch (GISTEmbed), one language a batch
    (CoCoSoDa). With it they are the P x K batches of triplet losses. Only full batches are made.
    Every epoch draws anew which rows and which groups meet.

    Without `alpha` an epoch visits no row twice, and as many rows as possible. It leaves out the
    rows that do not fill their group's last K (so it never visits groups smaller than `per_group`)
    and, if few groups have most of the rows, those that find no other group for their batch. A
    warning says so where that is more than a tenth.

    With `alpha` an epoch has as many batches, but groups take part in proportion to
    ``size ** alpha``: 1 means by size, 0 all equally; CoCoSoDa uses 0.7. Small groups then repeat
    their rows in another order, and large ones are visited in part. A batch has a group at most
    once, even if its share is larger.

    With `at_least` a batch holds that many rows or more of each of its groups, and two groups or
    more: 2 is what triplet losses with in-batch mining need. Groups take part by their sizes, so
    this uses nearly all rows even of many groups of very different sizes, where P x K batches leave
    out half. What is left out: the rows that do not fill their group's last `at_least`, and those
    of a group larger than all others together that find no other group for their batch.

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
    at_least : int, optional
        Divides `batch_size`, which is at least twice as large; instead of `per_group`, and without
        `alpha` and `keys`.
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
        at_least: int | None = None,
        alpha: float | None = None,
        keys: Csr | npt.ArrayLike | None = None,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        values = as_array(groups, "groups")
        refuse_names(values, "groups")
        ids = as_ids(values, "groups")
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
        self._mixed = at_least is not None
        if at_least is not None:
            self._per_group = as_count(at_least, "at_least")
            if self.batch_size % self._per_group or self.batch_size == self._per_group:
                raise ValueError(
                    f"at_least is {at_least}, expected a divisor of {batch_size} below it"
                )
            others = {"per_group": per_group, "alpha": alpha, "keys": keys}
            if given := [name for name, value in others.items() if value is not None]:
                raise ValueError(f"at_least is given with {', '.join(given)}, expected one alone")
        _, group_of, sizes = np.unique(ids, return_inverse=True, return_counts=True)
        by_group = np.argsort(group_of, kind="stable").astype(np.int32)
        self._groups = by_group, np.concatenate([[0], np.cumsum(sizes)])
        self._weights: npt.NDArray[np.float64] | None = None
        large = int((sizes >= self._per_group).sum())
        wanted = 2 if self._mixed else self.batch_size // self._per_group
        if large < wanted:
            raise ValueError(
                f"groups has {len(sizes)} groups, {large} of them with {self._per_group} rows or "
                f"more; a batch of {self.batch_size} rows takes {wanted} of those"
            )
        self._settle()
        if alpha is None:
            self._warn_of_groups(sizes)
            return
        if as_number(alpha, "alpha") < 0:
            raise ValueError(f"alpha is {alpha}, expected 0 or more")
        chunks, reached = self._chunks(self._per_group, None, np.random.default_rng(0))
        has_chunk = np.zeros(len(sizes), np.bool_)
        has_chunk[group_of[chunks[:reached]]] = True
        self._weights = np.where(has_chunk, (sizes / sizes.max()) ** float(alpha), 0.0)
        self._n_batches = self._visited // self.batch_size
        self._settle()

    def _warn_of_keys(self, reached: int, keys: npt.NDArray[np.int32]) -> None:
        if 2 * reached < self._reach_without_keys():  # else it is the groups that leave rows out
            super()._warn_of_keys(reached, keys)

    def _warn_of_groups(self, sizes: npt.NDArray[np.int64]) -> None:
        """Warn if the groups leave out more than a tenth beyond what fills no batch anyway."""
        left_out = self.n_rows - self._reach_without_keys()
        if 10 * (left_out - self.n_rows % self.batch_size) <= self.n_rows:
            return
        count, least = self.batch_size // self._per_group, self._per_group
        if self._mixed:
            takes = f"{least} rows or more from each of two groups or more"
            helps = "larger batches or a smaller at_least use"
        elif count == 1:
            takes, helps = f"{least} rows of one group", "smaller batches use"
        else:
            takes, helps = f"{least} rows from each of {count} groups", "fewer groups a batch use"
            if self._keys is None:
                helps = "at_least= in place of per_group, or fewer groups a batch, use"
        few = int(sizes[sizes < least].sum())
        if 2 * few > left_out:
            word = "at_least" if self._mixed else "per_group"
            helps = f"{few} of them are in smaller groups: a lower {word} would use"
        have = " to ".join(map(str, dict.fromkeys([sizes.min(), sizes.max()])))
        warnings.warn(
            f"groups leave {left_out} of {self.n_rows} rows out of each epoch: a batch takes "
            f"{takes}, which have {have}; {helps} more",
            stacklevel=3,
        )

    def _reach_without_keys(self) -> int:
        """Rows that an epoch could visit if there were no keys."""
        if self._mixed:  # without keys by itself
            return self._reference(0)[1]
        alone: Order = _core.group_order(
            *self._groups, None, self._per_group, self.batch_size, None, 0
        )
        return alone[1]

    def _order(self, epoch: int, rng: np.random.Generator) -> Order:
        self._require("_groups")
        return self._group_order(rng)

    def _reference(self, trial: int) -> Order:
        return self._group_order(np.random.default_rng(trial))

    def _group_order(self, rng: np.random.Generator) -> Order:
        if self._mixed:
            return self._mixed_order(rng)
        quotas = None
        if self._weights is not None:
            per_batch = self.batch_size // self._per_group
            quotas = _quotas(self._weights, self._n_batches * per_batch, self._n_batches, rng)
        return self._chunks(self.batch_size, quotas, rng)

    def _mixed_order(self, rng: np.random.Generator) -> Order:
        """Chunks of `per_group` rows of one group, in batches of two groups or more."""
        by_group, offsets = self._groups
        size, per_batch = self._per_group, self.batch_size // self._per_group
        sizes = np.diff(offsets)
        counts = sizes // size
        # A batch has room for all chunks but one of a group, so the others must go round.
        n_batches = int(min(counts.sum() // per_batch, counts.sum() - counts.max()))
        kept = np.minimum(counts, n_batches * (per_batch - 1))
        groups = np.repeat(np.arange(len(sizes)), sizes)
        place = np.arange(len(groups)) - offsets[:-1][groups]
        shuffled = by_group[np.lexsort((rng.random(len(groups)), groups))]
        taken = place < kept[groups] * size
        chunks = shuffled[taken].reshape(-1, size)
        group_of = np.repeat(np.arange(len(sizes)), kept)
        # Every group is spread evenly over the epoch, so batches resemble the whole.
        spread = (place[taken][::size] // size + rng.random(len(sizes))[group_of]) / kept[group_of]
        used = np.sort(rng.permutation(len(chunks))[: n_batches * per_batch])
        used = used[np.argsort(spread[used], kind="stable")].reshape(n_batches, per_batch)
        _swap_into_pure(used, group_of)
        rows = chunks[used.ravel()].ravel()
        return rows, len(rows)

    def _chunks(
        self, batch_size: int, quotas: npt.NDArray[np.int64] | None, rng: np.random.Generator
    ) -> Order:
        """Chunks of `per_group` rows of one group, in batches that have no group twice."""
        order: Order = _core.group_order(
            *self._groups, quotas, self._per_group, batch_size, self._keys, draw_seed(rng)
        )
        return order


def _swap_into_pure(batches: npt.NDArray[np.int64], group_of: npt.NDArray[np.int64]) -> None:
    """Give each batch [n, c] of one group's chunks a chunk of another group, in place."""
    groups = group_of[batches]
    for pure in np.flatnonzero((groups == groups[:, :1]).all(1)):
        others = groups != groups[pure, 0]
        # No group has more than all chunks but one of each batch: a batch with two others is there.
        donor = int(np.argmax(others.sum(1)))
        place = int(np.argmax(others[donor]))
        batches[pure, 0], batches[donor, place] = batches[donor, place], batches[pure, 0]
        for changed in (int(pure), donor):
            groups[changed] = group_of[batches[changed]]


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
