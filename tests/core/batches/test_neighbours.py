"""Batches of neighbourhoods: how they are filled, from what, and how hard they are."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from plans import Sampler, check_epochs, key_sets, ring, settings, some_keys, try_length

import ngame
from ngame import _core
from ngame.batches import NeighbourBatchSampler

# Toys, whose keys are those of many rows.
pytestmark = pytest.mark.filterwarnings("ignore:keys let")


def coverage(plan: list[npt.NDArray[Any]], neighbours: npt.NDArray[Any]) -> list[float]:
    """Share of each row's neighbours that are in its batch, by quarter of the epoch."""
    place = np.empty(len(neighbours), int)
    for number, rows in enumerate(plan):
        place[rows] = number
    share = (place[neighbours] == place[:, np.newaxis]).mean(axis=1)
    quarters = np.array_split(np.arange(len(plan)), 4)
    return [float(np.concatenate([share[plan[i]] for i in part]).mean()) for part in quarters]


@given(st.data())
def test_neighbourhoods_are_those_of_the_reference(data: st.DataObject) -> None:
    n_rows = data.draw(st.integers(1, 40))
    width = data.draw(st.integers(0, 8))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    neighbours = rng.integers(-1, n_rows, (n_rows, width), dtype=np.int32)
    nearest, drawn = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    batch_size = data.draw(st.integers(1, 12))
    random_rows = data.draw(st.integers(0, batch_size))
    seed = data.draw(st.integers(0, 2**64 - 1))
    ids = rng.integers(0, 2 * n_rows, (n_rows, 2)) if data.draw(st.booleans()) else None
    keys = None
    if ids is not None:
        keys = _core.number_keys(np.arange(0, 2 * n_rows + 1, 2), ids.ravel())
    found = _core.neighbour_order(neighbours, nearest, drawn, batch_size, random_rows, keys, seed)
    sets = [set()] * n_rows if ids is None else key_sets(ids)
    expected = reference.neighbour_order(
        neighbours, nearest, drawn, batch_size, random_rows, sets, seed
    )
    assert found.tolist() == expected


@given(st.data(), settings(), st.booleans(), st.booleans())
def test_neighbourhoods_keep_every_promise(
    data: st.DataObject, options: Any, keyed: bool, shuffle: bool
) -> None:
    n_rows, world_size = options["n_rows"], options["world_size"]
    keys = data.draw(some_keys(n_rows)) if keyed else None
    del options["size"]

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
    near = [bool(np.isin(neighbours[first[:i], :20], row).any()) for i, row in enumerate(first)]
    # Seeds are every ninth row, or a little more often where a neighbourhood overlaps another.
    assert 50 - 2 * 6 < sum(near) <= 50 - 1


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


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_share_of_the_rows_comes_without_neighbours(share: float) -> None:
    neighbours = ring(50_000, 16)
    sampler = NeighbourBatchSampler(50_000, 64, nearest=8, drawn=8, random_share=share)
    sampler.refresh(neighbours)
    # Early in the epoch, where no row lacks its neighbours because others took them.
    early = sampler.plan()[:100]
    unaccompanied = [64 - np.isin(rows, neighbours[rows]).sum() for rows in early]
    assert abs(np.mean(unaccompanied) - share * 64) < 2


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


@pytest.mark.filterwarnings("ignore:epoch 0 of this")
def test_state_of_neighbourhoods() -> None:
    options: Any = {"nearest": 3, "drawn": 3, "keys": np.arange(300) // 2}
    sampler = NeighbourBatchSampler(300, 32, seed=5, **options)
    copy = NeighbourBatchSampler(300, 32, **options)
    copy.load_state_dict(sampler.state_dict())
    assert list(copy) == list(sampler)
    assert copy.due(0)
    sampler.set_epoch(4)
    sampler.refresh(ring(300, 12))
    copy.load_state_dict(sampler.state_dict())
    assert list(copy) == list(sampler)
    assert not copy.due(4)
    wrong = sampler.state_dict() | {"neighbours": ring(299, 12)}
    with pytest.raises(ValueError, match="299 rows"):
        copy.load_state_dict(wrong)
    with pytest.raises(IndexError, match="out of range for 300"):
        copy.load_state_dict(wrong | {"neighbours": ring(300, 12) + 1})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nearest": -1}, ValueError, "nearest is -1"),
        ({"drawn": 1.5}, TypeError, "drawn is a float"),
        ({"neighbour_range": 0}, ValueError, "neighbour_range is 0"),
        ({"neighbour_range": 63}, ValueError, "nearest and drawn are 32 and 32"),
        ({"random_share": 1.5}, ValueError, "random_share is 1.5, expected a share from 0 to 1"),
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


def test_neighbours_come_from_a_search(mixture: Any) -> None:
    """Of all rows among themselves: each finds itself first, and is not its own neighbour."""
    x = mixture(100, 8)
    from_search, from_vectors = (NeighbourBatchSampler(100, 10) for _ in range(2))
    from_search.refresh(ngame.topk_arrays(x, x, 60))
    from_vectors.refresh(x)
    own = from_search.neighbours
    assert own is not None
    assert from_vectors.neighbours is not None
    assert (own[:, -1] == -1).all()
    np.testing.assert_array_equal(own[:, :-1], from_vectors.neighbours[:, :59])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.zeros((99, 4), np.int32), ValueError, "source has 99 rows"),
        (np.zeros((99, 4), np.float32), ValueError, "source has 99 rows"),
        (sp.csr_matrix((99, 99)), ValueError, "source has 99 rows"),
        (np.zeros(100, int), ValueError, r"source has shape \(100,\)"),
        (None, TypeError, "source is a NoneType, expected neighbours or embeddings"),
        (np.zeros((100, 4)), TypeError, "source has dtype float64"),
        (np.full((100, 4), np.nan, np.float32), ValueError, "source has NaN"),
        (np.zeros((100, 0), np.float32), ValueError, r"source has shape \(100, 0\), expected emb"),
        (np.full((100, 4), 100), IndexError, r"source\[0, 0\] is 100, out of range for 100"),
        (np.full((100, 4), -2), IndexError, r"source\[0, 0\] is -2"),
        ((np.zeros((100, 4)), np.zeros((100, 4))), TypeError, "source is a pair of which the sec"),
        (np.full((100, 4), 2**32), IndexError, r"is 4294967296"),
    ],
)
def test_bad_neighbours(source: Any, error: type[Exception], message: str) -> None:
    sampler = NeighbourBatchSampler(100, 10)
    with pytest.raises(error, match=message):
        sampler.refresh(source)
    assert sampler.neighbours is None
    assert sampler.refreshes == 0


def test_neighbours_considered_by_default(rng: np.random.Generator) -> None:
    """As in Sample4Geo: 128, of which 32 follow and 32 more are drawn."""
    sampler = NeighbourBatchSampler(200, 65)
    sampler.refresh(rng.standard_normal((200, 8), dtype=np.float32))
    assert sampler.neighbours is not None
    assert sampler.neighbours.shape == (200, 128)
    batch = sampler.plan()[0]
    ranks = {int(row): rank for rank, row in enumerate(sampler.neighbours[batch[0]])}
    followers = sorted(ranks[row] for row in batch[1:])
    assert followers[:32] == list(range(32))
    assert followers[-1] >= 64
