"""Batches of clusters: whole ones, random shares, schedules, refreshes."""

import pickle
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from plans import clustered, same, settings, some_clusters

from ngame import _core
from ngame.batches import ClusterBatchSampler
from ngame.cluster import Clusters, balanced_clusters

pytestmark = pytest.mark.filterwarnings("ignore:clusters of")


def batches_of_clusters(plan: list[npt.NDArray[Any]], clusters: Clusters) -> list[set[int]]:
    """For each cluster the batches that hold any of its rows."""
    batch_of = {row: index for index, batch in enumerate(plan) for row in batch.tolist()}
    return [
        {batch_of[row] for row in rows.tolist() if row in batch_of}
        for rows in np.split(clusters.order, clusters.offsets[1:-1])
    ]


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


def test_clusters_without_conflict_stay_whole() -> None:
    clusters = some_clusters(4096, 8)
    keys = np.arange(4096)
    keys[clusters.order[: 8 * 20]] = np.repeat(np.arange(40), 4)  # 20 clusters with conflicts
    plan = clustered(4096, 64, 8, keys=keys).plan()
    split = [len(home) > 1 for home in batches_of_clusters(plan, clusters)]
    assert sum(split[:20]) == 20
    # 120 rows had to leave their batches: others came in their place from the last batches.
    assert sum(split[20:]) <= 16 + 8


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


def test_refresh_acts_at_once() -> None:
    sampler = clustered(512, 32, 8)
    new = some_clusters(512, 8, seed=1)
    sampler.refresh(new)
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
    for epochs in range(7):
        assert sampler.last_refresh(epochs) == max([e for e in due if e < epochs], default=-1)


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


@pytest.mark.filterwarnings("ignore:epoch 2 of this")
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
    order = np.asarray(good["order"]).copy()  # a tensor where torch is loaded
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


def test_copy_plans_epochs_that_need_no_clusters() -> None:
    sampler = ClusterBatchSampler(100, 10, cluster_size=5, start_epoch=2)
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)
    sampler.refresh(some_clusters(100, 5))
    assert same(pickle.loads(pickle.dumps(sampler)).plan(0), sampler.plan(0))


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
        ({"n_rows": 2**31}, ValueError, "n_rows is 2147483648, expected at most 2147483647"),
        ({"keys": np.zeros(100)}, TypeError, "keys has dtype float64, expected integers"),
        (
            {"keys": [f"q{row}" for row in range(100)]},
            TypeError,
            r"keys holds strings, .*: np.unique\(keys, return_inverse=True\)\[1\] numbers them",
        ),
        ({"keys": np.array(["q", 1] * 50, object)}, TypeError, "keys holds strings"),
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


def test_a_state_of_other_cluster_sizes_is_rejected() -> None:
    state = ClusterBatchSampler(100, 10, cluster_size=5).state_dict()
    ClusterBatchSampler(100, 10, schedule={1: 5}).load_state_dict(state)
    other = ClusterBatchSampler(100, 10, cluster_size=2)
    with pytest.raises(
        ValueError, match=r"state has the sizes \{1: 5\} \(by epoch\), this sampler has \{1: 2\}"
    ):
        other.load_state_dict(state)


def test_clusters_larger_than_batches_are_said() -> None:
    message = "clusters of 32 rows are larger than batches of 16: they are cut"
    for options in ({"cluster_size": 32}, {"schedule": {1: 8, 3: 32}}):
        with pytest.warns(UserWarning, match=message) as caught:
            ClusterBatchSampler(100, 16, **options)
        assert caught[0].filename == __file__
    ClusterBatchSampler(100, 16, cluster_size=16)  # warnings are errors here


def test_bad_calls() -> None:
    sampler = ClusterBatchSampler(100, 10, cluster_size=5)
    with pytest.raises(ValueError, match="source has 99 rows, the sampler has 100"):
        sampler.refresh(np.zeros((99, 4), np.float32))
    with pytest.raises(TypeError, match="source has dtype float64"):
        sampler.refresh(np.zeros((100, 4)))
    with pytest.raises(ValueError, match="source has 50 rows, the sampler has 100"):
        sampler.refresh(some_clusters(50, 5))
    with pytest.raises(TypeError, match="source is a function, expected embeddings or Clusters"):
        sampler.refresh(lambda: None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="source has NaN or infinity in row 3"):
        sampler.refresh(np.where(np.arange(100)[:, None] == 3, np.nan, 1).astype(np.float32))
    with pytest.raises(ValueError, match=r"source has shape \(100, 0\), expected embeddings"):
        sampler.refresh(np.zeros((100, 0), np.float32))
    with pytest.raises(TypeError, match="epoch is a float"):
        sampler.set_epoch(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epoch is -1"):
        sampler.plan(-1)
    assert sampler.clusters is None
    assert sampler.refreshes == 0


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 2**64 - 1), st.randoms())
def test_cluster_order_is_that_of_the_reference(sizes: list[int], seed: int, random: Any) -> None:
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    order = np.random.default_rng(0).permutation(int(offsets[-1])).astype(np.int32)
    sequence = list(range(len(sizes)))
    random.shuffle(sequence)
    found = _core.cluster_order(order, offsets, np.array(sequence, np.int32), seed)
    expected = reference.cluster_order(np.split(order, offsets[1:-1]), sequence, seed)
    assert found.tolist() == expected
