# All ints named for arrays are addresses on the device; ngame/cuda.py has checked what lies there.
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

_Where = tuple[int, int, Callable[[int], int]]  # device, stream, allocate(bytes) -> address
# address, rows, columns, elements from one row to the next, "f32", "f16" or "bf16"
_Dense = tuple[int, int, int, int, str]
# indptr, indices, rows, columns, stored entries, whether the ids are int64
_Csr = tuple[int, int, int, int, int, bool]
_Pattern = tuple[int, int, int]  # indptr, indices, stored entries

# x, inverse norms, offsets, order, clusters
_Clustering = tuple[_Dense, int, int, int, int]
# queries, items, their columns; scores, their rows and columns;
# multiply(first query, last query, first item, last item)
_Product = tuple[int, int, int, int, int, int, Callable[[int, int, int, int], None]]

architectures: str
listed: int
asked: int

def devices() -> tuple[int, str]: ...
def balanced_clusters(
    where: _Where,
    x: _Dense,
    offsets: Sequence[int],
    seed: int,
    max_iterations: int,
    inverse: int,
    order: int,
) -> None: ...
def choose(
    where: _Where,
    clustering: _Clustering,
    means: int,
    lengths: int,
    lists: int,
    listed: int,
    keys: int,
) -> None: ...
def cluster_means(where: _Where, clustering: _Clustering, means: int, lengths: int) -> None: ...
def evaluate(
    where: _Where,
    predictions: _Csr,
    scores: int,
    scores_are_double: bool,
    truth: _Csr,
    drop: _Csr | None,
    inverse_propensity: int,
    ks: Sequence[int],
    by_row: bool,
) -> dict[str, npt.NDArray[np.float64]]: ...
def in_batch_positives(
    where: _Where, labels: _Csr, rows: int, row_count: int, columns: int, column_count: int
) -> _Pattern: ...
def label_pool(
    where: _Where, labels: _Csr, rows: int, row_count: int
) -> tuple[int, int, _Pattern]: ...
def match(
    where: _Where,
    rows: int,
    offsets: int,
    clusters: int,
    home: int,
    keys: int,
    held: int,
    counts: int,
    refused: int,
) -> int: ...
def topk(
    where: _Where,
    queries: _Dense,
    items: _Dense,
    drop: _Csr | None,
    k: int,
    cosine: bool,
    product: _Product,
    scores: int,
    ids: int,
) -> None: ...
