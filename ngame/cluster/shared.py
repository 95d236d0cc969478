"""Clusters of rows that several processes share: cuts together, then each its part."""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ngame import _core
from ngame.arrays import as_threads
from ngame.cluster.order import (
    MOST_DEALS,
    SAMPLED_ROWS,
    SAMPLED_ROWS_PER_DIMENSION,
    as_seed,
    balanced_order,
    cut_scores,
    is_progress,
    learnt_cuts,
    squared_means,
    unit,
)

if TYPE_CHECKING:
    from ngame.ranks import Ranks

# Processes send each other so many bytes of rows at a time, and score as many.
_SENT_BYTES = 1 << 21
# Beside its share of the rows a process holds a portion of those that it clusters: an eighth of the
# bytes of the share, or so many.
_PORTIONS, _LEAST_PORTION = 8, 1 << 22
# So many levels of cuts are learnt on one sample, and scored in one pass over the rows.
_LEVELS_AT_ONCE = 4


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
    share = int(offsets[-1]) * x.shape[1] // ranks.size  # in values
    portion_bytes = max(share * x.itemsize // _PORTIONS, _LEAST_PORTION)
    portions = max(-(-share * np.dtype(np.float16).itemsize // portion_bytes), 1)
    parts = np.arange(ranks.size * portions).reshape(ranks.size, portions)  # of each rank
    bounds = np.arange(parts.size + 1) * len(sizes) // parts.size  # of each part's clusters
    some = -(-rounds // 2)  # each time that the rows are dealt
    room_shape = np.diff(bounds).max() * sizes.max(), x.shape[1]
    homes, directions = _homes(x, offsets[bounds], ranks, [], seed, max_iter, threads)
    cuts = [directions]  # of each time that rows were dealt
    part_of = np.repeat(np.arange(parts.size, dtype=np.int32), np.diff(bounds))  # of each cluster
    cluster_of, order = (np.empty(int(offsets[-1]), np.int32) for _ in range(2))
    tightness: list[float] = []
    while True:
        is_last = rounds == 0 or len(tightness) == MOST_DEALS - 1
        room = np.empty(room_shape, np.float16)
        found, sums, squares = [], [np.empty((0, x.shape[1]), np.float32)], 0.0
        for of_rank in parts.T:
            part = int(of_rank[ranks.rank])
            ids, vectors = _exchanged(x, first, homes, of_rank, ranks, room)
            if len(ids):
                own = np.append(0, np.cumsum(sizes[part_of == part]))
                if tightness:
                    local = np.argsort(cluster_of[ids], kind="stable").astype(np.int32)
                    local = _core.refine_clusters(vectors, local, own, some, as_threads(threads))
                else:
                    local = balanced_order(
                        vectors, own, as_seed(seed + part), max_iter, refine=some, threads=threads
                    )
                if not is_last:
                    sums.append(_core.cluster_sums(vectors, local, own, as_threads(threads)))
                    squares += squared_means(sums[-1], np.diff(own))
                ids = ids[local]
            found.append(ids)
        places = np.argsort(np.repeat(part_of, sizes), kind="stable")
        order[places] = np.concatenate(ranks.all_arrays(np.concatenate(found)))
        if is_last:
            return order
        tightness.append(float(np.sum(ranks.all_arrays(np.array([squares])))))
        if not is_progress(tightness):
            return order
        means = np.concatenate(sums)
        del room, vectors, sums  # not held beside the sample of the means
        again = as_seed(seed + len(cuts))
        dealt, directions = _homes(means, bounds, ranks, cuts, again, max_iter, threads)
        cuts.append(directions)
        part_of[np.argsort(part_of, kind="stable")] = np.concatenate(ranks.all_arrays(dealt))
        cluster_of[order] = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        homes = part_of[cluster_of[first : first + len(x)]]


def _homes(
    x: npt.NDArray[Any],
    bounds: npt.NDArray[np.int64],
    ranks: "Ranks",
    avoided: list[npt.NDArray[np.float32]],
    seed: int,
    max_iter: int,
    threads: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The part that each row of x goes to: bounds[p + 1] - bounds[p] rows of all to part p.

    Also gives the directions of the cuts. Those to avoid are as in `learnt_cuts`.
    """
    parts = np.flatnonzero(np.diff(bounds)).astype(np.int32)  # that get rows
    bounds = np.append(bounds[parts], bounds[-1])
    homes = np.zeros(len(x), np.int32)  # the first of the parts that a row may go to
    cuts = [np.empty((0, x.shape[1]), np.float32)]
    nodes = [(0, len(parts))]
    while nodes := [(begin, end) for begin, end in nodes if end - begin > 1]:
        trees, below = [], []
        for begin, end in nodes:
            leaves = _leaves(begin, end)
            below += list(pairwise(leaves))
            rows = np.flatnonzero(homes == begin)
            ends = bounds[leaves] - bounds[begin]
            sample = _sample(x, rows, ends, ranks, [seed, begin, end])
            of_sample = _scaled(ends, len(sample))
            levels, directions = learnt_cuts(sample, of_sample, seed, max_iter, threads, avoided)
            cuts.append(directions)
            trees.append((leaves, rows, levels, iter(_scores(x, rows, directions, threads).T)))
        # The trees' cuts of a level together: each message is a wait.
        for depth in range(_LEVELS_AT_ONCE):
            divided, scores, on_left = [], [], []
            for leaves, rows, levels, columns in trees:
                for begin, middle, _ in levels[depth] if depth < len(levels) else []:
                    inside = np.flatnonzero(homes[rows] == leaves[begin])
                    divided.append((rows[inside], leaves[middle]))
                    scores.append(next(columns)[inside])
                    on_left.append(int(bounds[leaves[middle]] - bounds[leaves[begin]]))
            sides = _smallest(scores, on_left, ranks)
            for (rows, right), is_left in zip(divided, sides, strict=True):
                homes[rows[~is_left]] = right
        nodes = below
    return parts[homes], np.concatenate(cuts)


def _leaves(begin: int, end: int) -> list[int]:
    """Where the nodes begin that some halvings of begin .. end - 1 give, and the end."""
    leaves = [begin, end]
    for _ in range(_LEVELS_AT_ONCE):
        leaves = sorted({*leaves, *((first + last) // 2 for first, last in pairwise(leaves))})
    return leaves


def _sample(
    x: npt.NDArray[Any],
    rows: npt.NDArray[np.intp],
    ends: npt.NDArray[np.int64],
    ranks: "Ranks",
    seed: list[int],
) -> npt.NDArray[np.float32]:
    """Unit vectors of some of all ranks' rows, enough to learn how to deal them to these parts."""
    wanted = max(SAMPLED_ROWS, SAMPLED_ROWS_PER_DIMENSION * x.shape[1]) * -(-(len(ends) - 1) // 8)
    drawn = min(len(rows), -(-wanted * len(rows) // int(ends[-1])))
    chosen = np.random.default_rng([*seed, ranks.rank]).choice(rows, drawn, replace=False)
    return np.concatenate(ranks.all_arrays(unit(x[np.sort(chosen)].astype(np.float32))))


def _scaled(ends: npt.NDArray[np.int64], rows: int) -> npt.NDArray[np.int64]:
    """Where parts end that divide so many rows in the same shares, each at least one row."""
    places = np.arange(len(ends))
    scaled = np.maximum.accumulate(ends * rows // ends[-1] - places)
    found: npt.NDArray[np.int64] = np.clip(scaled, 0, rows - places[-1]) + places
    return found


def _scores(
    x: npt.NDArray[Any],
    rows: npt.NDArray[np.intp],
    directions: npt.NDArray[np.float32],
    threads: int,
) -> npt.NDArray[np.float32]:
    """`cut_scores` of some rows, few at a time."""
    scores = np.empty((len(rows), len(directions)), np.float32)
    at_once = max(1, _SENT_BYTES // max(1, x.itemsize * x.shape[1]))
    for start in range(0, len(rows), at_once):
        some = slice(start, start + at_once)
        scores[some] = cut_scores(x[rows[some]], directions, threads)
    return scores


def _smallest(
    scores: list[npt.NDArray[np.float32]], counts: list[int], ranks: "Ranks"
) -> list[npt.NDArray[np.bool_]]:
    """For each array, whether each score is among the `count` smallest of all ranks' scores.

    Ties go to the lower rank, and there to the lower place. The thresholds are found digit by
    digit, from counts of each digit's values.
    """
    if not scores:
        return []
    keys = []
    for some in scores:
        bits = (some + np.float32(0)).view(np.uint32)  # one zero
        keys.append(np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)))
    thresholds, alive = np.zeros(len(keys), np.uint32), keys
    missing = np.array(counts)  # of those below the digits so far
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        mask = np.uint32((1 << width) - 1)
        digits = [(some >> np.uint32(shift)) & mask for some in alive]
        found = ranks.sum_counts(np.stack([np.bincount(d, minlength=1 << width) for d in digits]))
        ends = np.cumsum(found, axis=1)
        digit = (ends < missing[:, None]).sum(axis=1)
        missing -= (np.take_along_axis(ends - found, digit[:, None], axis=1))[:, 0]
        alive = [some[d == of] for some, d, of in zip(alive, digits, digit, strict=True)]
        thresholds |= (digit << shift).astype(np.uint32)
    ties = [np.flatnonzero(some == last) for some, last in zip(keys, thresholds, strict=True)]
    of_ranks = np.stack(ranks.all_arrays(np.array([len(places) for places in ties])))
    missing -= of_ranks[: ranks.rank].sum(axis=0)
    chosen = []
    for some, last, places, more in zip(keys, thresholds, ties, missing.tolist(), strict=True):
        chosen.append(some < last)
        chosen[-1][places[: max(0, more)]] = True
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
    The vectors are float16, in `room`: those of float32 as unit vectors, which are half as long to
    send and no worse to cluster.
    """
    parts = [np.flatnonzero(homes == part).astype(np.int32) for part in of_rank]
    received = ranks.exchange([part + np.int32(first) for part in parts])
    ids = np.concatenate(received)
    vectors = room[: len(ids)]
    ends = np.cumsum([len(found) for found in received])
    rooms = np.split(vectors, ends[:-1])
    at_once = max(1, _SENT_BYTES // max(1, room.itemsize * x.shape[1] * ranks.size))
    rounds = ranks.most(max(-(-len(part) // at_once) for part in parts))
    for start in range(0, rounds * at_once, at_once):
        some = slice(start, start + at_once)
        sent = [x[part[some]] for part in parts]
        if x.dtype == np.float32:
            sent = [unit(rows) for rows in sent]
        ranks.swap(sent, [room[some] for room in rooms])
    return ids, vectors
