"""Samplers to try, and what every plan of theirs promises."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from hypothesis import strategies as st

from ngame.batches import ClusterBatchSampler, GroupBatchSampler, NeighbourBatchSampler
from ngame.cluster import Clusters

Sampler = ClusterBatchSampler | NeighbourBatchSampler | GroupBatchSampler


def some_clusters(n_rows: int, size: int, seed: int = 0) -> Clusters:
    """Clusters of `size` random rows, one of which takes the remainder, at a random place."""
    rng = np.random.default_rng(seed)
    sizes = np.full(-(-n_rows // size), size)
    sizes[-1] = n_rows - size * (len(sizes) - 1)
    offsets = np.concatenate([[0], np.cumsum(rng.permutation(sizes))])
    return Clusters(rng.permutation(n_rows).astype(np.int32), offsets.astype(np.int64))


def clustered(n_rows: int, batch_size: int, size: int, **options: Any) -> ClusterBatchSampler:
    sampler = ClusterBatchSampler(n_rows, batch_size, cluster_size=size, start_epoch=0, **options)
    sampler.refresh(some_clusters(n_rows, size))
    return sampler


def same(first: list[npt.NDArray[Any]], second: list[npt.NDArray[Any]]) -> bool:
    return len(first) == len(second) and all(map(np.array_equal, first, second))


@st.composite
def settings(draw: st.DrawFn) -> dict[str, Any]:
    n_rows = draw(st.integers(1, 200))
    batch_size = draw(st.integers(1, n_rows + 5))
    world_size = draw(st.integers(1, max(1, min(3, n_rows // batch_size))))
    return {
        "n_rows": n_rows,
        "batch_size": batch_size,
        "size": draw(st.integers(1, n_rows)),
        "random_share": draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        "drop_last": draw(st.booleans()) and batch_size <= n_rows,
        "world_size": world_size,
        "seed": draw(st.integers(-(2**63), 2**64)),
    }


def key_sets(keys: Any) -> list[set[int]]:
    """The keys of each row."""
    if sp.issparse(keys):
        return [set(row.indices.tolist()) for row in keys]
    return [set(row) for row in np.reshape(keys, (len(keys), -1)).tolist()]


def check_epochs(samplers: list[Sampler], keys: Any = None, repeats: bool = False) -> None:
    """What every plan promises; `samplers` are the ranks of one epoch."""
    first = samplers[0]
    sets = None if keys is None else key_sets(keys)
    for epoch in range(4):
        plans = [sampler.plan(epoch) for sampler in samplers]
        assert [len(plan) for plan in plans] == [len(first)] * len(samplers)
        batches = [batch for plan in plans for batch in plan]
        rows = np.concatenate(batches)
        assert len(rows) == first.n_rows - first.rows_left_out
        assert rows.min() >= 0
        assert rows.max() < first.n_rows
        assert repeats or len(np.unique(rows)) == len(rows)
        sizes = [len(batch) for batch in batches]
        only_full = first.drop_last or len(samplers) > 1
        assert set(sizes if only_full else sizes[:-1]) <= {first.batch_size}
        assert sizes[-1] <= first.batch_size
        for batch in batches:
            assert len(set(batch.tolist())) == len(batch)
            if sets is not None:
                used = [key for row in batch.tolist() for key in sets[row]]
                assert len(set(used)) == len(used)


@st.composite
def some_keys(draw: st.DrawFn, n_rows: int) -> Any:
    seed = draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    different = draw(st.integers(1, 3 * n_rows))
    kind = draw(st.sampled_from(["one", "popular", "two", "sparse"]))
    if kind == "one":
        return rng.integers(-different, different, n_rows)
    if kind == "popular":
        return np.minimum(rng.zipf(1.5, n_rows), different)
    if kind == "two":
        return rng.integers(0, different, (n_rows, 2))
    share = min(1.0, 2 / different)
    return sp.random(n_rows, different, share, format="csr", random_state=rng)


def try_length(make: Callable[[], Iterator[Sampler]]) -> list[Sampler]:
    """Make the samplers of all ranks; none where keys leave no full batch a rank."""
    try:
        return list(make())
    except ValueError as error:
        if "can be planned, expected at least batch_size * world_size" not in str(error):
            raise
        return []


def ring(n_rows: int, width: int) -> npt.NDArray[np.int64]:
    """Rows on a ring and the nearest of each, by turns on either side."""
    steps = np.arange(1, width // 2 + 1)
    ids: npt.NDArray[np.int64] = (
        np.arange(n_rows)[:, np.newaxis] + np.stack([steps, -steps], 1).ravel()
    )
    return ids % n_rows
