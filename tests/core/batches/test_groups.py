"""Batches of groups: pure ones, several of each, in proportion to a power of the size."""

import pickle
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from plans import Sampler, check_epochs, some_keys, try_length

from ngame.batches import GroupBatchSampler

# Toys, whose keys are those of many rows.
pytestmark = [
    pytest.mark.filterwarnings("ignore:keys let"),
    pytest.mark.filterwarnings("ignore:groups leave"),
]


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
        with pytest.raises(ValueError, match=r"expected at least|takes"):
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


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=100),
    st.integers(1, 3),
    st.integers(2, 5),
    st.integers(1, 2),
)
def test_batches_of_at_least_some_of_each_group(
    groups: list[int], at_least: int, chunks: int, world_size: int
) -> None:
    options: Any = {"at_least": at_least, "world_size": world_size}
    counts = np.bincount(groups) // at_least
    n_batches = min(counts.sum() // chunks, counts.sum() - counts.max()) // world_size
    if not n_batches:
        with pytest.raises(ValueError, match=r"expected at least|takes 2 of those"):
            GroupBatchSampler(groups, at_least * chunks, **options)
        return
    ranks = [
        GroupBatchSampler(groups, at_least * chunks, **options, rank=rank)
        for rank in range(world_size)
    ]
    assert len(ranks[0]) == n_batches
    check_epochs([*ranks])
    for epoch in range(3):
        for batch in ranks[0].plan(epoch):
            ids, found = np.unique(np.array(groups)[batch], return_counts=True)
            assert len(ids) >= 2
            assert found.min() >= at_least


@pytest.mark.parametrize(
    ("sizes", "share"),
    [
        # Few, many, and very unlike groups.
        ([1250, 1223, 1162, 896, 835, 86], 0.99),
        (
            [962, 464, 421, 363, 276, 274, 218, 217, 207, 191]
            + [80 - 3 * number for number in range(10)]
            + [20 - number for number in range(10)]
            + [4, 4, 6, 8, 9, 9, 9, 10, 11, 11],
            0.98,
        ),
        ([1000, 500, 3], 0.97),
        ([3000, 50, 50], 0.45),  # every batch of 32 has a pair of the others
    ],
)
def test_share_of_the_rows_that_at_least_two_of_each_use(sizes: list[int], share: float) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    sampler = GroupBatchSampler(groups, 32, at_least=2)
    assert 1 - sampler.rows_left_out / len(groups) >= share
    visits = np.zeros(len(groups), int)
    for epoch in range(20):
        visits[np.concatenate(sampler.plan(epoch))] += 1
    assert visits.min() > 0  # each epoch leaves out others


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


def test_a_group_with_less_than_a_draw_an_epoch_is_not_left_out_of_all() -> None:
    """Its draws, 0.36 an epoch, are rounded up in as many epochs."""
    groups = np.repeat([0, 1], [72, 8])
    sampler = GroupBatchSampler(groups, 8, alpha=1.5)
    drawn = sum(groups[np.concatenate(sampler.plan(epoch))].sum() / 8 for epoch in range(100))
    assert abs(drawn - 100 * 10 / 28) < 20


def test_groups_are_spread_over_the_epoch() -> None:
    """With `at_least`: any part of an epoch has of each group what the whole has."""
    groups = np.repeat([0, 1, 2], [2000, 400, 80])
    sampler = GroupBatchSampler(groups, 32, at_least=2)
    parts = np.array([sampler.plan(epoch) for epoch in range(8)]).reshape(8 * 7, -1)
    counts = np.stack([np.bincount(groups[part], minlength=3) for part in parts]) / 2
    # By chance alone the larger ones would differ by about 4.
    assert (counts.std(axis=0)[:2] < 3).all()


def test_a_tempered_group_begins_again_only_at_its_end() -> None:
    groups = np.repeat([0, 1], [400, 40])
    sampler = GroupBatchSampler(groups, 8, alpha=0.0)
    rows = np.concatenate(sampler.plan())
    visits = np.bincount(rows, minlength=440)
    assert visits[:400].max() == 1
    assert set(visits[400:]) <= {5, 6}
    assert visits[400:].sum() in (27 * 8, 28 * 8)


def test_state_of_tempered_groups() -> None:
    groups = np.arange(200) % 7
    sampler = GroupBatchSampler(groups, 8, per_group=2, alpha=0.5, seed=3)
    sampler.set_epoch(5)
    resumed = GroupBatchSampler(groups, 8, per_group=2, alpha=0.5)
    assert list(sampler) != list(resumed)
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == list(sampler)
    with pytest.raises(ValueError, match="without groups: make a new GroupBatchSampler"):
        pickle.loads(pickle.dumps(sampler)).plan()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groups": np.zeros(100)}, TypeError, "groups has dtype float64"),
        ({"groups": np.zeros((10, 10), int)}, ValueError, r"groups has shape \(10, 10\)"),
        ({"groups": ["a", "b"] * 8}, TypeError, r"groups holds strings, .*: np.unique\(groups, "),
        ({"groups": []}, ValueError, "n_rows is 0"),
        ({"per_group": 0}, ValueError, "per_group is 0"),
        ({"per_group": 3}, ValueError, "per_group is 3, expected a divisor of 10"),
        ({"groups": np.arange(100)}, ValueError, "0 of them with 10 rows or more"),
        ({"alpha": -0.5}, ValueError, "alpha is -0.5, expected 0 or more"),
        ({"alpha": float("nan")}, ValueError, "alpha is nan"),
        ({"alpha": "0.7"}, TypeError, "alpha is a str"),
        ({"world_size": 20}, ValueError, "world_size = 200"),
        ({"at_least": 3}, ValueError, "at_least is 3, expected a divisor of 10 below it"),
        ({"at_least": 10}, ValueError, "at_least is 10, expected a divisor of 10 below it"),
        ({"at_least": 2, "alpha": 1.0}, ValueError, "at_least is given with alpha"),
        ({"at_least": 2}, ValueError, "1 of them with 2 rows or more; .* takes 2 of those"),
    ],
)
def test_bad_arguments_of_groups(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GroupBatchSampler(**{"groups": np.zeros(100, int), "batch_size": 10, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 60, "per_group": 6},
            "groups leave 1340 of 2000 rows out of each epoch: a batch takes 6 rows from each of "
            "10 groups, which have 69 to 526; at_least= in place of per_group, or fewer groups a "
            "batch, use more",
        ),
        ({"batch_size": 60, "per_group": 6, "keys": np.arange(2000)}, "; fewer groups a batch"),
        ({"batch_size": 20, "sizes": [25] * 8}, "leave 40 of 200 .* takes 20 rows of one group"),
        ({"batch_size": 120}, "leave 560 .* takes 120 rows of one group, .*; smaller batches use"),
        ({"batch_size": 32, "at_least": 2, "sizes": [3000, 50, 50]}, "1500 of .* smaller at_least"),
        (
            {"batch_size": 64, "per_group": 4, "sizes": [50] * 40 + [1] * 600},
            "680 of 2600 .*; 600 of them are in smaller groups: a lower per_group would use more",
        ),
        # What helps is quiet, and so is what leaves out no more than full batches do.
        ({"batch_size": 60, "at_least": 6}, None),
        ({"batch_size": 30, "per_group": 6}, None),
        ({"batch_size": 120, "alpha": 0.5}, None),
        ({"batch_size": 4, "per_group": 2, "sizes": [2, 2, 3]}, None),
    ],
)
def test_one_warning_where_groups_leave_out_many_rows(
    options: dict[str, Any], message: str | None
) -> None:
    options = {"sizes": [526, 300, 260, 230, 180, 150, 120, 90, 75, 69], **options}
    sizes = options.pop("sizes")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        sampler = GroupBatchSampler(np.repeat(np.arange(len(sizes)), sizes), **options)
    assert len(warned) == (message is not None)
    if message is not None:
        assert re.search(message, str(warned[0].message))
        assert f"leave {sampler.rows_left_out} of" in str(warned[0].message)
        assert warned[0].filename == __file__


def test_too_few_groups() -> None:
    groups = np.repeat(np.arange(6), [9, 9, 9, 1, 1, 1])
    with pytest.raises(
        ValueError,
        match="groups has 6 groups, 3 of them with 2 rows or more; a batch of 8 rows takes 4 of",
    ):
        GroupBatchSampler(groups, 8, per_group=2)
    with pytest.raises(ValueError, match=r"0 of them with 12 rows or more; .* takes 1 of those"):
        GroupBatchSampler(groups, 12)
    assert len(GroupBatchSampler(groups, 6, per_group=2)) == 4
