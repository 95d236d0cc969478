"""What the processes of a group exchange."""

import processes
import pytest
import torch

from ngame.ranks import Ranks

EXCHANGES = """
    from ngame.ranks import Ranks
    ranks = Ranks.all()
    assert (ranks.rank, ranks.size) == (rank, size)
    counts = ranks.counts(8)
    assert counts == [2, 3, 3] and sum(counts[:rank]) == ranks.share(8).start
    assert ranks.share(8).stop - ranks.share(8).start == counts[rank]
    assert ranks.counts(1) == [0, 0, 1]

    whole = torch.arange(16.0).reshape(8, 2)
    own = whole[ranks.share(8)].clone().requires_grad_()
    found = ranks.concatenate(own, counts)
    assert torch.equal(found, whole)
    # The gradient of a row is the sum of those on all ranks.
    (found * (rank + 1) * whole).sum().backward()
    assert torch.equal(own.grad, 6 * whole[ranks.share(8)])

    gathered = ranks.gather(own.detach(), counts)
    assert torch.equal(gathered, whole) if rank == 0 else gathered is None
    assert ranks.gather(whole[ranks.share(1)], ranks.counts(1)) is None or rank == 0
    assert ranks.sum(torch.tensor([rank, 1])).tolist() == [3, 3]
    assert ranks.mean(rank, 2 - rank) == (0 * 2 + 1 * 1) / 3
    assert ranks.broadcast({"rank": rank}) == {"rank": 0}

    for dtype in (np.float16, np.int64):
        sent = [np.full((to, 2), 10 * rank + to, dtype) for to in range(size)]
        received = ranks.exchange(sent)
        assert [array.tolist() for array in received] == [
            [[10 * origin + rank] * 2] * rank for origin in range(size)
        ]
        assert all(array.dtype == dtype for array in received)
        theirs = ranks.all_arrays(np.full((origin := rank, 3), rank, dtype))
        assert [array.tolist() for array in theirs] == [[[r] * 3] * r for r in range(size)]

    # A smaller group has ranks of its own.
    pair = dist.new_group([1, 2])
    if rank:
        ranks = Ranks(pair)
        assert (ranks.rank, ranks.size) == (rank - 1, 2)
        assert ranks.broadcast(rank) == 1
        rows = ranks.gather(torch.full((1, 1), rank), [1, 1])
        assert rows is None if rank == 2 else rows.tolist() == [[1], [2]]
    dist.barrier()
"""


def test_what_three_processes_exchange():
    processes.run(EXCHANGES, size=3)


def test_alone_nothing_is_exchanged():
    alone = Ranks.all()
    assert (alone.rank, alone.size) == (0, 1)
    x = torch.ones(3, 2)
    for found in (
        alone.concatenate(x, [3]),
        alone.all_rows(x, [3]),
        alone.gather(x, [3]),
        alone.sum(x),
        alone.broadcast(x),
        alone.exchange([x])[0],
        alone.all_arrays(x)[0],
    ):
        assert found is x
    assert (alone.counts(3), alone.share(3)) == ([3], slice(0, 3))
    assert alone.mean(0.1, 3) == 0.1


@pytest.mark.parametrize("call", ["sum(x)", "gather(x, [1, 1])", "all_rows(x, [1, 1])"])
def test_a_lost_rank_is_named_at_once(call):
    code = f"""
        from ngame.ranks import Ranks
        ranks, x = Ranks.all(), torch.ones(1)
        dist.barrier()
        if rank:
            os._exit(3)
        ranks.{call}
    """
    first, second = processes.finish(processes.start(code), timeout=30)
    assert second.returncode == 3
    assert first.returncode
    assert "ConnectionError: another rank has ended" in first.stderr


def test_a_group_without_a_backend_for_the_host():
    code = """
        from ngame.ranks import Ranks
        dist.get_backend_config = lambda group: "cuda:nccl"
        try:
            Ranks(dist.group.WORLD)
        except ValueError as error:
            assert "cpu:gloo,cuda:nccl" in str(error)
        else:
            raise AssertionError
    """
    processes.run(code, size=1)
