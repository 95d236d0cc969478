"""The samplers: what a plan holds, when it changes, and how it survives a restart."""

import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import ngame
from ngame import _core
from ngame.batches import ClusterBatchSampler, GroupBatchSampler, NeighbourBatchSampler
from ngame.cluster import Clusters, balanced_clusters


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


def batches_of_clusters(plan: list[npt.NDArray[Any]], clusters: Clusters) -> list[set[int]]:
    """For each cluster the batches that hold any of its rows."""
    batch_of = {row: index for index, batch in enumerate(plan) for row in batch.tolist()}
    return [
        {batch_of[row] for row in rows.tolist() if row in batch_of}
        for rows in np.split(clusters.order, clusters.offsets[1:-1])
    ]


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


# ---- What a plan holds -----------------------------------------------------------------------


@given(settings(), st.integers(0, 5))
def test_every_row_is_visited_once_in_batches_of_the_stated_size(
    options: dict[str, Any], epoch: int
) -> None:
    n_rows, batch_size = options["n_rows"], options["batch_size"]
    world_size = options["world_size"]
    ranks = [clustered(**options, rank=rank) for rank in range(world_size)]
    plans = [sampler.plan(epoch) for sampler in ranks]

    assert [len(plan) for plan in plans] == [len(sampler) for sampler in ranks]
    assert len({len(plan) for plan in plans}) == 1
    rows = np.concatenate([batch for plan in plans for batch in plan])
    assert len(np.unique(rows)) == len(rows)
    only_full = options["drop_last"] or world_size > 1
    left_out = n_rows % (batch_size * world_size) if only_full else 0
    assert len(rows) == n_rows - left_out
    assert rows.min() >= 0
    assert rows.max() < n_rows
    sizes = [len(batch) for plan in plans for batch in plan]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert sizes[-1] == (batch_size if only_full else (n_rows - 1) % batch_size + 1)


