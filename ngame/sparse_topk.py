"""Exact search among sparse rows: the items with the highest dot product."""

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame import _core
from ngame.arrays import (
    Csr,
    Pairs,
    as_count,
    as_pairs,
    as_threads,
    as_weighted_rows,
    new_csr,
    pattern,
)


class SparseIndex:
    """Sparse items prepared once for many searches, each with the result of `sparse_topk`.

    The index keeps 8 bytes for every stored entry, and 8 for every column per two million rows.
    The matrix itself is not copied and must not change while the index is in use. It is safe to
    search from several threads and in forked processes.

    Parameters
    ----------
    items : float32 CSR matrix of shape [m, d]
        Unsorted indices are sorted, and duplicates summed, in a copy.

    Raises
    ------
    TypeError
        `items` is not a CSR matrix of float32.
    ValueError
        A row has NaN or infinity (the message names the first).

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sp
    >>> index = SparseIndex(sp.csr_matrix(np.array([[1, 0], [1, 2], [0, 1]], np.float32)))
    >>> index.search(sp.csr_matrix(np.array([[1, 1]], np.float32)), 2).toarray().tolist()
    [[1.0, 3.0, 0.0]]
    """

    def __init__(self, items: Csr) -> None:
        self._items = as_weighted_rows(items, "items")
        if self._items.shape[0] > np.iinfo(np.int32).max:
            raise ValueError(
                f"items has {self._items.shape[0]} rows, at most 2**31 - 1 are possible"
            )
        self._prepared = _core.prepare_sparse_items(pattern(self._items), self._items.data)

    def search(
        self, queries: Csr, k: int, *, drop: Pairs | None = None, threads: int = 0
    ) -> sp.csr_matrix:
        """Find the k items with the highest score for every query.

        Parameters, results and errors are those of `sparse_topk`, to the bit.
        """
        rows = self._as_queries(queries)
        k = as_count(k, "k")
        shape = (rows.shape[0], len(self))
        dropped = None if drop is None else as_pairs(drop, "drop", shape)
        matrices = [rows, self._items, *([] if dropped is None else [dropped])]
        index = np.result_type(*(matrix.indices.dtype for matrix in matrices))
        found = _core.sparse_topk(
            pattern(rows, index),
            rows.data,
            pattern(self._items, index),
            self._items.data,
            self._prepared,
            k,
            None if dropped is None else pattern(dropped, index),
            as_threads(threads),
        )
        return new_csr(*found, shape)

    def pair_scores(self, queries: Csr, pairs: Csr, *, threads: int = 0) -> npt.NDArray[np.float32]:
        """Score given pairs of queries and items, with the scores of `search`.

        Parameters
        ----------
        queries, threads
            As for `sparse_topk`.
        pairs : CSR matrix of shape [n, m]
            Every stored entry is a pair.

        Returns
        -------
        float32 array of shape [pairs.nnz]
            In the order of the entries, columns ascending within a row.
        """
        rows = self._as_queries(queries)
        if not sp.issparse(pairs):  # whose scores would come back in another order
            raise TypeError(f"pairs is a {type(pairs).__name__}, expected a CSR matrix")
        asked = as_pairs(pairs, "pairs", (rows.shape[0], len(self)))
        index = np.result_type(*(m.indices.dtype for m in (rows, self._items, asked)))
        return _core.sparse_pair_scores(
            pattern(rows, index),
            rows.data,
            pattern(self._items, index),
            self._items.data,
            pattern(asked, index),
            as_threads(threads),
        )

    def _as_queries(self, queries: Any) -> Any:
        """Check that queries fit the items."""
        rows = as_weighted_rows(queries, "queries")
        if rows.shape[1] != self._items.shape[1]:
            raise ValueError(
                f"queries has {rows.shape[1]} columns, items has {self._items.shape[1]}"
            )
        return rows

    def __getstate__(self) -> Any:
        """Give the items: what is prepared is made anew in another process."""
        return self._items

    def __setstate__(self, items: Any) -> None:
        self._items = items
        self._prepared = _core.prepare_sparse_items(pattern(items), items.data)

    def __len__(self) -> int:
        """Give the number of items."""
        return int(self._items.shape[0])


def sparse_topk(
    queries: Csr, items: Csr, k: int, *, drop: Pairs | None = None, threads: int = 0
) -> sp.csr_matrix:
    """Find the k items with the highest dot product for every query, exactly.

    Rows of norm 1 give cosines. The result has the k largest entries of each row of
    ``queries @ items.T``, which is never made.

    Parameters
    ----------
    queries : float32 CSR matrix of shape [n, d]
        Unsorted indices are sorted, and duplicates summed, in a copy.
    items : float32 CSR matrix of shape [m, d]
        As `queries`. Items that are searched again are better kept in a `SparseIndex`.
    k : int
        1 or more. Queries with fewer than k scores other than 0 get fewer entries.
    drop : CSR matrix of shape [n, m] or integer array of shape [p, 2], optional
        (query, item) pairs that are left out.
    threads : int
        0 means the CPUs this process may use. Scores do not depend on it.

    Returns
    -------
    float32 CSR matrix of shape [n, m]
        Indices sorted. Negative scores are listed where fewer than k are positive. Scores are
        summed in float64 in the order of the columns, rounded to float32, and then compared, ties
        by lower id.

    Raises
    ------
    TypeError
        `queries` or `items` is not a CSR matrix of float32.
    ValueError
        They differ in columns, k is below 1, or a row has NaN, infinity, or values whose products
        overflow float32 (the message names the first).
    IndexError
        A pair of `drop` is out of range.

    Notes
    -----
    Columns are visited one at a time, as a search engine visits the lists of its terms, and the
    scores of 16,384 items are summed in 16 bits, or 32 for long queries. Frequent columns are left
    out where they can add little (after Turtle and Flood, "Query evaluation: strategies and
    optimizations", 1995; the bound is Cauchy and Schwarz's). Items that come close to the best k
    are then scored exactly. Where that would take longer, for rows are long or few items have a
    column of the query, all sums are exact at once.

    Memory beyond input and output: the index (see `SparseIndex`), 8 bytes for every result, and
    under 1 MB a thread.

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sp
    >>> items = sp.csr_matrix(np.array([[1, 0], [1, 2], [0, 1]], np.float32))
    >>> sparse_topk(sp.csr_matrix(np.array([[1, 1]], np.float32)), items, 2).toarray().tolist()
    [[1.0, 3.0, 0.0]]
    """
    return SparseIndex(items).search(queries, k, drop=drop, threads=threads)
