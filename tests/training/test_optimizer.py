"""Learning rate schedule, and joint clipping of dense and sparse gradients."""

import math

import pytest
import torch

from ngame.config import StageConfig
from ngame.training.optimizer import Optimizer, ParameterGroup, SparseAdam, clip


def test_learning_rates_rise_and_fall():
    """Parameters with sparse gradients have their own rate on the same schedule."""
    module = torch.nn.Sequential(torch.nn.Embedding(3, 2, sparse=True), torch.nn.Linear(2, 2))
    config = StageConfig(warmup=0.25, clip=0)
    optimizer = Optimizer([ParameterGroup(module, 0.4, 0.8)], config, 8)
    rates = {"dense": [], "sparse": []}
    for _ in range(8):
        module(torch.tensor([0, 2])).sum().backward()
        optimizer.step()
        for kind, found in rates.items():
            found.append(optimizer._optimizers[kind].param_groups[0]["lr"])
    shares = [1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates["dense"] == pytest.approx([0.4 * share for share in shares])
    assert rates["sparse"] == pytest.approx([0.8 * share for share in shares])


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_counts_sparse_and_dense_gradients_together(limit):
    table = torch.nn.Embedding(4, 2, sparse=True)
    dense = torch.nn.Linear(2, 1)
    table(torch.tensor([1, 1, 3])).matmul(dense.weight.T).sum().backward()
    parameters = [table.weight, dense.weight]
    before = [p.grad.to_dense().clone() for p in parameters]
    norm = math.sqrt(sum(float(g.square().sum()) for g in before))
    clip([*parameters, dense.bias], limit)
    scale = min(1, limit / norm)
    for old, parameter in zip(before, parameters, strict=True):
        torch.testing.assert_close(parameter.grad.to_dense(), old * scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_adam_is_that_of_pytorch(dtype):
    """In the core or not; rows that come twice or never, and a table without a gradient."""
    torch.manual_seed(0)
    start = torch.randn(6, 5, dtype=dtype)
    tables = [torch.nn.Embedding(6, 5, sparse=True, dtype=dtype) for _ in range(3)]
    for table in tables:
        table.weight.data.copy_(start)
    ours = SparseAdam([tables[0].weight, tables[2].weight], lr=0.1)
    theirs = torch.optim.SparseAdam([tables[1].weight], lr=0.1)
    for ids in ([1, 4, 4], [0, 1], [5], [1, 2, 3]):
        scale = torch.randn(len(ids), 5, dtype=dtype)
        for table, optimizer in zip(tables[:2], (ours, theirs), strict=True):
            optimizer.zero_grad()
            (table(torch.tensor(ids)) * scale).sum().backward()
            optimizer.step()
        torch.testing.assert_close(tables[0].weight, tables[1].weight)
    assert (tables[2].weight == start).all()
    state, expected = (o.state_dict()["state"][0] for o in (ours, theirs))
    assert state.keys() == expected.keys()
    assert state["step"] == expected["step"]
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name], expected[name])
