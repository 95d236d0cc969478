"""Clusters of rows that memory does not hold: cuts, then part by part, by way of files."""

import math
import os
import tempfile
from pathlib import Path
from typing import Any

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
    first_not_finite,
    is_progress,
    learnt_cuts,
    pieces,
    squared_means,
    unit,
)

# What the core takes beside the rows, in bytes a row; and what is kept of a row while the parts are
# clustered one by one. Parts differ in size by some percent, as they are cut where a sample says.
_WORKING_BYTES, _KEPT_BYTES = 84, 8
_UNEVEN = 1.25
_MOST_PARTS = 256
# Equal rows are parted too: products with a cut differ by up to this, as the ids say.
_JITTER = 1e-5


def parts_within(memory: int, x: npt.NDArray[Any], clusters: int) -> int:
    """The number of parts that x is to be clustered in; 1 where all of it fits."""
    rows, dim = x.shape
    needed: int = rows * (dim * x.itemsize + _WORKING_BYTES) + 4 * dim * clusters
    if needed <= memory:
        return 1
    least = math.ceil(_KEPT_BYTES * rows + _UNEVEN * needed / _MOST_PARTS)
    if memory < least:
        raise ValueError(f"memory is {memory} bytes, x of shape {x.shape} takes {least} or more")
    parts: int = math.ceil(_UNEVEN * needed / (memory - _KEPT_BYTES * rows))
    return min(parts, clusters)


