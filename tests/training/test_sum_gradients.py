"""The sum of the gradients of several processes."""

import processes

SUMS = """
    from ngame.ranks import Ranks
    from ngame.training.optimizer import clip, sum_gradients
    ranks = Ranks.all()
    torch.manual_seed(0)
    table = torch.nn.Embedding(50, 3, sparse=True)
    unused, frozen = torch.nn.Embedding(9, 3, sparse=True), torch.nn.Linear(3, 3)
    linear, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 1)
    parameters = [table.weight, unused.weight, *linear.parameters(), *second.parameters(),
                  *frozen.parameters()]
    lists = [torch.tensor([1, 1, 7, 30]), torch.tensor([30, 2]), torch.tensor([], dtype=int)]

    def loss(of):
        found = linear(table(lists[of])).square().sum()
        return found + second(table(lists[of])).sum() if of == 1 else found

    # What one process has that computes all of it.
    sum(loss(of) for of in range(size)).backward()
    expected = [None if p.grad is None else p.grad.to_dense().clone() for p in parameters]
    for p in parameters:
        p.grad = None
    if rank < 2:  # the last rank has no gradient of anything
        loss(rank).backward()
    sum_gradients(parameters, ranks)
    for p, whole in zip(parameters, expected):
        if whole is None:
            assert p.grad is None
            continue
        torch.testing.assert_close(p.grad.to_dense(), whole)
        theirs = [None] * size
        dist.all_gather_object(theirs, p.grad.to_dense().tolist())
        assert all(each == theirs[0] for each in theirs)  # to the bit
    assert sorted(table.weight.grad._indices()[0].tolist()) == [1, 2, 7, 30]

    # The norm counts each rank's own rows of a shared parameter.
    shared = torch.nn.Parameter(torch.zeros(2, 3))
    shared.grad = torch.full((2, 3), rank + 1.0)
    whole = torch.nn.Parameter(torch.zeros(1))
    whole.grad = torch.tensor([2.0])
    norm = (4 + 6 * sum((r + 1) ** 2 for r in range(size))) ** 0.5
    clip([whole], 0.5, [shared], ranks)
    torch.testing.assert_close(whole.grad, torch.tensor([2 * 0.5 / norm]))
    torch.testing.assert_close(shared.grad, torch.full((2, 3), (rank + 1) * 0.5 / norm))
"""


def test_sums_and_norms_are_those_of_one_process():
    processes.run(SUMS, size=3)
