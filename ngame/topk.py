"""Exact search: the items with the highest cosine or dot product."""

import os
import zlib
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ngame import _core
from ngame.arrays import (
    Csr,
    Pairs,
    Pattern,
    ProcessGroup,
    as_count,
    as_matrix,
    as_pairs,
    as_threads,
    is_sparse,
    new_csr,
    on_gpu,
    pattern,
)
from ngame.dispatch import dispatched
from ngame.files import map_arrays, write_arrays

if TYPE_CHECKING:
    from ngame.ranks import Ranks

Metric = Literal["cosine", "dot"]
_Arrays = dict[str, npt.NDArray[Any]]

# Of a file of `ExactIndex.save`. The number changes where older readers would misread the arrays.
_FORMAT = "ngame.ExactIndex 1"

# Rows and codes of more bytes than this are checked in so many blocks of this size: reading all of
# a large file would take longer than mapping it saves.
_WHOLE_BYTES, _BLOCKS, _BLOCK_BYTES = 1 << 26, 256, 1 << 14

# Queries of a rank that the others hold at once.
_QUERIES_AT_ONCE = 4096


@dispatched
def topk_arrays(
    queries: npt.ArrayLike,
    items: npt.ArrayLike,
    k: int,
    *,
    metric: Metric = "cosine",
    drop: Pairs | None = None,
    threads: int = 0,
    group: ProcessGroup | None = None,
) -> tuple[Any, Any]:
    """Find the k items with the highest score for every query, exactly.

    If either is on a CUDA device, so are the results: see `ngame.cuda`. Several processes can
    share the items: see `group`.

    Parameters
    ----------
    queries : float32 or float16 array of shape [n, d]
    items : float32 or float16 array of shape [m, d]
        Only arrays with non-contiguous rows are copied.
    k : int
        1 .. m.
    metric : "cosine" or "dot"
        The cosine of a zero row with anything is 0.
    drop : CSR matrix of shape [n, m] or integer array of shape [p, 2], optional
        (query, item) pairs that are left out.
    threads : int
        0 means the CPUs this process may use. Scores do not depend on it.
    group : torch.distributed.ProcessGroup, optional
        Every rank calls with a share of the items, whose ids go on where those of the rank before
        end, and with queries of its own, whose results it gets: those of a search among all the
        items, to the bit. `k` and `drop` are of all items. Arrays on the host only.

    Returns
    -------
    scores : float32 array of shape [n, k]
    ids : int32 array of shape [n, k]
        Best first, ties by lower id. Where `drop` leaves fewer than k items, the tail of a row is
        -inf and -1. Scores are summed in float64, rounded to float32, and then compared.

    Raises
    ------
    TypeError
        A dtype is neither float32 nor float16.
    ValueError
        Shapes differ, k is not in 1 .. m, `metric` is unknown, or a row has NaN or infinity (the
        message names the first); or, for "dot", the longest query times the longest item is beyond
        float32.
    IndexError
        A pair of `drop` is out of range.
    ConnectionError
        Another rank of `group` has ended, because of an error of its own, say.

    Examples
    --------
    >>> import numpy as np
    >>> scores, ids = topk_arrays(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), 1)
    >>> ids.tolist()
    [[0], [1]]

    With a progress bar, where there are millions of queries: slices of them over an `ExactIndex`.

    >>> from tqdm import tqdm
    >>> queries, index = np.eye(6, dtype=np.float32), ExactIndex(np.eye(6, dtype=np.float32))
    >>> starts = tqdm(range(0, len(queries), 4), disable=None)  # slices of ten thousand or so
    >>> parts = [index.search(queries[at : at + 4], 1) for at in starts]
    >>> scores, ids = map(np.concatenate, zip(*parts))
    >>> ids.ravel().tolist()
    [0, 1, 2, 3, 4, 5]
    """
    if group is not None:
        index = ExactIndex(items, metric, threads=threads, group=group)
        return index.search(queries, k, drop=drop, threads=threads)
    items, cosine = _as_items(items, metric)
    return _search(queries, items, None, k, cosine, drop, threads)


