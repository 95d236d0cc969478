"""Exact top-100 of 131,073 x 384 items for 20,000 queries, beside what one could use instead.

The answers are checked before anything is timed. Peers that are not installed are skipped::

    pytest bench/bench_topk.py --benchmark-sort=mean
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ngame
from ngame import _core

THREADS = len(os.sched_getaffinity(0))
QUERIES, ITEMS, DIM, K = 20_000, 131_073, 384, 100


@pytest.fixture(scope="module")
def embeddings() -> tuple[np.ndarray, np.ndarray]:
    """Queries and items of one kind: unit vectors around topics under parent topics."""
    rng = np.random.default_rng(0)
    rows = QUERIES + ITEMS
    parents = rng.standard_normal((55, DIM), dtype=np.float32)
    topics = parents[rng.integers(len(parents), size=rows // 50)]
    topics += 0.7 * rng.standard_normal(topics.shape, dtype=np.float32)
    x = topics[rng.integers(len(topics), size=rows)]
    x += rng.standard_normal(x.shape, dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x[:QUERIES], x[QUERIES:]


def once(benchmark: Any, work: Callable[[], Any]) -> Any:
    """Time one run, of some seconds each; that many products need no warming up."""
    return benchmark.pedantic(work, rounds=1, iterations=1)


def check(found: np.ndarray, queries: np.ndarray, items: np.ndarray, least: float) -> None:
    """Compare ids of a sample with those of float64, up to scores that equal in float32."""
    sample = np.arange(0, len(queries), 400)
    exact = queries[sample].astype(np.float64) @ items.T.astype(np.float64)
    last = np.sort(exact, axis=1)[:, -K, None].astype(np.float32)
    scores = np.take_along_axis(exact, found[sample].astype(np.int64), axis=1)
    assert np.mean(scores.astype(np.float32) >= last) >= least


@pytest.mark.parametrize("k", [1, 10, K, 1000])
def test_ngame(benchmark: Any, embeddings: Any, k: int) -> None:
    # At k = 1 there is hardly any selection: nearly the products alone.
    queries, items = embeddings
    found = once(benchmark, lambda: ngame.topk_arrays(queries, items, k, threads=THREADS))
    if k == K:
        check(found[1], queries, items, 1)


@pytest.mark.parametrize("level", _core.simd_levels()[:-1])
def test_ngame_at_lower_levels(benchmark: Any, embeddings: Any, level: str) -> None:
    queries, items = embeddings
    best = _core.simd_level()
    _core.set_simd_level(level)
    try:
        found = once(benchmark, lambda: ngame.topk_arrays(queries, items, K, threads=THREADS))
    finally:
        _core.set_simd_level(best)
    check(found[1], queries, items, 1)


def test_faiss(benchmark: Any, embeddings: Any) -> None:
    faiss = pytest.importorskip("faiss")
    queries, items = embeddings
    faiss.omp_set_num_threads(THREADS)
    index = faiss.IndexFlatIP(DIM)
    index.add(items)
    found = once(benchmark, lambda: index.search(queries, K)[1])
    # Its sums are in float32, so that neighbours in the order may change places.
    check(found, queries, items, 0.999)


@pytest.mark.parametrize("select", [False, True], ids=["product", "topk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch(benchmark: Any, embeddings: Any, dtype: str, select: bool) -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(THREADS)
    queries, items = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in embeddings)

    def work() -> np.ndarray:
        ids = []
        for block in queries.split(500):
            product = block @ items.T
            if select:
                ids.append(product.topk(K).indices)
        return torch.cat(ids).numpy() if select else np.empty(0)

    found = once(benchmark, work)
    if select:
        check(found, *embeddings, 0.999 if dtype == "float32" else 0.95)
