from typing import Any

import numpy as np
import numpy.typing as npt

_Csr = tuple[npt.NDArray[Any], npt.NDArray[Any], int]
_Keys = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], int]
_Prepared = tuple[
    npt.NDArray[np.float64],
    float,
    npt.NDArray[np.uint32],
    npt.NDArray[np.float32],
    npt.NDArray[np.float32],
    npt.NDArray[np.float32],
]
_Sparse = tuple[npt.NDArray[Any], npt.NDArray[np.int32], npt.NDArray[np.int64]]

__version__: str

def simd_level() -> str: ...
def simd_levels() -> list[str]: ...
def set_simd_level(level: str) -> None: ...
def usable_cpus() -> int: ...
def quota_cpus(root: str) -> int: ...
def balanced_clusters(
    x: npt.NDArray[Any],
    offsets: npt.NDArray[np.int64],
    seed: int,
    max_iter: int,
    refine: int,
    threads: int,
) -> npt.NDArray[np.int32]: ...
def refine_clusters(
    x: npt.NDArray[Any],
    order: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    rounds: int,
    threads: int,
    compared: int = 4096,
) -> npt.NDArray[np.int32]: ...
def cluster_sums(
    x: npt.NDArray[Any],
    order: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    threads: int,
) -> npt.NDArray[np.float32]: ...
def coherence(
    x: npt.NDArray[Any],
    order: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    threads: int,
) -> float: ...
def number_keys(offsets: npt.NDArray[np.int64], values: npt.NDArray[np.int64]) -> _Keys: ...
def cluster_order(
    order: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    sequence: npt.NDArray[np.int32],
    seed: int,
) -> npt.NDArray[np.int32]: ...
def neighbour_order(
    neighbours: npt.NDArray[np.int32],
    nearest: int,
    drawn: int,
    batch_size: int,
    random_rows: int,
    keys: _Keys | None,
    seed: int,
) -> npt.NDArray[np.int32]: ...
def group_order(
    order: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    chunks: npt.NDArray[np.int64] | None,
    per_group: int,
    batch_size: int,
    keys: _Keys | None,
    seed: int,
) -> tuple[npt.NDArray[np.int32], int]: ...
def separate(
    rows: npt.NDArray[np.int32], keys: _Keys, batch_size: int
) -> tuple[npt.NDArray[np.int32], int]: ...
def prepare_items(items: npt.NDArray[Any], cosine: bool, threads: int) -> _Prepared: ...
def topk(
    queries: npt.NDArray[Any],
    items: npt.NDArray[Any],
    prepared: _Prepared | None,
    k: int,
    cosine: bool,
    drop: _Csr | None,
    threads: int,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]: ...
def pair_scores(
    queries: npt.NDArray[Any],
    items: npt.NDArray[Any],
    prepared: _Prepared | None,
    pairs: _Csr,
    cosine: bool,
    threads: int,
) -> npt.NDArray[np.float32]: ...
def adam_rows(
    weight: npt.NDArray[np.float32],
    mean: npt.NDArray[np.float32],
    square: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    gradient: npt.NDArray[np.float32],
    first: float,
    second: float,
    rate: float,
    epsilon: float,
    threads: int,
) -> None: ...
def in_batch_positives(
    labels: _Csr, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]: ...
def label_pool(
    labels: _Csr, rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]: ...
def cluster_shortlist(
    labels: _Csr,
    order: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    limit: int | None,
    threads: int,
) -> _Sparse: ...

class SparseItems:
    def __init__(self, *args: object, **kwargs: object) -> None: ...

def prepare_sparse_items(items: _Csr, values: npt.NDArray[np.float32]) -> SparseItems: ...
def sparse_topk(
    queries: _Csr,
    query_values: npt.NDArray[np.float32],
    items: _Csr,
    item_values: npt.NDArray[np.float32],
    prepared: SparseItems,
    k: int,
    drop: _Csr | None,
    threads: int,
) -> _Sparse: ...
def sparse_pair_scores(
    queries: _Csr,
    query_values: npt.NDArray[np.float32],
    items: _Csr,
    item_values: npt.NDArray[np.float32],
    pairs: _Csr,
    threads: int,
) -> npt.NDArray[np.float32]: ...
def keep_topk(matrix: _Csr, values: npt.NDArray[Any], k: int, threads: int) -> _Sparse: ...
def merge(
    first: _Csr,
    first_values: npt.NDArray[Any],
    second: _Csr,
    second_values: npt.NDArray[Any],
    sum: bool,
    threads: int,
) -> _Sparse: ...
def drop_pairs(matrix: _Csr, values: npt.NDArray[Any], pairs: _Csr, threads: int) -> _Sparse: ...
def train_linear(
    points: _Csr,
    values: npt.NDArray[np.float32],
    relevant: _Csr,
    compared: _Csr | None,
    cost: float,
    tolerance: float,
    least: float,
    passes: int,
    seed: int,
    threads: int,
) -> _Sparse: ...
def evaluate(
    predictions: _Csr,
    scores: npt.NDArray[Any],
    truth: _Csr,
    drop: _Csr | None,
    inverse_propensity: npt.NDArray[np.float32] | None,
    ks: npt.NDArray[np.int64],
    by_row: bool,
    threads: int,
) -> dict[str, npt.NDArray[np.float64]]: ...
def parse_sparse_text(
    text: bytes,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64], int]: ...
