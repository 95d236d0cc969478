"""Search among items that several processes share."""

import processes

COMPARE = """
    import ngame
    import importlib
    import scipy.sparse as sp
    module = importlib.import_module("ngame.topk")
    module._QUERIES_AT_ONCE = 7
    group = dist.group.WORLD

    def check(items, bounds, k, metric="cosine", drop=None):
        rng = np.random.default_rng(100 + rank)
        mine = items[bounds[rank] : bounds[rank + 1]]
        queries = rng.standard_normal((5 + 11 * rank, items.shape[1]), dtype=np.float32)
        queries[:4] = items[rng.integers(len(items), size=4)]
        if drop is not None:
            drop = rng.random((len(queries), len(items))) < drop
            if rank == 0:
                drop = sp.csr_matrix(drop, dtype=np.float32)
                drop.data[:] = 0  # the stored entries are the pairs, whatever their values
            else:
                drop = np.argwhere(drop)
        expected = module.topk_arrays(queries, items, k, metric=metric, drop=drop)
        found = module.topk_arrays(queries, mine, k, metric=metric, drop=drop, group=group)
        for ours, theirs in zip(found, expected):
            assert ours.dtype == theirs.dtype
            assert (ours == theirs).all(), (items.shape, bounds, k, metric)
        index = ngame.ExactIndex(mine, metric, group=group)
        assert (index.search(queries, k, drop=drop)[1] == expected[1]).all()
        ours = ngame.topk(queries, mine, k, metric=metric, drop=drop, group=group)
        theirs = ngame.topk(queries, items, k, metric=metric, drop=drop)
        assert ours.shape == theirs.shape and (ours != theirs).nnz == 0

    rng = np.random.default_rng(0)
    x = rng.standard_normal((203, 19), dtype=np.float32)
    for metric in ("cosine", "dot"):
        for bounds in ([0, 101, 203], [0, 0, 203], [0, 200, 203]):
            for k in (1, 5, 203):
                for drop in (None, 0.5, 1.0):
                    check(x, bounds, k, metric, drop)
        check(x[rng.integers(3, size=203)], [0, 90, 203], 50, metric)  # ties across ranks
        check(np.zeros((20, 3), np.float32), [0, 10, 20], 15, metric)
        check(x.astype(np.float16), [0, 101, 203], 9, metric)
"""

MISTAKES = """
    import ngame
    items = np.eye(4, dtype=np.float32)[2 * rank : 2 * rank + 2]
    group = dist.group.WORLD
    # (what a rank asks, words of the error on all of them)
    cases = [
        (lambda: ngame.topk_arrays(items, items, 5, group=group), "the ranks have only 4 items"),
        (lambda: ngame.topk_arrays(items, items, 1 + rank, group=group), "differ in k"),
        (
            lambda: ngame.topk_arrays(items, items, 1, metric=["dot", "cosine"][rank], group=group),
            "differ in metric",
        ),
        (
            lambda: ngame.topk_arrays(items[:, rank:], items[:, rank:], 1, group=group),
            "differ in columns",
        ),
        (lambda: ngame.topk_arrays(items * np.nan, items, 1, group=group), "NaN"),
    ]
    for call, words in cases:
        try:
            call()
        except ValueError as error:
            assert words in str(error), (words, error)
        else:
            raise AssertionError(words)
    scores, ids = ngame.topk_arrays(items[:0], items, 2, group=group)
    assert scores.shape == ids.shape == (0, 2)
"""


def test_ids_and_scores_are_those_of_one_process():
    processes.run(COMPARE)


def test_mistakes_are_errors_on_all_ranks():
    processes.run(MISTAKES)
