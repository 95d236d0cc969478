"""ClusterBatchSampler: what a plan holds, when it changes, and how it survives a restart."""

import pickle
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngame.batches import ClusterBatchSampler
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