def parted_order(
    x: npt.NDArray[Any],
    offsets: npt.NDArray[np.int64],
    parts: int,
    seed: int,
    max_iter: int,
    rounds: int,
    threads: int,
) -> npt.NDArray[np.int32]:
    """The order of `balanced_clusters` by parts, of which one at a time is in memory."""
    sizes = np.diff(offsets)
    order = np.empty(len(x), np.int32)
    some = -(-rounds // 2)  # each time that the rows are dealt
    with tempfile.TemporaryDirectory(prefix="ngame-") as folder:
        files, means = _Files(folder, x.shape[1], x.dtype), Path(folder) / "means"
        cuts = [_Cuts(x, parts, [], seed, max_iter, threads)]
        for ids, rows in pieces(x):
            if not np.isfinite(rows).all():
                raise _not_finite(x)
            files.append(cuts[0].homes(rows, ids, threads), ids, rows)
        first, squares = 0, 0.0  # the former is the first cluster of the part
        for part in range(parts):
            ids, vectors = files.take(part)
            # Whole clusters. The rows that are left over go to the next part, which is near.
            end = int(np.searchsorted(offsets, offsets[first] + len(ids), "right"))
            own = offsets[first:end] - offsets[first]
            first, whole = end - 1, int(own[-1])
            local = np.arange(len(ids), dtype=np.int32)
            if whole:
                bounds = own if whole == len(ids) else np.append(own, len(ids))
                local = balanced_order(
                    vectors, bounds, as_seed(seed + part), max_iter, refine=some, threads=threads
                )
                if rounds:
                    sums = _core.cluster_sums(vectors, local, bounds, as_threads(threads))
                    sums = sums[: len(own) - 1]
                    squares += squared_means(sums, np.diff(own))
                    _append(sums, means)
            rest = local[whole:]
            files.append(np.full(len(rest), part + 1), ids[rest], vectors[rest])
            del vectors
            members = ids[local[:whole]]
            if (np.diff(ids) < 0).any():  # those left over came last
                cluster = np.repeat(np.arange(len(own) - 1), np.diff(own))
                members = members[np.lexsort((members, cluster))]
            order[offsets[first] - whole : offsets[first]] = members
        cluster_of = np.empty(len(x), np.int32)  # of each row
        part_of = np.zeros(len(sizes), np.int16)  # of each cluster
        tightness = [squares]
        while rounds and len(cuts) < MOST_DEALS and is_progress(tightness):
            cluster_of[order] = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
            sums = np.memmap(means, np.float32, "r", shape=(len(sizes), x.shape[1]))
            avoided = [each.directions for each in cuts]
            cuts.append(_Cuts(sums, parts, avoided, as_seed(seed + len(cuts)), max_iter, threads))
            dealt = [cuts[-1].homes(rows, ids, threads) for ids, rows in pieces(sums)]
            part_of[np.argsort(part_of, kind="stable")] = np.concatenate(dealt)
            means.unlink()
            for ids, rows in pieces(x):
                files.append(part_of[cluster_of[ids]], ids, rows)
            squares = 0.0
            for part in range(parts):
                ids, vectors = files.take(part)
                if len(ids) == 0:
                    continue
                clusters = np.flatnonzero(part_of == part)
                own = np.append(0, np.cumsum(sizes[clusters]))
                local = np.argsort(cluster_of[ids], kind="stable").astype(np.int32)
                local = _core.refine_clusters(vectors, local, own, some, as_threads(threads))
                starts = np.repeat(offsets[clusters] - own[:-1], sizes[clusters])
                order[np.arange(len(ids)) + starts] = ids[local]
                if len(cuts) < MOST_DEALS:
                    sums = _core.cluster_sums(vectors, local, own, as_threads(threads))
                    squares += squared_means(sums, sizes[clusters])
                    _append(sums, means)
                del vectors
            tightness.append(squares)
    return order


def _append(values: npt.NDArray[Any], path: Path) -> None:
    """Add an array to a file; OSError with the reason and the file, which `tofile` does not say."""
    try:
        with open(path, "ab") as file:
            file.write(values.data)
    except OSError as error:
        error.filename = os.fspath(path)
        raise


def _not_finite(x: npt.NDArray[Any]) -> ValueError:
    return ValueError(f"x has NaN or infinity in row {first_not_finite(x)}")


class _Cuts:
    """How rows are dealt to parts: a tree of cuts, learnt on a sample, into about equal parts.

    Those to avoid are as in `learnt_cuts`.
    """

    def __init__(
        self,
        x: npt.NDArray[Any],
        parts: int,
        avoided: list[npt.NDArray[np.float32]],
        seed: int,
        max_iter: int,
        threads: int,
    ) -> None:
        wanted = max(SAMPLED_ROWS, SAMPLED_ROWS_PER_DIMENSION * x.shape[1])
        drawn = min(len(x), wanted * -(-parts // 8))
        random = np.random.default_rng([seed, parts])
        ids = np.sort(random.choice(len(x), drawn, replace=False)).astype(np.int32)
        rows = x[ids]
        if not np.isfinite(rows).all():
            raise _not_finite(x)
        ends = np.arange(parts + 1) * drawn // parts
        levels, self.directions = learnt_cuts(
            unit(rows.astype(np.float32)), ends, seed, max_iter, threads, avoided
        )
        self._cuts = [cut for level in levels for cut in level]
        # Each leaves to the left what its share of the parts is.
        self._thresholds: list[float] = []
        homes = np.zeros(drawn, np.int16)
        scores = self._scores(rows, ids, threads)
        for cut, (begin, middle, end) in enumerate(self._cuts):
            part = scores[homes == begin, cut]
            left = len(part) * (middle - begin) // (end - begin)
            self._thresholds.append(np.partition(part, left)[left] if len(part) else 0)
            homes[(homes == begin) & (scores[:, cut] >= self._thresholds[cut])] = middle

    def homes(
        self, rows: npt.NDArray[Any], ids: npt.NDArray[np.int32], threads: int
    ) -> npt.NDArray[np.int16]:
        """The part that each row goes to."""
        homes = np.zeros(len(rows), np.int16)
        scores = self._scores(rows, ids, threads)
        for cut, (begin, middle, _) in enumerate(self._cuts):
            beyond = scores[:, cut] >= self._thresholds[cut]
            homes[(homes == begin) & beyond] = middle
        return homes

    def _scores(
        self, rows: npt.NDArray[Any], ids: npt.NDArray[np.int32], threads: int
    ) -> npt.NDArray[np.float32]:
        """`cut_scores`, a little apart for equal rows."""
        scores = cut_scores(rows, self.directions, threads)
        scattered = ids.astype(np.uint32) * np.uint32(2654435769)  # of a golden section
        jitter = (scattered.astype(np.float64) * (_JITTER / 2**32)).astype(np.float32)
        return scores + jitter[:, None]


class _Files:
    """Rows and their ids, appended to the files of their parts, read and removed part by part.

    Parameters
    ----------
    folder : where the files go; they have names of their own
    dim : columns of the rows
    dtype : of the rows
    """

    def __init__(self, folder: str | os.PathLike[str], dim: int, dtype: npt.DTypeLike) -> None:
        self._folder, self._dim, self._dtype = Path(folder), dim, np.dtype(dtype)

    def append(
        self,
        homes: npt.NDArray[np.integer],
        ids: npt.NDArray[np.int32],
        rows: npt.NDArray[Any],
    ) -> None:
        """Add each row, with its id, to the part that is its home."""
        order = np.argsort(homes, kind="stable")
        parts, starts = np.unique(homes[order], return_index=True)
        ends = np.append(starts, len(order))[1:]
        for part, start, end in zip(parts.tolist(), starts, ends, strict=True):
            chosen = order[start:end]
            for path, values in zip(self._paths(part), (ids, rows), strict=True):
                _append(values[chosen], path)

    def take(self, part: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
        """Ids and rows of a part, in the order in which they came. Its files are removed."""
        paths = self._paths(part)
        if not paths[0].exists():
            return np.empty(0, np.int32), np.empty((0, self._dim), self._dtype)
        ids, values = (
            np.fromfile(path, dtype)
            for path, dtype in zip(paths, (np.dtype(np.int32), self._dtype), strict=True)
        )
        for path in paths:
            path.unlink()
        return ids, values.reshape(-1, self._dim)

    def _paths(self, part: int) -> tuple[Path, Path]:
        return self._folder / f"{part}.ids", self._folder / f"{part}.rows"
