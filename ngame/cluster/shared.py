"""Clusters of rows that several processes share: cuts together, then each its part."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame import _core
from ngame.arrays import as_threads
from ngame.cluster.order import (
    SAMPLED_ROWS,
    SAMPLED_ROWS_PER_DIMENSION,
    as_seed,
    away_from,
    balanced_order,
    sums_of,
    unit,
)
from ngame.topk import pair_scores

if TYPE_CHECKING:
    from ngame.ranks import Ranks

# Processes send each other so many bytes at a time; and each clusters its part of the rows in up to
# so many portions, of which it holds one beside its share.
_SENT_BYTES = 1 << 21
_MOST_PORTIONS, _LEAST_PORTION = 8, 1 << 22  # the latter in bytes


def shared_order(
    x: npt.NDArray[Any],
    first: int,
    offsets: npt.NDArray[np.int64],
    ranks: "Ranks",
    seed: int,
    max_iter: int,
    rounds: int,
    threads: int,
) -> npt.NDArray[np.int32]:
    """The order of `balanced_clusters` over ranks; the rows of x have the ids from `first` on.

    A rank clusters its part of the rows in portions, so that it holds few more rows than its x.
    """
    sizes = np.diff(offsets)
    share_bytes = int(offsets[-1]) * x.shape[1] * x.itemsize // ranks.size
    portions = min(max(share_bytes // _LEAST_PORTION, 1), _MOST_PORTIONS)
    parts = np.arange(ranks.size * portions).reshape(ranks.size, portions)  # of each rank
    bounds = np.arange(parts.size + 1) * len(sizes) // parts.size  # of each part's clusters
    room = np.empty((np.diff(bounds).max() * sizes.max(), x.shape[1]), x.dtype)
    homes, cuts = _homes(x, offsets[bounds], ranks, [], seed, max_iter, threads)
    found, means = [], []
    for of_rank in parts.T:
        part = int(of_rank[ranks.rank])
        ids, vectors = _exchanged(x, first, homes, of_rank, ranks, room)
        if len(ids):
            own = offsets[bounds[part] : bounds[part + 1] + 1] - offsets[bounds[part]]
            most = -(-rounds // 2)  # more follow
            of_part = as_seed(seed + part)
            local = balanced_order(vectors, own, of_part, max_iter, refine=most, threads=threads)
            means.append(sums_of(vectors, local, own))
            ids = ids[local]
        found.append(ids)
    order = np.concatenate(ranks.all_arrays(np.concatenate(found)))
    if rounds == 0:
        return order
    # Rows that the cuts parted from their neighbours could not reach them. So the clusters are
    # dealt once more, along other directions, and refined again.
    sums = np.concatenate([*means, np.zeros((0, x.shape[1]), np.float32)])
    dealt, _ = _homes(sums, bounds, ranks, cuts, seed, max_iter, threads)
    del means, sums
    dealt = np.concatenate(ranks.all_arrays(dealt))
    assignment = np.empty(len(order), np.int32)
    assignment[order] = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    homes = dealt[assignment[first : first + len(x)]]
    found = []
    for of_rank in parts.T:
        part = int(of_rank[ranks.rank])
        ids, vectors = _exchanged(x, first, homes, of_rank, ranks, room)
        if len(ids):
            own = np.append(0, np.cumsum(sizes[dealt == part]))
            local = np.argsort(assignment[ids], kind="stable").astype(np.int32)
            ids = ids[_core.refine_clusters(vectors, local, own, rounds, as_threads(threads))]
        found.append(ids)
    places = np.argsort(np.repeat(dealt, sizes), kind="stable")
    order[places] = np.concatenate(ranks.all_arrays(np.concatenate(found)))
    return order


def _homes(
    x: npt.NDArray[Any],
    bounds: npt.NDArray[np.int64],
    ranks: "Ranks",
    avoided: list[npt.NDArray[np.float32]],
    seed: int,
    max_iter: int,
    threads: int,
) -> tuple[npt.NDArray[np.int32], list[npt.NDArray[np.float32]]]:
    """The part that each row of x goes to: bounds[p + 1] - bounds[p] rows of all to part p.

    Also gives the directions of the cuts, which are at right angles to those to avoid.
    """
    homes = np.zeros(len(x), np.int32)
    cuts: list[npt.NDArray[np.float32]] = []
    # Parts begin .. end - 1 have rows to divide among them, whose homes are `begin` so far.
    level = [(0, len(bounds) - 1)]
    while level:
        divided, following = [], []
        for begin, end in level:
            middle = (begin + end) // 2
            if middle == begin:
                continue
            following += [(begin, middle), (middle, end)]
            left, count = (int(bounds[stop] - bounds[begin]) for stop in (middle, end))
            rows = np.flatnonzero(homes == begin)
            if left == 0:
                homes[rows] = middle
            elif left < count:
                # Of one cut only: the core's lowest cuts have an eighth of a sample each.
                wanted = max(SAMPLED_ROWS, SAMPLED_ROWS_PER_DIMENSION * x.shape[1]) // 4
                drawn = min(len(rows), -(-wanted * len(rows) // count))
                random = np.random.default_rng([seed, begin, end, ranks.rank])
                own = x[np.sort(random.choice(rows, drawn, replace=False))].astype(np.float32)
                sample = unit(np.concatenate(ranks.all_arrays(own)))
                cuts.append(_direction(sample, left / count, avoided, max_iter, threads))
                divided.append((middle, left, rows))
        if divided:
            # One product a row, of all cuts of the level at once: the rows are far from the
            # processor.
            cut_of = np.full(len(x), -1, np.int32)
            for cut, (_, _, rows) in enumerate(divided):
                cut_of[rows] = cut
            has_one = cut_of >= 0
            ends = np.append(0, np.cumsum(has_one))
            ones = np.ones(ends[-1], np.int8)
            pairs = sp.csr_matrix((ones, cut_of[has_one], ends), shape=(len(x), len(divided)))
            scores = pair_scores(x, np.stack(cuts[-len(divided) :]), pairs, threads=threads)
            for middle, left, rows in divided:
                homes[rows[~_smallest(scores[ends[rows]], left, ranks)]] = middle
        level = following
    return homes, cuts


def _direction(
    sample: npt.NDArray[np.float32],
    share: float,
    avoided: list[npt.NDArray[np.float32]],
    max_iter: int,
    threads: int,
) -> npt.NDArray[np.float32]:
    """From the left centre to the right one, with that share of the rows on the left."""
    if avoided:
        sample = away_from(sample, np.stack(avoided))
    left = min(max(round(share * len(sample)), 1), len(sample) - 1)
    sizes = np.array([0, left, len(sample)])
    order = balanced_order(sample, sizes, 0, max_iter, refine=0, threads=threads)
    centres = unit(sums_of(sample, order, sizes))
    direction: npt.NDArray[np.float32] = centres[1] - centres[0]
    return direction


def _smallest(scores: npt.NDArray[np.float32], count: int, ranks: "Ranks") -> npt.NDArray[np.bool_]:
    """Whether each score is among the `count` smallest of all ranks' scores.

    Ties go to the lower rank, and there to the lower place. The threshold is found digit by digit,
    from counts of each digit's values.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # one zero
    keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    below, threshold = 0, np.uint32(0)
    alive = keys
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        digits = (alive >> np.uint32(shift)) & np.uint32((1 << width) - 1)
        counts = ranks.sum_counts(np.bincount(digits, minlength=1 << width))
        ends = below + np.cumsum(counts)
        digit = int(np.searchsorted(ends, count))
        below = int(ends[digit - 1]) if digit else below
        alive = alive[digits == digit]
        threshold |= np.uint32(digit << shift)
    ties = np.flatnonzero(keys == threshold)
    before = np.concatenate(ranks.all_arrays(np.array([len(ties)])))[: ranks.rank].sum()
    chosen: npt.NDArray[np.bool_] = keys < threshold
    chosen[ties[: max(0, count - below - int(before))]] = True
    return chosen


def _exchanged(
    x: npt.NDArray[Any],
    first: int,
    homes: npt.NDArray[np.int32],
    of_rank: npt.NDArray[np.integer],
    ranks: "Ranks",
    room: npt.NDArray[Any],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    """Ids and vectors of the rows, of all ranks, that this one gets, ids ascending.

    The rows of x have the ids from `first` on; those whose home is of_rank[r] go to rank r.
    The vectors are in `room`.
    """
    parts = [np.flatnonzero(homes == part).astype(np.int32) for part in of_rank]
    received = ranks.exchange([part + np.int32(first) for part in parts])
    ids = np.concatenate(received)
    vectors = room[: len(ids)]
    ends = np.cumsum([len(found) for found in received])
    rooms = np.split(vectors, ends[:-1])
    row_bytes = x.dtype.itemsize * x.shape[1]
    at_once = max(1, _SENT_BYTES // max(1, row_bytes * ranks.size))
    rounds = ranks.most(max(-(-len(part) // at_once) for part in parts))
    for start in range(0, rounds * at_once, at_once):
        some = slice(start, start + at_once)
        ranks.swap([x[part[some]] for part in parts], [room[some] for room in rooms])
    return ids, vectors
