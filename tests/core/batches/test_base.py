"""What all samplers promise: keys apart, exact lengths, restarts, copies, trainers."""

import itertools
import pickle
import resource
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from plans import Sampler, check_epochs, clustered, ring, same, settings, some_keys, try_length

from ngame import _core
from ngame.batches import ClusterBatchSampler, GroupBatchSampler, NeighbourBatchSampler
from ngame.cluster import Clusters

# Toys, whose keys are those of many rows.
pytestmark = [
    pytest.mark.filterwarnings("ignore:keys let"),
    pytest.mark.filterwarnings("ignore:clusters of"),
]

ROWS, BATCH = 1003, 10


def of_clusters(**options: Any) -> ClusterBatchSampler:
    return clustered(ROWS, BATCH, 5, **options)


def of_neighbours(**options: Any) -> NeighbourBatchSampler:
    sampler = NeighbourBatchSampler(ROWS, BATCH, nearest=2, drawn=2, **options)
    sampler.refresh(ring(ROWS, 12))
    return sampler


def of_groups(**options: Any) -> GroupBatchSampler:
    return GroupBatchSampler(np.arange(ROWS) % 9, BATCH, per_group=5, **options)


each_kind = pytest.mark.parametrize("make", [of_clusters, of_neighbours, of_groups])


# ---- Epochs ----------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("keyed", [False, True])
def test_all_ranks_get_as_many_batches_every_epoch(make: Any, world_size: int, keyed: bool) -> None:
    keys = np.arange(ROWS) // 2 if keyed else None
    ranks = [make(world_size=world_size, rank=rank, keys=keys) for rank in range(world_size)]
    check_epochs(ranks, keys)
    assert ranks[0].rows_left_out < 5 * 9 + BATCH * world_size  # groups: less than 5 of each
    length = len(ranks[0])
    if make is not of_groups:
        vectors = np.random.default_rng(0).standard_normal((ROWS, 4), dtype=np.float32)
        for sampler in ranks:
            sampler.refresh(vectors)
        check_epochs(ranks, keys)
    assert len(ranks[0]) == length


def test_batches_go_to_the_ranks_by_turns() -> None:
    """Ranks that step together are at neighbouring batches of one plan."""
    whole = clustered(120, 10, 5).plan()
    for rank in range(3):
        own = clustered(120, 10, 5, world_size=3, rank=rank).plan()
        assert same(own, whole[rank::3])


@each_kind
def test_iterating_is_pure(make: Any) -> None:
    sampler = make()
    first = list(sampler)
    next(iter(sampler))
    assert list(sampler) == first
    assert sampler.epoch == 0
    assert first == [batch.tolist() for batch in sampler.plan(0)]
    assert all(type(row) is int for row in first[0])
    assert list(make(seed=1)) != first


@pytest.mark.parametrize("make", [of_clusters, of_neighbours])
def test_refresh_does_not_act_on_an_iteration_that_runs(make: Any) -> None:
    sampler = make()
    planned = list(sampler)
    running = iter(sampler)
    begun = [next(running)]
    sampler.refresh(np.random.default_rng(0).standard_normal((ROWS, 4), dtype=np.float32))
    assert begun + list(running) == planned
    assert list(sampler) != planned


def second_kinds() -> list[Any]:
    return [
        lambda: ClusterBatchSampler(96, 8, cluster_size=4, refresh_every=2),
        lambda: ClusterBatchSampler(96, 8, cluster_size=4, start_epoch=0, refresh_every=3),
        lambda: ClusterBatchSampler(96, 8, schedule={0: 1, 2: 4, 3: 8}),
        lambda: NeighbourBatchSampler(96, 8, nearest=2, drawn=1, start_epoch=1, refresh_every=4),
    ]


def training(sampler: Any, epochs: int, x: Any) -> tuple[list[int], list[Any]]:
    """The epochs of the refreshes of a plain loop, and its batches."""
    refreshed, batches = [], []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        if sampler.due(epoch):
            sampler.refresh(x * (1 + np.arange(4) * epoch).astype(np.float32))
            refreshed.append(epoch)
        batches.append(list(sampler))
    return refreshed, batches


