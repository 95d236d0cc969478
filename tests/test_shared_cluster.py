"""Clusters of rows that several processes share."""

import processes
import pytest

CLUSTER = """
    import importlib
    import ngame
    cluster = importlib.import_module("ngame.cluster.shared")
    cluster._SENT_BYTES = 1 << 12
    group = dist.group.WORLD

    def share(x, cuts):
        bounds = [0, *cuts, len(x)]
        return x[bounds[rank] : bounds[rank + 1]]

    def check(x, cuts, **options):
        found = ngame.balanced_clusters(share(x, cuts), group=group, **options)
        one = ngame.balanced_clusters(x, **options)
        assert (found.offsets == one.offsets).all()
        assert sorted(found.order.tolist()) == list(range(len(x)))
        assert all((np.diff(found[c]) > 0).all() for c in range(len(found)))
        again = ngame.balanced_clusters(share(x, cuts), group=group, threads=2, **options)
        assert again == found
        theirs = [None] * size
        dist.all_gather_object(theirs, found.order.tolist())
        assert all(order == theirs[0] for order in theirs)
        return found, one

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((30, 24))
    x = (centres[rng.integers(30, size=1003)] + 0.4 * rng.standard_normal((1003, 24)))
    x = x.astype(np.float32)
    even = [len(x) * r // size for r in range(1, size)]
    found, one = check(x, even, size=16)
    assert found.coherence(x) > 0.97 * one.coherence(x), (found.coherence(x), one.coherence(x))
    nearby = found.neighbour_share(x)
    assert nearby > 0.93 * one.neighbour_share(x)
    assert found.neighbour_share(share(x, even), group=group) == nearby
    check(x, [0] * (size - 1), n_clusters=31, refine=0)  # all rows on the last rank
    check(x.astype(np.float16), [1] + even[1:], size=7)
    # Rows are sent as unit vectors of float16, so any length will do.
    for scale in (1e-30, 1e30, rng.choice([1e-30, 1.0, 1e30], (len(x), 1))):
        assert check(x * np.float32(scale), even, size=16)[0].coherence(x) > 0.97 * one.coherence(x)
    check(x, even, size=1001)  # the last cluster has two rows
    # Each rank gets its rows in portions, here of some 60 to 100 rows.
    exchanged, taken = cluster._exchanged, []
    def counted(*arguments):
        ids, vectors = exchanged(*arguments)
        taken.append(len(ids))
        return ids, vectors
    cluster._LEAST_PORTION, cluster._exchanged = 3000, counted
    in_portions, _ = check(x, even, size=8)
    assert max(taken) < 150, taken
    assert in_portions.coherence(x) > 0.8 * ngame.balanced_clusters(x, size=8).coherence(x)
    cluster._LEAST_PORTION, cluster._exchanged = 1 << 22, exchanged
    check(x[:9], [3] * (size - 1), n_clusters=2)  # fewer clusters than ranks, where there are 3
    check(x[:2], [1] * (size - 1), size=2)
    check(np.ones((50, 3), np.float32), [20] * (size - 1), size=5)  # ties everywhere
    zeros = x.copy()
    zeros[::3] = 0
    check(zeros, even, size=10)
    assert check(x, even, size=16, seed=1)[0] != found

    # The smallest of all, whatever ties.
    ranks = importlib.import_module("ngame.ranks").Ranks(group)
    several = [rng.standard_normal(400), rng.integers(-3, 3, 400), np.zeros(400)]
    several = [np.where(rng.random(400) < 0.1, -0.0, some).astype(np.float32) for some in several]
    counts = (1, 7, 200, 399)
    def own(x):
        return np.split(x, [150] * (size - 1))[rank]
    asked = [(some, count) for some in several for count in counts]
    found = cluster._smallest([own(some) for some, _ in asked], [n for _, n in asked], ranks)
    for (some, count), chosen in zip(asked, found, strict=True):
        expected = np.zeros(400, bool)
        expected[np.argsort(some, kind="stable")[:count]] = True
        assert (chosen == own(expected)).all(), count
    assert cluster._smallest([], [], ranks) == []

    bad = x.copy()
    bad[len(x) - 3, 5] = np.nan
    bad[len(x) - 1, 0] = np.inf
    for options, words in (
        (dict(x=bad, size=4), "x has NaN or infinity in row 1000"),
        (dict(size=4 + rank), "the ranks differ in size"),
        (dict(n_clusters=4, seed=2 * rank), "the ranks differ in seed"),
        (dict(size=2000), "x has only 1003 rows"),
    ):
        try:
            ngame.balanced_clusters(share(options.pop("x", x), even), group=group, **options)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)
"""


@pytest.mark.parametrize("size", [2, 3])
def test_sizes_are_exact_and_clusters_as_tight(size):
    processes.run(CLUSTER, size=size)