@given(
    st.integers(1, 6),
    st.integers(1, 8),
    st.integers(0, 100),
    st.booleans(),
    st.integers(1, 2),
    st.integers(0, 5),
)
def test_no_cluster_is_split_where_the_batch_is_a_multiple_of_it(
    size: int, multiple: int, more: int, drop_last: bool, world_size: int, epoch: int
) -> None:
    batch_size = size * multiple
    n_rows = batch_size * world_size + more
    ranks = [
        clustered(n_rows, batch_size, size, drop_last=drop_last, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    plan = [batch for sampler in ranks for batch in sampler.plan(epoch)]
    assert all(
        len(batches) <= 1 for batches in batches_of_clusters(plan, some_clusters(n_rows, size))
    )


@pytest.mark.parametrize(
    ("batch_size", "size", "share"), [(64, 8, 0.25), (64, 64, 0.3), (60, 7, 0.5), (60, 7, 0.01)]
)
def test_random_share_keeps_the_other_clusters_whole(
    batch_size: int, size: int, share: float
) -> None:
    n_rows = 2000
    clusters = some_clusters(n_rows, size)
    sampler = clustered(n_rows, batch_size, size, random_share=share)
    n_full = n_rows // batch_size
    whole_a_batch = min((1 - share) * batch_size / size, batch_size // size)
    kept = []
    for epoch in range(2):
        plan = sampler.plan(epoch)
        homes = batches_of_clusters(plan, clusters)
        whole = [home.copy().pop() for home in homes if len(home) == 1]
        per_batch = np.bincount(whole, minlength=n_full + 1)[:n_full]
        # Dealt evenly; a dissolved cluster can come together again by chance where size is small.
        assert per_batch.min() >= int(whole_a_batch)
        assert abs(len(whole) - n_full * whole_a_batch) < 3
        kept.append({index for index, home in enumerate(homes) if len(home) == 1})
    assert kept[0] != kept[1]


def test_a_share_of_one_is_as_random_as_no_clusters() -> None:
    clusters = some_clusters(2048, 8)
    plan = clustered(2048, 64, 8, random_share=1.0).plan()
    assert sum(len(home) == 1 for home in batches_of_clusters(plan, clusters)) < 3


def test_batch_is_filled_from_the_next_cluster_where_sizes_do_not_fit() -> None:
    clusters = some_clusters(1000, 7)
    homes = batches_of_clusters(clustered(1000, 64, 7).plan(), clusters)
    # Each of the 15 cuts splits at most one cluster.
    assert all(len(home) <= 2 for home in homes)
    assert sum(len(home) == 2 for home in homes) <= 15


def test_clusters_larger_than_a_batch_are_cut_into_batches() -> None:
    clusters = some_clusters(1024, 128)
    plan = clustered(1024, 32, 128).plan()
    assert all(len(set(clusters.assignment[batch])) == 1 for batch in plan)
    assert not same(
        [np.sort(batch) for batch in plan if 0 in batch],
        [np.sort(batch) for batch in clustered(1024, 32, 128).plan(1) if 0 in batch],
    )


def test_clusters_of_differing_sizes_are_taken() -> None:
    clusters = Clusters(
        np.arange(100, dtype=np.int32), np.array([0, 30, 50, 75, 100], dtype=np.int64)
    )
    for share in (0.0, 0.3):
        sampler = ClusterBatchSampler(100, 10, cluster_size=25, start_epoch=0, random_share=share)
        sampler.refresh(clusters)
        rows = np.concatenate(sampler.plan())
        assert np.array_equal(np.sort(rows), np.arange(100))


def test_no_row_is_left_out_in_every_epoch() -> None:
    # 100 = 12 clusters of 8 and one of 4; 36 rows do not fill a batch of 64.
    sampler = clustered(100, 64, 8, drop_last=True)
    visits = np.zeros(100, int)
    for epoch in range(60):
        visits[np.concatenate(sampler.plan(epoch))] += 1
    assert visits.min() > 10


def test_the_smaller_cluster_has_no_fixed_place() -> None:
    # 132 = 4 batches of 32 and 4 rows; the cluster of 4 is in the short batch. With drop_last it
    # is in a full one, which must not be the same one every epoch.
    sampler = clustered(132, 32, 8, drop_last=True)
    clusters = some_clusters(132, 8)
    small = int(np.flatnonzero(np.diff(clusters.offsets) == 4)[0])
    homes = {
        tuple(batches_of_clusters(sampler.plan(epoch), clusters)[small]) for epoch in range(30)
    }
    assert len(homes) == 4


# ---- Keys ------------------------------------------------------------------------------------

Sampler = ClusterBatchSampler | NeighbourBatchSampler | GroupBatchSampler


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


@given(st.data(), settings(), st.booleans())
def test_no_batch_has_a_key_twice(data: st.DataObject, options: Any, clusters: bool) -> None:
    n_rows, world_size = options["n_rows"], options["world_size"]
    keys = data.draw(some_keys(n_rows))

    def make() -> Iterator[Sampler]:
        for rank in range(world_size):
            sampler = clustered(**options, keys=keys, rank=rank)
            if not clusters:
                sampler.clusters = None
            yield sampler

    samplers = try_length(make)
    if samplers:
        check_epochs(samplers, keys)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=60), st.integers(1, 9), st.booleans())
def test_one_key_a_row_leaves_out_as_few_rows_as_can_be(
    keys: list[int], batch_size: int, drop_last: bool
) -> None:
    reachable = reference.reachable(np.bincount(keys), batch_size)
    if drop_last:
        reachable -= reachable % batch_size
    if reachable:
        sampler = clustered(len(keys), batch_size, 1, keys=keys, drop_last=drop_last)
        assert sampler.rows_left_out == len(keys) - reachable
        check_epochs([sampler], keys)


@pytest.mark.parametrize("batch_size", [2, 3])
def test_what_one_key_a_row_lets_reach(batch_size: int) -> None:
    """The closed form against all ways of cutting up to six rows into batches."""

    def most(keys: tuple[int, ...]) -> int:
        best = 0
        for order in itertools.permutations(keys):
            reached = 0
            while reached < len(order):
                batch = order[reached : reached + batch_size]
                distinct = next(n for n in range(len(batch), 0, -1) if len({*batch[:n]}) == n)
                reached += distinct
                if distinct < batch_size:
                    break
            best = max(best, reached)
        return best

    for keys in itertools.combinations_with_replacement(range(4), 6):
        assert reference.reachable(np.bincount(keys), batch_size) == most(keys)


@given(st.integers(0, 1000), st.integers(2, 20), st.integers(4, 20), st.booleans())
def test_no_row_is_left_out_where_each_conflicts_with_few(
    seed: int, batch_size: int, n_batches: int, clusters: bool
) -> None:
    # Two keys a row, of n_batches // 4 rows each: no row conflicts with half as many rows as there
    # are batches. Clusters are made of conflicts.
    rng = np.random.default_rng(seed)
    n_rows = batch_size * n_batches
    rows = np.arange(n_rows)
    alike = max(n_batches // 4, 1)
    keys = np.stack([rows // alike, n_rows + rng.permutation(n_rows) // alike], axis=1)
    sampler = ClusterBatchSampler(n_rows, batch_size, cluster_size=alike, start_epoch=0, keys=keys)
    if clusters:
        offsets = np.append(np.arange(0, n_rows, alike), n_rows)
        sampler.refresh(Clusters(rows.astype(np.int32), offsets))
    assert sampler.rows_left_out == 0
    check_epochs([sampler], keys)


def test_clusters_without_conflict_stay_whole() -> None:
    clusters = some_clusters(4096, 8)
    keys = np.arange(4096)
    keys[clusters.order[: 8 * 20]] = np.repeat(np.arange(40), 4)  # 20 clusters with conflicts
    plan = clustered(4096, 64, 8, keys=keys).plan()
    split = [len(home) > 1 for home in batches_of_clusters(plan, clusters)]
    assert sum(split[:20]) == 20
    # 120 rows had to leave their batches: others came in their place from the last batches.
    assert sum(split[20:]) <= 16 + 8


def test_keys_of_several_kinds_mean_the_same(rng: np.random.Generator) -> None:
    ids = rng.integers(0, 40, (100, 2))
    sparse = sp.csr_matrix((np.zeros(200), (np.repeat(np.arange(100), 2), ids.ravel())), (100, 40))
    plans = [
        clustered(100, 10, 5, keys=keys).plan()
        for keys in (ids, ids.tolist(), ids.astype(np.uint8), ids * -(2**50), ids[:, ::-1])
    ]
    assert all(same(plan, plans[0]) for plan in plans[:-1])
    check_epochs([clustered(100, 10, 5, keys=sparse)], ids)
    unused = clustered(100, 10, 5, keys=np.arange(100))
    assert same(unused.plan(), clustered(100, 10, 5).plan())


def test_keys_compare_across_columns_and_may_repeat_in_a_row() -> None:
    sampler = ClusterBatchSampler(3, 2, cluster_size=1, keys=[[1, 2], [2, 3], [4, 4]])
    for epoch in range(20):
        assert {0, 1} not in [set(batch.tolist()) for batch in sampler.plan(epoch)]
    assert sampler.rows_left_out == 0


def test_an_epoch_that_falls_short_takes_an_order_that_does_not() -> None:
    class Unlucky(ClusterBatchSampler):
        def _order(self, epoch: int, rng: np.random.Generator) -> Any:
            rows, reached = super()._order(epoch, rng)
            return (rows, reached - 1) if epoch == 2 else (rows, reached)

    keys = np.arange(100) // 3
    sampler = Unlucky(100, 10, cluster_size=4, keys=keys)
    check_epochs([sampler], keys)
    assert not same(
        sampler.plan(2), ClusterBatchSampler(100, 10, cluster_size=4, keys=keys).plan(2)
    )


def test_popular_keys_in_two_columns() -> None:
    # Thousands of rows cannot be placed, and how many depends on their order.
    rng = np.random.default_rng(0)
    keys = np.minimum(rng.zipf(1.3, (5000, 2)), 10**6) * 2 + [0, 1]
    for drop_last in (False, True):
        sampler = clustered(5000, 16, 8, keys=keys, drop_last=drop_last)
        assert 0 < sampler.rows_left_out < 5000
        check_epochs([sampler], keys)
        orders = {sampler.plan(epoch)[0].tobytes() for epoch in range(10)}
        assert len(orders) > 5


# ---- Neighbourhoods --------------------------------------------------------------------------


def ring(n_rows: int, width: int) -> npt.NDArray[np.int64]:
    """Rows on a ring and the nearest of each, by turns on either side."""
    steps = np.arange(1, width // 2 + 1)
    ids: npt.NDArray[np.int64] = (
        np.arange(n_rows)[:, np.newaxis] + np.stack([steps, -steps], 1).ravel()
    )
    return ids % n_rows


@given(st.data())
def test_neighbourhoods_are_those_of_the_reference(data: st.DataObject) -> None:
    n_rows = data.draw(st.integers(1, 40))
    width = data.draw(st.integers(0, 8))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    neighbours = rng.integers(-1, n_rows, (n_rows, width), dtype=np.int32)
    nearest, drawn = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    batch_size = data.draw(st.integers(1, 12))
    seed = data.draw(st.integers(0, 2**64 - 1))
    ids = rng.integers(0, 2 * n_rows, (n_rows, 2)) if data.draw(st.booleans()) else None
    keys = None
    if ids is not None:
        keys = _core.number_keys(np.arange(0, 2 * n_rows + 1, 2), ids.ravel())
    found = _core.neighbour_order(neighbours, nearest, drawn, batch_size, keys, seed)
    sets = [set()] * n_rows if ids is None else key_sets(ids)
    expected = reference.neighbour_order(neighbours, nearest, drawn, batch_size, sets, seed)
    assert found.tolist() == expected


@given(st.data(), settings(), st.booleans(), st.booleans())
def test_neighbourhoods_keep_every_promise(
    data: st.DataObject, options: Any, keyed: bool, shuffle: bool
) -> None:
    n_rows, world_size = options["n_rows"], options["world_size"]
    keys = data.draw(some_keys(n_rows)) if keyed else None
    del options["size"], options["random_share"]

    def make() -> Iterator[Sampler]:
        for rank in range(world_size):
            sampler = NeighbourBatchSampler(
                **options, nearest=3, drawn=2, keys=keys, rank=rank, shuffle_batches=shuffle
            )
            sampler.refresh(ring(n_rows, 10))
            yield sampler

    samplers = try_length(make)
    if samplers:
        check_epochs(samplers, keys)
        if not keyed:
            assert samplers[0].rows_left_out < samplers[0].batch_size * world_size


def test_members_are_seeds_or_neighbours_of_one_before() -> None:
    sampler = NeighbourBatchSampler(1000, 50, nearest=4, drawn=4, neighbour_range=20)
    neighbours = ring(1000, 30)
    sampler.refresh(neighbours)
    assert sampler.neighbours is not None
    assert sampler.neighbours.shape == (1000, 20)
    first = sampler.plan()[0].tolist()
    assert first[1:5] == neighbours[first[0], :4].tolist()
    assert len(set(first[5:9]) & set(neighbours[first[0], 4:20].tolist())) == 4
    near = [bool(np.isin(neighbours[first[:at], :20], row).any()) for at, row in enumerate(first)]
    # Seeds are every ninth row, or a little more often where a neighbourhood overlaps another.
    assert 50 - 2 * 6 < sum(near) <= 50 - 1


def coverage(plan: list[npt.NDArray[Any]], neighbours: npt.NDArray[Any]) -> list[float]:
    """Share of each row's neighbours that are in its batch, by quarter of the epoch."""
    place = np.empty(len(neighbours), int)
    for number, rows in enumerate(plan):
        place[rows] = number
    share = (place[neighbours] == place[:, np.newaxis]).mean(axis=1)
    quarters = np.array_split(np.arange(len(plan)), 4)
    return [float(np.concatenate([share[plan[i]] for i in part]).mean()) for part in quarters]


@pytest.mark.parametrize(
    ("batch_size", "each", "reach", "published"),
    [(128, 32, 128, [0.50, 0.45, 0.37, 0.21]), (32, 8, 64, [0.20, 0.16, 0.12, 0.06])],
)
def test_quarters_of_the_epoch_are_as_hard_as_those_of_the_published_code(
    batch_size: int, each: int, reach: int, published: list[float]
) -> None:
    """What the published code does on a ring of CVUSA's size, as measured."""
    n_rows = 35_532
    options: Any = {"nearest": each, "drawn": each, "neighbour_range": reach}
    sampler = NeighbourBatchSampler(n_rows, batch_size, **options)
    sampler.refresh(ring(n_rows, 128))
    found = coverage(sampler.plan(), ring(n_rows, 64))
    assert np.abs(np.subtract(found, published)).max() < 0.02
    shuffled = NeighbourBatchSampler(n_rows, batch_size, shuffle_batches=True, **options)
    shuffled.refresh(ring(n_rows, 128))
    even = coverage(shuffled.plan(), ring(n_rows, 64))
    assert max(even) - min(even) < 0.1 < found[0] - found[3]


def test_row_0_is_a_neighbour_like_others() -> None:
    sampler = NeighbourBatchSampler(2000, 128, nearest=32, drawn=0, drop_last=True)
    sampler.refresh(ring(2000, 128))
    missed = np.zeros(2000)
    for epoch in range(200):
        missed += 1
        missed[np.concatenate(sampler.plan(epoch))] -= 1
    assert missed[0] < 3 * missed.mean()


def test_neighbours_come_from_embeddings_graphs_and_ids(mixture: Any) -> None:
    x = mixture(60, 8)
    ids = ngame.topk_arrays(x, x, 6, drop=np.stack([np.arange(60)] * 2, axis=1))[1]
    graph = ngame.topk(x, x, 7)
    samplers = [
        NeighbourBatchSampler(60, 10, nearest=3, drawn=2, neighbour_range=6) for _ in range(3)
    ]
    for sampler, source in zip(samplers, (x, graph, ids.astype(np.int64)), strict=True):
        sampler.refresh(source)
        assert sampler.neighbours is not None
        assert np.array_equal(sampler.neighbours, ids)
        assert list(sampler) == list(samplers[0])


def test_neighbourhoods_start_and_refresh_when_told() -> None:
    sampler = NeighbourBatchSampler(400, 20, nearest=9, drawn=0, start_epoch=2, refresh_every=3)
    asked = []
    for epoch in range(9):
        sampler.set_epoch(epoch)
        if sampler.due(epoch):
            asked.append(epoch)
            sampler.refresh(ring(400, 10))
        near = coverage(sampler.plan(), ring(400, 10))
        assert near[0] > 0.5 if epoch >= 2 else near[0] < 0.2
    assert asked == [2, 5, 8]
    assert sampler.refreshes == 3


def test_state_of_neighbourhoods(tmp_path: Any) -> None:
    options: Any = {"nearest": 3, "drawn": 3, "keys": np.arange(300) // 2}
    sampler = NeighbourBatchSampler(300, 32, seed=5, **options)
    copy = NeighbourBatchSampler(300, 32, **options)
    copy.load_state_dict(sampler.state_dict())
    assert list(copy) == list(sampler)
    assert copy.due(0)
    sampler.set_epoch(4)
    sampler.refresh(ring(300, 12))
    np.savez(tmp_path / "state.npz", **sampler.state_dict())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        copy.load_state_dict(state)
    assert list(copy) == list(sampler)
    assert not copy.due(4)
    wrong = sampler.state_dict() | {"neighbours": ring(299, 12)}
    with pytest.raises(ValueError, match="299 rows"):
        copy.load_state_dict(wrong)
    with pytest.raises(IndexError, match="out of range for 300"):
        copy.load_state_dict(wrong | {"neighbours": ring(300, 12) + 1})
    with pytest.raises(ValueError, match="rows_left_out 0, this sampler has"):
        clustered(300, 32, 8, keys=np.zeros(300, int)).load_state_dict(
            clustered(300, 32, 8).state_dict()
        )


# ---- Groups ----------------------------------------------------------------------------------


def test_batches_of_one_group() -> None:
    groups = np.repeat([7, -3, 0, 99], [40, 25, 10, 3])
    sampler = GroupBatchSampler(groups, 10)
    assert len(sampler) == 4 + 2 + 1
    assert sampler.rows_left_out == 78 - 70
    check_epochs([sampler])
    visits = np.zeros(78, int)
    for epoch in range(20):
        plan = sampler.plan(epoch)
        assert all(len(set(groups[batch])) == 1 for batch in plan)
        visits[np.concatenate(plan)] += 1
    assert set(visits[:40]) == {20}
    assert visits[40:65].min() > 5
    assert set(visits[75:]) == {0}


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=100),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 2),
)
def test_batches_of_several_groups(
    groups: list[int], per_group: int, n_groups: int, world_size: int
) -> None:
    """As many as can be: the chunks of a group are rows that share a key."""
    chunks = np.bincount(groups) // per_group
    n_batches = reference.reachable(chunks, n_groups) // n_groups // world_size
    options: Any = {"per_group": per_group, "world_size": world_size}
    if not n_batches:
        with pytest.raises(ValueError, match="expected at least"):
            GroupBatchSampler(groups, per_group * n_groups, **options)
        return
    ranks = [
        GroupBatchSampler(groups, per_group * n_groups, **options, rank=rank)
        for rank in range(world_size)
    ]
    assert len(ranks[0]) == n_batches
    check_epochs([*ranks])
    for batch in ranks[0].plan():
        ids, counts = np.unique(np.array(groups)[batch], return_counts=True)
        assert len(ids) == n_groups
        assert set(counts) == {per_group}


@given(st.data(), st.integers(0, 100), st.booleans(), st.sampled_from([None, 0.5]))
def test_groups_keep_keys_apart(
    data: st.DataObject, seed: int, pure: bool, alpha: float | None
) -> None:
    n_rows = data.draw(st.integers(20, 120))
    groups = np.random.default_rng(seed).integers(0, 6, n_rows)
    keys = data.draw(some_keys(n_rows))
    per_group = 4 if pure else 2

    def make() -> Iterator[Sampler]:
        yield GroupBatchSampler(groups, 4, per_group=per_group, alpha=alpha, keys=keys)

    samplers = try_length(make)
    if samplers:
        check_epochs(samplers, keys, repeats=alpha is not None)
        for batch in samplers[0].plan():
            assert set(np.unique(groups[batch], return_counts=True)[1]) == {per_group}


@pytest.mark.parametrize("alpha", [0, 0.7, 1.0])
@pytest.mark.parametrize("per_group", [8, 4])
def test_groups_take_part_in_proportion_to_a_power_of_their_size(
    alpha: float, per_group: int
) -> None:
    sizes = np.array([24927, 8000, 5000, 1208, 64, 7])
    groups = np.repeat(np.arange(6), sizes)
    sampler = GroupBatchSampler(groups, 8, per_group=per_group, alpha=alpha)
    untempered = GroupBatchSampler(groups, 8, per_group=per_group)
    assert len(sampler) == len(untempered)
    check_epochs([sampler], repeats=True)
    epochs = 5
    drawn = np.zeros(6)
    for epoch in range(epochs):
        drawn += np.bincount(groups[np.concatenate(sampler.plan(epoch))], minlength=6)
    weights = np.where(sizes >= per_group, sizes, 0) ** float(alpha) * (sizes >= per_group)
    expected = weights / weights.sum()
    if per_group == 4 and expected[0] > 0.5:  # in every batch, once
        expected[0] = 0.5
        expected[1:] = 0.5 * weights[1:] / weights[1:].sum()
    # Each epoch is within one draw of the proportion, which a draw a batch would not be.
    assert np.abs(drawn / per_group - expected * drawn.sum() / per_group).max() <= epochs


def test_a_tempered_group_begins_again_only_at_its_end() -> None:
    groups = np.repeat([0, 1], [400, 40])
    sampler = GroupBatchSampler(groups, 8, alpha=0.0)
    rows = np.concatenate(sampler.plan())
    visits = np.bincount(rows, minlength=440)
    assert visits[:400].max() == 1
    assert set(visits[400:]) <= {5, 6}
    assert visits[400:].sum() in (27 * 8, 28 * 8)


def test_state_and_copies_of_groups() -> None:
    groups = np.arange(200) % 7
    sampler = GroupBatchSampler(groups, 8, per_group=2, alpha=0.5, seed=3)
    sampler.set_epoch(5)
    resumed = GroupBatchSampler(groups, 8, per_group=2, alpha=0.5)
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == list(sampler)
    assert list(sampler) != list(GroupBatchSampler(groups, 8, per_group=2, alpha=0.5))
    copy = pickle.loads(pickle.dumps(sampler))
    assert len(copy) == len(sampler)
    with pytest.raises(ValueError, match="without groups: make a new GroupBatchSampler"):
        copy.plan()


# ---- When it changes -------------------------------------------------------------------------


def test_iterating_is_pure() -> None:
    sampler = clustered(500, 32, 8)
    first = list(sampler)
    next(iter(sampler))
    assert list(sampler) == first
    assert sampler.epoch == 0
    assert first == [batch.tolist() for batch in sampler.plan(0)]
    assert all(type(row) is int for row in first[0])


def test_order_is_a_function_of_seed_epoch_and_refresh() -> None:
    def plan(seed: int, epoch: int, refreshes: int) -> list[list[int]]:
        sampler = clustered(500, 32, 8, seed=seed)
        for _ in range(refreshes):
            sampler.refresh(some_clusters(500, 8))
        sampler.set_epoch(epoch)
        return list(sampler)

    plans = [plan(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]]
    assert all(plans[i] != plans[j] for i in range(5) for j in range(i))
    assert plans[0] == plan(0, 0, 0)


def test_batches_are_random_before_the_start_epoch_and_without_clusters() -> None:
    clusters = some_clusters(2048, 8)
    sampler = ClusterBatchSampler(2048, 64, cluster_size=8, start_epoch=3)

    def unsplit(epoch: int) -> int:
        homes = batches_of_clusters(sampler.plan(epoch), clusters)
        return sum(len(home) == 1 for home in homes)

    assert unsplit(3) < 3
    sampler.refresh(clusters)
    assert unsplit(2) < 3
    assert unsplit(3) == 256


def test_refresh_acts_at_once_but_not_on_an_iteration_that_runs() -> None:
    sampler = clustered(512, 32, 8)
    planned = list(sampler)
    running = iter(sampler)
    begun = [next(running)]
    new = some_clusters(512, 8, seed=1)
    sampler.refresh(new)
    assert begun + list(running) == planned
    assert sampler.clusters is new
    assert all(len(home) == 1 for home in batches_of_clusters(sampler.plan(), new))


def test_refresh_clusters_embeddings_by_the_schedule() -> None:
    x = np.random.default_rng(0).standard_normal((100, 4), dtype=np.float32)
    sampler = ClusterBatchSampler(100, 20, schedule={2: 5, 4: 10}, seed=3)
    sizes = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        sampler.refresh(x)
        assert sampler.clusters is not None
        sizes.append(int(np.diff(sampler.clusters.offsets).max()))
    assert sizes == [5, 5, 5, 5, 10, 10]
    assert sampler.refreshes == 6
    # Mates are near: the clusters are those of balanced_clusters, not arbitrary ones.
    reference = balanced_clusters(x, size=10)
    spread = [
        float(np.linalg.norm(x[clusters.order].reshape(10, 10, 4).mean(1)))
        for clusters in (sampler.clusters, reference)
    ]
    assert spread[0] > 0.8 * spread[1]


def test_refreshes_cluster_with_seeds_of_their_own() -> None:
    x = np.random.default_rng(0).standard_normal((256, 8), dtype=np.float32)

    def assignments(seed: int) -> list[npt.NDArray[np.int32]]:
        sampler = ClusterBatchSampler(256, 32, cluster_size=8, seed=seed)
        found = []
        for _ in range(2):
            sampler.refresh(x.astype(np.float16))
            assert sampler.clusters is not None
            found.append(sampler.clusters.order.copy())
        return found

    assert same(assignments(0), assignments(0))
    assert not np.array_equal(*assignments(0))


@pytest.mark.parametrize(
    ("options", "sizes", "due"),
    [
        ({"cluster_size": 4}, [1, 4, 4, 4, 4, 4], [1, 2, 3, 4, 5]),
        ({"cluster_size": 4, "start_epoch": 2, "refresh_every": 2}, [1, 1, 4, 4, 4, 4], [2, 4]),
        ({"schedule": {3: 8, 1: 4}, "refresh_every": 4}, [1, 4, 4, 8, 8, 8], [1, 3, 5]),
        ({"schedule": {0: 1, 2: 4}, "refresh_every": 3}, [1, 1, 4, 4, 4, 4], [2, 3]),
        ({"cluster_size": 1}, [1] * 6, []),
    ],
)
def test_schedule(options: dict[str, Any], sizes: list[int], due: list[int]) -> None:
    sampler = ClusterBatchSampler(64, 8, **options)
    assert [sampler.cluster_size_at(epoch) for epoch in range(6)] == sizes
    asked = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        if sampler.due(epoch):
            asked.append(epoch)
            sampler.refresh(some_clusters(64, 4))
        assert not sampler.due(epoch)
    assert asked == due


def test_refresh_that_was_missed_stays_due() -> None:
    sampler = ClusterBatchSampler(64, 8, cluster_size=4, start_epoch=1, refresh_every=10)
    assert [epoch for epoch in range(5) if sampler.due(epoch)] == [1, 2, 3, 4]


def test_length_never_changes() -> None:
    sampler = ClusterBatchSampler(1000, 48, schedule={1: 4, 2: 7, 3: 100}, random_share=0.2)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        if epoch:
            sampler.refresh(some_clusters(1000, sampler.cluster_size_at(epoch)))
        assert len(list(sampler)) == len(sampler) == 21


# ---- Restart, copies, trainers ---------------------------------------------------------------


@pytest.mark.parametrize("with_clusters", [False, True])
def test_state_goes_on_with_the_same_batches(with_clusters: bool, tmp_path: Any) -> None:
    x = np.random.default_rng(0).standard_normal((300, 4), dtype=np.float32)
    options = {"cluster_size": 8, "start_epoch": 2, "random_share": 0.1}
    sampler = ClusterBatchSampler(300, 32, seed=5, **options)
    sampler.set_epoch(2)
    if with_clusters:
        sampler.refresh(x)
    np.savez(tmp_path / "state.npz", **sampler.state_dict())

    resumed = ClusterBatchSampler(300, 32, **options)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        resumed.load_state_dict(state)
    assert resumed.epoch == 2
    assert resumed.due(2) == sampler.due(2) == (not with_clusters)
    assert list(resumed) == list(sampler)
    for each in (sampler, resumed):
        each.set_epoch(3)
        each.refresh(x)
    assert list(resumed) == list(sampler)


def test_state_of_other_data_is_rejected_and_changes_nothing() -> None:
    sampler = clustered(100, 10, 5)
    before = list(sampler)
    good = sampler.state_dict()
    order = good["order"].copy()
    order[0] = order[1]
    for change, message in [
        ({"n_rows": 99}, "n_rows 99, this sampler has 100"),
        ({"batch_size": 20}, "batch_size 20"),
        ({"drop_last": 1}, "drop_last 1"),
        ({"world_size": 2}, "world_size 2"),
        ({"order": good["order"][:50]}, "50 rows"),
        ({"order": order, "epoch": 9}, "order"),
    ]:
        with pytest.raises(ValueError, match=message):
            sampler.load_state_dict({**good, **change})
    del good["epoch"]
    with pytest.raises(ValueError, match="lacks epoch"):
        sampler.load_state_dict(good)
    assert list(sampler) == before


def test_pickling_drops_the_clusters_and_says_so() -> None:
    sampler = clustered(10_000, 32, 8)
    data = pickle.dumps(sampler)
    assert len(data) < 2000
    copy = pickle.loads(data)
    assert len(copy) == len(sampler)
    for use in (copy.plan, copy.state_dict, lambda: iter(copy)):
        with pytest.raises(ValueError, match="pickled copy"):
            use()
    with pytest.raises(ValueError, match="pickled copy"):
        pickle.loads(pickle.dumps(copy)).plan()
    copy.load_state_dict(sampler.state_dict())
    assert list(copy) == list(sampler)
    copy = pickle.loads(data)
    copy.refresh(some_clusters(10_000, 8))
    assert len(copy.plan()) == len(sampler)


@pytest.mark.parametrize("kind", [ClusterBatchSampler, NeighbourBatchSampler])
def test_pickling_drops_keys_and_neighbours(kind: Any) -> None:
    options = {"cluster_size": 8} if kind is ClusterBatchSampler else {}
    keyed = kind(10_000, 32, keys=np.arange(10_000) // 2, **options)
    data = pickle.dumps(keyed)
    assert len(data) < 2000
    with pytest.raises(ValueError, match=f"without keys: make a new {kind.__name__}"):
        pickle.loads(data).plan()
    near = NeighbourBatchSampler(10_000, 32)
    near.refresh(ring(10_000, 128))
    data = pickle.dumps(near)
    assert len(data) < 2000
    copy = pickle.loads(data)
    for use in (copy.plan, copy.state_dict):
        with pytest.raises(ValueError, match="without neighbours: call refresh"):
            use()
    copy.load_state_dict(near.state_dict())
    assert list(copy) == list(near)


def test_copy_plans_epochs_that_need_no_clusters() -> None:
    sampler = ClusterBatchSampler(100, 10, cluster_size=5, start_epoch=2)
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)
    sampler.refresh(some_clusters(100, 5))
    assert same(pickle.loads(pickle.dumps(sampler)).plan(0), sampler.plan(0))


def test_sampler_proxy_forwards_the_epoch() -> None:
    sampler = clustered(100, 10, 5)
    sampler.sampler.set_epoch(7)
    assert sampler.epoch == 7


@pytest.mark.parametrize("workers", [0, 2])
# Python 3.12 and later warn of any fork while torch's threads exist; the workers run no torch op
# that would use them.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_data_loader(workers: int) -> None:
    data = pytest.importorskip("torch.utils.data")
    sampler = clustered(103, 10, 5)
    loader = data.DataLoader(range(103), batch_sampler=sampler, num_workers=workers)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert len(loader) == len(sampler) == 11
        assert [batch.tolist() for batch in loader] == list(sampler)


# ---- Bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_rows": 0}, ValueError, "n_rows is 0, expected 1 or more"),
        ({"n_rows": 10.0}, TypeError, "n_rows is a float, expected an integer"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"batch_size": "8"}, TypeError, "batch_size is a str"),
        ({"cluster_size": None}, ValueError, "exactly one of cluster_size and schedule"),
        ({"schedule": {1: 4}}, ValueError, "exactly one of cluster_size and schedule"),
        ({"cluster_size": 0}, ValueError, "cluster size is 0"),
        ({"cluster_size": 101}, ValueError, "cluster size is 101, n_rows is only 100"),
        ({"cluster_size": 2.5}, TypeError, "cluster size is a float"),
        ({"cluster_size": None, "schedule": {}}, ValueError, "schedule is empty"),
        ({"cluster_size": None, "schedule": [8]}, TypeError, "schedule is a list"),
        ({"cluster_size": None, "schedule": {"1": 8}}, TypeError, "start epoch is a str"),
        ({"cluster_size": None, "schedule": {-1: 8}}, ValueError, "start epoch is -1"),
        (
            {"cluster_size": None, "schedule": {1: 8}, "start_epoch": 1},
            ValueError,
            "start_epoch is given with schedule",
        ),
        ({"start_epoch": -1}, ValueError, "start epoch is -1"),
        ({"refresh_every": 0}, ValueError, "refresh_every is 0"),
        ({"random_share": 1.5}, ValueError, "random_share is 1.5"),
        ({"random_share": float("nan")}, ValueError, "random_share is nan"),
        ({"random_share": "all"}, TypeError, "random_share is a str"),
        ({"seed": 0.5}, TypeError, "seed is a float"),
        ({"world_size": 0}, ValueError, "world_size is 0"),
        ({"world_size": 2, "rank": 2}, ValueError, "rank is 2, expected less than world_size, 2"),
        ({"rank": -1}, ValueError, "rank is -1"),
        ({"threads": -1}, ValueError, "threads is -1"),
        ({"n_rows": 2**31}, ValueError, r"n_rows is 2147483648, at most 2\*\*31 - 1"),
        ({"keys": np.zeros(100)}, TypeError, "keys has dtype float64, expected integers"),
        ({"keys": np.zeros(99, int)}, ValueError, "keys has 99 rows, the sampler has 100"),
        ({"keys": np.zeros((100, 1, 1), int)}, ValueError, r"keys has shape \(100, 1, 1\)"),
        ({"keys": sp.csr_matrix((99, 3))}, ValueError, "keys has 99 rows"),
        ({"keys": sp.csc_matrix((100, 3))}, TypeError, "keys is a csc matrix"),
        (
            {"keys": np.zeros(100, int), "drop_last": True},
            ValueError,
            "n_rows is 100, of which 1 can be planned, expected at least",
        ),
        ({"batch_size": 101, "drop_last": True}, ValueError, "n_rows is 100, expected at least"),
        ({"batch_size": 60, "world_size": 2}, ValueError, "world_size = 120"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ClusterBatchSampler(**{"n_rows": 100, "batch_size": 10, "cluster_size": 5, **options})


def test_bad_calls() -> None:
    sampler = ClusterBatchSampler(100, 10, cluster_size=5)
    with pytest.raises(ValueError, match="embeddings has 99 rows, the sampler has 100"):
        sampler.refresh(np.zeros((99, 4), np.float32))
    with pytest.raises(TypeError, match="float64"):
        sampler.refresh(np.zeros((100, 4)))
    with pytest.raises(ValueError, match="clusters has 50 rows, the sampler has 100"):
        sampler.refresh(some_clusters(50, 5))
    with pytest.raises(TypeError, match="epoch is a float"):
        sampler.set_epoch(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epoch is -1"):
        sampler.plan(-1)
    assert sampler.clusters is None
    assert sampler.refreshes == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nearest": -1}, ValueError, "nearest is -1"),
        ({"drawn": 1.5}, TypeError, "drawn is a float"),
        ({"neighbour_range": 0}, ValueError, "neighbour_range is 0"),
        ({"neighbour_range": 63}, ValueError, "nearest and drawn are 32 and 32"),
        ({"start_epoch": -1}, ValueError, "start_epoch is -1"),
        ({"refresh_every": 0}, ValueError, "refresh_every is 0"),
        ({"batch_size": 101, "drop_last": True}, ValueError, "n_rows is 100, expected at least"),
    ],
)
def test_bad_arguments_of_neighbourhoods(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        NeighbourBatchSampler(**{"n_rows": 100, "batch_size": 10, **options})


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.zeros((99, 4), np.int32), ValueError, "neighbours has 99 rows"),
        (np.zeros((99, 4), np.float32), ValueError, "embeddings has 99 rows"),
        (sp.csr_matrix((99, 99)), ValueError, "graph has 99 rows"),
        (np.zeros(100, int), ValueError, r"neighbours has shape \(100,\)"),
        (np.zeros((100, 4)), TypeError, "float64"),
        (np.full((100, 4), np.nan, np.float32), ValueError, "NaN"),
        (np.full((100, 4), 100), IndexError, r"neighbours\[0, 0\] is 100, out of range for 100"),
        (np.full((100, 4), -2), IndexError, r"neighbours\[0, 0\] is -2"),
        (np.full((100, 4), 2**32), IndexError, r"is 4294967296"),
    ],
)
def test_bad_neighbours(source: Any, error: type[Exception], message: str) -> None:
    sampler = NeighbourBatchSampler(100, 10)
    with pytest.raises(error, match=message):
        sampler.refresh(source)
    assert sampler.neighbours is None
    assert sampler.refreshes == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groups": np.zeros(100)}, TypeError, "groups has dtype float64"),
        ({"groups": np.zeros((10, 10), int)}, ValueError, r"groups has shape \(10, 10\)"),
        ({"groups": []}, ValueError, "n_rows is 0"),
        ({"per_group": 0}, ValueError, "per_group is 0"),
        ({"per_group": 3}, ValueError, "per_group is 3, expected a divisor of 10"),
        ({"groups": np.arange(100)}, ValueError, "n_rows is 100, of which 0 can be planned"),
        ({"alpha": -0.5}, ValueError, "alpha is -0.5, expected 0 or more"),
        ({"alpha": float("nan")}, ValueError, "alpha is nan"),
        ({"alpha": "0.7"}, TypeError, "alpha is a str"),
        ({"world_size": 20}, ValueError, "world_size = 200"),
    ],
)
def test_bad_arguments_of_groups(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GroupBatchSampler(**{"groups": np.zeros(100, int), "batch_size": 10, **options})


def test_core_checks_for_itself() -> None:
    order, offsets = np.arange(4, dtype=np.int32), np.array([0, 2, 4])
    keys = (np.arange(5), np.zeros(4, np.int32), 1)
    with pytest.raises(IndexError, match="sequence has row 2"):
        _core.cluster_order(order, offsets, np.array([0, 2], np.int32), 0)
    with pytest.raises(ValueError, match="sequence repeats a cluster"):
        _core.cluster_order(order, offsets, np.array([1, 1], np.int32), 0)
    with pytest.raises(ValueError, match="sequence lacks a cluster"):
        _core.cluster_order(order, offsets, np.array([1], np.int32), 0)
    with pytest.raises(IndexError, match="rows has row 4, out of range for 4"):
        _core.separate(order + 1, keys, 2)
    with pytest.raises(ValueError, match="rows has row 0 twice"):
        _core.separate(order * 0, keys, 2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        _core.separate(order, keys, 0)
    with pytest.raises(IndexError, match="keys has key 0, out of range for 0"):
        _core.separate(order, (*keys[:2], 0), 2)
    with pytest.raises(ValueError, match="does not ascend"):
        _core.separate(order, (np.array([0, 2, 1, 4]), *keys[1:]), 2)
    with pytest.raises(ValueError, match="does not ascend"):
        _core.number_keys(np.array([0, 3, 2]), np.arange(2))
    near = np.full((4, 1), 4, np.int32)
    with pytest.raises(IndexError, match="neighbours has row 4"):
        _core.neighbour_order(near, 1, 0, 2, None, 0)
    with pytest.raises(ValueError, match="nearest is -1"):
        _core.neighbour_order(near, -1, 0, 2, None, 0)
    with pytest.raises(ValueError, match="keys has 4 rows, expected 3"):
        _core.neighbour_order(near[:3], 1, 0, 2, keys, 0)
    with pytest.raises(ValueError, match="chunks has 1 groups, expected 2"):
        _core.group_order(order, offsets, np.array([1]), 1, 2, None, 0)
    with pytest.raises(ValueError, match="batch_size is 1, expected 2 or more"):
        _core.group_order(order, offsets, None, 2, 1, None, 0)


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 2**64 - 1), st.randoms())
def test_cluster_order_is_that_of_the_reference(sizes: list[int], seed: int, random: Any) -> None:
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    order = np.random.default_rng(0).permutation(int(offsets[-1])).astype(np.int32)
    sequence = list(range(len(sizes)))
    random.shuffle(sequence)
    found = _core.cluster_order(order, offsets, np.array(sequence, np.int32), seed)
    expected = reference.cluster_order(np.split(order, offsets[1:-1]), sequence, seed)
    assert found.tolist() == expected
