"""Exact search among sparse rows, beside SciPy and libraries for sparse products.

    pytest bench/bench_sparse_topk.py --peers PYTHON --texts FOLDER

FOLDER is a data set with test points: their texts are the queries, those of the training points the
items, by TF-IDF of words and pairs of words. Without it texts are drawn at random.
"""

import numpy as np
import pytest
import scipy.sparse as sp

import ngame
from ngame.prediction.lexical import Tfidf

K = 100
# The product of all queries would not fit in memory, and the peers would take minutes: every
# 40th query is enough for a ratio.
STEP = 40


def zipf_texts(rng, count, words=50_000, length=9):
    """Texts of words drawn with Zipf's frequencies."""
    share = 1 / np.arange(1, words + 1)
    drawn = rng.choice(words, (count, length), p=share / share.sum())
    return [" ".join(f"w{word}" for word in row) for row in drawn]


@pytest.fixture(scope="module")
def case(request, quick):
    """Queries and items."""
    folder = request.config.getoption("texts")
    if folder is None:
        rng = np.random.default_rng(0)
        items, queries = (zipf_texts(rng, n) for n in ((5000, 400) if quick else (200_000, 20_000)))
    else:
        data = ngame.load_dataset(folder)
        items, queries = data.train_texts, data.test_texts
    tfidf, rows = Tfidf.fit(items)
    return tfidf(queries), rows


def by_product(queries, items):
    """The product by SciPy, some queries at a time, then the best of each row by NumPy."""
    columns = items.T.tocsr()
    rows = []
    for first in range(0, queries.shape[0], 64):
        product = queries[first : first + 64] @ columns
        for row in range(product.shape[0]):
            part = slice(*product.indptr[row : row + 2])
            ids, scores = product.indices[part], product.data[part]
            best = np.argpartition(-scores, K - 1)[:K] if len(ids) > K else slice(None)
            rows.append((ids[best], scores[best]))
    return rows


def describe(benchmark, queries, items):
    benchmark.extra_info["size"] = f"{queries.shape[0]:,}, {items.shape[0]:,} x {items.shape[1]:,}"


PEERS = ["sparse_dot_topn", "pecos product alone", "sklearn"]


@pytest.mark.parametrize("who", ["ours", "scipy", *PEERS])
def test_some_queries(benchmark, case, peer, who):
    queries, items = case[0][::STEP], case[1]
    describe(benchmark, queries, items)
    if who == "ours":
        index = ngame.SparseIndex(items)
        found = benchmark.pedantic(
            index.search, (queries, K), {"threads": 2}, rounds=3, warmup_rounds=1
        )
        for row, (_, scores) in enumerate(by_product(queries[:20], items)):
            mine = np.sort(found[row].data)
            np.testing.assert_allclose(mine, np.sort(scores), rtol=1e-5)
    elif who == "scipy":
        benchmark.pedantic(by_product, (queries, items), rounds=1)
    else:
        name = f"{who.split()[0]}_sparse_topk"
        call = peer(name, threads=2, queries=queries, items=items, k=K)
        benchmark.pedantic(call, rounds=2, warmup_rounds=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_all_queries(benchmark, case, threads):
    queries, items = case
    describe(benchmark, queries, items)
    benchmark.pedantic(ngame.sparse_topk, (queries, items, K), {"threads": threads}, rounds=1)


def test_index(benchmark, case):
    describe(benchmark, *case)
    benchmark.pedantic(ngame.SparseIndex, (case[1],), rounds=2)


def test_one_query(benchmark, case):
    index, query = ngame.SparseIndex(case[1]), sp.csr_matrix(case[0][7])
    describe(benchmark, query, case[1])
    benchmark.pedantic(index.search, (query, K), {"threads": 1}, rounds=200, warmup_rounds=5)