class ExactIndex:
    """Items prepared once for many searches, each with the result of `topk_arrays`.

    The index keeps norms and 8-bit codes of the rows: a quarter of the bytes of float32 rows, half
    of those of float16. The rows themselves are not copied and must not change while the index is
    in use. It is safe to search from several threads and in forked processes.

    Parameters
    ----------
    items : float32 or float16 array of shape [m, d]
        On the host. Only arrays with non-contiguous rows are copied.
    metric : "cosine" or "dot"
        The cosine of a zero row with anything is 0.
    threads : int
        0 means the CPUs this process may use.
    group : torch.distributed.ProcessGroup, optional
        Every rank prepares its share of the items, and calls `search` when the others do: see
        `topk_arrays`. `save` and `len` are of the rank's share.

    Raises
    ------
    TypeError
        The dtype is neither float32 nor float16, or `items` is a CUDA tensor.
    ValueError
        `items` does not have two dimensions, `metric` is unknown, or a row has NaN or infinity
        (the message names the first).

    Examples
    --------
    >>> import numpy as np
    >>> index = ExactIndex(np.eye(3, dtype=np.float32), metric="dot")
    >>> scores, ids = index.search(np.array([[0, 2, 1]], np.float32), 2)
    >>> ids.tolist(), scores.tolist()
    ([[1, 2]], [[2.0, 1.0]])
    """

    _ranks: "Ranks | None" = None

    def __init__(
        self,
        items: npt.ArrayLike,
        metric: Metric = "cosine",
        *,
        threads: int = 0,
        group: ProcessGroup | None = None,
    ) -> None:
        _on_host(items, "items")
        self._items, cosine = _as_items(items, metric)
        self._metric: Metric = metric
        self._prepared = _core.prepare_items(self._items, cosine, as_threads(threads))
        if group is not None:
            from ngame.ranks import Ranks

            self._ranks = Ranks(group)

    def search(
        self, queries: npt.ArrayLike, k: int, *, drop: Pairs | None = None, threads: int = 0
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Find the k items with the highest score for every query.

        Parameters, results and errors are those of `topk_arrays`, to the bit.
        """
        _on_host(queries, "queries")
        if self._ranks is not None:
            return self._search_shares(self._ranks, queries, k, drop, threads)
        cosine = self._metric == "cosine"
        return _search(queries, self._items, self._prepared, k, cosine, drop, threads)

    def pair_scores(
        self, queries: npt.ArrayLike, pairs: Csr, *, threads: int = 0
    ) -> npt.NDArray[np.float32]:
        """Score given pairs of queries and items, with exactly the scores of `search`.

        With a process group the items are this rank's own, and nothing is exchanged.

        Parameters
        ----------
        queries, threads
            As for `topk_arrays`.
        pairs : CSR matrix of shape [n, m]
            Every stored entry is a pair.

        Returns
        -------
        float32 array of shape [pairs.nnz]
            In the order of the entries, columns ascending within a row.

        Raises
        ------
        TypeError, ValueError, IndexError
            As `topk_arrays`.
        """
        _on_host(queries, "queries")
        cosine = self._metric == "cosine"
        return _pair_scores(queries, self._items, self._prepared, pairs, cosine, threads)

    def _search_shares(
        self, ranks: "Ranks", queries: npt.ArrayLike, k: int, drop: Pairs | None, threads: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Search this rank's items for the queries of all ranks, and merge what they found for its
        own."""
        queries, k = _as_queries(queries, self._items), as_count(k, "k")
        # What the ranks must agree on is checked by all, so that all raise or none.
        about = [len(self), len(queries), self.dim, k, self._metric == "cosine"]
        items, counts, *agreed = np.concatenate(ranks.all_arrays(np.array([about]))).T
        for name, values in zip(("columns", "k", "metric"), agreed, strict=True):
            if (values != values[0]).any():
                raise ValueError(f"the ranks differ in {name}: {values.tolist()}")
        firsts, total = np.cumsum(items) - items, int(items.sum())
        if total > np.iinfo(np.int32).max:
            raise ValueError(f"the ranks have {total} items, at most 2**31 - 1 are possible")
        if k > total:
            raise ValueError(f"k is {k}, the ranks have only {total} items")
        pairs = np.zeros((0, 2), np.int64)
        if drop is not None:
            entries = as_pairs(drop, "drop", (len(queries), total)).nonzero()
            pairs = np.stack(entries, axis=1).astype(np.int64)
        scores = np.empty((len(queries), k), np.float32)
        ids = np.empty((len(queries), k), np.int32)
        for begin in range(0, int(counts.max()), _QUERIES_AT_ONCE):
            part = slice(begin, begin + _QUERIES_AT_ONCE)
            asked = ranks.all_arrays(queries[part].astype(np.float32, copy=False))
            asked_of = (pairs[:, 0] >= part.start) & (pairs[:, 0] < part.stop)
            dropped = ranks.all_arrays(pairs[asked_of] - [begin, 0])
            found = ranks.exchange(
                [
                    self._answer(theirs, k, left_out, int(firsts[ranks.rank]), threads)
                    for theirs, left_out in zip(asked, dropped, strict=True)
                ]
            )
            rows = len(scores[part])
            if rows == 0:
                continue  # other ranks have more queries
            # A row of each rank's answer has as many entries as it has items, at most k.
            merged = np.concatenate([one.reshape(rows, -1, 2) for one in found if len(one)], axis=1)
            best, who = merged[..., 0].view(np.float32), merged[..., 1]
            order = np.lexsort((who, -best))[:, :k]
            scores[part] = np.take_along_axis(best, order, 1)
            ids[part] = np.take_along_axis(who, order, 1)
        return scores, ids

    def _answer(
        self,
        queries: npt.NDArray[np.float32],
        k: int,
        left_out: npt.NDArray[np.int64],
        first: int,
        threads: int,
    ) -> npt.NDArray[np.int32]:
        """This rank's best items for some queries, as pairs (bits of the score, id), [n * k, 2]."""
        here = (left_out[:, 1] >= first) & (left_out[:, 1] < first + len(self))
        k = min(k, len(self))
        if k == 0 or len(queries) == 0:
            return np.zeros((0, 2), np.int32)
        scores, ids = _search(
            queries,
            self._items,
            self._prepared,
            k,
            self._metric == "cosine",
            left_out[here] - [0, first],
            threads,
        )
        ids = np.where(ids >= 0, ids + np.int32(first), ids)
        return np.stack([scores.view(np.int32), ids], axis=-1).reshape(-1, 2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the items, their norms and their codes in safetensors format, in one step."""
        norms, _, panels, weights, errors, lengths = self._prepared
        checked: _Arrays = {"norms": norms, "weights": weights, "errors": errors}
        checked["lengths"] = lengths
        metadata = {
            "format": _FORMAT,
            "metric": self._metric,
            "checksum": _checksum({**checked, "panels": panels, "items": self._items}),
        }
        # The panels first: they then begin at the start of a cache line.
        write_arrays(path, {"panels": panels, **checked, "items": self._items}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ExactIndex":
        """Map a file that `save` wrote into memory.

        Rows and codes are read when a search needs them. The structure of the file and a checksum
        are verified here: of all up to 64 MiB, of 256 blocks spread over larger rows and codes, and
        of all the rest.

        Raises
        ------
        ValueError
            The file is truncated, damaged, or no index; the message names it.
        """
        arrays, metadata = map_arrays(path)
        metric: Metric = "cosine" if metadata.get("metric") == "cosine" else "dot"
        if metadata.get("format") != _FORMAT or metadata.get("metric") != metric:
            raise ValueError(f"{os.fspath(path)} does not hold an ExactIndex of this version")
        try:
            items, panels = arrays.pop("items"), arrays.pop("panels")
            if metadata.get("checksum") != _checksum({**arrays, "panels": panels, "items": items}):
                raise ValueError("its checksum does not fit")
            norms, weights = arrays["norms"], arrays["weights"]
            longest = float(norms.max(initial=0))
            prepared = (norms, longest, panels, weights, arrays["errors"], arrays["lengths"])
            # The core compares dtypes and shapes.
            none = np.zeros((0, items.shape[1]), np.float32)
            _core.topk(none, items, prepared, 1, metric == "cosine", None, 1)
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise ValueError(f"{os.fspath(path)} is damaged: {error}") from error
        index = cls.__new__(cls)
        index._items, index._metric, index._prepared = items, metric, prepared
        return index

    @property
    def items(self) -> npt.NDArray[Any]:
        """The rows, [m, d]."""
        return self._items

    @property
    def metric(self) -> Metric:
        """The metric: "cosine" or "dot"."""
        return self._metric

    @property
    def dim(self) -> int:
        """Columns of the items."""
        return int(self._items.shape[1])

    def __len__(self) -> int:
        """Give the number of items."""
        return len(self._items)

    def __repr__(self) -> str:
        return f"ExactIndex({len(self)} items of {self.dim} columns, metric={self._metric!r})"


def _checksum(arrays: _Arrays) -> str:
    """CRC-32 of arrays, in the order of their names; of large rows and codes, of blocks of them."""
    total = 0
    for name in sorted(arrays):
        array = arrays[name]
        rows = max(1, _BLOCK_BYTES // max(1, array[:1].nbytes))
        starts = np.arange(0, len(array), rows)
        if name in ("items", "panels") and array.nbytes > _WHOLE_BYTES:
            starts = starts[np.linspace(0, len(starts) - 1, _BLOCKS).astype(np.int64)]
        for start in starts.tolist():
            total = zlib.crc32(array[start : start + rows].tobytes(), total)
    return f"{total:08x}"


def _on_host(value: Any, name: str) -> None:
    if on_gpu(value):
        raise TypeError(f"{name} is on a CUDA device, expected an array on the host")


def _search(
    queries: npt.ArrayLike,
    items: npt.NDArray[Any],
    prepared: Any,
    k: int,
    cosine: bool,
    drop: Pairs | None,
    threads: int,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Search checked items; `prepared` is None or what `_core.prepare_items` gave."""
    queries = _as_queries(queries, items)
    k = as_count(k, "k")
    if k > len(items):
        raise ValueError(f"k is {k}, items has only {len(items)} rows")
    dropped: Pattern | None = None
    if drop is not None:
        dropped = pattern(as_pairs(drop, "drop", (len(queries), len(items))))
    return _core.topk(queries, items, prepared, k, cosine, dropped, as_threads(threads))


def pair_scores(
    queries: npt.ArrayLike,
    items: npt.ArrayLike,
    pairs: Csr,
    *,
    metric: Metric = "cosine",
    threads: int = 0,
) -> npt.NDArray[np.float32]:
    """Score given pairs of queries and items once: see `ExactIndex.pair_scores`."""
    items, cosine = _as_items(items, metric)
    return _pair_scores(queries, items, None, pairs, cosine, threads)


def _pair_scores(
    queries: npt.ArrayLike,
    items: npt.NDArray[Any],
    prepared: Any,
    pairs: Csr,
    cosine: bool,
    threads: int,
) -> npt.NDArray[np.float32]:
    """Score pairs with checked items; `prepared` as in `_search`."""
    queries = _as_queries(queries, items)
    if not is_sparse(pairs):  # whose scores would come back in another order
        raise TypeError(f"pairs is a {type(pairs).__name__}, expected a CSR matrix")
    asked = as_pairs(pairs, "pairs", (len(queries), len(items)))
    return _core.pair_scores(queries, items, prepared, pattern(asked), cosine, as_threads(threads))


def _as_items(items: npt.ArrayLike, metric: str) -> tuple[npt.NDArray[Any], bool]:
    """Check items and metric; also tells whether the metric is the cosine."""
    matrix = as_matrix(items, "items")
    if len(matrix) > np.iinfo(np.int32).max:
        raise ValueError(f"items has {len(matrix)} rows, at most 2**31 - 1 are possible")
    if metric not in ("cosine", "dot"):
        raise ValueError(f'metric is {metric!r}, expected "cosine" or "dot"')
    return matrix, metric == "cosine"


def _as_queries(queries: npt.ArrayLike, items: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Check that queries fit the items."""
    matrix = as_matrix(queries, "queries")
    if matrix.shape[1] != items.shape[1]:
        raise ValueError(f"queries has {matrix.shape[1]} columns, items has {items.shape[1]}")
    return matrix


def topk(
    queries: npt.ArrayLike,
    items: npt.ArrayLike,
    k: int,
    *,
    metric: Metric = "cosine",
    drop: Pairs | None = None,
    threads: int = 0,
    group: ProcessGroup | None = None,
) -> Any:
    """Find the k items with the highest score for every query, as a sparse matrix.

    Parameters, errors and ranking are those of `topk_arrays`, which also shows how to search with
    a progress bar; `scipy.sparse.vstack` puts the parts together.

    Returns
    -------
    float32 CSR matrix of shape [n, m]
        k stored entries a row, fewer where `drop` leaves fewer items; indices sorted. Scores of 0
        are stored too. On a CUDA device a sparse CSR tensor. With `group`, m are the items of all.
    """
    scores, ids = topk_arrays(
        queries, items, k, metric=metric, drop=drop, threads=threads, group=group
    )
    columns = np.shape(items)[0]
    if group is not None:
        from ngame.ranks import Ranks

        columns = int(np.sum(Ranks(group).all_arrays(np.array([columns]))))
    return ranked_csr(scores, ids, columns)


@dispatched
def ranked_csr(scores: Any, ids: Any, columns: int) -> Any:
    """Convert scores and ids from `topk_arrays` to a CSR matrix of shape [n, columns].

    Indices are sorted. An id of -1 is no entry.
    """
    order = np.argsort(ids, axis=1)
    scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    found = ids >= 0
    offsets = np.append(0, np.cumsum(found.sum(axis=1)))
    return new_csr(scores[found], ids[found], offsets, (len(ids), columns))