@pytest.mark.parametrize("make", second_kinds())
@pytest.mark.parametrize("epochs", [2, 3, 5])
def test_second_training_has_the_batches_of_a_new_sampler(make: Any, epochs: int) -> None:
    x, other = np.random.default_rng(0).standard_normal((2, 96, 4), dtype=np.float32)
    sampler = make()
    training(sampler, epochs, other)
    state = sampler.state_dict()
    assert training(sampler, 5, x) == training(make(), 5, x)
    # The second one may be stopped before its first refresh, and go on in another sampler.
    again, resumed = make(), make()
    again.load_state_dict(state)
    again.set_epoch(0)
    resumed.load_state_dict(again.state_dict())
    assert training(resumed, 5, x) == training(make(), 5, x)


def test_going_back_loses_nothing() -> None:
    x = np.random.default_rng(0).standard_normal((96, 4), dtype=np.float32)
    sampler = ClusterBatchSampler(96, 8, cluster_size=4, refresh_every=5)
    _, (first, second) = training(sampler, 2, x)
    before = sampler.state_dict()
    sampler.set_epoch(0)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) == second
    after = sampler.state_dict()
    assert after.pop("started_over") == 1
    assert all(np.array_equal(value, before[name]) for name, value in after.items())
    resumed = ClusterBatchSampler(96, 8, cluster_size=4, refresh_every=5)
    resumed.load_state_dict(before)
    assert not resumed.due(1)
    assert list(resumed) == second
    sampler.load_state_dict(before)
    sampler.set_epoch(2)  # and on with the training
    assert not sampler.due(2)
    sampler.refresh(x)
    assert sampler.refreshes == 2
    # A look at an epoch after the first one with clusters begins nothing.
    sampler.set_epoch(6)
    sampler.refresh(x)
    sampler.set_epoch(2)
    sampler.set_epoch(6)
    assert not sampler.due(6)
    sampler.refresh(x)
    assert sampler.refreshes == 4


# ---- Keys ------------------------------------------------------------------------------------


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


# ---- Restart, copies, trainers ---------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("keyed", [False, True])
def test_state_goes_on_with_the_same_batches(make: Any, keyed: bool, tmp_path: Any) -> None:
    keys = np.arange(ROWS) // 2 if keyed else None
    sampler = make(seed=5, keys=keys)
    sampler.set_epoch(3)
    if make is not of_groups:  # by something that the resumed one has not
        sampler.refresh(np.random.default_rng(0).standard_normal((ROWS, 4), dtype=np.float32))
    np.savez(tmp_path / "state.npz", **sampler.state_dict())
    resumed = make(keys=keys)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        resumed.load_state_dict(state)
    assert resumed.epoch == 3
    for epoch in (3, 4):
        assert same(resumed.plan(epoch), sampler.plan(epoch))


@pytest.mark.parametrize("make", [of_clusters, of_neighbours])
def test_a_state_stays_as_it_was(make: Any) -> None:
    sampler = make()
    expected = list(sampler)
    state = sampler.state_dict()
    sampler.set_epoch(1)
    sampler.refresh(np.random.default_rng(0).standard_normal((ROWS, 4), dtype=np.float32))
    list(sampler)
    resumed = make()
    resumed.load_state_dict(state)
    assert list(resumed) == expected


def test_state_of_other_keys_is_rejected() -> None:
    state = clustered(300, 32, 8).state_dict()
    with pytest.raises(ValueError, match="rows_left_out 0, this sampler has"):
        clustered(300, 32, 8, keys=np.zeros(300, int)).load_state_dict(state)


@pytest.mark.filterwarnings("ignore:epoch 0 of this")
@each_kind
def test_pickling_drops_arrays_and_says_so(make: Any) -> None:
    sampler = make()
    data = pickle.dumps(sampler)
    assert len(data) < 2000
    copy = pickle.loads(data)
    assert len(copy) == len(sampler)
    again = pickle.loads(pickle.dumps(copy))
    for use in (copy.plan, lambda: iter(copy), again.plan):
        with pytest.raises(ValueError, match="pickled copy without"):
            use()
    if make is of_groups:
        return
    with pytest.raises(ValueError, match="call refresh or load_state_dict first"):
        copy.state_dict()
    copy.load_state_dict(sampler.state_dict())
    assert list(copy) == list(sampler)
    again.refresh(np.random.default_rng(0).standard_normal((ROWS, 4), dtype=np.float32))
    assert len(again.plan()) == len(sampler)


