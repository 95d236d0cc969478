"""Exact search beside other libraries, and at every SIMD level.

    pytest bench/bench_topk.py --peers PYTHON

The ids of a sample of the queries are compared with those of float64. `operations` counts the
products. Their time in float32 is the limit; 8-bit codes can be faster than it.
"""

import functools

import inputs
import numpy as np
import pytest

import ngame
from ngame import _core

QUERIES, ITEMS, DIM, K = 20_000, 131_073, 384, 100
# Each peer: name, function, options, least share of the ids that it must find.
PEERS = {
    "faiss": ("faiss_topk", {"k": K}, 0.999),
    "torch float32": ("torch_topk", {"k": K, "dtype": "float32", "block": 500}, 0.999),
    "torch bfloat16": ("torch_topk", {"k": K, "dtype": "bfloat16", "block": 500}, 0.9),
    "torch float32, product alone": ("torch_product", {"dtype": "float32", "block": 500}, None),
    "torch bfloat16, product alone": ("torch_product", {"dtype": "bfloat16", "block": 500}, None),
}
# Of few queries by items that are prepared. The same, with rows of length 1.
INDEX_ITEMS, INDEX_DIM = 300_000, 128
INDEX_PEERS = {
    "NumPy": ("numpy_topk", {"k": K}, 0.999),
    "NumPy, product alone": ("numpy_product", {}, None),
    "faiss": ("faiss_topk", {"k": K}, 0.999),
}


def case(quick, queries=QUERIES):
    """Queries and items of one kind."""
    n, m, dim = (500, 5000, 64) if quick else (queries, ITEMS, DIM)
    x = inputs.mixture(n + m, dim)
    return x[:n], x[n:]


def tell(benchmark, queries, items, ids=None):
    """Record the size, and the share of the ids that equal those of float64 or tie with them."""
    benchmark.extra_info["size"] = f"{len(queries):,}, {len(items):,} x {items.shape[1]}"
    benchmark.extra_info["operations"] = 2 * len(queries) * items.size
    if ids is None:
        return 1.0
    sample = np.arange(0, len(queries), max(1, len(queries) // 50))
    exact = queries[sample].astype(np.float64) @ items.T.astype(np.float64)
    last = np.sort(exact, axis=1)[:, -ids.shape[1], np.newaxis].astype(np.float32)
    scores = np.take_along_axis(exact, ids[sample].astype(np.int64), axis=1)
    recall = float(np.mean(scores.astype(np.float32) >= last))
    benchmark.extra_info["recall"] = recall
    return recall


def ours(benchmark, queries, items, k):
    """Time ours, which must find every id."""
    _, ids = benchmark.pedantic(
        ngame.topk_arrays, (queries, items, k), {"threads": 2}, rounds=2, warmup_rounds=0
    )
    assert tell(benchmark, queries, items, ids) == 1


@pytest.mark.parametrize("who", ["ours", *PEERS])
def test_search(benchmark, peer, quick, who):
    """The search of the project's bar."""
    queries, items = case(quick)
    if who == "ours":
        ours(benchmark, queries, items, K)
        return
    name, options, least = PEERS[who]
    found = peer(name, threads=2, queries=queries, items=items, **options)
    benchmark.pedantic(found, rounds=1)
    ids = None if least is None else found.result()["ids"]
    assert tell(benchmark, queries, items, ids) >= (least or 0)


@pytest.mark.parametrize("queries", [1, 64])
@pytest.mark.parametrize("who", ["ours", "ours, prepared at each call", *INDEX_PEERS])
def test_index(benchmark, peer, quick, who, queries):
    """Few queries, as of an application that answers requests: items are prepared before."""
    n, dim = (20_000, 64) if quick else (INDEX_ITEMS, INDEX_DIM)
    x = inputs.mixture(64 + n, dim)
    few, items = x[:queries], x[64:]
    if who in INDEX_PEERS:
        name, options, least = INDEX_PEERS[who]
        found = peer(name, threads=2, queries=few, items=items, **options)
        benchmark.pedantic(found, rounds=10, warmup_rounds=1)
        ids = None if least is None else found.result()["ids"]
        assert tell(benchmark, few, items, ids) >= (least or 0)
        return
    search = functools.partial(ngame.topk_arrays, few, items, metric="dot")
    if who == "ours":
        search = functools.partial(ngame.ExactIndex(items, metric="dot").search, few)
    ids = benchmark.pedantic(search, (), {"k": K, "threads": 2}, rounds=10, warmup_rounds=1)[1]
    assert tell(benchmark, few, items, ids) == 1


@pytest.mark.parametrize("k", [1, 10, 1000])
def test_labels_wanted(benchmark, quick, k):
    """At k = 1 there is little to select: the time is nearly that of the products."""
    ours(benchmark, *case(quick, 4000), min(k, 100) if quick else k)


@pytest.mark.parametrize("level", _core.simd_levels())
def test_simd(benchmark, quick, level):
    """Each SIMD level."""
    before = _core.simd_level()
    _core.set_simd_level(level)
    try:
        ours(benchmark, *case(quick, 1000), K)
    finally:
        _core.set_simd_level(before)