@each_kind
def test_pickling_drops_keys(make: Any) -> None:
    data = pickle.dumps(make(keys=np.arange(ROWS) // 2))
    assert len(data) < 2000
    with pytest.raises(ValueError, match="without keys: make a new"):
        pickle.loads(data).plan()


@each_kind
def test_sampler_proxy_forwards_the_epoch(make: Any) -> None:
    sampler = make()
    sampler.sampler.set_epoch(7)
    assert sampler.epoch == 7
    assert same(sampler.plan(), make().plan(7))


@each_kind
@pytest.mark.parametrize("workers", [0, 2])
# Python 3.12 and later warn of any fork while torch's threads exist; the workers run no torch op
# that would use them.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_data_loader(make: Any, workers: int) -> None:
    data = pytest.importorskip("torch.utils.data")
    sampler = make()
    loader = data.DataLoader(range(ROWS), batch_sampler=sampler, num_workers=workers)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert len(loader) == len(sampler)
        assert [batch.tolist() for batch in loader] == list(sampler)


# ---- The core --------------------------------------------------------------------------------


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
        _core.neighbour_order(near, 1, 0, 2, 0, None, 0)
    with pytest.raises(ValueError, match="nearest is -1"):
        _core.neighbour_order(near, -1, 0, 2, 0, None, 0)
    with pytest.raises(ValueError, match="random_rows is -1"):
        _core.neighbour_order(near, 1, 0, 2, -1, None, 0)
    with pytest.raises(ValueError, match="keys has 4 rows, expected 3"):
        _core.neighbour_order(near[:3], 1, 0, 2, 0, keys, 0)
    with pytest.raises(ValueError, match="chunks has 1 groups, expected 2"):
        _core.group_order(order, offsets, np.array([1]), 1, 2, None, 0)
    with pytest.raises(ValueError, match="batch_size is 1, expected 2 or more"):
        _core.group_order(order, offsets, None, 2, 1, None, 0)
    with pytest.raises(ValueError, match="chunks is -1"):
        _core.group_order(order, offsets, np.array([1, -1]), 1, 2, None, 0)
    for many in (2**31, 2**62):
        with pytest.raises(ValueError, match="chunks make more than"):
            _core.group_order(order, offsets, np.array([1, many]), 1, 2, None, 0)
    with pytest.raises(ValueError, match="and 1152921504606846976 different keys"):
        _core.separate(order, (*keys[:2], 2**60), 2)


MOST = 2**31 - 1
HUGE = [5 * 10**8, MOST]


@pytest.mark.parametrize("huge", HUGE)
def test_memory_goes_by_the_rows_whatever_is_asked_for(huge):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    keys = [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    cluster = ClusterBatchSampler(10, huge, cluster_size=2, start_epoch=0, keys=keys)
    near = NeighbourBatchSampler(
        10, huge, nearest=huge // 2, drawn=huge // 2, neighbour_range=huge, keys=keys
    )
    shared = NeighbourBatchSampler(10, huge, random_share=1.0, keys=keys)
    points, graph = np.eye(10, dtype=np.float32), sp.csr_matrix(np.ones((10, 10)))
    for sampler, source in ((cluster, points), (near, points), (near, graph), (shared, graph)):
        sampler.refresh(source)
        (batch,) = sampler.plan()
        assert len(sampler) == 1
        assert sampler.rows_left_out == 1
        assert set(batch) | {8, 9} == set(range(10))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
    for make in (
        lambda: ClusterBatchSampler(10, huge, cluster_size=2, drop_last=True),
        lambda: ClusterBatchSampler(10, huge, cluster_size=2, world_size=huge),
        lambda: GroupBatchSampler([0, 0, 1], huge),
        lambda: GroupBatchSampler([0, 0, 1], huge, per_group=huge, alpha=0.5),
    ):
        with pytest.raises(ValueError, match="expected at least batch_size"):
            make()


@pytest.mark.parametrize("count", [2**31, 2**62 + 3, 2**63 - 1, 2**64, 10**30])
@pytest.mark.parametrize(
    "make",
    [
        lambda count: ClusterBatchSampler(10, count, cluster_size=2),
        lambda count: ClusterBatchSampler(10, 4, cluster_size=count),
        lambda count: ClusterBatchSampler(10, 4, cluster_size=2, world_size=count),
        lambda count: NeighbourBatchSampler(10, 4, nearest=count),
        lambda count: NeighbourBatchSampler(10, 4, drawn=count),
        lambda count: NeighbourBatchSampler(10, 4, neighbour_range=count),
        lambda count: GroupBatchSampler([0, 0, 1], count),
        lambda count: GroupBatchSampler([0, 0, 1], 2, per_group=count),
    ],
)
def test_counts_beyond_32_bits(make, count):
    with pytest.raises(ValueError, match=f"is {count}, expected at most {MOST}"):
        make(count)


@pytest.mark.parametrize("huge", HUGE)
def test_the_core_allocates_by_the_rows(huge):
    keys = _core.number_keys(np.arange(5), np.array([1, 1, 2, 2]))
    order = np.arange(4, dtype=np.int32)
    rows, reached = _core.separate(order, keys, huge)
    assert sorted(rows.tolist()) == [0, 1, 2, 3]
    assert reached == 2
    offsets = np.array([0, 2, 4])
    for size in (1, huge):
        rows, reached = _core.group_order(order, offsets, None, size, huge, keys, 0)
        assert (len(rows), reached) == (0, 0)


@pytest.mark.parametrize("make", [of_clusters, of_neighbours])
def test_too_many_threads_are_refused_at_once(make: Any) -> None:
    with pytest.raises(ValueError, match="threads is 1000000, expected at most 1024"):
        make(threads=10**6)


# ---- What is probably a mistake --------------------------------------------------------------


def test_one_warning_where_a_refresh_never_came() -> None:
    for sampler in (
        ClusterBatchSampler(20, 4, cluster_size=2),
        NeighbourBatchSampler(20, 4, nearest=1, drawn=0, start_epoch=1),
    ):
        assert len(list(sampler)) == 5  # epoch 0 is to be random
        sampler.set_epoch(1)
        with pytest.warns(UserWarning, match="epoch 1 of this .* is random, since refresh"):
            list(sampler)
        list(sampler)
        sampler.plan(1)  # a look at other epochs says nothing


def test_one_warning_where_keys_leave_few_rows() -> None:
    keys = np.where(np.arange(100) < 70, 0, np.arange(100))
    message = "keys let an epoch visit 41 of 100 rows: one key is that of 70 rows"
    with pytest.warns(UserWarning, match=message) as warned:
        ClusterBatchSampler(100, 4, cluster_size=2, keys=keys)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    ClusterBatchSampler(100, 4, cluster_size=2, keys=np.arange(100) // 10)
    # Where the groups leave them out, keys are not blamed.
    with pytest.warns(UserWarning, match="groups leave 80 of 100 rows") as warned:
        GroupBatchSampler([0] * 90 + [1] * 10, 4, per_group=2, keys=np.arange(100) // 2)
    assert len(warned) == 1
    with pytest.warns(UserWarning, match="keys let an epoch visit"):
        GroupBatchSampler(np.zeros(100, int), 4, keys=keys)


class Tensor:
    """A torch tensor on another device, as far as NumPy is concerned: unreadable before `cpu`."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def detach(self) -> Any:
        return Tensor(self.values)

    def cpu(self) -> Any:
        return self.values


def test_refresh_from_a_tensor_on_another_device() -> None:
    x = np.random.default_rng(0).standard_normal((20, 4), dtype=np.float32)
    for sampler in (
        ClusterBatchSampler(20, 4, cluster_size=2, start_epoch=0),
        NeighbourBatchSampler(20, 4, nearest=1, drawn=0),
    ):
        sampler.refresh(x)
        expected = sampler.plan()
        sampler.refreshes = 0
        sampler.refresh(Tensor(x))
        assert same(sampler.plan(), expected)
